"""What toto and a machine that pulls hand each other, as files in toto's state: two folders for each machine.

    api/told/REPO/MACHINE/     what toto tells it
        document                   the newest signed document, which the machine asks for
        ask                        words, the newest first: toto wants a report that repeats the first
    api/told/known.json        the machines that toto knows by a host key
    api/told/changed           changes whenever something is told
    api/said/REPO/MACHINE/     what it says
        reports/                   signed by its host key, by number; the newest `KEPT`
        contact                    touched whenever the machine asks for something
        fetched                    counts of what it has asked of the cache: `toto.machine.fetched`

The web server that machines ask (`toto.api`) is in a cell, where it reads what is told and writes what is said. So what
is said is read as a stranger's, and whoever acts on a report checks its signature: `Reports.read`.
"""

import fcntl
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, TypeAdapter

from flying_monkey import proof
from flying_monkey.desired import BadDocument, Desired
from flying_monkey.report import BadReport, Report
from flying_monkey.signature import MOST, NotGenuine, unsealed
from toto.base import files, paths
from toto.base.errors import InputError
from toto.cell import folders
from toto.git_host.shared import name_of
from toto.machine import proof as machine_proof

log = logging.getLogger(__name__)

KEPT: Final = 64  # reports of a machine
FETCHED: Final = "fetched"
_NAME: Final = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,127}[A-Za-z0-9_-])?")
_NUMBER: Final = re.compile(r"([0-9]{16})\.json")
_WORDS: Final = 16  # of toto's asking, that are remembered for a machine
_ALL: Final = 10_000_000  # names in a folder
_FORGED: Final = 100  # reports that are not the machine's, until no more are looked at


class NotVerified(Exception):
    """A report is not the machine's, or is none."""


class Known(BaseModel):
    """A machine that toto knows: its repo, the name of the repo's folder here, and the machine's host keys."""

    model_config = ConfigDict(frozen=True)

    repo: str
    folder: str
    host_keys: tuple[str, ...]


_KNOWN: Final = TypeAdapter(dict[str, Known])


@dataclass(frozen=True)
class Place:
    """Where a machine's files are: below the folder of its repo, in what is told and in what is said."""

    folder: str
    machine: str

    @classmethod
    def of(cls, repo: Path, machine: str) -> "Place":
        """Raises `InputError` for what is no machine's name."""
        if _NAME.fullmatch(machine) is None:
            raise InputError(f"{machine[:80]!a} is no machine's name")
        return cls(paths.repo_folder(repo), machine)

    @property
    def told(self) -> Path:
        """The folder of what toto tells the machine; there may be none."""
        return told() / self.folder / self.machine

    @property
    def said(self) -> Path:
        """The folder of what the machine says, for who writes it."""
        return said() / self.folder / self.machine


def told() -> Path:
    """The folder of all that machines are told. (Cells' users read it; its parent is toto's.)"""
    return paths.state_home() / "api" / "told"


def said() -> Path:
    """The folder of all that machines say, which belongs to the user of a cell."""
    return paths.state_home() / "api" / "said"


def _open_folder(path: Path) -> Path:
    """Make a folder that everybody may read who gets there."""
    path.mkdir(parents=True, exist_ok=True)
    path.chmod(0o755)
    return path


def stamp() -> Path:
    """A file that changes whenever a machine is told something: what a server watches."""
    return told() / "changed"


def known_file() -> Path:
    """The file of the machines that toto knows."""
    return told() / "known.json"


def make_known(machines: Mapping[str, Known]) -> None:
    """Tell the web server which machines there are."""
    paths.private_folder(told().parent)
    _open_folder(told())
    files.write_bytes(known_file(), _KNOWN.dump_json(dict(machines)), 0o644)


def tidy() -> None:
    """See that a new server reads what is told, and that what is said is what machines say.

    (A restore makes folders that only toto enters. And a server that was taken over may have filled its room.)
    """
    for folder in (*told().glob("*/"), *told().glob("*/*/")):
        folder.chmod(0o755)
    for file in (*told().glob("*/*/document"), *told().glob("*/*/ask")):
        file.chmod(0o644)
    known = {(each.folder, name) for name, each in read_known().items()}
    for repo in folders.listed(said().parent, said().name, most=_ALL):
        if not any(folder == repo for folder, _ in known):
            folders.remove(said().parent, said().name, repo)
            continue
        for machine in folders.listed(said(), repo, most=_ALL):
            if (repo, machine) not in known:
                folders.remove(said(), repo, machine)
                continue
            for name in {*folders.listed(said(), repo, machine, most=_ALL)} - {"reports", "contact", FETCHED}:
                folders.remove(said(), repo, machine, name)
            reports = folders.listed(said(), repo, machine, "reports", most=_ALL)
            newest = sorted(name for name in reports if _NUMBER.fullmatch(name))[-KEPT:]
            for name in {*reports} - {*newest}:
                folders.remove(said(), repo, machine, "reports", name)


def read_known() -> dict[str, Known]:
    """The machines that there are. Raises OSError, ValueError."""
    return _KNOWN.validate_json(known_file().read_bytes())


@contextmanager
def _telling(repo: Path, machine: str) -> Iterator[Path]:
    """The folder of what a machine is told, for one writer at a time; whoever waits for it is woken in the end."""
    place = Place.of(repo, machine).told
    paths.private_folder(told().parent)
    for each in (told(), place.parent, place):
        _open_folder(each)
    with files.lock(paths.repo_state(repo) / "documents.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield place
    files.write(stamp(), secrets.token_hex(8), 0o644)


def publish(repo: Path, machine: str, envelope: bytes) -> None:
    """Have a machine fetch a signed document, in place of the one before, unless that one is newer."""
    with _telling(repo, machine) as place:
        if _serial(envelope) >= _serial(published(Place.of(repo, machine))):
            files.write_bytes(place / "document", envelope, 0o644)


def _serial(envelope: bytes | None) -> int:
    """The serial of a document; 0 for none, and for what is no document."""
    try:
        return Desired.read(unsealed(envelope)[0]).serial if envelope else 0
    except (NotGenuine, BadDocument):
        return 0


def published(place: Place) -> bytes | None:
    """The newest document for a machine, if there is one."""
    try:
        with (place.told / "document").open("rb") as source:
            return source.read(MOST + 1)
    except FileNotFoundError:
        return None


def machines(repo: Path) -> list[Place]:
    """The machines of a repo that have been told something."""
    folder = paths.repo_folder(repo)
    return [Place(folder, each.name) for each in sorted((told() / folder).glob("*"))]


def forget(repo: Path, machine: str) -> None:
    """Remove all that a machine was told and has said: it is not the repo's any more."""
    place = Place.of(repo, machine)
    shutil.rmtree(place.told, ignore_errors=True)
    folders.remove(said(), place.folder, machine)


def ask(repo: Path, machine: str) -> str:
    """Ask a machine for a report, now; the word by which it is told apart."""
    word = secrets.token_hex(16)
    with _telling(repo, machine) as place:
        words = [word, *_words(Place.of(repo, machine))][:_WORDS]
        files.write(place / "ask", "\n".join(words), 0o644)
    return word


def asked(place: Place) -> str:
    """The word of the newest report that toto asked for; "" for none."""
    return next(iter(_words(place)), "")


def answers(place: Place, word: str) -> set[str]:
    """The words that a report may repeat which was asked for by `word`: whoever asked later was answered later."""
    words = _words(place)
    return {*words[: words.index(word) + 1]} if word in words else {*words}


def _words(place: Place) -> list[str]:
    try:
        return (place.told / "ask").read_text().split("\n")
    except FileNotFoundError:
        return []


def note_contact(place: Place) -> None:
    """Note that a machine has asked for something just now."""
    file = place.said / "contact"
    try:
        os.utime(file)
    except FileNotFoundError:
        files.write(paths.private_folder(file.parent) / file.name, "")


def contact(place: Place) -> float:
    """When a machine asked for something last, in seconds since 1970; 0 for never."""
    return folders.modified(said(), place.folder, place.machine, "contact")


def take(place: Place, repo: str, machine: str, envelope: bytes) -> bool:
    """Keep a report that nobody has verified; whether it is new. The same number again changes nothing.

    Raises `BadReport`, `NotGenuine` for what cannot be one of this machine's.
    """
    text, _ = unsealed(envelope)
    report = Report.read(text)
    if (report.repo, report.machine) != (repo, machine):
        raise BadReport(f"it is of {report.machine} of {report.repo}")
    reports = paths.private_folder(place.said / "reports")
    file = reports / f"{report.number:016d}.json"
    if file.exists():
        return False
    files.write_bytes(file, envelope)
    for old in numbers(place)[:-KEPT]:
        (reports / f"{old:016d}.json").unlink(missing_ok=True)
    return True


def numbers(place: Place) -> list[int]:
    """The numbers of a machine's reports, the newest last."""
    names = folders.listed(said(), place.folder, place.machine, "reports", most=4 * KEPT)
    return sorted(int(found[1]) for found in map(_NUMBER.fullmatch, names) if found)


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
    _forged: set[int] = field(default_factory=set)

    def read(self) -> list[Report]:
        """The reports since the last call, in order. What is not the machine's is logged, left out, and removed.

        Only a web server that was taken over writes such: with high numbers, they would hide the machine's own even
        from the next one. After `_FORGED` of them nothing is looked at any more, since each costs the check of a
        signature; who writes them could have withheld the machine's reports as well.
        """
        place, found = Place.of(self.repo, self.machine), []
        for number in numbers(place)[-KEPT:]:
            if number <= self._seen or number in self._forged or len(self._forged) >= _FORGED:
                continue
            path = (place.folder, place.machine, "reports", f"{number:016d}.json")
            if (envelope := folders.read_regular(said(), *path, most=MOST)) is None:
                folders.remove(said(), *path)  # it is no file; or newer ones took its place
                continue
            try:
                report = verified(envelope, name_of(self.repo), self.machine, self.host_keys)
                if report.number != number:
                    raise NotVerified("it has a different number than its file")
            except NotVerified as error:
                log.warning("%s: a report that is not the machine's is left out: %s", self.machine, error)
                self._forged.add(number)
                folders.remove(said(), *path)
                continue
            self._seen = number
            found.append(report)
        if found:
            self.newest = found[-1]
            self.serial = max(self.serial, *(each.serial for each in found))
        return found
