"""Makes the plan of a commit: finds out what the commit would change, without touching anything."""

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, Generic, Self, TypeAlias, TypeVar

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
from toto.nix.memory import Evaluations, Remembered
from toto.nix.messages import hearing
from toto.plan import changes
from toto.plan.changes import Action, Change, Desired, Failure, Told, Why
from toto.plan.compare import compare
from toto.plan.kind import Found, Source
from toto.plan.kinds import KINDS, kind_of
from toto.plan.order import Order, Plan
from toto.plan.selector import Selector

LAST_GOOD: Final = "toto/last-good"  # the tag of the last commit that was deployed to the whole fleet


T = TypeVar("T")
Note: TypeAlias = Callable[[], None]


class Shown:
    """How the evaluations of a plan are shown while they are made. These are not; those of `tasks.detect` are."""

    async def all(self, count: int, work: Callable[[Note], Awaitable[T]]) -> T:
        """Do `work`, which makes `count` evaluations, and calls what it is given whenever one has ended."""
        return await work(lambda: None)

    async def one(self, target: Target, work: Callable[[], Awaitable[T]]) -> T:
        """Do `work` on a target that has changed, or whose evaluation has failed: then `work` raises the error."""
        return await work()


NOT_SHOWN: Final = Shown()


async def make(
    repo: Path,
    commit: str,
    run: str,
    only: Sequence[str] = (),
    *,
    override: str | None = None,
    try_for: float = 0,
    force: bool = False,
    deploys: bool = True,
    shown: Shown = NOT_SHOWN,
) -> Plan:
    """The plan of a commit, compared with the ledger as it is now.

    `run` is the id of the run that plans, `only` the names, tags and kinds that it is limited to, `override` the reason
    to ignore freezes and windows, `try_for` the seconds for which it only tries what it rolls out. With `force` it also
    has targets that have not changed. `deploys` says whether the run is to roll out; its orders deploy only where the
    commit is on the deployed branch as well. `shown` shows the evaluations. A target that does not evaluate is a
    failure in the plan and does not stop the others.
    Raises `InputError` for mistakes in the manifest, the settings or `only`, and for a commit that is unfinished, such
    as one with a submodule; `NoSuchCommit`.
    """
    source = await _source(repo, commit, run, override, deploys=deploys)
    settings, fleet = source.settings, source.manifest
    planning = _Planning(source, shown)
    await owners.check_distinct(fleet)
    found, left, after = await _discover(source, only)
    with hearing() as warnings:
        with suppress(daemon.DaemonFailed):  # (there may be no hosts at all)
            home = daemon.socket().parent.parent
            if lone := builders.unused_of(home, fleet):
                warnings["this server does not build on it, although its role is builder (docs/builders.md)"] = lone
            for name, builder in builders.obeying(home, fleet).items():
                warnings[f"it is also the builder {builder}, whose user is root there (docs/builders.md)"] = [name]
        wanted = await planning.identified(found)
    ledger = Ledger(repo).read()
    compared = compare(
        commit, wanted.made.values(), wanted.failures, fleet, ledger, left=[each.target for each in left], force=force
    )
    told = _told(source, [*found, *left], ledger)
    changed = {each.target: each for each in compared.changes}
    ordered = await planning.ordered([each for each in found if each.target in changed], changed)
    planning.evaluations.remembered.write(None if only else {each.target.name for each in (*found, *left)})
    positions = {each.target: number for number, each in enumerate(found)}
    stops = {each.target: each.stops for each in found}
    orders = tuple(
        _placed(
            ordered.made[each.target].model_copy(update={"try_for": try_for}),
            positions[each.target],
            ledger.get(each.target),
            stops=stops[each.target],
        )
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
            "machines": changes.of_machines(await _last_manifest(source), fleet),
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


async def hosts(repo: Path, commit: str, run: str, only: Sequence[str] = (), *, shown: Shown = NOT_SHOWN) -> Hosts:
    """What the hosts of a commit are to be, or those that `only` names; nothing is compared with the ledger.

    Raises as `make` does.
    """
    source = await _source(repo, commit, run)
    planning = _Planning(source, shown)
    found, _, _ = await _discover(source, only or (HOST,))
    wanted = await planning.identified([each for each in found if each.target.kind == HOST])
    planning.evaluations.remembered.write(None)
    return Hosts(tuple(wanted.made.values()), wanted.failures, source.settings)


async def one(repo: Path, commit: str, run: str, target: Target) -> Order:
    """The order of one target of a commit, whatever the ledger says: to build and to try it, and not to roll it out.

    Raises as `make` does, and what identifying the target raises.
    """
    source = await _source(repo, commit, run)
    planning, kind = _Planning(source, NOT_SHOWN), kind_of(target)
    found, _, _ = await _discover(source, [str(target)])
    (wanted,) = (each for each in found if each.target == target)

    async def order(source: Source, each: Found[Any]) -> Order:
        change = Change(desired=await kind.identify(source, each), why=Why.FORCED, action=Action.REHEARSE)
        return await kind.order(source, each, change)

    made = await planning.done(wanted, "#one", order)
    planning.evaluations.remembered.write(None)
    return made


async def _source(repo: Path, commit: str, run: str, override: str | None = None, *, deploys: bool = False) -> Source:
    """A commit, exported until the run is over, with its settings and its manifest. Raises as `make` does."""
    tree = run_directory(repo, run) / "tree"
    await git.checkout(repo, commit, tree)
    settings, fleet = read_tree(tree)
    await git.check_finished(repo, commit, settings.tree.unfinished)
    settings = limits.within(settings)
    manifest.check_distinct(fleet)
    limits.check_machines(fleet)
    defined = jobs.read(tree, settings.jobs.path)  # a mistake in one is told before anything is done
    deployed = deploys and await admission.on_deployed_branch(repo, commit)
    return Source(repo, commit, run, tree, settings, fleet, override, deployed, jobs=defined, owners=owners.read())


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

    @classmethod
    def of(cls, found: Sequence[Found[Any]], results: Sequence[T | Failure]) -> Self:
        """What came out for each target, in their order."""
        return cls(
            {at.target: each for at, each in zip(found, results, strict=True) if not isinstance(each, Failure)},
            tuple(each for each in results if isinstance(each, Failure)),
        )


class _Planning:
    """What is asked of the kinds about each target of a commit, side by side as there is room.

    A `TotoError` becomes that target's failure.
    """

    def __init__(self, source: Source, shown: Shown) -> None:
        self.source, self.shown = source, shown
        usual, most = source.settings.nix.evaluate_memory, int(limits.load()["nix.evaluate_memory"])
        self.evaluations = Evaluations(Remembered.in_repo(source.repo), usual, most)
        self._others = asyncio.Semaphore(os.cpu_count() or 1)

    async def identified(self, found: Sequence[Found[Any]]) -> _Results[Desired]:
        """What the commit wants each target to be."""

        async def work(note: Note) -> _Results[Desired]:
            async def one(source: Source, each: Found[Any]) -> Desired:
                return await kind_of(each.target).identify(source, each)

            async def ended(each: Found[Any]) -> Desired | Failure:
                try:
                    return await self.done(each, "", one)
                except TotoError as error:
                    if kind_of(each.target).evaluated:
                        with suppress(TotoError):
                            await self.shown.one(each.target, partial(_raise, error))
                    return Failure(target=each.target, message=str(error))
                finally:
                    if kind_of(each.target).evaluated:
                        note()

            return _Results.of(found, await asyncio.gather(*map(ended, found)))

        count = sum(kind_of(each.target).evaluated for each in found)
        return await (self.shown.all(count, work) if count else work(lambda: None))

    async def ordered(self, found: Sequence[Found[Any]], changes: Mapping[Target, Change]) -> _Results[Order]:
        """Everything that the steps need to know about each target that has changed."""

        async def one(source: Source, each: Found[Any]) -> Order:
            kind = kind_of(each.target)
            work = partial(kind.order, source, each, changes[each.target])
            return await (self.shown.one(each.target, work) if kind.evaluated else work())

        async def ended(each: Found[Any]) -> Order | Failure:
            try:
                return await self.done(each, "#vm", one)
            except TotoError as error:
                return Failure(target=each.target, message=str(error))

        return _Results.of(found, await asyncio.gather(*map(ended, found)))

    async def done(self, each: Found[Any], what: str, work: Callable[[Source, Found[Any]], Awaitable[T]]) -> T:
        """The result of `work`, as soon as there is room for it.

        `what` is added to the target's name where its evaluation is remembered. Raises what `work` raises.
        """
        if not kind_of(each.target).evaluated:
            async with self._others:
                return await work(self.source, each)
        return await self.evaluations.run(
            f"{each.target.name}{what}", lambda memory: work(replace(self.source, memory=memory), each)
        )


async def _raise(error: TotoError) -> None:
    raise error


def _placed(order: Order, position: int, entry: Entry, *, stops: bool) -> Order:
    """The order with what the plan adds: its position, whether its failure counts, and why it is held back."""
    change: Change = order.change.model_copy(update={"held": order.held(entry)})
    return order.model_copy(update={"position": position, "stops": stops, "change": change})


async def _last_manifest(source: Source) -> Manifest | None:
    """The manifest of the last commit that was deployed to the whole fleet; None when there is no valid one."""
    done = await git.git(source.repo, "show", f"refs/tags/{LAST_GOOD}:{manifest.FILE}", check=False)
    if done.status == 0 and done.stdout == (source.tree / manifest.FILE).read_text(errors="replace"):
        return source.manifest  # (to parse a thousand machines takes a while)
    try:
        return manifest.parse(done.stdout) if done.status == 0 else None
    except InputError:
        return None


async def previews(orders: Sequence[Order], *, build: bool = False) -> dict[str, str]:
    """What would change in each target, in words by label, where it is known without a rehearsal.

    With `build`, targets are built first. Raises `BuildFailed` when a build fails.
    """
    side_by_side = asyncio.Semaphore(os.cpu_count() or 1)

    async def one(order: Order) -> str:
        async with side_by_side:
            return await kind_of(order.target).preview(order, build=build)

    texts = await asyncio.gather(*map(one, orders))
    return {order.label: text for order, text in zip(orders, texts, strict=True) if text}
