"""What toto and a machine that pulls hand each other, as files in toto's state: a folder for each machine.

    document     the newest signed document, which the machine asks for
    ask          a word: toto wants a report that repeats it
    reports/     what the machine reported, signed by its host key, by number; the newest `KEPT`
    contact      touched whenever the machine asks for something
    cache/       what it may fetch: see `toto.machine.grants`

`toto.api` serves the folders and reads no key. Whoever acts on a report checks its signature: `Reports.read`.
"""

import contextlib
import fcntl
import logging
import os
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from flying_monkey import proof
from flying_monkey.desired import BadDocument, Desired
from flying_monkey.report import BadReport, Report
from flying_monkey.signature import MOST, NotGenuine, unsealed
from toto.base import files, paths
from toto.base.errors import InputError
from toto.git_host.shared import name_of
from toto.machine import proof as machine_proof
from toto.machine import serials

log = logging.getLogger(__name__)

KEPT: Final = 64  # reports of a machine
_NAME: Final = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,127}[A-Za-z0-9_-])?")
_NUMBER: Final = re.compile(r"([0-9]{16})\.json")


class NotVerified(Exception):
    """A report is not the machine's, or is none."""


def folder(repo: Path, machine: str) -> Path:
    """The folder of a machine, made when missing. Raises `InputError` for what is no machine's name."""
    if _NAME.fullmatch(machine) is None:
        raise InputError(f"{machine[:80]!a} is no machine's name")
    return paths.private_folder(paths.private_folder(paths.repo_state(repo) / "machines") / machine)


def stamp() -> Path:
    """A file that changes whenever something is published for any machine: what a server watches."""
    return paths.private_folder(paths.state_home() / "api") / "published"


def publish(repo: Path, machine: str, envelope: bytes) -> None:
    """Have a machine fetch a signed document, in place of the one before, unless that one is newer."""
    place = folder(repo, machine)
    with files.lock(place / "document.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # (A serial that toto never gave was put there by somebody else.)
        if _serial(envelope) < _serial(published(place)) <= _given(repo, machine):
            return
        files.write_bytes(place / "document", envelope)
    files.write(stamp(), secrets.token_hex(8))


def _given(repo: Path, machine: str) -> int:
    """The newest serial that the signer gave a machine; 0 where that is not known."""
    try:
        return serials.read(repo).get(machine, 0)
    except (OSError, ValueError):
        return 0


def _serial(envelope: bytes | None) -> int:
    """The serial of a document; 0 for none, and for what is no document."""
    try:
        return Desired.read(unsealed(envelope)[0]).serial if envelope else 0
    except (NotGenuine, BadDocument):
        return 0


def published(place: Path) -> bytes | None:
    """The newest document in a machine's folder, if there is one."""
    try:
        with (place / "document").open("rb") as source:
            return source.read(MOST + 1)
    except FileNotFoundError:
        return None


def ask(repo: Path, machine: str) -> str:
    """Ask a machine for a report, now; the word by which it is told apart."""
    word = secrets.token_hex(16)
    files.write(folder(repo, machine) / "ask", word)
    files.write(stamp(), secrets.token_hex(8))
    return word


def asked(place: Path) -> str:
    """The word of the newest report that toto asked for, in a machine's folder; "" for none."""
    try:
        return (place / "ask").read_text()[:64]
    except FileNotFoundError:
        return ""


def note_contact(place: Path) -> None:
    """Note that a machine has asked for something just now."""
    file = place / "contact"
    try:
        os.utime(file)
    except FileNotFoundError:
        files.write(file, "")


def contact(place: Path) -> float:
    """When a machine asked for something last, in seconds since 1970; 0 for never."""
    with contextlib.suppress(FileNotFoundError):
        return (place / "contact").stat().st_mtime
    return 0


def take(place: Path, repo: str, machine: str, envelope: bytes) -> bool:
    """Keep a report that nobody has verified; whether it is new. The same number again changes nothing.

    Raises `BadReport`, `NotGenuine` for what cannot be one of this machine's.
    """
    text, _ = unsealed(envelope)
    report = Report.read(text)
    if (report.repo, report.machine) != (repo, machine):
        raise BadReport(f"it is of {report.machine} of {report.repo}")
    reports = paths.private_folder(place / "reports")
    file = reports / f"{report.number:016d}.json"
    if file.exists():
        return False
    files.write_bytes(file, envelope)
    for old in numbers(place)[:-KEPT]:
        (reports / f"{old:016d}.json").unlink(missing_ok=True)
    return True


def numbers(place: Path) -> list[int]:
    """The numbers of the reports in a machine's folder, the newest last."""
    with contextlib.suppress(FileNotFoundError):
        names = (_NUMBER.fullmatch(each.name) for each in (place / "reports").iterdir())
        return sorted(int(found[1]) for found in names if found)
    return []


def verified(envelope: bytes, repo: str, machine: str, host_keys: Sequence[str]) -> Report:
    """The report that a machine signed by one of its `host_keys`. Raises `NotVerified`."""
    try:
        text, signed = unsealed(envelope)
        machine_proof.check(text, signed, machine, host_keys, proof.REPORT)
        report = Report.read(text)
    except (NotGenuine, BadReport) as error:
        raise NotVerified(str(error)) from None
    if (report.repo, report.machine) != (repo, machine):
        raise NotVerified(f"it is of {report.machine} of {report.repo}")
    return report


@dataclass
class Reports:
    """The verified reports of one machine; each is verified once. `newest` is that with the highest number."""

    repo: Path
    machine: str
    host_keys: Sequence[str]
    newest: Report | None = None
    serial: int = 0
    """the highest serial of a document that the machine says it has had"""
    _seen: int = -1

    def read(self) -> list[Report]:
        """The reports since the last call, in order. What is not the machine's is logged and left out."""
        place, found = folder(self.repo, self.machine), []
        for number in numbers(place):
            if number <= self._seen:
                continue
            file = place / "reports" / f"{number:016d}.json"
            try:
                envelope = file.read_bytes()
                report = verified(envelope, name_of(self.repo), self.machine, self.host_keys)
                if report.number != number:
                    raise NotVerified("it has a different number than its file")
            except FileNotFoundError:  # newer ones took its place
                continue
            except NotVerified as error:
                log.warning("%s: a report that is not the machine's is removed: %s", self.machine, error)
                file.unlink(missing_ok=True)
                continue
            self._seen = number
            found.append(report)
        if found:
            self.newest = found[-1]
            self.serial = max(self.serial, *(each.serial for each in found))
        return found
