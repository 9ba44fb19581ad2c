"""The flow reconcile with the parameter names of toto 0.1.0 (`again` for `force`), for the old deployment names."""

from pathlib import Path

from prefect import flow
from prefect.client.schemas.objects import State

from flows import reconcile as new
from tasks import names
from tasks.settle import settle_soon
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
    again: bool = False,
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
        again: the old name of `force`.
    """
    return await new.reconcile.fn(
        repo,
        commit,
        origin,
        only,
        plan_only,
        rehearse_only,
        override,
        force=force or again,
        venues=venues,
        accept=accept,
        reason=reason,
        try_for=try_for,
    )
