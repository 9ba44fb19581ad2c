"""The table of kinds and their steps: how toto rehearses, rolls out and reverts a target (see `toto.plan.kinds`)."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

from flows import helm, host, terraform
from tasks import accept
from tasks.accept import Reader
from tasks.reversal import Reversal
from toto.base.errors import TotoError
from toto.ledger.ledger import Deployed
from toto.ledger.target import Target
from toto.plan.kinds import kind_of
from toto.plan.verdict import Verdict

Outcome: TypeAlias = Literal["deployed", "verified", "tried", "recorded", "recorded without its CRDs", "unreachable"]


@dataclass(frozen=True)
class Steps:
    """The steps for targets of one kind. `stage` is the name of the stage that rolls them out.

    `rehearse` and `roll_out` are subflows that get an order in `quote`; without it Prefect would draw edges from
    everything that the order contains. `roll_out` also gets the verdict of the rehearsal: nothing is rolled out without
    one. `revert` closes the open intent on the target and returns what the target is now, in words. `drift` returns
    what was changed outside toto since the last good, one line for each change; it is None when toto does not check the
    kind for drift. `present` reads the present state, for a person who takes it as good. Each raises `TotoError`.
    """

    stage: str
    rehearse: Callable[[Any], Awaitable[Verdict[Any]]]
    roll_out: Callable[[Any, Verdict[Any]], Awaitable[Outcome]]
    revert: Callable[[Reversal], Awaitable[str]]
    drift: Callable[[Path, str, Target, Deployed], Awaitable[list[str]]] | None = None
    present: Reader | None = None


STEPS: Final[dict[str, Steps]] = {
    "host": Steps("hosts", host.rehearse, host.roll_out, host.revert, host.find_drift, accept.host),
    "terraform": Steps(
        "terraform", terraform.rehearse, terraform.roll_out, terraform.revert, terraform.find_drift, accept.root
    ),
    "helm": Steps("helm", helm.rehearse, helm.roll_out, helm.revert, helm.find_drift, accept.release),
}


def steps_of(target: Target) -> Steps:
    """The steps of a target's kind. Raises `TotoError` for a kind that this version of toto does not have."""
    if (steps := STEPS.get(target.kind)) is None:
        kind_of(target)  # raises, unless only the steps are missing
        raise TotoError(
            f"there are no steps for the kind {target.kind!r}",
            target=str(target),
            hint="add a row to STEPS in flows/kinds.py",
        )
    return steps
