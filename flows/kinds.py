"""The table of kinds: what toto does with a target of each. What a kind is, `toto.plan.kinds` says."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

from flows import helm, host, terraform
from tasks.reversal import Reversal
from toto.base.errors import TotoError
from toto.ledger.ledger import Deployed
from toto.ledger.target import Target
from toto.plan.kinds import kind_of
from toto.plan.verdict import Verdict

Outcome: TypeAlias = Literal["deployed", "verified", "recorded", "unreachable"]


@dataclass(frozen=True)
class Steps:
    """What is done with a target of one kind. `stage` is the name of the stage in which they are rolled out.

    `rehearse` and `roll_out` are subflows, given an order in `quote`: without it Prefect draws edges to whatever the
    order holds. `roll_out` takes the verdict of the rehearsal, and nothing is rolled out without one. `revert` closes
    the intent that is open on the target, and says what the target is now. `drift` is what was changed outside since
    the last good, a line a change; None for a kind whose drift toto does not look for. Each raises `TotoError`.
    """

    stage: str
    rehearse: Callable[[Any], Awaitable[Verdict[Any]]]
    roll_out: Callable[[Any, Verdict[Any]], Awaitable[Outcome]]
    revert: Callable[[Reversal], Awaitable[str]]
    drift: Callable[[Path, str, Target, Deployed], Awaitable[list[str]]] | None = None


STEPS: Final[dict[str, Steps]] = {
    "host": Steps("hosts", host.rehearse, host.roll_out, host.revert),
    "terraform": Steps("terraform", terraform.rehearse, terraform.roll_out, terraform.revert, terraform.find_drift),
    "helm": Steps("helm", helm.rehearse, helm.roll_out, helm.revert, helm.find_drift),
}


def steps_of(target: Target) -> Steps:
    """The steps of a target's kind. Raises `TotoError` for a kind that this version of toto does not have."""
    if (steps := STEPS.get(target.kind)) is None:
        kind_of(target)  # raises, unless only the steps are missing
        raise TotoError(f"there are no steps for the kind {target.kind!r}", target=str(target),
                        hint="add a row to STEPS in flows/kinds.py")
    return steps
