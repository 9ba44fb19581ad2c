"""Detect: from a commit to a plan. Nothing outside toto is touched, no machine is spoken to."""

import asyncio
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

import tasks  # noqa: F401  (errors without tracebacks)
from toto import changes, git, hosts, keys, plan, process
from toto.changes import Action, Change, ChangeSet, Desired, Failure
from toto.errors import TotoError
from toto.ledger import Ledger
from toto.manifest import Machine, Manifest
from toto.plan import Plan
from toto.settings import Settings


@task(name="detect", cache_policy=NO_CACHE)
async def detect(repo: Path, commit: str, run: str, only: list[str]) -> Plan:
    """The plan of a commit: export, manifest, every host's identity, the ledger, the VMs of what changed."""
    directory = plan.run_directory(repo, run)
    async with git.exported(repo, commit, directory.parent.parent) as tree:
        settings, manifest = plan.read_tree(tree)
        found = plan.choose(await plan.discover(tree, settings), manifest, only)
        change_set = await _identities(tree, found, settings, manifest, ledger=Ledger(repo), commit=commit,
                                       roots=directory / "roots")
        if only:
            change_set = change_set.model_copy(update={"waiting": (), "retired": ()})
        vms, failures = await _vms(tree, change_set, manifest, settings, directory / "roots")
    if failures:
        failed = {failure.name for failure in failures}
        change_set = change_set.model_copy(update={
            "changes": tuple(each for each in change_set.changes if each.host.name not in failed),
            "failed": (*change_set.failed, *failures)})
    if change_set.changes:
        await plan.checkout(repo, run, commit)
    return Plan(repo=repo, run=run, commit=commit, manifest=manifest, settings=settings, changes=change_set, vms=vms)


async def _identities(tree: Path, found: list[hosts.Host], settings: Settings, manifest: Manifest, *,
                      ledger: Ledger, commit: str, roots: Path) -> ChangeSet:
    room = asyncio.Semaphore(plan.at_once(settings.nix.evaluate_memory))

    async def one(host: hosts.Host) -> Desired | Failure:
        async with room:
            try:
                return await evaluate.with_options(task_run_name=f"evaluate {host.name}")(
                    tree, host, manifest.machines.get(host.name), settings, roots)
            except TotoError as error:
                return Failure(name=host.name, message=str(error))

    results = await asyncio.gather(*map(one, found))
    return changes.compare(commit, [each for each in results if isinstance(each, Desired)],
                           [each for each in results if isinstance(each, Failure)], manifest, ledger.read())


@task(name="evaluate", cache_policy=NO_CACHE)
async def evaluate(tree: Path, host: hosts.Host, machine: Machine | None, settings: Settings, roots: Path) -> Desired:
    """One host's desired identity, in a nix process of its own."""
    return await plan.desire(tree, host, machine, settings, roots)


async def _vms(tree: Path, change_set: ChangeSet, manifest: Manifest, settings: Settings,
               roots: Path) -> tuple[dict[str, str], list[Failure]]:
    """The VM drv of each host that will be rehearsed. Only of those: an evaluation is what a push costs."""
    sandbox_key = await keys.public("sandbox")
    room = asyncio.Semaphore(plan.at_once(settings.nix.evaluate_memory))

    async def one(change: Change) -> tuple[str, str] | Failure:
        async with room:
            try:
                return change.host.name, "" if change.action is Action.RECORD else await plan.instantiate_vm(
                    tree, change, manifest.machines.get(change.host.name), settings, roots=roots, sandbox_key=sandbox_key)
            except TotoError as error:
                return Failure(name=change.host.name, message=f"its VM {error}")

    results = await asyncio.gather(*map(one, change_set.changes))
    return (dict(each for each in results if not isinstance(each, Failure)),
            [each for each in results if isinstance(each, Failure)])


@task(name="clear what a dead run left", cache_policy=NO_CACHE)
async def sweep(repo: Path) -> None:
    """End processes, remove sandboxes and run directories whose toto is no longer alive."""
    killed = process.sweep()
    removed = plan.sweep(repo)
    if killed or removed:
        get_run_logger().warning("ended %s processes and removed %s directories of runs that had died",
                                 len(killed), len(removed))

