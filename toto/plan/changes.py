"""The change set: what differs between what a commit wants and what the ledger says is deployed.

This module is only the value, and its table. `toto.plan.compare` works it out.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Final

from pydantic import BaseModel, ConfigDict, SerializeAsAny

from toto.base.model import shown
from toto.infra_repo.manifest import Machine, Manifest
from toto.ledger.ledger import Deployed, Entry
from toto.ledger.target import Target


class Why(StrEnum):
    """Why a target is in the change set."""

    NEW = "new"
    CHANGED = "drv changed"
    FILES = "files changed"  # of a terraform root or a release: whatever its identity is made of
    TESTS = "tests changed"
    INTENT = "intent left open"
    UNREACHABLE = "unreachable last time"
    REVERTED = "reverted last time"
    FORCED = "forced"


class Action(StrEnum):
    """What a run would do with a target that passes its rehearsal."""

    DEPLOY = "deploy"  # roll out
    VERIFY = "verify"  # run its post-switch tests against the machine; activate nothing
    RECORD = "record"  # a different drv, the same closure: only the ledger changes
    REHEARSE = "rehearse only"  # there is no machine for it, or its machine is not toto's to push to


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True)


class Desired(_Value):
    """What a commit wants of one target, and the file that says so. A kind may add to it.

    `identity` is the hash that changes when the target does.
    """

    model_config = ConfigDict(extra="allow")  # what a kind adds is kept where the kind is not known

    target: Target
    file: str
    identity: str


class Failure(_Value):
    """A target that has no desired identity, because it does not evaluate."""

    target: Target
    message: str


class Change(_Value):
    """One target of the change set. `last` is its last good, None when toto never deployed it.

    `held` is why it would not be rolled out now, though it is rehearsed: it is frozen, or its window is closed.
    """

    desired: SerializeAsAny[Desired]
    why: Why
    action: Action
    last: SerializeAsAny[Deployed] | None = None
    note: str = ""
    held: str = ""

    @property
    def target(self) -> Target:
        return self.desired.target

    @property
    def label(self) -> str:
        return self.target.label


class MachineChange(_Value):
    """A machine whose entry in the manifest differs from that of the last good commit. It deploys nothing."""

    name: str
    what: str


class ChangeSet(_Value):
    """All that one commit would change, and what it would leave alone and why. It prints as a table.

    `ledger` is the fingerprint of the ledger that it was compared with; `whole` is false where it was limited to some
    targets.
    """

    commit: str
    ledger: str
    whole: bool = True
    changes: tuple[Change, ...] = ()
    unchanged: tuple[Target, ...] = ()
    waiting: tuple[str, ...] = ()
    retired: tuple[Target, ...] = ()
    failed: tuple[Failure, ...] = ()
    machines: tuple[MachineChange, ...] = ()

    @property
    def empty(self) -> bool:
        return not (self.changes or self.failed or self.retired)

    def rows(self, differences: Mapping[str, str] | None = None) -> list[dict[str, str]]:
        """One row a target: target, action, why, what changes (where `differences` knows it, by label)."""
        shown = differences or {}
        rows = [_row(f"machine/{each.name}", "none", "manifest", each.what) for each in self.machines]
        rows += [_row(change.target, f"{change.action}{', held back' if change.held else ''}", _why(change),
                      shown.get(change.label, "")) for change in self.changes]
        rows += [_row(failure.target, "none", "does not evaluate", failure.message) for failure in self.failed]
        rows += [_row(target, "retire", "left the commit", "its ledger entry goes; nothing of it is touched")
                 for target in self.retired]
        rows += [_row(f"host/{name}", "none", "waiting", f"in the manifest, but there is no hosts/{name}.nix yet")
                 for name in self.waiting]
        return rows + [_row(target, "none", "unchanged", "") for target in self.unchanged]

    def __str__(self) -> str:
        return table(self.rows())


def _row(target: Target | str, action: str, why: str, what: str) -> dict[str, str]:
    return dict(zip(COLUMNS, (str(target), action, why, what), strict=True))


def _why(change: Change) -> str:
    said = [note for note in (change.note, change.held) if note]
    return f"{change.why} ({'; '.join(said)})" if said else str(change.why)


def deploy(desired: Desired, entry: Entry, changed: Why) -> Change:
    """The change of a target that is to be rolled out. `changed` is why, where the ledger has no better reason."""
    if entry.intent is not None:
        why, note = Why.INTENT, f"run {entry.intent.run}, {entry.intent.step}"
    elif entry.unreachable is not None:
        why, note = Why.UNREACHABLE, entry.unreachable.at
    elif entry.reverted is not None:
        why, note = Why.REVERTED, entry.reverted.at
    else:
        why, note = changed if entry.good else Why.NEW, ""
    return Change(desired=desired, why=why, action=Action.DEPLOY, last=entry.good, note=note)


def of_machines(before: Manifest | None, now: Manifest) -> tuple[MachineChange, ...]:
    """What differs in the manifest from before: machines added, removed, and each field that changed."""
    was = before.machines if before else {}
    found = []
    for name in sorted(was.keys() | now.machines.keys()):
        match was.get(name), now.machines.get(name):
            case None, Machine(address=address):
                found.append(MachineChange(name=name, what=f"added, at {address}"))
            case Machine(address=address), None:
                found.append(MachineChange(name=name, what=f"removed (it was at {address}); nothing on it is touched"))
            case old, new if old != new and old is not None and new is not None:
                fields = [f"{field} {shown(getattr(old, field))} → {shown(getattr(new, field))}"
                          for field in Machine.model_fields if getattr(old, field) != getattr(new, field)]
                found.append(MachineChange(name=name, what=", ".join(fields)))
    return tuple(found)


COLUMNS: Final = ("target", "action", "why", "what changes")


def table(rows: list[dict[str, str]], columns: tuple[str, ...] = COLUMNS) -> str:
    """Rows as text in aligned columns; further lines of a cell are indented below it."""
    if not rows:
        return "nothing to do"
    cells = [[row.get(column, "").split("\n") for column in columns] for row in rows]
    widths = [max(len(column), *(len(row[number][0]) for row in cells)) for number, column in enumerate(columns)]
    lines = ["  ".join(column.upper().ljust(width) for column, width in zip(columns, widths, strict=True)).rstrip()]
    for row in cells:
        lines.append("  ".join(cell[0].ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        lines += [f"    {line}" for cell in row for line in cell[1:] if line.strip()]
    return "\n".join(lines)
