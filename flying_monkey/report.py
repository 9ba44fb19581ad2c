"""What a machine reports to toto: how it obeys the newest document, and what it runs. It is signed by its host key."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Final, Self

MOST: Final = 65_536  # bytes of a report
LOG: Final = 16_000  # bytes of a log
_ERROR: Final = 4_000  # characters
_LARGEST: Final = 2**53 - 1
_DETAILS: Final = 16_384  # bytes
_FORMS: Final = {
    "repo": re.compile(r"[A-Za-z0-9_.-]{1,128}"),
    "machine": re.compile(r"[A-Za-z0-9_.-]{1,128}"),
    "phase": re.compile(r"(?:try|keep|back)?"),
    "step": re.compile(r"[a-z_]{0,20}"),
    "state": re.compile(r"[a-z]{0,10}(?: -?[0-9]{1,5})?"),
    "system": re.compile(r"(?:/nix/store/[0-9A-Za-z+._?=-]{1,250})?"),
    "boots": re.compile(r"(?:/nix/store/[0-9A-Za-z+._?=-]{1,250})?"),
    "kind": re.compile(r"[A-Za-z]{0,40}"),
    "asked": re.compile(r"[A-Za-z0-9]{0,64}"),
    "nar_hash": re.compile(r"(?:sha256[:-][A-Za-z0-9+/=]{1,64})?"),
}
_LENGTHS: Final = {"error": _ERROR, "log": LOG}


class BadReport(Exception):
    """A text is no report. The message names the field."""


@dataclass(frozen=True)
class Report:
    """How a machine is.

    `serial` and `phase` are the newest document's that it has had, also when it refused that: then `error` says why,
    and `kind` what sort of refusal it was. `step` and `state` are the helper's (see `flying_monkey.helper`), `system`
    and `boots` the store paths of what it runs and boots. `at` is the machine's time, in seconds since 1970; `number`
    grows with each report of the machine. `asked` is toto's word when it asked for this very report;
    then `nar_hash` is that of what runs.
    `details` are the helper's further words (hooks, checks, failed units, drift), as they are.
    """

    repo: str
    machine: str
    serial: int
    phase: str
    step: str
    state: str
    system: str
    boots: str
    at: int
    number: int
    error: str = ""
    kind: str = ""
    log: str = ""
    asked: str = ""
    nar_hash: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, form in _FORMS.items():
            value = getattr(self, name)
            if not isinstance(value, str) or form.fullmatch(value) is None:
                raise BadReport(f"{name}: {str(value)[:80]!a} is not allowed")
        for name in ("serial", "at", "number"):
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value <= _LARGEST:
                raise BadReport(f"{name}: not a whole number from 0 to {_LARGEST}")
        for name, most in _LENGTHS.items():
            value = getattr(self, name)
            if not isinstance(value, str) or len(value) > most:
                raise BadReport(f"{name}: not a text of at most {most} characters")
        if not isinstance(self.details, dict) or len(json.dumps(self.details)) > _DETAILS:
            raise BadReport(f"details: not an object of at most {_DETAILS} bytes")

    @classmethod
    def read(cls, text: bytes) -> Self:
        """The report that `text` is. Raises `BadReport`."""
        if len(text) > MOST:
            raise BadReport(f"it has more than {MOST} bytes")
        try:
            found = json.loads(text.decode())
        except (ValueError, RecursionError) as error:
            raise BadReport(f"it is not JSON: {error}") from None
        if not isinstance(found, dict):
            raise BadReport("it is not an object")
        if unknown := sorted(set(found) - {each.name for each in fields(cls)}):
            raise BadReport(f"{unknown[0]!a} is not known")
        try:
            return cls(**found)
        except (TypeError, RecursionError) as error:
            raise BadReport(str(error)) from None

    def write(self) -> bytes:
        """The text of the report, always the same for the same report: what is signed."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":")).encode()
