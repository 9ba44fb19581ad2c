"""Reconcile makes the fleet agree with a commit: detect, rehearse, roll out, record; revert when something fails."""

from pathlib import Path

from prefect import flow, runtime
from prefect.client.schemas.objects import State

from flows.accept import accept_present
from flows.revert import revert, settle
from flows.stages import detect, notify, rehearse, roll_out, the_roll_out
from tasks import names
from tasks.approve import approve
from tasks.limits import one_roll_out, room_for_run
from tasks.run import Request, Run, carry_out, conclude, names_nothing, start_jobs
from tasks.settle import left_over, settle_soon
from toto.infra_repo import git
from toto.report.venues import Origin


@flow(
    name="reconcile",
    flow_run_name=names.of_reconcile,
    persist_result=False,
    on_cancellation=[settle_soon],
    on_crashed=[settle_soon],
)
async def reconcile(
    repo: Path,
    commit: str | None = None,
    origin: Origin = "ui",
    only: list[str] | None = None,
    plan_only: bool = False,
    rehearse_only: bool = False,
    override: str | None = None,
    force: bool = False,
    venues: list[str] | None = None,
    accept: list[str] | None = None,
    reason: str | None = None,
    try_for: float = 0,
) -> State[None]:
    """Make the fleet what a commit of an infra repo says; revert everything when something fails.

    Args:
        repo: the bare infra repo on toto.
        commit: a commit, tag or branch; the tip of the deployed branch when left out.
        origin: what started this run.
        only: names, tags or kinds (host, terraform, helm) of targets; all when left out, and none when empty.
        plan_only: show what would change, and do nothing.
        rehearse_only: rehearse what changed, and touch nothing.
        override: in an emergency, the reason to roll out in spite of a freeze or a closed window; it is recorded.
        force: also deploy targets that have not changed, to undo what was changed outside.
        venues: names of venue blocks that are notified of the result besides the usual ones.
        accept: targets that cannot be put back: first of all, their present states are taken as good.
        reason: why they are; it is recorded.
        try_for: seconds for which hosts are only tried: activated by `test`, and put back after that; 0 to keep them.
    """
    if only is not None and not any(map(str.strip, only)):
        return names_nothing()
    return await carry_out(
        Request(
            repo=repo,
            commit=git.resolve(repo, commit or "HEAD"),
            origin=origin,
            only=tuple(only or ()),
            plan_only=plan_only,
            rehearse_only=rehearse_only,
            override=override,
            force=force,
            venues=tuple(venues or ()),
            accept=tuple(accept or ()),
            reason=reason,
            try_for=try_for,
        ),
        _stages,
    )


async def _stages(run: Run) -> Run:
    """The stages of a run, in order. Each takes what the one before returned; a stage without work is left out.

    Raises `Superseded` or `Outdated`; then nothing was touched.
    """
    if run.request.accepts:
        async with one_roll_out(run.repo, run.id):
            await accept_present(run.repo, run.id, run.request.accept, run.request.reason, run.request.somebody)
    if run.finds_open_intents:
        await settle(run.repo, return_state=True)
        run.stuck = await left_over(run.repo, run.id)
    async with room_for_run(run.repo, run.id, runtime.flow_run.tags, run.check_superseded):
        run = await detect(run)
        if run.rehearses:
            run = await rehearse(run)
    if run.asks:
        run = await approve(run)
    if run.rolls_out:
        async with the_roll_out(run):
            for kind in run.kinds_due:
                run = await roll_out(kind, run)
            if run.to_revert:
                run = await revert(run)
            if not run.report.failed_roll_out:
                await conclude(run)
    return await start_jobs(await notify(run))
