"""The change set: the differences between what a commit wants and what the ledger says is deployed.

This module defines the value and prints it as a table. `toto.plan.compare` computes it.
"""

import re
from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import Final

from pydantic import BaseModel, ConfigDict, SerializeAsAny

from toto.base.model import shown
from toto.infra_repo.manifest import Machine, Manifest
from toto.ledger.ledger import Deployed, Entry
from toto.ledger.target import Target
from toto.plan.alike import Alike, alike, all_of, listed

LISTED: Final = 20  # unchanged targets that have a row each; of more there is only the number


class Why(StrEnum):
    """The reason why a target is in the change set."""

    NEW = "new"
    CHANGED = "drv changed"
    FILES = "files changed"  # the files that a terraform root's or a release's identity is computed from
    TESTS = "tests changed"
    INTENT = "intent left open"
    MOVED = "at a new address"
    UNREACHABLE = "unreachable last time"
    REVERTED = "reverted last time"
    REBOOT = "reboot needed"
    DRIFT = "drifted"
    FORCED = "forced"


class Action(StrEnum):
    """What a run does with a target that passes its rehearsal."""

    DEPLOY = "deploy"  # roll it out
    VERIFY = "verify"  # run its post-switch tests against the machine, without an activation
    RECORD = "record"  # the drv differs and the closure is the same: only the ledger changes
    REHEARSE = "rehearse only"  # it has no machine, or toto does not push to its machine


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True)


class Desired(_Value):
    """What a commit wants a target to be. Kinds add fields of their own.

    `file` is the file in the repo that defines the target. `identity` is a hash that changes when the target does.
    """

    model_config = ConfigDict(extra="allow")  # keeps a kind's own fields where the kind is not known

    target: Target
    file: str
    identity: str


class Failure(_Value):
    """A target that does not evaluate, so that its desired identity is not known."""

    target: Target
    message: str

    @property
    def where(self) -> str:
        """The first line of the message, without what the plan says anyway: `hosts/web1.nix:3`."""
        first = self.message.removeprefix(f"{self.target.label}: ").split("\n", 1)[0].removesuffix(":")
        place = re.fullmatch(r"does not evaluate \((.*)\)", first)
        return place[1] if place else first


class Change(_Value):
    """One target of the change set.

    `last` is its last good, None when toto has never deployed it. `note` adds details to `why`. `held` is why the
    target would be rehearsed but not rolled out now: it is frozen, or its window is closed; "" otherwise.
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
    """A machine whose entry in the manifest differs from the last good commit's. This alone deploys nothing."""

    name: str
    what: str


class Told(_Value):
    """Something in a commit that is not deployed although it looks as if it were: where, what, and what to do."""

    place: str
    what: str
    why: str = "not found"


class ChangeSet(_Value):
    """Everything that a commit would change, and what it would not change and why. It prints as a table.

    `ledger` is the fingerprint of the ledger that the commit was compared with. `whole` is False when the run was
    limited to some targets. `waiting` are machines whose host file does not exist yet.
    """

    commit: str
    ledger: str
    whole: bool = True
    changes: tuple[Change, ...] = ()
    unchanged: tuple[Target, ...] = ()
    waiting: tuple[str, ...] = ()
    retired: tuple[Target, ...] = ()
    failed: tuple[Failure, ...] = ()
    excused: tuple[Failure, ...] = ()
    """failures that stop nothing: of hosts that the manifest does not list"""
    machines: tuple[MachineChange, ...] = ()
    told: tuple[Told, ...] = ()
    nothing: str = ""
    """why the commit deploys nothing at all, whatever changes; "" when it does"""
    warnings: Mapping[str, tuple[str, ...]] = {}
    """what evaluations warned of, and the hosts that they were about"""

    @property
    def empty(self) -> bool:
        return not (self.changes or self.failed or self.retired)

    def rows(self, differences: Mapping[str, str] | None = None) -> list[dict[str, str]]:
        """One row for each target: target, action, why, what changes. `differences` has the last column by label."""
        shown = differences or {}
        rows = [_row(f"machine/{each.name}", "none", "manifest", each.what) for each in self.machines]
        rows += [
            _row(
                change.target,
                f"{change.action}{', held back' if change.held else ''}",
                _why(change),
                shown.get(change.label, ""),
            )
            for change in self.changes
        ]
        rows += [_row(each.target, "none", "does not evaluate", each.where) for each in self.failed]
        rows += [
            _row(each.target, "none", "does not evaluate, a warning: not in machines.yaml", each.where)
            for each in self.excused
        ]
        rows += [
            _row(target, "retire", "left the commit", "its ledger entry goes; nothing of it is touched")
            for target in self.retired
        ]
        rows += [
            _row(f"host/{name}", "none", "waiting", f"in the manifest, but there is no hosts/{name}.nix yet")
            for name in self.waiting
            if f"host/{name}" not in {each.place for each in self.told}
        ]
        rows += [_row(each.place, "none", each.why, each.what) for each in self.told]
        if len(self.unchanged) > LISTED:
            return [*rows, _row(f"{len(self.unchanged)} targets", "none", "unchanged", "")]
        return rows + [_row(target, "none", "unchanged", "") for target in self.unchanged]

    @property
    def errors(self) -> list[Alike]:
        """What does not evaluate, and why; what is the same for several targets is there once."""
        return alike((each.target.label, each.message) for each in (*self.failed, *self.excused))

    def text(self, differences: Mapping[str, str] | None = None) -> str:
        """The plan as `str`, then each error in full."""
        errors = [[f"\n{listed(each.names)}: {each.text}", all_of(each.names)] for each in self.errors]
        return "\n".join([self._table(differences), *(line for error in errors for line in error if line)])

    def _table(self, differences: Mapping[str, str] | None = None) -> str:
        """The rows as a table, below a line that says so when nothing is deployed at all; then the warnings."""
        warned = [f"{each} ({listed(names)})" for each, names in self.warnings.items()]
        return "\n".join(filter(None, (self.nothing, table(self.rows(differences)), *warned)))

    def __str__(self) -> str:
        return self._table()


def _row(target: Target | str, action: str, why: str, what: str) -> dict[str, str]:
    return dict(zip(COLUMNS, (str(target), action, why, what), strict=True))


def _why(change: Change) -> str:
    said = [note for note in (change.note, change.held) if note]
    return f"{change.why} ({'; '.join(said)})" if said else str(change.why)


def deploy(desired: Desired, entry: Entry, changed: Why) -> Change:
    """The change of a target that must be rolled out. `changed` is the reason when the ledger has no better one."""
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
    """What changed in the manifest: machines that were added or removed, and each field that differs."""
    was = before.machines if before else {}
    found = []
    for name in sorted(was.keys() | now.machines.keys()):
        match was.get(name), now.machines.get(name):
            case None, Machine(address=address):
                found.append(MachineChange(name=name, what=f"added, at {address}"))
            case Machine(address=address), None:
                found.append(MachineChange(name=name, what=f"removed (it was at {address}); nothing on it is touched"))
            case old, new if old != new and old is not None and new is not None:
                found.append(MachineChange(name=name, what=", ".join(_fields(old, new))))
    return tuple(found)


def _fields(old: BaseModel, new: BaseModel, within: str = "") -> Iterator[str]:
    """Each field that differs, such as `ssh.port 22 → 2222`."""
    for field in type(old).model_fields:
        before, after = getattr(old, field), getattr(new, field)
        if isinstance(before, BaseModel) and isinstance(after, BaseModel):
            yield from _fields(before, after, f"{within}{field}.")
        elif before != after:
            yield f"{within}{field} {_in_words(before)} → {_in_words(after)}"


def _in_words(value: object) -> str:
    if isinstance(value, list | tuple):
        return f"({', '.join(map(shown, value))})"
    return shown(value)


COLUMNS: Final = ("target", "action", "why", "what changes")


def table(rows: list[dict[str, str]], columns: tuple[str, ...] = COLUMNS) -> str:
    """Rows as text in aligned columns. Further lines of a cell go below its row, indented."""
    if not rows:
        return "nothing to do"
    cells = [[row.get(column, "").split("\n") for column in columns] for row in rows]
    widths = [max(len(column), *(len(row[number][0]) for row in cells)) for number, column in enumerate(columns)]
    lines = ["  ".join(column.upper().ljust(width) for column, width in zip(columns, widths, strict=True)).rstrip()]
    for row in cells:
        lines.append("  ".join(cell[0].ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        lines += [f"    {line}" for cell in row for line in cell[1:] if line.strip()]
    return "\n".join(lines)
