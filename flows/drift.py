"""Drift: find what was changed without toto, and report it. Nothing is touched."""

from pathlib import Path

from prefect import flow, runtime, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from flows.kinds import steps_of
from tasks import cancelled_by_sigterm, names, report
from tasks.notify import notify
from toto.base import runs
from toto.base.errors import TotoError
from toto.infra_repo import git
from toto.ledger.ledger import Deployed, Ledger
from toto.ledger.target import Target
from toto.plan.changes import ChangeSet
from toto.report.report import Report
from toto.report.venues import Origin


@flow(name="drift", flow_run_name=names.of_flow, persist_result=False)
async def drift(repo: Path, origin: Origin = "ui", venues: list[str] | None = None) -> State[None]:
    """Compare every machine, terraform root and release with what its last good commit wants.

    Nothing is applied. To undo a change, start `reconcile` with `force` and the target in `only`.

    Args:
        repo: the bare infra repo on toto.
        origin: what started this run.
        venues: names of venue blocks that are notified of the result besides the usual ones.
    """
    run = str(runtime.flow_run.id)
    async with cancelled_by_sigterm(), runs.claimed(repo, run):
        newest = git.resolve(repo, "HEAD")
        ledger = Ledger(repo).read()
        found = Report(repo.name.removesuffix(".git"), newest, ChangeSet(commit=newest, ledger=ledger.fingerprint))
        for target, entry in sorted(ledger.entries.items()):
            if entry.good is None or entry.intent is not None:
                continue
            try:
                changed = await drift_of.with_options(task_run_name=f"drift of {target}")(repo, run, target, entry.good)
            except TotoError as error:
                found.failure(target.label, "drift check", error)
                continue
            if changed:
                found.failure(
                    target.label,
                    "drift check",
                    TotoError(
                        "\n".join(["it was changed outside", *changed]),
                        target=target.label,
                        hint=f'start reconcile with force=true and only=["{target}"], or commit the change to the repo',
                    ),
                )
        await report.show_report(found)
        await notify(repo, newest, found, origin, named=venues or (), check="drift")
        message = found.headline() if found.failed else "everything is as it was deployed"
        return Failed(message=message) if found.failed else Completed(message=message)


@task(name="drift", task_run_name="drift", cache_policy=NO_CACHE)
async def drift_of(repo: Path, run: str, target: Target, good: Deployed) -> list[str]:
    """What was changed outside toto in one target, one line for each change. Raises `TotoError`."""
    find = steps_of(target).drift
    return await find(repo, run, target, good) if find else []
