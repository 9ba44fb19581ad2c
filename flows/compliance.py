"""Compliance: whether the machines are as the checks of the infra repo want them. Nothing is changed."""

import asyncio
from pathlib import Path

from prefect import flow, runtime
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from tasks import cancelled_by_sigterm, names, report, together
from tasks.compliance import check_machine, chosen, judge
from tasks.limits import side_by_side
from tasks.notify import notify
from toto.base import runs
from toto.base.errors import TotoError
from toto.compliance import history
from toto.git_host import admission
from toto.infra_repo import git
from toto.infra_repo.tree import read_tree
from toto.ledger.ledger import Ledger
from toto.machine.ssh import AuthenticationFailed, HostKeyChanged, Unreachable
from toto.plan.changes import ChangeSet
from toto.report.report import PARTIAL, Report
from toto.report.venues import Origin


@flow(name="compliance", flow_run_name=names.of_flow, persist_result=False)
async def compliance(
    repo: Path,
    commit: str | None = None,
    only: list[str] | None = None,
    origin: Origin = "ui",
    venues: list[str] | None = None,
) -> State[None]:
    """Check the machines by the InSpec profiles and pytest-testinfra modules of a commit. Nothing is changed.

    Args:
        repo: the bare infra repo on toto.
        commit: a commit, tag or branch, of the deployed branch; its tip when left out.
        only: names or tags of machines; those that toto.toml chooses when left out. A machine that is named is checked
            even if toto.toml does not choose it.
        origin: what started this run.
        venues: names of venue blocks that are notified of the result besides the usual ones.
    """
    if only is not None and not any(map(str.strip, only)):
        return Completed(message="`only` names nothing: nothing is checked")
    run = str(runtime.flow_run.id)
    async with cancelled_by_sigterm(), runs.claimed(repo, run) as folder:
        newest = git.resolve(repo, commit or "HEAD")
        await admission.check(repo, newest)
        tree = folder / "tree"
        await git.checkout(repo, newest, tree)
        changes = ChangeSet(commit=newest, ledger=Ledger(repo).read().fingerprint, whole=not only)
        found = Report(repo.name.removesuffix(".git"), newest, changes)
        try:
            settings, manifest = read_tree(tree)
            by, not_known = chosen(repo, tree, manifest, settings, only or (), found)
        except TotoError as error:
            await notify(repo, newest, error, origin, venues or (), check="compliance")
            raise
        room = asyncio.Semaphore(await side_by_side())

        async def one(name: str) -> None:
            check = check_machine.with_options(task_run_name=f"check {name}")
            try:
                async with room:
                    controls = await check(repo, run, newest, manifest.machines[name], by[name], settings, tree, folder)
                not_known[name] = judge(found, name, controls)
            except TotoError as error:
                if isinstance(error, Unreachable) and not isinstance(error, AuthenticationFailed | HostKeyChanged):
                    found.outcome[name], found.away[name] = "unreachable", str(error)
                else:
                    found.failure(name, "compliance check", error)

        await together(map(one, by))
        if not only:
            await history.forget_all_but(repo, manifest.machines)
        await report.show_report(found)
        await notify(repo, newest, found, origin, venues or (), (settings, manifest), check="compliance")
    said = "; ".join([found.headline(), *(f"{name}: {what}" for name, what in sorted(not_known.items()) if what)])
    if found.failed:
        return Failed(message=said)
    return Completed(name=None if found.complete and not any(not_known.values()) else PARTIAL, message=said)
