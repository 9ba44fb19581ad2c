"""Makes the plan of a commit: finds out what the commit would change, without touching anything."""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Generic, TypeAlias, TypeVar

from toto.base import paths
from toto.base.errors import InputError, TotoError
from toto.base.runs import run_directory
from toto.git_host import admission
from toto.infra_repo import git, limits, manifest
from toto.infra_repo.manifest import Manifest
from toto.infra_repo.settings import Settings
from toto.infra_repo.tree import read_tree
from toto.jobs import folder as jobs
from toto.ledger.ledger import Entry, Ledger, Snapshot
from toto.ledger.target import HOST, Target
from toto.machine import owners
from toto.nix import builders, daemon
from toto.nix.memory import Allowance, Evaluations, Remembered
from toto.nix.messages import hearing
from toto.plan import changes
from toto.plan.changes import Action, Change, Desired, Failure, Told, Why
from toto.plan.compare import compare
from toto.plan.kind import Found, Kind, Source
from toto.plan.kinds import KINDS, kind_of
from toto.plan.order import Order, Plan
from toto.plan.selector import Selector

LAST_GOOD: Final = "toto/last-good"  # the tag of the last commit that was deployed to the whole fleet


T = TypeVar("T")
Identify: TypeAlias = Callable[[Kind[Any], Source, Found[Any]], Awaitable[Desired]]


async def identify(kind: Kind[Any], source: Source, found: Found[Any]) -> Desired:
    """What a commit wants a target to be. Raises `TotoError`."""
    return await kind.identify(source, found)


async def make(
    repo: Path,
    commit: str,
    run: str,
    only: Sequence[str] = (),
    *,
    override: str | None = None,
    force: bool = False,
    deploys: bool = True,
    identify: Identify = identify,
) -> Plan:
    """The plan of a commit, compared with the ledger as it is now.

    `run` is the id of the run that plans, `only` the names, tags and kinds that it is limited to, `override` the reason
    to ignore freezes and windows. With `force` it also has targets that have not changed. `deploys` says whether the
    run is to roll out; its orders deploy only where the commit is on the deployed branch as well. `identify` may wrap
    this module's own. A target that does not evaluate is a failure in the plan and does not stop the others.
    Raises `InputError` for mistakes in the manifest, the settings or `only`, and for a commit that is unfinished, such
    as one with a submodule; `NoSuchCommit`.
    """
    async with _source(repo, commit, run, override, deploys=deploys) as source:
        settings, fleet = source.settings, source.manifest
        evaluations = _evaluations(source)
        await owners.check_distinct(fleet)
        found, left, after = await _discover(source, only)
        with hearing() as warnings:
            with suppress(daemon.DaemonFailed):  # (there may be no hosts at all)
                home = daemon.socket().parent.parent
                if lone := builders.unused_of(home, fleet):
                    warnings["this server does not build on it, although its role is builder (docs/builders.md)"] = lone
                for name, builder in builders.obeying(home, fleet).items():
                    warnings[f"it is also the builder {builder}, whose user is root there (docs/builders.md)"] = [name]
            wanted = await _each(
                found, source, evaluations, "", lambda source, each: identify(kind_of(each.target), source, each)
            )
        ledger = Ledger(repo).read()
        compared = compare(
            commit,
            wanted.made.values(),
            wanted.failures,
            fleet,
            ledger,
            left=[each.target for each in left],
            force=force,
        )
        told = _told(source, [*found, *left], ledger)
        changed = {each.target: each for each in compared.changes}
        ordered = await _each(
            [each for each in found if each.target in changed],
            source,
            evaluations,
            "#vm",
            lambda source, each: kind_of(each.target).order(source, each, changed[each.target]),
        )
        evaluations.remembered.write(None if only else {each.target.name for each in (*found, *left)})
    positions = {each.target: number for number, each in enumerate(found)}
    stops = {each.target: each.stops for each in found}
    orders = tuple(
        _placed(ordered.made[each.target], positions[each.target], ledger.get(each.target), stops=stops[each.target])
        for each in compared.changes
        if each.target in ordered.made
    )
    failures = (*compared.failed, *ordered.failures)
    change_set = compared.model_copy(
        update={
            "changes": tuple(order.change for order in orders),
            "failed": tuple(each for each in failures if stops[each.target]),
            "excused": tuple(each for each in failures if not stops[each.target]),
            "retired": tuple(
                each for each in compared.retired if each.kind not in {other.target.kind for other in ordered.failures}
            ),  # one that may have moved stays in the ledger until that is settled
            "machines": changes.of_machines(await _last_manifest(repo), fleet),
            "told": told,
            "nothing": _nothing([*found, *left], fleet),
            "warnings": {warning: tuple(sorted(names)) for warning, names in warnings.items()},
            # A run that is limited to some targets says nothing about the others.
            **(
                {"waiting": (), "retired": (), "machines": (), "told": (), "nothing": "", "whole": False}
                if only
                else {}
            ),
        }
    )
    if orders:
        await git.checkout(repo, commit, run_directory(repo, run) / "tree")
    return Plan(
        repo=repo,
        run=run,
        commit=commit,
        manifest=fleet,
        settings=settings,
        changes=change_set,
        orders=orders,
        after=after,
        jobs=source.jobs,
    )


@dataclass(frozen=True)
class Hosts:
    """What the hosts of a commit are to be, those that do not evaluate, and the commit's settings."""

    desired: tuple[Desired, ...]
    failed: tuple[Failure, ...]
    settings: Settings


async def hosts(repo: Path, commit: str, run: str, only: Sequence[str] = (), *, identify: Identify = identify) -> Hosts:
    """What the hosts of a commit are to be, or those that `only` names; nothing is compared with the ledger.

    Raises as `make` does.
    """
    async with _source(repo, commit, run) as source:
        evaluations = _evaluations(source)
        found, _, _ = await _discover(source, only or (HOST,))
        hosts = [each for each in found if each.target.kind == HOST]
        wanted = await _each(
            hosts, source, evaluations, "", lambda source, each: identify(kind_of(each.target), source, each)
        )
        evaluations.remembered.write(None)
    return Hosts(tuple(wanted.made.values()), wanted.failures, source.settings)


async def one(repo: Path, commit: str, run: str, target: Target) -> Order:
    """The order of one target of a commit, whatever the ledger says: to build and to try it, and not to roll it out.

    Raises as `make` does, and what identifying the target raises.
    """
    async with _source(repo, commit, run) as source:
        found, _, _ = await _discover(source, [str(target)])
        (each,) = (each for each in found if each.target == target)
        kind, evaluations = kind_of(target), _evaluations(source)

        async def order(memory: Allowance | None) -> Order:
            within = replace(source, memory=memory)
            change = Change(desired=await kind.identify(within, each), why=Why.FORCED, action=Action.REHEARSE)
            return await kind.order(within, each, change)

        made = await evaluations.run(f"{target.name}#one", order) if kind.evaluated else await order(None)
        evaluations.remembered.write(None)
    await git.checkout(repo, commit, run_directory(repo, run) / "tree")
    return made


@asynccontextmanager
async def _source(
    repo: Path, commit: str, run: str, override: str | None = None, *, deploys: bool = False
) -> AsyncIterator[Source]:
    """A commit, exported to the end of the block, with its settings and its manifest. Raises as `make` does."""
    async with git.exported(repo, commit, paths.repo_state(repo)) as tree:
        settings, fleet = read_tree(tree)
        await git.check_finished(repo, commit, settings.tree.unfinished)
        settings = limits.within(settings)
        manifest.check_distinct(fleet)
        limits.check_machines(fleet)
        defined = jobs.read(tree, settings.jobs.path)  # a mistake in one is told before anything is done
        deployed = deploys and await admission.on_deployed_branch(repo, commit)
        yield Source(repo, commit, run, tree, settings, fleet, override, deployed, jobs=defined)


def _evaluations(source: Source) -> Evaluations:
    remembered = Remembered.in_repo(source.repo)
    return Evaluations(remembered, source.settings.nix.evaluate_memory, int(limits.load()["nix.evaluate_memory"]))


async def _discover(
    source: Source, only: Sequence[str]
) -> tuple[list[Found[Any]], list[Found[Any]], Mapping[str, tuple[str, ...]]]:
    """The targets of a commit that a run takes, those that are not due, and what comes before each label.

    When `only` names a target, its failure is one of the run.
    """
    selector = Selector(only, source.manifest)
    taken: list[Found[Any]] = []
    left: list[Found[Any]] = []
    after: dict[str, tuple[str, ...]] = {}
    for kind in KINDS.values():
        found = await kind.discover(source)
        chosen = [
            replace(each, stops=each.stops or selector.names(each.target))
            for each in found
            if selector.takes(each.target, each.tags, due=each.due)
        ]
        names = {each.target for each in chosen}
        left += [each for each in found if not (each.due or each.target in names)]
        after |= kind.after(source, chosen)
        taken += chosen
    selector.check()
    return taken, left, after


def _told(source: Source, found: Sequence[Found[Any]], ledger: Snapshot) -> tuple[Told, ...]:
    """What each kind has to say about the commit besides its targets."""
    return tuple(
        each
        for name, kind in KINDS.items()
        for each in kind.told(
            source,
            [target for target in found if target.target.kind == name],
            [target.name for target, entry in ledger.entries.items() if target.kind == name and entry.good],
        )
    )


def _nothing(found: Sequence[Found[Any]], fleet: Manifest) -> str:
    """Why a commit deploys nothing at all; "" when it has something to deploy."""
    if any(kind_of(each.target).is_deployed(each, fleet) for each in found):
        return ""
    many = " and no ".join(kind.many for name, kind in KINDS.items() if name != HOST)
    if not found:
        return f"NOTHING TO DEPLOY: this commit has no {HOST}s and no {many}"
    return (
        f"NOTHING TO DEPLOY: no host of this commit has a machine of its name in {manifest.FILE} "
        f"with role: nixos and deploy: push, and there are no {many}"
    )


@dataclass(frozen=True)
class _Results(Generic[T]):
    made: Mapping[Target, T]
    failures: tuple[Failure, ...]


async def _each(
    found: Sequence[Found[Any]],
    source: Source,
    evaluations: Evaluations,
    what: str,
    work: Callable[[Source, Found[Any]], Awaitable[T]],
) -> _Results[T]:
    """The result of `work` for each target, side by side as `evaluations` has room.

    `what` is added to a target's name where its evaluation is remembered. A `TotoError` becomes that target's failure.
    """
    others = asyncio.Semaphore(os.cpu_count() or 1)

    async def one(each: Found[Any]) -> T | Failure:
        try:
            if kind_of(each.target).evaluated:
                return await evaluations.run(
                    f"{each.target.name}{what}", lambda memory: work(replace(source, memory=memory), each)
                )
            async with others:
                return await work(source, each)
        except TotoError as error:
            return Failure(target=each.target, message=str(error))

    results = dict(zip((each.target for each in found), await asyncio.gather(*map(one, found)), strict=True))
    return _Results(
        {target: each for target, each in results.items() if not isinstance(each, Failure)},
        tuple(each for each in results.values() if isinstance(each, Failure)),
    )


def _placed(order: Order, position: int, entry: Entry, *, stops: bool) -> Order:
    """The order with what the plan adds: its position, whether its failure counts, and why it is held back."""
    change: Change = order.change.model_copy(update={"held": order.held(entry)})
    return order.model_copy(update={"position": position, "stops": stops, "change": change})


async def _last_manifest(repo: Path) -> Manifest | None:
    """The manifest of the last commit that was deployed to the whole fleet; None when there is no valid one."""
    done = await git.git(repo, "show", f"refs/tags/{LAST_GOOD}:{manifest.FILE}", check=False)
    try:
        return manifest.parse(done.stdout) if done.status == 0 else None
    except InputError:
        return None


async def previews(orders: Sequence[Order], *, build: bool = False) -> dict[str, str]:
    """What would change in each target, in words by label, where it is known without a rehearsal.

    With `build`, targets are built first. Raises `BuildFailed` when a build fails.
    """
    texts = await asyncio.gather(*(kind_of(each.target).preview(each, build=build) for each in orders))
    return {order.label: text for order, text in zip(orders, texts, strict=True) if text}
