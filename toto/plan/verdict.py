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


class Verdict(Generic[F]):
    """A target, in exactly this state, may be rolled out: it passed now, had passed before, or that was waived.

    `found` is what the rehearsal leaves to the roll-out, such as a saved plan; None when it was waived. `by` and `why`
    say who waived it and for what reason. `summary` goes into the report, `difference` into the plan's table.
    `question` is what a person must approve first.

    (It has slots and is not a dataclass, so that Prefect shows it as `<Verdict>` among a roll-out's parameters: a large
    plan would be more than Prefect stores.)
    """

    __slots__ = ("__weakref__", "by", "difference", "found", "how", "identity", "question", "summary", "target", "why")

    def __init__(
        self,
        target: Target,
        identity: str,
        how: How,
        found: F | None = None,
        summary: str = "",
        difference: str = "",
        question: Question | None = None,
        by: str = "",
        why: str = "",
    ) -> None:
        self.target, self.identity, self.how, self.found = target, identity, how, found
        self.summary, self.difference, self.question, self.by, self.why = summary, difference, question, by, why

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
    def told(cls, order: Order, *, summary: str, difference: str = "") -> Self:
        """The verdict in a run that will not deploy: what is known about the target, and nothing to roll out."""
        return cls(order.target, order.desired.identity, "passed", None, summary, difference)

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
