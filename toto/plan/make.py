"""What a commit would do, worked out without touching anything: the plan, and one target's part of it, its order."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final, Literal, TypeAlias, TypeVar

from toto.base import paths, process
from toto.base.errors import InputError, TotoError
from toto.base.resources import at_once
from toto.base.runs import run_directory
from toto.helm import release as helm_release
from toto.helm.release import Release
from toto.infra_repo import git, manifest
from toto.infra_repo.manifest import Machine, Manifest
from toto.infra_repo.settings import Settings
from toto.infra_repo.tree import read_tree
from toto.ledger.ledger import Ledger
from toto.ledger.target import Target
from toto.machine import keys
from toto.nix import closure, hosts
from toto.nix import commands as nix
from toto.plan import changes
from toto.plan.changes import Action, Change, ChangeSet, Desired, Failure
from toto.plan.order import HostOrder, Plan
from toto.plan.selector import Selector
from toto.plan.window import held_now
from toto.rehearsal import suite
from toto.terraform import session as terraform
from toto.terraform.session import Root

LAST_GOOD: Final = "toto/last-good"  # the tag of the last commit that was deployed whole

T = TypeVar("T")
Evaluate: TypeAlias = Callable[[Path, hosts.Host, Machine | None, Settings, Path], Awaitable[Desired]]


async def discover(tree: Path, settings: Settings) -> list[hosts.Host]:
    """The hosts of a commit: those of its flake where it has any, else the files under hosts/."""
    from_flake = await nix.flake_hosts(tree, timeout=settings.nix.evaluate_timeout)
    return hosts.in_files(tree) if from_flake is None else from_flake


async def desire(tree: Path, host: hosts.Host, machine: Machine | None, settings: Settings, roots: Path) -> Desired:
    """What the tree wants of one host. Raises `EvaluationFailed`, `CommandTimeout`, `InputError`."""
    tests = suite.find(tree, host.name)
    drv = await nix.instantiate(
        tree, host, "toplevel", roots / host.name / "toplevel.drv", nixpkgs=settings.nix.nixpkgs,
        system=machine.system if machine else None, timeout=settings.nix.evaluate_timeout)
    (path,) = await nix.outputs(drv)
    return Desired(target=Target("host", host.name), file=host.file, identity=drv, path=path,
                   tests=tests.digest(list(suite.Phase)))


async def instantiate_vm(tree: Path, host: Desired, machine: Machine | None, settings: Settings, *, roots: Path,
                         sandbox_key: str) -> str:
    """The drv of the VM in which a changed host is rehearsed."""
    name = host.target.name
    return await nix.instantiate(
        tree, hosts.Host(name, host.file), "vm", roots / name / "vm.drv",
        nixpkgs=settings.nix.nixpkgs, system=machine.system if machine else None, sandbox_key=sandbox_key,
        ports=machine.ports if machine else (), timeout=settings.nix.evaluate_timeout)


async def make(repo: Path, commit: str, run: str, only: Sequence[str] = (), *, override: str | None = None,
               again: bool = False, evaluate: Evaluate = desire) -> Plan:
    """The plan of a commit: export, manifest, every target's identity, the ledger, the VMs of what changed.

    One host's failure to evaluate is its own result and stops no other. `evaluate` may wrap `desire`.
    Raises `InputError` for a manifest, settings or names that are wrong, `NoSuchCommit`.
    """
    directory = run_directory(repo, run)
    async with git.exported(repo, commit, paths.repo_state(repo)) as tree:
        settings, fleet = read_tree(tree)
        selector, machines = Selector(only, fleet), fleet.machines
        found = [host for host in await discover(tree, settings) if selector.takes(
            Target("host", host.name), machines[host.name].tags if host.name in machines else ())]
        roots = {root.name: root for root in terraform.discover(tree, settings.terraform)
                 if selector.takes(Target("terraform", root.name), root.tags)}
        releases = {release.name: release for release in helm_release.discover(tree)
                    if selector.takes(Target("helm", release.name), release.tags)}
        selector.check()
        room = asyncio.Semaphore(at_once(settings.nix.evaluate_memory))

        async def of_host(host: hosts.Host) -> Desired | Failure:
            return await _or_failure(Target("host", host.name), room, lambda: evaluate(
                tree, host, machines.get(host.name), settings, directory / "roots"))

        async def of_root(root: Root) -> Desired | Failure:
            target = Target("terraform", root.name)
            return await _or_failure(target, room, lambda: _desired(
                target, root.path, terraform.identity(repo, commit, tree, root)))

        async def of_release(release: Release) -> Desired | Failure:
            target = Target("helm", release.name)
            return await _or_failure(target, room, lambda: _desired(
                target, release.file, helm_release.identity(repo, commit, tree, release)))

        results = await asyncio.gather(*map(of_host, found), *map(of_root, roots.values()),
                                       *map(of_release, releases.values()))
        compared = changes.compare(commit, [each for each in results if isinstance(each, Desired)],
                                   [each for each in results if isinstance(each, Failure)], fleet,
                                   Ledger(repo).read(), again=again)
        # VMs only of what will be rehearsed: an evaluation is what a push costs.
        rehearsed = [each.desired for each in compared.changes
                     if each.target.kind == "host" and each.action is not Action.RECORD]
        sandbox_key = await keys.public("sandbox") if rehearsed else ""

        async def vm(host: Desired) -> str | Failure:
            name = host.target.name
            return await _or_failure(host.target, room, lambda: instantiate_vm(
                tree, host, machines.get(name), settings, roots=directory / "roots", sandbox_key=sandbox_key))

        vms = dict(zip((each.target for each in rehearsed), await asyncio.gather(*map(vm, rehearsed)), strict=True))
    failures = {target: each for target, each in vms.items() if isinstance(each, Failure)}
    held = {each.target: held_now(each.target, fleet, settings.roll_out) for each in compared.changes
            if override is None and each.action in (Action.DEPLOY, Action.VERIFY)}
    change_set = compared.model_copy(update={
        "changes": tuple(each.model_copy(update={"held": held.get(each.target) or ""})
                         for each in compared.changes if each.target not in failures),
        "failed": (*compared.failed, *failures.values()),
        "machines": changes.of_machines(await _last_manifest(repo), fleet),
        # A run that was limited to some targets says nothing of the others.
        **({"waiting": (), "retired": (), "machines": (), "whole": False} if only else {})})
    if change_set.changes:
        await git.checkout(repo, commit, directory / "tree")
    return Plan(repo=repo, run=run, commit=commit, manifest=fleet, settings=settings, changes=change_set,
                vms={target.name: drv for target, drv in vms.items() if isinstance(drv, str)}, roots=roots,
                releases=releases, override=override)


async def _last_manifest(repo: Path) -> Manifest | None:
    """The manifest of the last commit that was deployed whole; None where there is none, or it cannot be read now."""
    done = await git.git(repo, "show", f"refs/tags/{LAST_GOOD}:{manifest.FILE}", check=False)
    try:
        return manifest.parse(done.stdout) if done.status == 0 else None
    except InputError:
        return None


async def _desired(target: Target, file: str, identity: Awaitable[str]) -> Desired:
    return Desired(target=target, file=file, identity=await identity)


async def _or_failure(target: Target, room: asyncio.Semaphore, work: Callable[[], Awaitable[T]]) -> T | Failure:
    async with room:
        try:
            return await work()
        except TotoError as error:
            return Failure(target=target, message=str(error))


async def build(order: HostOrder, what: Literal["toplevel", "vm"], on_line: process.LineSink | None = None) -> Path:
    """Build a host's toplevel or its VM, kept by a root for as long as the run lasts. Raises `BuildFailed`."""
    return Path(await nix.build(order.desired.identity if what == "toplevel" else order.vm, order.roots / what,
                                timeout=order.settings.nix.build_timeout, target=order.label, on_line=on_line))


async def differences(change_set: ChangeSet) -> dict[str, str]:
    """What changes in each host that is to be deployed, by label, where its closures are in the store."""
    async def of(change: Change) -> tuple[str, str]:
        if change.action in (Action.VERIFY, Action.RECORD):
            return change.label, "nothing in the closure"
        if not await nix.valid(change.desired.path):
            return change.label, "not built yet"
        return change.label, str(await difference(change))
    return dict(await asyncio.gather(*(of(each) for each in change_set.changes if each.target.kind == "host")))


async def difference(change: Change) -> closure.Difference:
    """What changes from a host's last good to what is desired, which must be in the store."""
    last = change.last.path if change.last and await nix.valid(change.last.path) else None
    return await closure.difference(last, change.desired.path)



