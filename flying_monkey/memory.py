"""What a machine remembers of the documents that it accepted, so that none is obeyed twice or out of order.

One small file, replaced in one step and written through to the disk before each step of an update: whenever the power
goes, the machine knows what it had begun.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Literal, Self, TypeAlias, get_args

from flying_monkey.desired import Desired

Step: TypeAlias = Literal["accepted", "fetched", "prepared", "tried", "kept", "back", "finished"]
"""the newest step of an update that the machine has begun"""

_MOST: Final = 65_536  # bytes of the file


class Refused(Exception):
    """A genuine document is not for this machine, or not for now."""


class Lost(Exception):
    """The memory cannot be read or written. Nothing may be changed then: an old document would pass for a new one."""


@dataclass(frozen=True)
class Memory:
    """What the machine remembers; `Memory()` is that of a machine which has never had a document.

    `activation` is the name of the newest activation that a document began, as `activate.sh` has it.
    `digest` is that of the newest document's text, `issued` the newest time at which one was issued, in seconds since
    1970.
    """

    serial: int = 0
    digest: str = ""
    issued: int = 0
    step: Step = "finished"
    activation: str = ""

    @classmethod
    def load(cls, file: Path) -> Self:
        """What `file` holds. Raises `Lost` for one that is there and cannot be understood."""
        try:
            with file.open("rb") as source:
                found = json.loads(source.read(_MOST))
            memory = cls(**found)
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise Lost(f"{file}: {error}") from None
        sound = type(memory.serial) is int and type(memory.issued) is int and isinstance(memory.digest, str)
        sound = sound and isinstance(memory.activation, str)
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
        issued = max(self.issued, int(document.issued.timestamp()))
        return replace(self, serial=document.serial, digest=digest, issued=issued, step="accepted")
