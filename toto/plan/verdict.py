"""The verdict of a rehearsal on one target. Nothing is rolled out without a verdict."""

from dataclasses import dataclass
from typing import Generic, Literal, Self, TypeAlias, TypeVar

from toto.ledger.target import Target
from toto.plan.order import Order

F = TypeVar("F")
How: TypeAlias = Literal["passed", "cached", "waived"]


@dataclass(frozen=True)
class Question:
    """A question to a person before a roll-out: to approve `text` within `seconds`."""

    text: str
    seconds: float


@dataclass(frozen=True)
class Verdict(Generic[F]):
    """Permission to roll out a target with exactly this identity: its rehearsal passed, now or earlier, or was waived.

    `found` is what the rehearsal hands to the roll-out, such as a saved plan; None when it was waived. `by` and `why`
    say who waived it and why. `summary` goes into the report, `difference` into the plan's table. `question` is what a
    person must approve first.
    """

    target: Target
    identity: str
    how: How
    found: F | None = None
    summary: str = ""
    difference: str = ""
    question: Question | None = None
    by: str = ""
    why: str = ""

    @classmethod
    def passed(
        cls,
        order: Order,
        found: F,
        *,
        summary: str,
        difference: str = "",
        cached: bool = False,
        question: Question | None = None,
    ) -> Self:
        """The verdict on a target that passed its rehearsal, now or (`cached`) in an earlier run."""
        return cls(
            order.target, order.desired.identity, "cached" if cached else "passed", found, summary, difference, question
        )

    @classmethod
    def waived(cls, order: Order, *, by: str, why: str) -> Self:
        """The verdict on a target that may be rolled out without a rehearsal, because `by` says so."""
        return cls(order.target, order.desired.identity, "waived", by=by, why=why)

    def check(self, order: Order) -> None:
        """Raises `ValueError` when this is the verdict on a different target or a different identity."""
        if (self.target, self.identity) != (order.target, order.desired.identity):
            raise ValueError(
                f"the verdict is on {self.target} at {self.identity}, not on {order.target} at {order.desired.identity}"
            )

    def __str__(self) -> str:
        return f"waived by {self.by}: {self.why}" if self.how == "waived" else self.summary
