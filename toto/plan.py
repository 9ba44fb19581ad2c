"""What a commit would do, worked out without touching anything: the plan, and one target's part of it, its order."""

import asyncio
import contextlib
import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict

from toto import changes, closure, git, helm_release, hosts, keys, manifest, nix, paths, process, suite, terraform
from toto import settings as settings_of
from toto.changes import Action, Change, ChangeSet, Desired, Failure
from toto.errors import InputError, TotoError
from toto.helm_release import Release
from toto.ledger import KINDS, Ledger, Target
from toto.manifest import Machine, Manifest
from toto.settings import RollOut, Settings
from toto.terraform import Root

LAST_GOOD: Final = "toto/last-good"  # the tag of the last commit that was deployed whole

T = TypeVar("T")
Evaluate: TypeAlias = Callable[[Path, hosts.Host, Machine | None, Settings, Path], Awaitable[Desired]]


class Order(BaseModel):
    """All that the rehearsal and the roll-out of one target need to know. `run` is the flow run's id.

    `override` is the reason for which it is rolled out in spite of a freeze or a closed window.
    """

    model_config = ConfigDict(frozen=True)

    repo: Path
    run: str
    commit: str
    change: Change
    settings: Settings
    tree: Path
    override: str | None = None

    @property
    def desired(self) -> Desired:
        return self.change.desired

    @property
    def target(self) -> Target:
        return self.desired.target

    @property
    def name(self) -> str:
        return self.target.name

    @property
    def label(self) -> str:
        return self.target.label

    @property
    def scratch(self) -> Path:
        """What this run writes, and what goes when it is over."""
        return run_directory(self.repo, self.run)


class HostOrder(Order):
    """One host's part of a plan."""

    machine: Machine | None
    vm: str

    @property
    def roots(self) -> Path:
        """Where this run keeps what it evaluated and built of the host from garbage collection."""
        return self.scratch / "roots" / self.name


class RootOrder(Order):
    """One terraform root's part of a plan."""

    root: Root


class ReleaseOrder(Order):
    """One helm release's part of a plan."""

    release: Release


class Plan(BaseModel):
    """The change set of one commit with what is needed to act on it."""

    model_config = ConfigDict(frozen=True)

    repo: Path
    run: str
    commit: str
    manifest: Manifest
    settings: Settings
    changes: ChangeSet
    vms: dict[str, str] = {}
    roots: dict[str, Root] = {}
    releases: dict[str, Release] = {}
    override: str | None = None

    @property
    def tree(self) -> Path:
        return run_directory(self.repo, self.run) / "tree"

    def order(self, change: Change) -> HostOrder | RootOrder | ReleaseOrder:
        """One target's part."""
        name = change.target.name
        common: dict[str, Any] = {"repo": self.repo, "run": self.run, "commit": self.commit, "change": change,
                                  "settings": self.settings, "tree": self.tree, "override": self.override}
        match change.target.kind:
            case "host":
                return HostOrder(**common, machine=self.manifest.machines.get(name), vm=self.vms.get(name, ""))
            case "terraform":
                return RootOrder(**common, root=self.roots[name])
            case "helm":
                return ReleaseOrder(**common, release=self.releases[name])

    @property
    def orders(self) -> list[HostOrder | RootOrder | ReleaseOrder]:
        return [self.order(change) for change in self.changes.changes]

    def groups(self, labels: Iterable[str]) -> list[list[str]]:
        """`labels` in groups, to be rolled out one after the other: hosts by wave and `after`, terraform, helm."""
        due = set(labels)
        behind = [Target("terraform", name).label for name in self.roots]
        behind += [Target("helm", name).label for name in self.releases]
        return [*self.manifest.order(due & self.manifest.machines.keys()), *([each] for each in behind if each in due)]

    def held_behind(self, label: str, stuck: Collection[str]) -> str | None:
        """The first of `stuck` (labels of targets that were not rolled out) that this target comes `after`."""
        after: dict[str, tuple[str, ...]] = {name: each.after for name, each in self.manifest.machines.items()}
        after |= {f"terraform/{name}": tuple(f"terraform/{other}" for other in each.after)
                  for name, each in self.roots.items()}
        after |= {f"helm/{name}": tuple(f"helm/{other}" for other in each.after)
                  for name, each in self.releases.items()}
        return next((other for other in stuck if label in dependents(other, after)), None)


def dependents(name: str, after: Mapping[str, Collection[str]]) -> set[str]:
    """What comes after `name`, and after that, and so on; without itself. `after` tells what each comes after."""
    found: set[str] = set()
    fresh = {name}
    while fresh:
        fresh = {other for other, before in after.items() if not fresh.isdisjoint(before)} - found
        found |= fresh
    return found - {name}


def run_directory(repo: Path, run: str) -> Path:
    """What one run writes: its tree, its roots, its sandboxes. Removed when the run is over."""
    return paths.repo_state(repo) / "runs" / run


def last_good_root(repo: Path, host: str) -> Path:
    """The GC root of what a host runs by its ledger entry, and is gone back to."""
    return paths.repo_state(repo) / "good" / host


def previous_root(repo: Path, host: str) -> Path:
    """The GC root of what a host ran before that, to which a revert of the same run goes back."""
    return paths.repo_state(repo) / "previous" / host


def held_now(target: Target, fleet: Manifest, settings: RollOut) -> str | None:
    """Why a target must not be rolled out now: it or the fleet is frozen, or a maintenance window is closed."""
    machine = fleet.machines.get(target.name) if target.kind == "host" else None
    now = datetime.now().astimezone()
    for whose, rules in (("the fleet", settings), (target.label, machine)):
        if rules is None:
            continue
        if rules.freeze:
            return rules.freeze if isinstance(rules.freeze, str) else f"{whose} is frozen"
        if rules.window is not None and not rules.window.contains(now):
            return f"outside the window of {whose}, {rules.window}"
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
    settings = settings_of.load(tree)
    return settings, manifest.load(tree / manifest.FILE)


class Selector:
    """What a run is limited to: targets by name, tag or kind; everything when no word is given."""

    def __init__(self, only: Sequence[str], manifest: Manifest) -> None:
        self.only = set(only)
        self.known: set[str] = set(KINDS)
        for machine in manifest.machines.values():  # one that waits for its host file is known as well
            self.known |= {machine.name, *machine.tags}

    def takes(self, target: Target, tags: Iterable[str] = ()) -> bool:
        """Whether a run takes a target."""
        words = {target.name, str(target), target.kind, *tags}
        self.known |= words
        return not self.only or bool(words & self.only)

    def check(self) -> None:
        """Raises `InputError` for words that no target has, once all have been asked for."""
        if unknown := sorted(self.only - self.known):
            raise InputError(f"there is no target, tag or kind {', '.join(unknown)}", target="only",
                             hint="known are " + ", ".join(sorted(self.known)))


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
