"""Terraform roots as a kind of target: the hash of its files and settings identifies a root."""

from collections.abc import Collection, Sequence
from typing import Any, Final

from pydantic import AliasChoices, Field

from toto.ledger.ledger import Before, Deployed
from toto.ledger.target import Target
from toto.plan.changes import Change, Desired, Told
from toto.plan.kind import Found, Kind, Source
from toto.plan.order import Order
from toto.plan.verdict import Question
from toto.terraform import session as terraform
from toto.terraform.plan import Deed, Planned, State, wants_approval
from toto.terraform.session import Root

MOST: Final = 20  # folders that are told to be no roots
_SERIAL = Field(default=0, validation_alias=AliasChoices("serial", "revision"))  # older ledgers say revision


class DeployedRoot(Deployed):
    """What a root is, by toto's own roll-out: the state that the roll-out left.

    It has the serial and the lineage of that state, the addresses in it, and its place in words. Older versions
    recorded only the serial.
    """

    serial: int = _SERIAL
    lineage: str = ""
    resources: tuple[str, ...] = ()
    place: str = ""

    def is_in(self, state: State) -> bool:
        """Whether a state is the one that the roll-out left, or what became of it."""
        return state.serial >= self.serial and self.lineage in ("", state.lineage)


class RootBefore(Before):
    """What a root was before a roll-out: the serial of its terraform state, and the addresses in it.

    `deeds` is what the roll-out's plan does to them; None in an intent of an older version, which did not record that.
    `was` is the root's earlier name, of which the last good is this root's too.
    """

    serial: int = _SERIAL
    resources: tuple[str, ...] = ()
    deeds: tuple[Deed, ...] | None = None
    was: str = ""


class RootOrder(Order):
    """One terraform root's part of a plan."""

    root: Root

    def question(self, planned: Planned) -> Question | None:
        """What a person must approve before this plan is applied; None where the settings ask for no approval."""
        if not wants_approval(planned, self.root.approve):
            return None
        return Question(str(planned), self.settings.terraform.approve_timeout)


class RootKind(Kind[Root]):
    """Root modules of terraform."""

    name, one, many = "terraform", "terraform root", "terraform roots"

    async def discover(self, source: Source) -> list[Found[Root]]:
        return [
            Found(Target(self.name, root.name), root, root.tags, root.after)
            for root in terraform.discover(source.tree, source.settings.terraform)
        ]

    def told(self, source: Source, found: Sequence[Found[Root]], deployed: Collection[str]) -> list[Told]:
        """Folders that look like roots and are none, and roots that left the commit."""
        there = [each.subject for each in found]
        told = [
            Told(place=place, what=what)
            for place, what in terraform.left_aside(source.tree, source.settings.terraform, there)
        ]
        if len(told) > MOST:
            told[MOST:] = [Told(place="…", what=f"{len(told) - MOST} more folders with .tf files are no roots")]
        names = {root.name for root in there}
        unless = ", unless a new root has the same state" if names - set(deployed) else ""
        for name in sorted(set(deployed) - names):
            heir = next((root.label for root in there if root.was == name), None)
            what = (
                f"goes on as {heir}"
                if heir
                else f"left the commit: what its state holds stays there, and nobody manages it{unless}"
            )
            told.append(Told(place=f"{self.name}/{name}", what=what))
        return told

    async def identify(self, source: Source, found: Found[Root]) -> Desired:
        identity = await terraform.identity(source.repo, source.commit, source.tree, found.subject)
        return Desired(target=found.target, file=found.subject.path, identity=identity)

    async def order(self, source: Source, found: Found[Root], change: Change) -> RootOrder:
        return source.order(RootOrder, change, root=found.subject)

    def deployed(self, desired: Desired, **facts: Any) -> DeployedRoot:
        return DeployedRoot(identity=desired.identity, **facts)
