"""The ledger: what is deployed where, and what is being deployed.

It is the branch `refs/toto/ledger` of the infra repo on toto: one JSON file for each target, one commit for
each change, so that `git log refs/toto/ledger` is the deployment history. Every write is a compare-and-swap
of the ref (`toto.infra_repo.branch`), and a change is a function of the current entry, so several writers
are safe: the one that loses the race gets the new entry and decides again. An open intent belongs to one
run; a different run that tries to overwrite it is refused (`TargetBusy`, `LostTarget`). So the ledger stays
right even when a lock fails.
"""

import hashlib
import json
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self, TypeAlias, overload

from pydantic import BaseModel, ConfigDict, SerializeAsAny, ValidationError

from toto.base import process
from toto.base.errors import TotoError
from toto.infra_repo import branch, git
from toto.ledger.target import Target

REF: Final = "refs/toto/ledger"


class LedgerError(TotoError):
    """The ledger cannot be read or written."""


class TargetBusy(LedgerError):
    """A different run has an open intent on this target."""


class LostTarget(LedgerError):
    """This run's intent is gone, because a different run settled it. This run must not touch the target any more."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class KindRecord(BaseModel):
    """A record that each kind extends with fields of its own.

    The ledger stores those fields without knowing them. The kind reads them with `of`, which ignores fields that the
    kind does not know, because older versions wrote every kind's fields for every kind.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    @overload
    @classmethod
    def of(cls, record: "KindRecord") -> Self: ...
    @overload
    @classmethod
    def of(cls, record: None) -> None: ...
    @classmethod
    def of(cls, record: "KindRecord | None") -> Self | None:
        """The record with the kind's own fields; None for None. Raises `LedgerError` when it is not of this kind."""
        if record is None or type(record) is cls:
            return record
        try:
            return cls.model_validate(record.model_dump())
        except ValidationError as error:
            raise LedgerError(f"a record in {REF} cannot be read: {error}") from error


class Deployed(KindRecord):
    """What toto's roll-out made of a target. `commit` and `run` say where it came from, `at` when (UTC, ISO 8601).

    `identity` is a hash that changes when the target does (for a host, the drv of its toplevel).
    """

    identity: str
    commit: str
    run: str
    at: str


class Before(KindRecord):
    """What a target was before it was touched, as read from the target itself. Each kind has its own fields."""


class Intent(_Record):
    """A target is being changed. `owner` identifies the process that changes it: see `owner_lives`."""

    desired: SerializeAsAny[Deployed]
    before: SerializeAsAny[Before]
    run: str
    owner: str
    at: str
    step: str = "roll out"
    left_by: str = ""
    """the run that died and left the intent, once a different run has taken it over"""


class Note(_Record):
    """A note on a target for a later run: why it was reverted, or since when toto cannot connect to it."""

    identity: str
    commit: str
    run: str
    at: str
    why: str


class Accepted(_Record):
    """Who took the present state of a target as good, `what` that was, and why."""

    by: str
    why: str
    what: str
    run: str
    at: str


class Frozen(_Record):
    """Who says that a target is not to be rolled out, why, and since when (UTC)."""

    by: str
    why: str
    at: str = ""

    def __str__(self) -> str:
        return f"frozen by {self.by}: {self.why}"


class Entry(_Record):
    """Everything that the ledger says about one target.

    `good` is the last good. `previous` (from the ledger) and `before` (read from the target itself) are what the
    target was before that: when the run that made it good fails later, it reverts the target to them.
    `rehearsed` is what last passed its rehearsal, for a host that is only rehearsed.
    """

    good: SerializeAsAny[Deployed] | None = None
    previous: SerializeAsAny[Deployed] | None = None
    before: SerializeAsAny[Before] | None = None
    intent: Intent | None = None
    reverted: Note | None = None
    unreachable: Note | None = None
    rehearsed: SerializeAsAny[Deployed] | None = None
    accepted: Accepted | None = None
    """how `good` came to be, when that was not by a roll-out"""
    frozen: Frozen | None = None
    """it is rehearsed, and not rolled out until that is taken back"""

    def touched_by(self, run: str) -> bool:
        """Whether a run is changing the target, or has made it what it is."""
        return (self.intent is not None and self.intent.run == run) or (self.good is not None and self.good.run == run)


@dataclass(frozen=True)
class Snapshot:
    """The ledger at one of its commits ("" before the first)."""

    commit: str
    entries: dict[Target, Entry] = field(default_factory=dict)
    blobs: dict[Target, str] = field(default_factory=dict, repr=False, compare=False)
    """git's names for what the entries were read from"""

    def get(self, target: Target) -> Entry:
        return self.entries.get(target, Entry())

    @property
    def fingerprint(self) -> str:
        """A hash (SHA-256, hex) of what is deployed and rehearsed. It does not change with intents and notes."""
        origin = {"commit", "run", "at"}
        what = sorted(
            (str(target), *(each and each.model_dump_json(exclude=origin) for each in (entry.good, entry.rehearsed)))
            for target, entry in self.entries.items()
            if entry.good or entry.rehearsed
        )
        return hashlib.sha256(repr(what).encode()).hexdigest()

    @property
    def open_intents(self) -> dict[Target, Intent]:
        return {target: entry.intent for target, entry in self.entries.items() if entry.intent}


def owner() -> str:
    """This process, as an intent names it: machine, boot id, PID and start time."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{socket.gethostname()}/{boot}/{process.owner()}"


def owner_lives(who: str) -> bool | None:
    """Whether the owner of an intent is still alive; None when it ran on a different machine."""
    host, _, rest = who.partition("/")
    boot, _, pid = rest.partition("/")
    if host != socket.gethostname():
        return None
    return boot == owner().split("/")[1] and process.lives(pid)


def _commits(entry: Entry | None) -> list[str]:
    """The commits that an entry names: what is deployed, what a revert has to read, what people are told of."""
    if entry is None:
        return []
    desired = entry.intent.desired if entry.intent else None
    records = (entry.good, entry.previous, desired, entry.rehearsed, entry.reverted, entry.unreachable)
    return [record.commit for record in records if record is not None]


Change: TypeAlias = Callable[[Entry], Entry | None]


def _target(path: str) -> Target:
    kind, _, name = path.partition("/")
    return Target(kind, name.removesuffix(".json"))


def _path(target: Target) -> str:
    return f"{target.kind}/{target.name}.json"


_read: Final[dict[Path, Snapshot]] = {}  # the newest snapshot of each repo's ledger that this process has read


@dataclass(frozen=True)
class Ledger:
    """The ledger of one infra repo."""

    repo: Path

    def read(self) -> Snapshot:
        """The ledger as it is now. What this process has read of it before, and has not changed, is not read again.

        Raises `LedgerError`, with the file's name, for a file that does not parse.
        """
        commit, known = git.tip(self.repo, REF), _read.get(self.repo, Snapshot(""))
        if commit == known.commit:
            return known
        found = Snapshot(commit)
        with git.open_repo(self.repo) as repo:
            for path, blob in (git.blobs(repo, commit) if commit else {}).items():
                target = _target(path)
                found.blobs[target] = blob
                if known.blobs.get(target) == blob:
                    found.entries[target] = known.entries[target]
                else:
                    found.entries[target] = self._parsed(path, git.blob(repo, blob))
        _read[self.repo] = found
        return found

    def get(self, target: Target) -> Entry:
        """The entry of one target as it is now. Raises `LedgerError` when it does not parse."""
        path = _path(target)
        texts = branch.read(self.repo, REF, [path])
        return self._parsed(path, texts[path]) if path in texts else Entry()

    async def write(self, target: Target, change: Change, message: str) -> Entry | None:
        """Change the entry of one target and return it. `change` gets the current entry and returns the new one.

        `change` returns None to remove the entry. It is called again when a different writer was faster. What it raises
        passes through, and nothing is written. `message` is that of the commit.
        Raises `LedgerError` when the ledger cannot be written or read.
        """
        path = _path(target)
        written: Entry | None = None

        def edit(texts: Mapping[str, str]) -> dict[str, str | None]:
            nonlocal written
            old = self._parsed(path, texts[path]) if path in texts else None
            try:
                new = change(old or Entry())
            except LedgerError as error:
                error.target = error.target or str(target)
                raise
            if new == old or (new is not None and new.model_dump() == (old or Entry()).model_dump()):
                written = old
                return {}
            written = new
            if new is None:
                return {path: None}
            return {path: json.dumps(new.model_dump(exclude_none=True), indent=1, sort_keys=True) + "\n"}

        try:
            await branch.change(self.repo, REF, [path], edit, message, named=lambda: _commits(written))
        except branch.NotWritten as error:
            raise LedgerError(
                f"the ledger could not be written: {error.why}", target=str(target), hint=error.hint
            ) from error
        return written

    def _parsed(self, path: str, text: str | bytes) -> Entry:
        try:
            return Entry.model_validate_json(text)
        except ValidationError as error:
            raise LedgerError(
                f"{path} in {REF} cannot be read: {error}",
                target=str(self.repo),
                hint=f"see `git log -p {REF} -- {path}`, and set the ref to the last commit that is valid",
            ) from error
