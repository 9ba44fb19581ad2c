"""The change set: what a commit wants, held against the ledger. It touches nothing and starts nothing."""

from collections.abc import Mapping
from enum import StrEnum
from typing import Final

from pydantic import BaseModel, ConfigDict

from toto.ledger import Entry, Snapshot, Target
from toto.manifest import Machine, Manifest


class Why(StrEnum):
    """Why a target is in the change set."""

    NEW = "new"
    CHANGED = "drv changed"
    TESTS = "tests changed"
    INTENT = "intent left open"
    UNREACHABLE = "unreachable last time"
    REVERTED = "reverted last time"


class Action(StrEnum):
    """What a run would do with a target that passes its rehearsal."""

    DEPLOY = "deploy"  # roll out
    VERIFY = "verify"  # run its post-switch tests against the machine; activate nothing
    RECORD = "record"  # another drv, the same closure: only the ledger changes
    REHEARSE = "rehearse only"  # there is no machine for it, or its machine is not toto's to push to


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True)


class Desired(_Value):
    """What a commit wants of one host: the toplevel's drv and output path, and the digest of its tests."""

    name: str
    file: str
    drv: str
    path: str
    tests: str


class Failure(_Value):
    """A host that has no desired identity, because it does not evaluate."""

    name: str
    message: str


class Change(_Value):
    """One target of the change set. `last` is the path of its last good, "" when toto never deployed it."""

    host: Desired
    why: Why
    action: Action
    last: str = ""
    note: str = ""

    @property
    def target(self) -> Target:
        return Target("host", self.host.name)


class ChangeSet(_Value):
    """All that one commit would change, and what it would leave alone and why. It prints as a table.

    `ledger` is the fingerprint of the ledger that it was held against; `whole` is false where it was limited to
    some hosts.
    """

    commit: str
    ledger: str
    whole: bool = True
    changes: tuple[Change, ...] = ()
    unchanged: tuple[str, ...] = ()
    waiting: tuple[str, ...] = ()
    retired: tuple[str, ...] = ()
    failed: tuple[Failure, ...] = ()

    @property
    def empty(self) -> bool:
        return not (self.changes or self.failed or self.retired)

    def rows(self, differences: Mapping[str, str] | None = None) -> list[dict[str, str]]:
        """One row a target: target, action, why, what changes (where `differences` knows it, by host)."""
        shown = differences or {}
        rows = [{"target": str(change.target), "action": str(change.action), "why": _why(change),
                 "what changes": shown.get(change.host.name, "")} for change in self.changes]
        rows += [{"target": f"host/{failure.name}", "action": "none", "why": "does not evaluate",
                  "what changes": failure.message} for failure in self.failed]
        rows += [{"target": f"host/{name}", "action": "forget", "why": "left the manifest",
                  "what changes": "its ledger entry and GC roots go; nothing on it is touched"}
                 for name in self.retired]
        rows += [{"target": f"host/{name}", "action": "none", "why": "waiting", "what changes":
                  f"in the manifest, but there is no hosts/{name}.nix yet"} for name in self.waiting]
        return rows + [{"target": f"host/{name}", "action": "none", "why": "unchanged", "what changes": ""}
                       for name in self.unchanged]

    def __str__(self) -> str:
        return table(self.rows())


def _why(change: Change) -> str:
    return f"{change.why} ({change.note})" if change.note else str(change.why)


def compare(commit: str, desired: list[Desired], failed: list[Failure], manifest: Manifest,
            ledger: Snapshot) -> ChangeSet:
    """The change set of a commit: what is desired, against the ledger (never against the previous push)."""
    changes, unchanged = [], []
    for host in sorted(desired, key=lambda each: each.name):
        change = _compare(host, manifest.machines.get(host.name), ledger)
        if change is None:
            unchanged.append(host.name)
        else:
            changes.append(change)
    known = {host.name for host in desired} | {failure.name for failure in failed}
    return ChangeSet(
        commit=commit, ledger=ledger.fingerprint, changes=tuple(changes), unchanged=tuple(unchanged),
        waiting=tuple(name for name, machine in manifest.machines.items()
                      if name not in known and machine.role == "nixos"),
        retired=tuple(sorted(target.name for target, entry in ledger.entries.items() if target.kind == "host"
                             and target.name not in manifest.machines
                             and not (entry.rehearsed and target.name in known and not entry.good))),
        failed=tuple(sorted(failed, key=lambda each: each.name)))


def _compare(host: Desired, machine: Machine | None, ledger: Snapshot) -> Change | None:
    entry = ledger.get(Target("host", host.name))
    if machine is None or machine.role != "nixos" or machine.deploy != "push":
        return _rehearsed_only(host, entry, "no machine in the manifest" if machine is None else
                               f"role {machine.role}, deploy {machine.deploy}")
    last = entry.good
    path = last.path if last else ""
    if entry.intent is not None:
        return Change(host=host, why=Why.INTENT, action=Action.DEPLOY, last=path,
                      note=f"run {entry.intent.run}, {entry.intent.step}")
    tests_differ = last is not None and last.tests != host.tests
    if last is not None and last.path == host.path:
        if last.identity != host.drv:
            return Change(host=host, why=Why.CHANGED, note="the same closure", last=path,
                          action=Action.VERIFY if tests_differ else Action.RECORD)
        return Change(host=host, why=Why.TESTS, action=Action.VERIFY, last=path) if tests_differ else None
    return Change(host=host, why=_again(entry, Why.CHANGED if last else Why.NEW), action=Action.DEPLOY, last=path,
                  note=_since(entry))


def _rehearsed_only(host: Desired, entry: Entry, note: str) -> Change | None:
    seen = entry.rehearsed
    if seen is not None and (seen.identity, seen.tests) == (host.drv, host.tests):
        return None
    why = Why.NEW if seen is None else Why.CHANGED if seen.identity != host.drv else Why.TESTS
    return Change(host=host, why=why, action=Action.REHEARSE, note=note)


def _again(entry: Entry, otherwise: Why) -> Why:
    return Why.UNREACHABLE if entry.unreachable else Why.REVERTED if entry.reverted else otherwise


def _since(entry: Entry) -> str:
    note = entry.unreachable or entry.reverted
    return note.at if note else ""


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
