"""What a commit would do, worked out without touching anything: the plan, and one host's part of it, its order."""

import asyncio
import contextlib
import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict

from toto import changes, closure, git, hosts, keys, nix, paths, process, suite
from toto.changes import Action, Change, ChangeSet, Desired, Failure
from toto.errors import InputError, TotoError
from toto.ledger import Ledger
from toto.manifest import Machine, Manifest
from toto.manifest import load as load_manifest
from toto.settings import Settings
from toto.settings import load as load_settings

T = TypeVar("T")
Evaluate: TypeAlias = Callable[[Path, hosts.Host, Machine | None, Settings, Path], Awaitable[Desired]]


class Order(BaseModel):
    """All that the rehearsal and the roll-out of one host need to know. `run` is the flow run's id."""

    model_config = ConfigDict(frozen=True)

    repo: Path
    run: str
    commit: str
    change: Change
    machine: Machine | None
    settings: Settings
    vm: str
    tree: Path

    @property
    def name(self) -> str:
        return self.change.host.name

    @property
    def scratch(self) -> Path:
        """What this run writes, and what goes when it is over."""
        return run_directory(self.repo, self.run)

    @property
    def roots(self) -> Path:
        """Where this run keeps what it evaluated and built of the host from garbage collection."""
        return self.scratch / "roots" / self.name


class Plan(BaseModel):
    """The change set of one commit with what is needed to act on it."""

    model_config = ConfigDict(frozen=True)

    repo: Path
    run: str
    commit: str
    manifest: Manifest
    settings: Settings
    changes: ChangeSet
    vms: dict[str, str]

    @property
    def tree(self) -> Path:
        return run_directory(self.repo, self.run) / "tree"

    def order(self, change: Change) -> Order:
        """One host's part."""
        name = change.host.name
        return Order(repo=self.repo, run=self.run, commit=self.commit, change=change, settings=self.settings,
                     machine=self.manifest.machines.get(name), vm=self.vms[name], tree=self.tree)

    @property
    def orders(self) -> list[Order]:
        return [self.order(change) for change in self.changes.changes]


def run_directory(repo: Path, run: str) -> Path:
    """What one run writes: its tree, its roots, its sandboxes. Removed when the run is over."""
    return paths.repo_state(repo) / "runs" / run


def last_good_root(repo: Path, host: str) -> Path:
    """The GC root of what a host runs by its ledger entry, and is gone back to."""
    return paths.repo_state(repo) / "good" / host


def previous_root(repo: Path, host: str) -> Path:
    """The GC root of what a host ran before that, to which a revert of the same run goes back."""
    return paths.repo_state(repo) / "previous" / host


def held_now(machine: Machine) -> str | None:
    """Why a machine must not be rolled out now: it is frozen, or its maintenance window is closed."""
    if machine.frozen_because is not None:
        return machine.frozen_because
    if machine.window is not None and not machine.window.contains(datetime.now().astimezone()):
        return f"outside its window, {machine.window}"
    return None


def memory_available() -> int:
    """Megabytes that processes could still take, as the kernel estimates."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) // 1024
    return 1024


def at_once(memory_each: int) -> int:
    """How many things of that many megabytes may run side by side: by memory and cores, at least one."""
    return max(1, min(os.cpu_count() or 1, memory_available() // max(1, memory_each)))


async def discover(tree: Path, settings: Settings) -> list[hosts.Host]:
    """The hosts of a commit: those of its flake where it has any, else the files under hosts/."""
    from_flake = await nix.flake_hosts(tree, timeout=settings.nix.evaluate_timeout)
    return hosts.in_files(tree) if from_flake is None else from_flake


def read_tree(tree: Path) -> tuple[Settings, Manifest]:
    """The settings and the manifest of an exported commit. Raises `SettingsError`, `ManifestError`."""
    settings = load_settings(tree)
    return settings, load_manifest(tree / "machines.yaml")


def choose(found: Sequence[hosts.Host], manifest: Manifest, only: Sequence[str]) -> list[hosts.Host]:
    """The hosts that a run is limited to, by name or tag; all when `only` is empty. Raises `InputError`."""
    if not only:
        return list(found)
    tagged = {tag for machine in manifest.machines.values() for tag in machine.tags}
    if unknown := sorted(set(only) - {host.name for host in found} - tagged):
        raise InputError(f"there is no host and no tag {', '.join(unknown)}", target="only",
                         hint="known hosts: " + ", ".join(host.name for host in found))
    return [host for host in found if host.name in only
            or (host.name in manifest.machines and set(manifest.machines[host.name].tags) & set(only))]


async def desire(tree: Path, host: hosts.Host, machine: Machine | None, settings: Settings, roots: Path) -> Desired:
    """What the tree wants of one host. Raises `EvaluationFailed`, `CommandTimeout`, `InputError`."""
    tests = suite.find(tree, host.name)
    drv = await nix.instantiate(
        tree, host, "toplevel", roots / host.name / "toplevel.drv", nixpkgs=settings.nix.nixpkgs,
        system=machine.system if machine else None, timeout=settings.nix.evaluate_timeout)
    (path,) = await nix.outputs(drv)
    return Desired(name=host.name, file=host.file, drv=drv, path=path, tests=tests.digest(list(suite.Phase)))


async def instantiate_vm(tree: Path, change: Change, machine: Machine | None, settings: Settings, *, roots: Path,
                         sandbox_key: str) -> str:
    """The drv of the VM in which a changed host is rehearsed."""
    return await nix.instantiate(
        tree, hosts.Host(change.host.name, change.host.file), "vm", roots / change.host.name / "vm.drv",
        nixpkgs=settings.nix.nixpkgs, system=machine.system if machine else None, sandbox_key=sandbox_key,
        ports=machine.ports if machine else (), timeout=settings.nix.evaluate_timeout)


async def make(repo: Path, commit: str, run: str, only: Sequence[str] = (), *, evaluate: Evaluate = desire) -> Plan:
    """The plan of a commit: export, manifest, every host's identity, the ledger, the VMs of what changed.

    One host's failure to evaluate is its own result and stops no other. `evaluate` may wrap `desire`.
    Raises `InputError` for a manifest, settings or names that are wrong, `NoSuchCommit`.
    """
    directory = run_directory(repo, run)
    async with git.exported(repo, commit, paths.repo_state(repo)) as tree:
        settings, manifest = read_tree(tree)
        found = choose(await discover(tree, settings), manifest, only)
        room = asyncio.Semaphore(at_once(settings.nix.evaluate_memory))

        async def identity(host: hosts.Host) -> Desired | Failure:
            return await _or_failure(host.name, room, lambda: evaluate(
                tree, host, manifest.machines.get(host.name), settings, directory / "roots"))

        results = await asyncio.gather(*map(identity, found))
        compared = changes.compare(commit, [each for each in results if isinstance(each, Desired)],
                                   [each for each in results if isinstance(each, Failure)], manifest,
                                   Ledger(repo).read())
        # VMs only of what will be rehearsed: an evaluation is what a push costs.
        sandbox_key = await keys.public("sandbox") if compared.changes else ""

        async def vm(change: Change) -> str | Failure:
            if change.action is Action.RECORD:
                return ""
            return await _or_failure(change.host.name, room, lambda: instantiate_vm(
                tree, change, manifest.machines.get(change.host.name), settings, roots=directory / "roots",
                sandbox_key=sandbox_key))

        vms = dict(zip((each.host.name for each in compared.changes), await asyncio.gather(*map(vm, compared.changes)),
                       strict=True))
    failures = tuple(each for each in vms.values() if isinstance(each, Failure))
    lost = {failure.name for failure in failures}
    change_set = compared.model_copy(update={
        "changes": tuple(each for each in compared.changes if each.host.name not in lost),
        "failed": (*compared.failed, *failures),
        # A run that was limited to some hosts says nothing of the others.
        **({"waiting": (), "retired": (), "whole": False} if only else {})})
    if change_set.changes:
        await git.checkout(repo, commit, directory / "tree")
    return Plan(repo=repo, run=run, commit=commit, manifest=manifest, settings=settings, changes=change_set,
                vms={name: drv for name, drv in vms.items() if isinstance(drv, str)})


async def _or_failure(name: str, room: asyncio.Semaphore, work: Callable[[], Awaitable[T]]) -> T | Failure:
    async with room:
        try:
            return await work()
        except TotoError as error:
            return Failure(name=name, message=str(error))


async def build(order: Order, on_line: process.LineSink | None = None) -> str:
    """Build a host's toplevel, kept by a root for as long as the run lasts. Raises `BuildFailed`."""
    return await nix.build(order.change.host.drv, order.roots / "toplevel", timeout=order.settings.nix.build_timeout,
                           target=order.name, on_line=on_line)


async def differences(change_set: ChangeSet) -> dict[str, str]:
    """What changes in each host that is to be deployed, where its closures are in the store."""
    async def of(change: Change) -> tuple[str, str]:
        if change.action in (Action.VERIFY, Action.RECORD):
            return change.host.name, "nothing in the closure"
        if not await nix.valid(change.host.path):
            return change.host.name, "not built yet"
        last = change.last if change.last and await nix.valid(change.last) else None
        return change.host.name, str(await closure.difference(last, change.host.path))
    return dict(await asyncio.gather(*map(of, change_set.changes)))


def claim(repo: Path, run: str) -> Path:
    """Make a run's directory and say whose it is, so that a later toto can tell when its run has died."""
    directory = run_directory(repo, run)
    if not directory.exists():
        # Named only once it says whose it is: without an owner it would be taken for a dead run's.
        fresh = directory.parent.with_name("runs.new") / run
        fresh.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.parent.mkdir(mode=0o700, exist_ok=True)
        (fresh / "owner").write_text(process.owner())
        fresh.replace(directory)
    (directory / "owner").write_text(process.owner())
    return directory


def sweep(repo: Path) -> list[Path]:
    """Remove the directories of runs whose process is no longer alive; returns them."""
    dead = []
    for directory in paths.repo_state(repo).glob("runs/*"):
        with contextlib.suppress(FileNotFoundError):  # another sweep was first
            if not process.lives((directory / "owner").read_text()):
                shutil.rmtree(directory, ignore_errors=True)
                dead.append(directory)
    return dead


@contextlib.asynccontextmanager
async def claimed(repo: Path, run: str) -> AsyncIterator[Path]:
    """A run's directory for as long as the outermost such block of the run lasts."""
    mine = not run_directory(repo, run).exists()
    directory = claim(repo, run)
    try:
        yield directory
    finally:
        if mine:
            shutil.rmtree(directory, ignore_errors=True)
