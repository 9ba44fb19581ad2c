"""Reconcile: make the fleet agree with a commit: detect, rehearse, roll out, record; revert when it goes wrong."""

import asyncio
from pathlib import Path
from typing import Literal, TypeAlias

from prefect import Flow, flow, runtime
from prefect.client.schemas.objects import FlowRun, State
from prefect.deployments import arun_deployment
from prefect.states import Cancelled, Completed, Failed

from flows.host import rehearse, roll_out
from flows.revert import revert, settle, settle_left_open
from tasks import cancelled_by_sigterm, report
from tasks.again import try_again_later
from tasks.detect import detect, sweep
from tasks.limits import one_roll_out
from tasks.roll_out import intend_to_put_back, record_rehearsed, record_verified, retire
from toto import git
from toto import plan as plans
from toto.changes import Action
from toto.errors import TotoError
from toto.ledger import Ledger, Target
from toto.plan import Order, Plan
from toto.story import Returned, Story

Origin: TypeAlias = Literal["push", "schedule", "ui", "notebook", "flying-monkey"]
SIDE_BY_SIDE = 4  # subflows at once; more make SQLite answer 503


def _name() -> str:
    parameters = runtime.flow_run.parameters
    what = (parameters.get("commit") or "newest commit")[:8]
    return f"{Path(parameters['repo']).name.removesuffix('.git')} {what} ({parameters.get('origin', 'ui')})"


async def settle_soon(flow: Flow[..., object], flow_run: FlowRun, state: State[object]) -> None:
    """A run that was cancelled or crashed in its roll-out leaves open intents: have them settled at once."""
    repo = flow_run.parameters["repo"]
    if Ledger(Path(repo)).read().open_intents:
        await arun_deployment("settle/toto", parameters={"repo": repo}, timeout=0, as_subflow=False)


@flow(name="reconcile", flow_run_name=_name, persist_result=False, on_cancellation=[settle_soon],
      on_crashed=[settle_soon])
async def reconcile(repo: Path, commit: str | None = None, origin: Origin = "ui", only: list[str] | None = None,
                    plan_only: bool = False) -> State[None]:
    """Make the machines become what a commit of an infra repo says; put everything back when it goes wrong.

    Args:
        repo: the bare infra repo on toto.
        commit: a commit, tag or branch; the tip of the deployed branch when left out.
        origin: what started this run.
        only: names or tags of hosts; all when left out.
        plan_only: show what would change, and do nothing.
    """
    run = str(runtime.flow_run.id)
    async with cancelled_by_sigterm(), plans.claimed(repo, run):
        await sweep(repo)
        if not plan_only and Ledger(repo).read().open_intents:
            await settle(repo)
        wanted = git.resolve(repo, commit or "HEAD")
        while True:
            plan = await detect(repo, wanted, run, only or [])
            story = Story(repo.name.removesuffix(".git"), wanted, plan.changes)
            await report.show_plan(plan)
            if plan_only:
                return await _told(story)
            orders = await _rehearse_all(plan, story)
            if story.failed and (plan.settings.roll_out.policy == "all" or not orders):
                return await _told(story)
            async with one_roll_out(repo, run):
                newer = await git.superseded_by(repo, wanted)
                if newer and origin == "push":
                    return Cancelled(message=f"superseded by {newer[:8]}: nothing was touched")
                await _settle_first(repo, run, story)
                if Ledger(repo).read().fingerprint == plan.changes.ledger:
                    await _roll_out_all(plan, orders, story)
                    return await _told(story)
            # Another run, or what was settled, has changed what is deployed, so the plan is out of date. Look again;
            # what was rehearsed is not rehearsed again.


async def _rehearse_all(plan: Plan, story: Story) -> list[Order]:
    """Rehearse every changed host side by side; returns those that passed."""
    room = asyncio.Semaphore(SIDE_BY_SIDE)

    async def one(order: Order) -> Order | None:
        async with room:
            try:
                if order.change.action is not Action.RECORD:
                    story.rehearsals[order.name] = str(await rehearse(order))
            except Exception as error:  # whatever it was, the others go on
                story.failure(order.name, "rehearsal", error)
                return None
            return order

    passed = [order for order in await asyncio.gather(*map(one, plan.orders)) if order is not None]
    if plan.changes.changes:
        await report.show_plan(plan, await plans.differences(plan.changes))
    return passed


async def _settle_first(repo: Path, run: str, story: Story) -> None:
    """Put back what dead runs left half done; a host that cannot be put back is not deployed over."""
    for left in await settle_left_open(repo, run):
        if left.error:
            story.failure(left.host, "settling", TotoError(left.error))


async def _roll_out_all(plan: Plan, orders: list[Order], story: Story) -> None:
    """Roll out, record; and put all that was touched back when one host fails."""
    touched = await _in_waves(plan, [order for order in orders if order.name not in story.failed_hosts], story)
    if story.failed_roll_out:
        story.put_back = await _revert(plan, touched, story)
        return
    await try_again_later(plan.repo, story.unreachable)
    for name in set(plan.changes.retired) - story.failed_hosts:  # one that is half done is not forgotten
        await retire(plan.repo, name)
    if story.complete and plan.changes.whole:
        await git.mark(plan.repo, "toto/last-good", plan.commit)


async def _in_waves(plan: Plan, orders: list[Order], story: Story) -> list[str]:
    """Roll out wave by wave, in the manifest's order; returns what was touched, in that order."""
    touched: list[str] = []
    by_name = {order.name: order for order in orders}
    room = asyncio.Semaphore(SIDE_BY_SIDE)

    async def one(order: Order) -> None:
        async with room:
            try:
                if order.change.action is Action.DEPLOY:
                    touched.append(order.name)
                story.outcome[order.name] = await roll_out(order)
            except Exception as error:  # whatever it was, what was touched is put back
                story.failure(order.name, "roll-out", error)

    for order in orders:
        if order.change.action is Action.REHEARSE:
            await record_rehearsed(order)
        elif order.change.action is Action.RECORD:
            await record_verified(order)
    due = {name for name, order in by_name.items() if order.change.action in (Action.DEPLOY, Action.VERIFY)}
    for name in due:
        if reason := plans.held_now(plan.manifest.machines[name]):
            story.held[name] = reason
    for group in plan.manifest.order(due):
        await asyncio.gather(*(one(by_name[name]) for name in story.hold_behind(group, plan.manifest)))
        if story.failed_roll_out:
            break
    return [name for name in touched if story.outcome.get(name) != "unreachable"]


async def _revert(plan: Plan, touched: list[str], story: Story) -> list[Returned]:
    """Put back what this run touched. All intents first: whatever happens now, the next run finds each of them."""
    entries = Ledger(plan.repo).read()
    mine = [name for name in touched if entries.get(Target("host", name)).touched_by(plan.run)]
    for name in mine:
        await intend_to_put_back(plan.repo, name, plan.run)
    return await revert(plan.repo, plan.run, mine, plan.manifest, plan.settings, story.headline()) if mine else []


async def _told(story: Story) -> State[None]:
    """Write the run's report; the state in which the run ends."""
    await report.show_story(story)
    return Failed(message=story.headline()) if story.failed else Completed(message=story.headline())
