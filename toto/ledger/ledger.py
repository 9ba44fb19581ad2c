"""The ledger: what is deployed where, and what is being deployed.

A branch, `refs/toto/ledger`, of the infra repo on toto: one JSON file a target, one commit a change, so
that `git log refs/toto/ledger` reads as the deployment history. Every write is a compare-and-swap of the
ref (`toto.infra_repo.branch`), and a change is a function of the entry as it stands, so several writers are
safe: whoever loses the race looks at the new entry and decides again. An open intent belongs to one run;
another run that tries to write over it is refused (`TargetBusy`, `LostTarget`): that is the fence behind
every lock.
"""

import hashlib
import json
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self, TypeAlias, overload

from gitdb.exc import BadName
from pydantic import BaseModel, ConfigDict, SerializeAsAny, ValidationError

from toto.base import process
from toto.base.errors import TotoError
from toto.infra_repo import branch, git
from toto.ledger.target import Target

REF: Final = "refs/toto/ledger"


class LedgerError(TotoError):
    """The ledger cannot be read or written."""


class TargetBusy(LedgerError):
    """Another run has an open intent on this target."""


class LostTarget(LedgerError):
    """This run's intent is gone: another run settled it. Nothing more may be done to the target."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class KindRecord(BaseModel):
    """A record that each kind extends by fields of its own.

    The ledger keeps those fields and does not know them; the kind reads them by `of`, which leaves out what it does
    not know: older versions wrote every kind's fields for every kind.
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
        """The same record as the kind knows it; None for None. Raises `LedgerError` where it is not of this kind."""
        if record is None or type(record) is cls:
            return record
        try:
            return cls.model_validate(record.model_dump())
        except ValidationError as error:
            raise LedgerError(f"a record in {REF} cannot be read: {error}") from error


class Deployed(KindRecord):
    """What a target is, or was, by toto's own roll-out: its identity and where that came from.

    `identity` is the hash that changes when the target does (a host's toplevel drv).
    """

    identity: str
    commit: str
    run: str
    at: str


class Before(KindRecord):
    """What was there before a target was touched, as read from it. Each kind says what that is."""


class Intent(_Record):
    """A target is being touched. `owner` tells whether the process that does it is still alive."""

    desired: SerializeAsAny[Deployed]
    before: SerializeAsAny[Before]
    run: str
    owner: str
    at: str
    step: str = "roll out"
    left_by: str = ""
    """the run that died over it, once another has taken it over"""


class Note(_Record):
    """Something about a target that a later run needs: why it was reverted, since when it cannot be reached."""

    identity: str
    commit: str
    run: str
    at: str
    why: str


class Entry(_Record):
    """All that the ledger says of one target.

    `good` is the last good. `previous` and `before` are what it was before that, as the ledger knew it and
    as the machine told it: to them goes a revert of the very run that made it good.
    `rehearsed` is the identity of a host that is rehearsed only.
    """

    good: SerializeAsAny[Deployed] | None = None
    previous: SerializeAsAny[Deployed] | None = None
    before: SerializeAsAny[Before] | None = None
    intent: Intent | None = None
    reverted: Note | None = None
    unreachable: Note | None = None
    rehearsed: SerializeAsAny[Deployed] | None = None

    def touched_by(self, run: str) -> bool:
        """Whether the target is what a run is making, or has made, of it."""
        return (self.intent is not None and self.intent.run == run) or (self.good is not None and self.good.run == run)


@dataclass(frozen=True)
class Snapshot:
    """The ledger as it stood at one of its commits ("" before the first)."""

    commit: str
    entries: dict[Target, Entry] = field(default_factory=dict)

    def get(self, target: Target) -> Entry:
        return self.entries.get(target, Entry())

    @property
    def fingerprint(self) -> str:
        """Changes when what is deployed, or known to be rehearsed, does; not with intents and notes."""
        origin = {"commit", "run", "at"}
        what = sorted((str(target), *(each and each.model_dump_json(exclude=origin)
                                      for each in (entry.good, entry.rehearsed)))
                      for target, entry in self.entries.items() if entry.good or entry.rehearsed)
        return hashlib.sha256(repr(what).encode()).hexdigest()

    @property
    def open_intents(self) -> dict[Target, Intent]:
        return {target: entry.intent for target, entry in self.entries.items() if entry.intent}


def owner() -> str:
    """This process, as an intent names it: machine, boot, PID and start time."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{socket.gethostname()}/{boot}/{process.owner()}"


def owner_lives(who: str) -> bool | None:
    """Whether the owner of an intent is still there; None where it ran on another machine."""
    host, _, rest = who.partition("/")
    boot, _, pid = rest.partition("/")
    if host != socket.gethostname():
        return None
    return boot == owner().split("/")[1] and process.lives(pid)


Change: TypeAlias = Callable[[Entry], Entry | None]


@dataclass(frozen=True)
class Ledger:
    """The ledger of one infra repo."""

    repo: Path

    def read(self) -> Snapshot:
        """The ledger as it stands. Raises `LedgerError` for a file that does not parse, naming it."""
        with git.open_repo(self.repo) as repo:
            try:
                head = repo.commit(REF)
            except (BadName, ValueError):
                return Snapshot("")
            entries = {}
            for folder in head.tree.trees:
                for blob in folder.blobs:
                    target, entry = self._parsed(str(blob.path), blob.data_stream.read())
                    entries[target] = entry
            return Snapshot(head.hexsha, entries)

    async def write(self, target: Target, change: Change, message: str) -> Entry | None:
        """Change the entry of one target: `change` gets it as it stands and returns the new one (None: remove it).

        Called again when another writer was first; what it raises goes through, with nothing written.
        Returns the entry as written. Raises `LedgerError` when the ledger cannot be written, or read.
        """
        path = f"{target.kind}/{target.name}.json"
        written: Entry | None = None

        def edit(texts: Mapping[str, str]) -> dict[str, str | None]:
            nonlocal written
            old = self._parsed(path, texts[path])[1] if path in texts else None
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
            await branch.change(self.repo, REF, [path], edit, message)
        except branch.NotWritten as error:
            raise LedgerError(f"the ledger could not be written: {error.why}", target=str(target),
                              hint=error.hint) from error
        return written

    def _parsed(self, path: str, text: str | bytes) -> tuple[Target, Entry]:
        kind, _, name = path.partition("/")
        try:
            return Target(kind, name.removesuffix(".json")), Entry.model_validate_json(text)
        except ValidationError as error:
            raise LedgerError(f"{path} in {REF} cannot be read: {error}", target=str(self.repo),
                              hint=f"look at `git log -p {REF} -- {path}`, and point the ref "
                                   "at the last commit that was whole") from error
