"""The table of kinds: what toto can deploy, in the order of a roll-out. `flows.kinds` has their steps."""

from typing import Any, Final

from toto.base.errors import TotoError
from toto.ledger.target import Target
from toto.plan.host import HostKind
from toto.plan.kind import Kind
from toto.plan.release import ReleaseKind
from toto.plan.root import RootKind

KINDS: Final[dict[str, Kind[Any]]] = {kind.name: kind for kind in (HostKind(), RootKind(), ReleaseKind())}


def kind_of(target: Target) -> Kind[Any]:
    """The kind of a target. Raises `TotoError` for a kind that this version of toto does not have."""
    if (kind := KINDS.get(target.kind)) is None:
        raise TotoError(
            f"this version of toto has no kind of target {target.kind!r}",
            target=str(target),
            hint=f"run the version of toto that deployed it (this one has: {', '.join(KINDS)})",
        )
    return kind


def place(target: Target) -> tuple[int, str]:
    """Sorts targets in the order of a roll-out: by kind, then by name. Unknown kinds come last."""
    names = list(KINDS)
    return names.index(target.kind) if target.kind in names else len(names), target.name
