"""What a kind of target is: how its targets are found in a commit, what identifies one, and when one has changed.

Each kind implements `Kind` in a module of its own, and has one row in `toto.plan.kinds`. What toto does with a target,
its rehearsal and its roll-out, are the kind's steps: `flows.kinds`.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from toto.base.runs import run_directory
from toto.infra_repo.manifest import Manifest
from toto.infra_repo.settings import Settings
from toto.ledger.ledger import Deployed, Entry
from toto.ledger.target import Target
from toto.plan.changes import Change, Desired, Why, deploy
from toto.plan.order import Order

S = TypeVar("S")


@dataclass(frozen=True)
class Source:
    """A commit that a plan is made of, exported into `tree`, with what it says of the fleet. `run` is who plans."""

    repo: Path
    commit: str
    run: str
    tree: Path
    settings: Settings
    manifest: Manifest

    @property
    def roots(self) -> Path:
        """Where this run keeps what it evaluates and builds from garbage collection, by host."""
        return run_directory(self.repo, self.run) / "roots"


@dataclass(frozen=True)
class Found(Generic[S]):
    """A target that a commit has. `subject` is what its kind read of it, `tags` are the words that select it."""

    target: Target
    subject: S
    tags: tuple[str, ...] = ()


class Kind(ABC, Generic[S]):
    """One kind of target; `S` is what it reads of a target in a commit."""

    name: ClassVar[str]
    one: ClassVar[str]
    """what people call one of them"""
    many: ClassVar[str]
    evaluated: ClassVar[bool] = False
    """whether it takes long to identify one: then that is shown as a step of its own"""

    @abstractmethod
    async def discover(self, source: Source) -> list[Found[S]]:
        """The targets of a commit, each after those that it depends on. Raises `InputError`."""

    @abstractmethod
    async def identify(self, source: Source, found: Found[S]) -> Desired:
        """What the commit wants of one target. Raises `TotoError`."""

    @abstractmethod
    async def order(self, source: Source, found: Found[S], change: Change) -> Order:
        """All that the steps need to act on a changed target. Raises `TotoError`."""

    def change(self, desired: Desired, entry: Entry, manifest: Manifest) -> Change | None:
        """What becomes of a target whose ledger entry is `entry`; None where it is what the commit wants."""
        if entry.intent is None and entry.good is not None and entry.good.identity == desired.identity:
            return None
        return deploy(desired, entry, Why.FILES)

    def retired(self, target: Target, entry: Entry, known: Collection[Target], manifest: Manifest) -> bool:
        """Whether a target of the ledger has left the commit; `known` are those that the commit has."""
        return target not in known

    @abstractmethod
    def deployed(self, desired: Desired, **facts: Any) -> Deployed:
        """The ledger's record of a target that was made what is desired.

        `facts` are the other fields of `Deployed`, and those that the kind itself records.
        """

    def after(self, source: Source, found: Sequence[Found[S]]) -> Mapping[str, tuple[str, ...]]:
        """By label, the labels of the targets that are rolled out before each."""
        return {}

    def groups(self, manifest: Manifest, orders: Sequence[Order]) -> list[list[Order]]:
        """The orders in groups to be rolled out one after the other. By default each alone, as discovered."""
        return [[each] for each in sorted(orders, key=lambda order: order.position)]

    async def preview(self, order: Order, *, build: bool = False) -> str:
        """What would change in a target, in words; "" where only its rehearsal can tell.

        With `build`, whatever must be built to tell it is built.
        """
        return ""

    def roots(self, repo: Path, name: str) -> tuple[Path, ...]:
        """The GC roots that go when a target is retired."""
        return ()
