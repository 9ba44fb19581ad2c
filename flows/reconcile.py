"""Reconcile: make the fleet agree with a commit: detect, rehearse, roll out, record; revert when it goes wrong."""

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from prefect import Flow, flow, runtime
from prefect.client.schemas.objects import FlowRun, State
from prefect.deployments import arun_deployment
from prefect.logging import get_run_logger
from prefect.states import Cancelled, Completed, Failed

from flows import helm, host, terraform
from flows.revert import revert, settle, settle_left_open
from tasks import approve, cancelled_by_sigterm, names, report
from tasks.again import try_again_later
from tasks.detect import detect, sweep
from tasks.limits import one_roll_out
from tasks.record import intend_to_put_back, record_rehearsed, record_verified, retire
from tasks.settle import bury, was_cancelled
from tasks.tell import tell
from toto.base import paths, runs
from toto.base.errors import TotoError
from toto.infra_repo import git
from toto.ledger.ledger import Ledger, LostTarget
from toto.ledger.target import Target
from toto.plan import make as plans
from toto.plan import window
from toto.plan.changes import Action
from toto.plan.order import HostOrder, Plan, ReleaseOrder, RootOrder
from toto.report.report import Returned, Story
from toto.report.venues import Origin

AnyOrder: TypeAlias = HostOrder | RootOrder | ReleaseOrder
Rehearsed: TypeAlias = tuple[AnyOrder, Any]  # with what its rehearsal found: a verdict, a saved plan, a difference
T = TypeVar("T")
LOOK = 2  # seconds between two looks whether a newer push has come
SIDE_BY_SIDE = 4  # subflows at once; more make SQLite answer 503


class Superseded(TotoError):
    """A newer push has taken the place of this run's."""


@dataclass(frozen=True)
class Request:
    """What is asked of a run. `pushed`: a push that a newer one may supersede."""

    repo: Path
    run: str
    commit: str
    only: tuple[str, ...]
    override: str | None
    force: bool
    plan_only: bool
    rehearse_only: bool
    pushed: bool


async def settle_soon(flow: Flow[..., object], flow_run: FlowRun, state: State[object]) -> None:
    """A run that was cancelled or crashed in its roll-out leaves open intents: have them settled at once.

    That a run has crashed nobody else would tell. (One that was cancelled is Crashed for a moment, too.)
    """
    repo, died = flow_run.parameters["repo"], state.is_crashed() and not await was_cancelled(flow_run.id)
    if died or Ledger(Path(repo)).read().open_intents:
        await arun_deployment("settle/settle", timeout=0, as_subflow=False,
                              idempotency_key=f"died-{flow_run.id}" if died else None,
                              parameters={"repo": repo, "died": [str(flow_run.id)] if died else []})
    if died:
        await bury(flow_run.id)


@flow(name="reconcile", flow_run_name=names.of_reconcile, persist_result=False, on_cancellation=[settle_soon],
      on_crashed=[settle_soon])
async def reconcile(repo: Path, commit: str | None = None, origin: Origin = "ui", only: list[str] | None = None,
                    plan_only: bool = False, rehearse_only: bool = False, override: str | None = None,
                    force: bool = False, venues: list[str] | None = None) -> State[None]:
    """Make the fleet become what a commit of an infra repo says; put everything back when it goes wrong.

    Args:
        repo: the bare infra repo on toto.
        commit: a commit, tag or branch; the tip of the deployed branch when left out.
        origin: what started this run.
        only: names, tags or kinds (host, terraform, helm) of targets; all when left out.
        plan_only: show what would change, and do nothing.
        rehearse_only: rehearse what changed, and touch nothing.
        override: in an emergency, the reason to roll out in spite of a freeze or a closed window; it is recorded.
        force: deploy the targets though nothing of them has changed: to mend what was changed outside.
        venues: who is told the result besides the usual ones, by the names of the venue blocks.
    """
    run = str(runtime.flow_run.id)
    async with cancelled_by_sigterm(), runs.claimed(repo, run):
        await sweep(repo)
        wanted = git.resolve(repo, commit or "HEAD")
        deploys = not (plan_only or rehearse_only)
        request = Request(repo, run, wanted, tuple(only or ()), override, force, plan_only, rehearse_only,
                          pushed=origin == "push" and deploys)
        told = partial(tell, repo, wanted, origin=origin, named=venues or (), listening=deploys)
        try:
            plan, story = await _reconcile(request)
        except Superseded as newer:
            return Cancelled(message=str(newer))
        except Exception as error:
            await told(error)
            raise
        await report.show_story(story)
        if not plan_only:
            await told(story, of=(plan.settings, plan.manifest))
        return Failed(message=story.headline()) if story.failed else Completed(message=story.headline())


async def _reconcile(request: Request) -> tuple[Plan, Story]:
    """Detect, rehearse, roll out; again from the start when what is deployed has changed meanwhile."""
    repo, run = request.repo, request.run
    if not request.plan_only:
        if Ledger(repo).read().open_intents:
            await settle(repo, return_state=True)  # (what could not be put back is told of below)
        paths.require_room(repo)
    while True:
        await _look(request)
        plan = await detect(repo, request.commit, run, list(request.only), override=request.override,
                            again=request.force)
        story = Story(repo.name.removesuffix(".git"), request.commit, plan.changes)
        await report.show_plan(plan)
        if request.plan_only:
            return plan, story
        rehearsed = await _unless_superseded(_rehearse_all(plan, story), request)
        if not (request.rehearse_only or _stops(plan, rehearsed, story)):
            await _unless_superseded(_ask(rehearsed, story), request)
        if request.rehearse_only or _stops(plan, rehearsed, story):
            return plan, story
        async with one_roll_out(repo, run):
            await _look(request)
            paths.require_room(repo)
            await _settle_first(repo, run, story)
            if Ledger(repo).read().fingerprint == plan.changes.ledger:
                await _roll_out_all(plan, rehearsed, story)
                return plan, story
        # Another run, or what was settled, has changed what is deployed, so the plan is out of date. Look again;
        # what was rehearsed is not rehearsed again.


async def _look(request: Request) -> None:
    """Raises `Superseded` when a newer push has taken the place of this one."""
    if request.pushed and (newer := await git.superseded_by(request.repo, request.commit)):
        raise Superseded(f"superseded by {newer[:8]}: nothing was touched")


async def _unless_superseded(work: Coroutine[Any, Any, T], request: Request) -> T:
    """What `work` returns. Work ends, by `Superseded`, as soon as a newer push takes this one's place."""
    task = asyncio.ensure_future(work)
    try:
        while not task.done():
            await asyncio.wait((task,), timeout=LOOK)
            if not task.done():
                await _look(request)
        return task.result()
    finally:
        task.cancel()
        await asyncio.wait((task,))
        if not task.cancelled():
            task.exception()  # what a cancel of the run made of it; asyncio complains where nobody asks


def _stops(plan: Plan, rehearsed: list[Rehearsed], story: Story) -> bool:
    """Whether nothing is rolled out, because something failed before."""
    return story.failed and (plan.settings.roll_out.policy == "all" or not rehearsed)


async def _ask(rehearsed: list[Rehearsed], story: Story) -> None:
    """Ask a person about each terraform plan for which the settings want it. No: that is a failure like another."""
    for order, found in rehearsed:
        if isinstance(order, RootOrder) and approve.needed(order, found):
            try:
                await approve.ask(order, found)
            except approve.NotApproved as error:
                story.failure(order.label, "approval", error)


async def _rehearse_all(plan: Plan, story: Story) -> list[Rehearsed]:
    """Rehearse every changed target side by side; returns those that passed, each with what its rehearsal found."""
    room = asyncio.Semaphore(SIDE_BY_SIDE)
    differences: dict[str, str] = {}

    async def one(order: AnyOrder) -> Rehearsed | None:
        async with room:
            try:
                if order.change.action is Action.RECORD:
                    return order, None
                with story.timed(order.label, "rehearse"):
                    found = await _rehearse(order)
            except Exception as error:  # whatever it was, the others go on
                story.failure(order.label, "rehearsal", error)
                return None
            if isinstance(order, HostOrder):
                story.rehearsals[order.label] = str(found)
            else:
                story.rehearsals[order.label] = found.summary
                differences[order.label] = str(found)
            return order, found

    passed = [each for each in await asyncio.gather(*map(one, plan.orders)) if each is not None]
    if plan.changes.changes:
        await report.show_plan(plan, await plans.differences(plan.changes) | differences)
    return passed


async def _rehearse(order: AnyOrder) -> Any:
    match order:
        case HostOrder():
            return await host.rehearse(order)
        case RootOrder():
            return await terraform.rehearse(order)
        case ReleaseOrder():
            return await helm.rehearse(order)


async def _roll_out(order: AnyOrder, found: Any) -> str:
    match order:
        case HostOrder():
            return await host.roll_out(order)
        case RootOrder():
            return await terraform.roll_out(order, found)
        case ReleaseOrder():
            return await helm.roll_out(order, found)


async def _settle_first(repo: Path, run: str, story: Story) -> None:
    """Put back what dead runs left half done; a target that cannot be put back is not deployed over."""
    for left in await settle_left_open(repo, run):
        if left.error:
            story.failure(left.target, "settling", TotoError(left.error))


async def _roll_out_all(plan: Plan, rehearsed: list[Rehearsed], story: Story) -> None:
    """Roll out, record; and put all that was touched back when one target fails."""
    touched = await _in_order(plan, [each for each in rehearsed if each[0].label not in story.failed_targets], story)
    if story.failed_roll_out:
        story.put_back = await _revert(plan, touched, story)
        return
    await try_again_later(plan.repo, story.unreachable)
    for target in plan.changes.retired:
        if target.label not in story.failed_targets:  # one that is half done is not forgotten
            await retire(plan.repo, target)
    if story.complete and plan.changes.whole:
        await git.mark(plan.repo, plans.LAST_GOOD, plan.commit)


async def _in_order(plan: Plan, rehearsed: list[Rehearsed], story: Story) -> list[Target]:
    """Roll out group by group: hosts by wave, terraform, helm; returns what was touched, in that order."""
    touched: list[Target] = []
    room = asyncio.Semaphore(SIDE_BY_SIDE)
    due: dict[str, Rehearsed] = {}

    async def one(order: AnyOrder, found: Any) -> None:
        async with room:
            try:
                if order.change.action is Action.DEPLOY:
                    touched.append(order.target)
                with story.timed(order.label, "roll out"):
                    story.outcome[order.label] = await _roll_out(order, found)
            except Exception as error:  # whatever it was, what was touched is put back
                story.failure(order.label, "roll-out", error)

    for order, found in rehearsed:
        if order.change.action is Action.REHEARSE:
            await record_rehearsed(order)
        elif order.change.action is Action.RECORD:
            await record_verified(order)
            story.outcome[order.label] = "recorded"
        else:
            due[order.label] = (order, found)
            reason = window.held_now(order.target, plan.manifest, plan.settings.roll_out)
            if reason and not plan.override:
                story.held[order.label] = reason
    for group in plan.groups(due):
        await asyncio.gather(*(one(*due[label]) for label in story.hold_behind(group, plan.held_behind)))
        if story.failed_roll_out:
            break
    return [target for target in touched if story.outcome.get(target.label) != "unreachable"]


async def _revert(plan: Plan, touched: list[Target], story: Story) -> list[Returned]:
    """Put back what this run touched. All intents first: whatever happens now, the next run finds each of them."""
    entries = Ledger(plan.repo).read()
    mine: list[Target] = []
    lost: list[Returned] = []
    for target in touched:
        entry = entries.get(target)
        if not entry.touched_by(plan.run):
            continue
        try:
            await intend_to_put_back(plan.repo, target, plan.run)
        except (TotoError, OSError) as error:
            half_done = entry.intent is not None and entry.intent.run == plan.run
            if isinstance(error, LostTarget) or not half_done:
                # It passed its tests, or is another run's: what it runs and what the ledger says stay the same.
                lost.append(Returned(target.label, error=str(error)))
                continue
            get_run_logger().error("%s is put back, though the ledger could not be told: %s", target.label, error)
        mine.append(target)
    if not mine:
        return lost
    with story.timed(", ".join(target.label for target in mine), "put back"):
        return lost + await revert(plan.repo, plan.run, mine, plan.manifest, plan.settings, story.cause)
