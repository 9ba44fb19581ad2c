"""What a machine remembers of the documents that it accepted, so that none is obeyed twice or out of order.

One small file, replaced in one step and written through to the disk before each step of an update: whenever the power
goes, the machine knows what it had begun.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal, Self, TypeAlias, get_args

from flying_monkey.desired import Desired

Step: TypeAlias = Literal["accepted", "fetched", "prepared", "tried", "kept", "back", "finished"]
"""the newest step of an update that the machine has begun"""

_MOST: Final = 1_000_000  # bytes of the file
_NEEDED: Final = ("serial", "digest", "issued", "step")


class Refused(Exception):
    """A genuine document is not for this machine, or not for now."""


class Lost(Exception):
    """The memory cannot be read or written. Nothing may be changed then: an old document would pass for a new one."""


@dataclass(frozen=True)
class Memory:
    """What the machine remembers; `Memory()` is that of a machine which has never had a document.

    Of all documents: `issued` is the newest time at which one was issued, in seconds since 1970, and `kept` the path of
    the system that was kept last, or gone back to. Of the newest: `digest` is that of its `text`. The rest is of the
    update that is under way, which may begin with a document to try and go on with one to keep, or of the last one.
    """

    serial: int = 0
    digest: str = ""
    issued: int = 0
    step: Step = "finished"
    activation: str = ""
    """the name of the newest activation of this update, as `activate.sh` has it"""
    text: str = ""
    kept: str = ""
    boot: str = ""
    """the boot (the kernel's name for it) in which the newest document was accepted"""
    state: str = "none"
    """as a status says it: `none`, `running`, `done N`, `back N`"""
    error: str = ""
    system: str = ""
    """what ran before the update"""
    profile: str = ""
    """what the next boot would have begun before the update"""
    begun: int = 0
    """when the activation began, in seconds since the boot"""
    prepared: bool = False
    """whether hooks of `prepare.d` were begun, and so those of `finish.d` are to run"""
    owed: tuple[str, ...] = ()
    """the hooks of `finish.d` that are to run then"""
    hooks: Mapping[str, str] = field(default_factory=dict)
    """what became of each hook: "" for one that did well"""
    checks: Mapping[str, str] = field(default_factory=dict)
    """the same of each check"""
    units: tuple[str, ...] = ()
    """units that had failed before the update"""
    reboots: str = ""
    """the boot in which the update began to reboot the machine"""

    @classmethod
    def load(cls, file: Path) -> Self:
        """What `file` holds. Raises `Lost` for one that is there and cannot be understood.

        What is not known is passed over: a newer agent may have written it, which the machine has gone back from.
        """
        fresh = cls()
        try:
            with file.open("rb") as source:
                found = json.loads(source.read(_MOST))
            if missing := [each for each in _NEEDED if each not in found]:
                raise ValueError(f"{missing[0]} is missing")
            known: dict[str, Any] = {each.name: found[each.name] for each in fields(cls) if each.name in found}
            for name, value in known.items():
                known[name] = tuple(value) if isinstance(value, list) else value
            memory = cls(**known)
        except FileNotFoundError:
            return fresh
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise Lost(f"{file}: {error}") from None
        sound = all(type(getattr(memory, each.name)) is type(getattr(fresh, each.name)) for each in fields(cls))
        if not sound or memory.step not in get_args(Step):
            raise Lost(f"{file}: it is not what this agent wrote")
        return memory

    def save(self, file: Path) -> None:
        """Write it to the disk; when this returns, a power cut does not undo it. Raises `Lost`."""
        fresh = file.with_name(f".{file.name}.new")
        try:
            with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as sink:
                sink.write(json.dumps(asdict(self)).encode())
                sink.flush()
                os.fsync(sink.fileno())
            fresh.replace(file)
            folder = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise Lost(f"{file}: {error.strerror}") from None

    def now(self, clock: float, built: float) -> datetime:
        """The machine's time: a clock that is behind what it has seen signed, or behind its agent's build, is wrong.

        `clock` and `built` are in seconds since 1970.
        """
        return datetime.fromtimestamp(int(max(clock, built, self.issued)), UTC)

    def accept(self, document: Desired, repo: str, name: str, host_keys: list[str], now: datetime) -> Self:
        """What the machine remembers once it has accepted `document`, which is genuine.

        The same document again is accepted, and changes nothing: who handed it over may not have heard the answer.
        Raises `Refused`.
        """
        if document.repo != repo:
            raise Refused(f"it is of the repo {document.repo}; this machine obeys {repo}")
        if document.machine.name != name or document.machine.host_key not in host_keys:
            raise Refused(
                f"it is for the machine {document.machine.name}; this one is {name}, or has a different host key"
            )
        digest = hashlib.sha256(document.write()).hexdigest()
        if (document.serial, digest) == (self.serial, self.digest):
            return self
        if document.serial <= self.serial:
            raise Refused(f"its serial is {document.serial}, and this machine has had {self.serial}")
        if document.expires <= now:
            raise Refused(f"it expired at {document.expires:%Y-%m-%d %H:%M:%S} UTC")
        before = type(self)(kept=self.kept) if self.step == "finished" else self
        return replace(
            before,
            serial=document.serial,
            digest=digest,
            issued=max(self.issued, int(document.issued.timestamp())),
            step="accepted",
            text=document.write().decode(),
            state="running",
            error="",
        )


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """To the end of the block nobody else changes the memory in `file`. Raises `Lost`."""
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = (file.parent / "lock").open("w")
    except OSError as error:
        raise Lost(f"{file}: {error.strerror}") from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
