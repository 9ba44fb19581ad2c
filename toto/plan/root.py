"""Terraform roots as a kind of target: the hash of its files and settings identifies a root."""

from typing import Any

from pydantic import AliasChoices, Field

from toto.ledger.ledger import Before, Deployed
from toto.ledger.target import Target
from toto.plan.changes import Change, Desired
from toto.plan.kind import Found, Kind, Source
from toto.plan.order import Order
from toto.plan.verdict import Question
from toto.terraform import session as terraform
from toto.terraform.plan import Deed, Planned, wants_approval
from toto.terraform.session import Root

_SERIAL = Field(default=0, validation_alias=AliasChoices("serial", "revision"))  # older ledgers say revision


class DeployedRoot(Deployed):
    """What a root is, by toto's own roll-out: the state that the roll-out left.

    It has the serial and the lineage of that state, and the addresses in it. Older versions recorded only the serial.
    """

    serial: int = _SERIAL
    lineage: str = ""
    resources: tuple[str, ...] = ()


class RootBefore(Before):
    """What a root was before a roll-out: the serial of its terraform state, and the addresses in it.

    `deeds` is what the roll-out's plan does to them; None in an intent of an older version, which did not record that.
    """

    serial: int = _SERIAL
    resources: tuple[str, ...] = ()
    deeds: tuple[Deed, ...] | None = None


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

    async def identify(self, source: Source, found: Found[Root]) -> Desired:
        identity = await terraform.identity(source.repo, source.commit, source.tree, found.subject)
        return Desired(target=found.target, file=found.subject.path, identity=identity)

    async def order(self, source: Source, found: Found[Root], change: Change) -> RootOrder:
        return source.order(RootOrder, change, root=found.subject)

    def deployed(self, desired: Desired, **facts: Any) -> DeployedRoot:
        return DeployedRoot(identity=desired.identity, **facts)
