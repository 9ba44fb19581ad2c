"""The stages of a reconcile. Each takes the run, adds its results, and returns it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from prefect.logging import get_run_logger
from prefect.utilities.annotations import quote

from flows.kinds import STEPS, steps_of
from flows.revert import settle_first
from flows.stage import stage
from tasks import report, together
from tasks.detect import Evaluations
from tasks.limits import one_roll_out, side_by_side
from tasks.notify import notify as send
from tasks.record import record_rehearsed, record_verified
from tasks.run import Run
from toto.base import paths
from toto.plan import make
from toto.plan.changes import Action
from toto.plan.kinds import KINDS
from toto.plan.order import Order
from toto.plan.verdict import Verdict
from toto.report.message import names


async def detect(run: Run) -> Run:
    """Plan what the commit would change. Nothing outside toto is touched. Raises `Superseded`."""
    await run.check_superseded()
    return await _detect(run)


@stage("detect", lambda run: run.commit)
async def _detect(run: Run) -> None:
    """Plan what the commit would change: find its targets, evaluate them, compare them with the ledger."""
    request = run.request
    if not request.plan_only:
        paths.require_room(run.repo)
    run.planned(
        await make.make(
            run.repo,
            request.commit,
            run.id,
            request.only,
            override=request.override,
            try_for=request.try_for,
            force=request.force,
            deploys=request.deploys,
            shown=Evaluations(run.repo),
        )
    )
    await report.show_plan(run.plan)


async def rehearse(run: Run) -> Run:
    """Rehearse all changed targets, side by side. Raises `Superseded`."""
    return await run.unless_superseded(_rehearse(run))


@stage("rehearse", lambda run: names([each.label for each in run.plan.orders]))
async def _rehearse(run: Run) -> None:
    """Rehearse every changed target, side by side. Nothing outside toto is touched."""
    room = asyncio.Semaphore(await side_by_side())

    async def one(order: Order) -> None:
        async with room:
            try:
                with run.report.timed(order.label, "rehearse"):
                    run.passed(order, await _verdict(order))
            except Exception as error:  # whatever it was, the others go on
                run.not_passed(order, error)

    await together(one(each) for each in run.plan.orders)
    differences = {label: verdict.difference for label, verdict in run.verdicts.items() if verdict.difference}
    others = await make.previews([each for each in run.plan.orders if each.label not in differences])
    await report.show_plan(run.plan, differences | others)


async def _verdict(order: Order) -> Verdict[object]:
    if order.change.action is Action.RECORD:
        return Verdict.waived(order, by="toto", why="exactly the same closure is already deployed")
    return await steps_of(order.target).rehearse(quote(order))


@asynccontextmanager
async def the_roll_out(run: Run) -> AsyncIterator[None]:
    """Hold the only roll-out slot of the repo, and settle what dead runs left before the block begins.

    Raises `Superseded`, `NotDeployable`, or `Outdated` when what is deployed has changed since the plan was made.
    """
    async with one_roll_out(run.repo, run.id):
        await run.check_superseded()
        await run.check_deployable()  # the branch, and whose signatures count, may have changed since the start
        paths.require_room(run.repo)
        for each in await settle_first(run.repo, run.id):
            if each.error:
                run.left(each)
                if each.target in run.forward:
                    get_run_logger().warning("%s goes on from what is there, since it cannot go back", each.target)
        run.check_plan()
        run.hold_back()
        yield


async def roll_out(kind: str, run: Run) -> Run:
    """Roll out the targets of one kind that have a verdict."""

    @stage(STEPS[kind].stage, lambda run: names([each.name for each in run.due(kind)]))
    async def of_kind(run: Run) -> None:
        """Roll out the targets of one kind, group by group, until one fails."""
        await _roll_out(kind, run)

    try:
        return await of_kind(run)
    except Exception as error:  # of no target: Prefect did not answer, for example. What was touched is reverted
        run.report.failure(STEPS[kind].stage, "roll-out", error)
        return run


async def _roll_out(kind: str, run: Run) -> None:
    room = asyncio.Semaphore(await side_by_side())

    async def one(order: Order) -> None:
        async with room:
            try:
                with run.report.timed(order.label, "roll out"):
                    run.report.outcome[order.label] = await STEPS[kind].roll_out(
                        quote(order), run.verdict_before_touching(order)
                    )
                run.note_unreachable(order)
            except Exception as error:  # whatever it was, what was touched is reverted
                run.report.failure(order.label, "going forward" if order.label in run.forward else "roll-out", error)

    due: list[Order] = []
    for order in run.due(kind):
        match order.change.action:
            case Action.REHEARSE:
                await record_rehearsed(order)
            case Action.RECORD:
                await record_verified(order)
                run.report.outcome[order.label] = "recorded"
            case Action.DEPLOY | Action.VERIFY:
                due.append(order)
    for group in KINDS[kind].groups(run.plan.manifest, due):
        await together(one(each) for each in run.not_held(group))
        if run.report.failed_roll_out:
            break


async def notify(run: Run) -> Run:
    """Show the report, and notify everybody for whom the result is news."""
    await report.show_report(run.report)
    if run.request.deploys:
        await report.show_results(run.report)
    if not run.request.plan_only:
        await send(
            run.repo,
            run.request.commit,
            quote(
                run.report
            ),  # (else Prefect looks for results of tasks in it, and in the manifest, machine by machine)
            run.request.origin,
            run.request.venues,
            quote((run.plan.settings, run.plan.manifest)),
            run.request.deploys,
            wait_for=[run],
        )
    return run
