"""A kind of target: it finds its targets in a commit, identifies each, and decides whether one has changed.

Each kind implements `Kind` in a module of its own and has a row in `toto.plan.kinds`. How its targets are rehearsed,
rolled out and reverted are the kind's steps, in `flows.kinds`.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from toto.infra_repo.manifest import Manifest
from toto.infra_repo.settings import Settings
from toto.jobs.folder import Jobs
from toto.ledger.ledger import Before, Deployed, Entry
from toto.ledger.target import Target
from toto.machine.owners import Owners
from toto.nix.memory import Allowance
from toto.plan.changes import Change, Desired, Told, Why, deploy
from toto.plan.order import Order

S = TypeVar("S")
OrderT = TypeVar("OrderT", bound=Order)


@dataclass(frozen=True)
class Source:
    """A commit to make a plan of. `tree` is its exported files, `run` the id of the run that plans.

    `override` is the reason for which the run rolls out in spite of a freeze or a closed window, `deploys` whether it
    will roll out the deployed branch. `memory` is what an evaluation may use, `jobs` are those of the commit, `owners`
    those of all machines as the plan begins. The run's folder has `tree` and `roots`.
    """

    repo: Path
    commit: str
    run: str
    tree: Path
    settings: Settings
    manifest: Manifest
    override: str | None = None
    deploys: bool = True
    memory: Allowance | None = None
    jobs: Jobs = field(default_factory=Jobs)
    owners: Owners = field(default_factory=Owners)

    def order(self, kind: type[OrderT], change: Change, **own: Any) -> OrderT:
        """The order of a changed target; `own` are the fields that its kind adds."""
        return kind(
            repo=self.repo,
            run=self.run,
            commit=self.commit,
            change=change,
            settings=self.settings,
            override=self.override,
            deploys=self.deploys,
            **own,
        )

    @property
    def roots(self) -> Path:
        """The folder of the GC roots for what this run evaluates and builds, with a folder for each host."""
        return self.tree.with_name("roots")


@dataclass(frozen=True)
class Found(Generic[S]):
    """A target in a commit. `subject` is what its kind read from the commit; `tags` are words that select it.

    `after` names the targets of its kind that are rolled out before it. `due` says whether a run takes it when `only`
    does not name it, and `stops` whether its failure is then one of the run, and not just a warning.
    """

    target: Target
    subject: S
    tags: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    due: bool = True
    stops: bool = True


class Kind(ABC, Generic[S]):
    """One kind of target. `S` is what the kind reads of a target in a commit."""

    name: ClassVar[str]
    one: ClassVar[str]
    """the word for one target, in messages"""
    many: ClassVar[str]
    """the word for several"""
    evaluated: ClassVar[bool] = False
    """whether identifying a target takes long: then each is a task of its own in the graph"""

    @abstractmethod
    async def discover(self, source: Source) -> list[Found[S]]:
        """The targets of a commit; each comes after those that it depends on. Raises `InputError`."""

    @abstractmethod
    async def identify(self, source: Source, found: Found[S]) -> Desired:
        """What the commit wants a target to be. Raises `TotoError`."""

    @abstractmethod
    async def order(self, source: Source, found: Found[S], change: Change) -> Order:
        """Everything that the steps need to know about a changed target. Raises `TotoError`."""

    def change(self, desired: Desired, entry: Entry, manifest: Manifest) -> Change | None:
        """What a run does with a target whose ledger entry is `entry`; None when it is what the commit wants."""
        if entry.intent is None and entry.good is not None and entry.good.identity == desired.identity:
            return None
        return deploy(desired, entry, Why.FILES)

    def retired(self, target: Target, entry: Entry, known: Collection[Target], manifest: Manifest) -> bool:
        """Whether a target in the ledger has left the commit. `known` are the targets of the commit."""
        return target not in known

    @abstractmethod
    def deployed(self, desired: Desired, **facts: Any) -> Deployed:
        """The ledger's record of a target that was made what `desired` says.

        `facts` are the other fields of `Deployed` and the kind's own fields.
        """

    def before(self, first: Before, now: Before) -> Before:
        """What a revert goes back to, when a target is rolled out over a change that could not be put back.

        `first` is what it was before that change, `now` what it is now.
        """
        return now

    def is_deployed(self, found: Found[S], manifest: Manifest) -> bool:
        """Whether toto ever rolls out a target of a commit."""
        return True

    def told(self, source: Source, found: Sequence[Found[S]], deployed: Collection[str]) -> list[Told]:
        """What in a commit looks like a target and is none; `deployed` are the names of this kind in the ledger."""
        return []

    def after(self, source: Source, found: Sequence[Found[S]]) -> Mapping[str, tuple[str, ...]]:
        """For each label, the labels of the targets that are rolled out before it."""
        return {each.target.label: tuple(Target(self.name, other).label for other in each.after) for each in found}

    def groups(self, manifest: Manifest, orders: Sequence[Order]) -> list[list[Order]]:
        """The orders in groups, which are rolled out one after the other. By default each target is a group."""
        return [[each] for each in sorted(orders, key=lambda order: order.position)]

    async def preview(self, order: Order, *, build: bool = False) -> str:
        """What would change in a target, in words; "" when only its rehearsal finds that out.

        With `build`, everything that this needs is built first.
        """
        return ""

    def roots(self, repo: Path, name: str) -> tuple[Path, ...]:
        """The GC roots that are removed when a target is retired."""
        return ()
