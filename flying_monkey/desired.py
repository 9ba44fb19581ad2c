"""The desired document: the signed JSON that says what one machine should be.

Toto hands it over (push), or the machine fetches it (pull); it is the same document, and what obeys it is the same
helper. This module reads and writes it, and decides nothing: see `flying_monkey.memory` for whether it is new, and
`flying_monkey.signature` for whether it is genuine.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from typing import Any, Final, Literal, Self, TypeAlias, get_args

VERSION: Final = 1
MOST: Final = 65_536  # bytes of a document

Phase: TypeAlias = Literal["try", "keep", "back"]
"""`try` a configuration until a deadline, `keep` the one that is tried or runs, go `back` to one"""
Activation: TypeAlias = Literal["switch", "boot", "test"]
Reboot: TypeAlias = Literal["never", "window", "now"]
"""what a machine does that is told to keep a system with a different kernel: only say so, also in case it is to reboot
in a `window` (a document that says so comes then), or reboot `now`"""

_STORE_PATH: Final = re.compile(r"/nix/store/[0-9a-df-np-sv-z]{32}-[0-9A-Za-z+._?=-]{1,211}")
_NAR_HASH: Final = re.compile(r"sha256:[0-9a-df-np-sv-z]{52}|sha256-[A-Za-z0-9+/]{43}=")
_NAME: Final = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,127}[A-Za-z0-9_-])?")
_HOST_KEY: Final = re.compile(r"[a-z0-9@.-]{3,60} [A-Za-z0-9+/=]{20,4096}")
_TIME: Final = "%Y-%m-%dT%H:%M:%SZ"
_LARGEST: Final = 2**53 - 1  # what every reader of JSON holds exactly
_LONGEST: Final = 7 * 86_400  # seconds of a deadline
_HOOKS: Final = 64


class BadDocument(Exception):
    """A document is not one that a machine may act on. The message names the field."""


@dataclass(frozen=True)
class System:
    """A system closure: its store path, and the hash of its contents, which its name does not promise."""

    path: str
    nar_hash: str

    def __post_init__(self) -> None:
        _matches("path", self.path, _STORE_PATH)
        _matches("nar_hash", self.nar_hash, _NAR_HASH)


@dataclass(frozen=True)
class Machine:
    """Which machine is meant: its name in the manifest, and its ssh host key (type and base64) there."""

    name: str
    host_key: str

    def __post_init__(self) -> None:
        _matches("name", self.name, _NAME)
        _matches("host_key", self.host_key, _HOST_KEY)


@dataclass(frozen=True)
class Deadlines:
    """Seconds that each step may take. `confirm` counts from the activation; then the machine goes back by itself."""

    prepare: int = 600
    activate: int = 900
    confirm: int = 120
    finish: int = 600

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            _within(name, value, 1, _LONGEST)


@dataclass(frozen=True)
class Hooks:
    """Which of the machine's own hooks run, by their file names in `prepare.d` and `finish.d`, in this order."""

    prepare: tuple[str, ...] = ()
    finish: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not isinstance(value, list | tuple) or len(value) > _HOOKS or len(set(map(str, value))) != len(value):
                raise BadDocument(f"{name}: not a list of at most {_HOOKS} different names")
            for each in value:
                _matches(name, each, _NAME)
            object.__setattr__(self, name, tuple(value))


@dataclass(frozen=True)
class Desired:
    """What one machine should be. Times are UTC, in whole seconds.

    `serial` only ever grows, for each machine. `good` is the machine's last good system, if there is one. A reboot
    begins before `reboot_until`, where there is such a time, or not at all.
    """

    repo: str
    machine: Machine
    serial: int
    issued: datetime
    expires: datetime
    phase: Phase
    activation: Activation
    system: System
    deadlines: Deadlines = field(default_factory=Deadlines)
    hooks: Hooks = field(default_factory=Hooks)
    good: System | None = None
    reboot: Reboot = "never"
    resting: bool = False
    """whether it is for between two updates: a machine that kept this system last does nothing, whatever it runs"""
    reboot_until: datetime | None = None

    def __post_init__(self) -> None:
        _matches("repo", self.repo, _NAME)
        _within("serial", self.serial, 1, _LARGEST)
        _among("phase", self.phase, get_args(Phase))
        _among("activation", self.activation, get_args(Activation))
        _among("reboot", self.reboot, get_args(Reboot))
        if type(self.resting) is not bool:
            raise BadDocument("resting: not true or false")
        until = self.reboot_until or self.issued
        for name, value in (("issued", self.issued), ("expires", self.expires), ("reboot_until", until)):
            if value.tzinfo != UTC or value.microsecond:
                raise BadDocument(f"{name}: not a time in UTC, in whole seconds")
        if self.expires <= self.issued:
            raise BadDocument("expires: not later than issued")

    @classmethod
    def read(cls, text: bytes) -> Self:
        """The document that `text` is. Raises `BadDocument`: a field too many is as wrong as one that is missing."""
        if len(text) > MOST:
            raise BadDocument(f"it has more than {MOST} bytes")
        try:
            found = json.loads(text.decode(), object_pairs_hook=_once, parse_constant=_refuse)
        except (ValueError, RecursionError) as error:
            raise BadDocument(f"it is not JSON: {error}") from None
        found = _fields("the document", found, required=_REQUIRED, optional=_OPTIONAL)
        if found["version"] != VERSION:
            raise BadDocument(f"version: this agent reads version {VERSION}")
        good = found.get("good")
        return cls(
            repo=found["repo"],
            machine=Machine(**_fields("machine", found["machine"], _names(Machine))),
            serial=found["serial"],
            issued=_time("issued", found["issued"]),
            expires=_time("expires", found["expires"]),
            phase=found["phase"],
            activation=found["activation"],
            system=System(**_fields("system", found["system"], _names(System))),
            deadlines=Deadlines(**_fields("deadlines", found["deadlines"], _names(Deadlines))),
            hooks=Hooks(**_fields("hooks", found["hooks"], _names(Hooks))),
            good=None if good is None else System(**_fields("good", good, _names(System))),
            reboot=found.get("reboot", "never"),
            resting=found.get("resting", False),
            reboot_until=_time("reboot_until", found["reboot_until"]) if "reboot_until" in found else None,
        )

    def write(self) -> bytes:
        """The text of the document, always the same for the same document: what is signed.

        What is as ever is left out where older agents do not know it.
        """
        fields = asdict(self)
        if self.reboot == "never":
            del fields["reboot"]
        if not self.resting:
            del fields["resting"]
        del fields["reboot_until"]
        times = {"issued": self.issued.strftime(_TIME), "expires": self.expires.strftime(_TIME)}
        if self.reboot_until is not None:
            times["reboot_until"] = self.reboot_until.strftime(_TIME)
        return (
            json.dumps(
                fields | times | {"version": VERSION}, sort_keys=True, ensure_ascii=True, separators=(",", ":")
            ).encode()
            + b"\n"
        )


_REQUIRED: Final = (
    *("version", "repo", "machine", "serial", "issued", "expires", "phase", "activation"),
    *("system", "deadlines", "hooks"),
)
_OPTIONAL: Final = ("good", "reboot", "resting", "reboot_until")


def _fields(where: str, found: object, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> dict[str, Any]:
    if not isinstance(found, Mapping):
        raise BadDocument(f"{where}: not an object")
    if missing := [each for each in required if each not in found]:
        raise BadDocument(f"{where}: {missing[0]} is missing")
    if unknown := sorted(set(found) - {*required, *optional}):
        raise BadDocument(f"{where}: {unknown[0]!a} is not known")
    return dict(found)


def _names(kind: type[Machine | System | Deadlines | Hooks]) -> tuple[str, ...]:
    return tuple(each.name for each in fields(kind))


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a field is there twice")
    return found


def _refuse(word: str) -> object:
    raise ValueError(f"{word} is no number")


def _time(name: str, value: object) -> datetime:
    try:
        found = datetime.strptime(str(value), _TIME).replace(tzinfo=UTC)
    except ValueError:
        found = None
    if found is None or found.strftime(_TIME) != value:
        raise BadDocument(f"{name}: not a time such as 2026-01-31T12:00:00Z")
    return found


def _matches(name: str, value: object, pattern: re.Pattern[str]) -> None:
    if not isinstance(value, str) or pattern.fullmatch(value) is None:
        raise BadDocument(f"{name}: {str(value)[:80]!a} is not allowed")


def _within(name: str, value: object, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:
        raise BadDocument(f"{name}: not a whole number from {least} to {most}")


def _among(name: str, value: object, words: tuple[str, ...]) -> None:
    if value not in words:
        raise BadDocument(f"{name}: not one of {', '.join(words)}")
