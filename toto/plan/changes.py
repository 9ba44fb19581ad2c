"""The change set: what a commit wants, held against the ledger. It touches nothing and starts nothing."""

from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Final

from pydantic import BaseModel, ConfigDict

from toto.base.model import shown
from toto.infra_repo.manifest import Machine, Manifest
from toto.ledger.ledger import Deployed, Entry, Snapshot
from toto.ledger.target import KINDS, Target


class Why(StrEnum):
    """Why a target is in the change set."""

    NEW = "new"
    CHANGED = "drv changed"
    FILES = "files changed"  # of a terraform root or a release: whatever its identity is made of
    TESTS = "tests changed"
    INTENT = "intent left open"
    UNREACHABLE = "unreachable last time"
    REVERTED = "reverted last time"
    AGAIN = "asked for again"


class Action(StrEnum):
    """What a run would do with a target that passes its rehearsal."""

    DEPLOY = "deploy"  # roll out
    VERIFY = "verify"  # run its post-switch tests against the machine; activate nothing
    RECORD = "record"  # another drv, the same closure: only the ledger changes
    REHEARSE = "rehearse only"  # there is no machine for it, or its machine is not toto's to push to


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True)


class Desired(_Value):
    """What a commit wants of one target, and the file that says so.

    `identity` is the hash that changes when the target does; `path` and `tests` are a host's: the output path of its
    toplevel, and the digest of its tests.
    """

    target: Target
    file: str
    identity: str
    path: str = ""
    tests: str = ""


class Failure(_Value):
    """A target that has no desired identity, because it does not evaluate."""

    target: Target
    message: str


class Change(_Value):
    """One target of the change set. `last` is its last good, None when toto never deployed it.

    `held` is why it would not be rolled out now, though it is rehearsed: it is frozen, or its window is closed.
    """

    desired: Desired
    why: Why
    action: Action
    last: Deployed | None = None
    note: str = ""
    held: str = ""

    @property
    def target(self) -> Target:
        return self.desired.target

    @property
    def label(self) -> str:
        return self.target.label


class MachineChange(_Value):
    """A machine that is in another way in the manifest than in that of the last good commit. It deploys nothing."""

    name: str
    what: str


class ChangeSet(_Value):
    """All that one commit would change, and what it would leave alone and why. It prints as a table.

    `ledger` is the fingerprint of the ledger that it was held against; `whole` is false where it was limited to
    some targets.
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
        rows += [_row(target, "forget", "left the manifest" if target.kind == "host" else "left the repo",
                      "its ledger entry goes; nothing of it is touched") for target in self.retired]
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


def compare(commit: str, desired: Iterable[Desired], failed: Iterable[Failure], manifest: Manifest,
            ledger: Snapshot, *, again: bool = False) -> ChangeSet:
    """The change set of a commit: what is desired, against the ledger (never against the previous push).

    The order is that of a roll-out: hosts, terraform roots, releases. With `again`, what toto deploys is in it though
    nothing of it has changed.
    """
    changes, unchanged = [], []
    wanted = sorted(desired, key=lambda each: _order(each.target))
    broken = sorted(failed, key=lambda each: _order(each.target))
    for each in wanted:
        entry = ledger.get(each.target)
        change = (_of_host(each, manifest.machines.get(each.target.name), entry) if each.target.kind == "host"
                  else _of_files(each, entry))
        if change is None and again and entry.good is not None:
            change = Change(desired=each, why=Why.AGAIN, action=Action.DEPLOY, last=entry.good)
        if change is None:
            unchanged.append(each.target)
        else:
            changes.append(change)
    known = {each.target for each in wanted} | {each.target for each in broken}
    return ChangeSet(
        commit=commit, ledger=ledger.fingerprint, changes=tuple(changes), unchanged=tuple(unchanged),
        waiting=tuple(name for name, machine in manifest.machines.items()
                      if Target("host", name) not in known and machine.role == "nixos"),
        retired=tuple(sorted(target for target, entry in ledger.entries.items()
                             if _retired(target, entry, known, manifest))),
        failed=tuple(broken))


def _order(target: Target) -> tuple[int, str]:
    return KINDS.index(target.kind), target.name


def _retired(target: Target, entry: Entry, known: set[Target], manifest: Manifest) -> bool:
    if target.kind != "host":
        return target not in known
    rehearsed_only = entry.rehearsed is not None and entry.good is None and target in known
    return target.name not in manifest.machines and not rehearsed_only


def _of_host(host: Desired, machine: Machine | None, entry: Entry) -> Change | None:
    if machine is None or machine.role != "nixos" or machine.deploy != "push":
        return _rehearsed_only(host, entry, "no machine in the manifest" if machine is None else
                               f"role {machine.role}, deploy {machine.deploy}")
    last = entry.good
    tests_differ = last is not None and last.tests != host.tests
    if entry.intent is None and last is not None and last.path == host.path:
        if last.identity != host.identity:
            return Change(desired=host, why=Why.CHANGED, note="the same closure", last=last,
                          action=Action.VERIFY if tests_differ else Action.RECORD)
        return Change(desired=host, why=Why.TESTS, action=Action.VERIFY, last=last) if tests_differ else None
    return _deploy(host, entry, Why.CHANGED)


def _of_files(desired: Desired, entry: Entry) -> Change | None:
    if entry.intent is None and entry.good is not None and entry.good.identity == desired.identity:
        return None
    return _deploy(desired, entry, Why.FILES)


def _deploy(desired: Desired, entry: Entry, changed: Why) -> Change:
    if entry.intent is not None:
        why, note = Why.INTENT, f"run {entry.intent.run}, {entry.intent.step}"
    elif entry.unreachable is not None:
        why, note = Why.UNREACHABLE, entry.unreachable.at
    elif entry.reverted is not None:
        why, note = Why.REVERTED, entry.reverted.at
    else:
        why, note = changed if entry.good else Why.NEW, ""
    return Change(desired=desired, why=why, action=Action.DEPLOY, last=entry.good, note=note)


def _rehearsed_only(host: Desired, entry: Entry, note: str) -> Change | None:
    seen = entry.rehearsed
    if seen is not None and (seen.identity, seen.tests) == (host.identity, host.tests):
        return None
    why = Why.NEW if seen is None else Why.CHANGED if seen.identity != host.identity else Why.TESTS
    return Change(desired=host, why=why, action=Action.REHEARSE, note=note)


def of_machines(before: Manifest | None, now: Manifest) -> tuple[MachineChange, ...]:
    """What is another way in the manifest than before: machines added, removed, and each field that changed."""
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
