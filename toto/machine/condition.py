"""How machines that do what documents say were when toto heard of them last, by their own account.

Roll-outs and drift checks note it, and a machine that pulls reports it by itself. So it is shown without asking any.
"""

import contextlib
import hashlib
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from flying_monkey.signature import MOST
from toto.base import files, paths
from toto.cell import folders
from toto.git_host.shared import name_of
from toto.machine import documents, owners
from toto.machine.documents import NotVerified, Place

_LOOKED_AT: Final = 3  # reports, the newest: what is not the machine's is passed over
_LONGEST: Final = 300  # characters of a line
_SIGNERS: Final = 16
_FINGERPRINT: Final = re.compile(r"SHA256:[A-Za-z0-9+/]{43}")
_UNPRINTABLE: Final = re.compile(r"[^ -~]")

_MOST_FORGED: Final = 10_000

_forged: set[bytes] = set()  # reports that were looked at by this process and were not the machine's


class Condition(BaseModel):
    """How a machine was `at` a time, in seconds since 1970.

    `drift` says how it differs from what was deployed, a line for each difference. `signers` are the fingerprints of
    the keys whose documents it obeys; None when it does not say. `report` is the number of the machine's report that
    says all that, if it was one.
    """

    model_config = ConfigDict(frozen=True)

    at: float
    drift: tuple[str, ...] = ()
    reboot_needed: bool = False
    signers: tuple[str, ...] | None = None
    report: int = 0

    @classmethod
    def of(cls, said: Mapping[str, Any], at: float | None = None, report: int = 0) -> Self:
        """The condition in a machine's own words, which may be anything."""
        drift, signers = said.get("drift"), said.get("signers")
        return cls(
            at=time.time() if at is None else at,
            drift=(_UNPRINTABLE.sub("?", drift[:_LONGEST]),) if isinstance(drift, str) and drift else (),
            reboot_needed=said.get("reboot_needed") is True,
            signers=tuple(filter(_is_fingerprint, signers[:_SIGNERS])) if isinstance(signers, list) else None,
            report=report,
        )


def note(repo: Path, machine: str, condition: Condition | None) -> None:
    """Keep how a machine is, in the place of how it was; None for one of which nothing is known any more."""
    file = _file(repo, machine)
    if condition is None:
        file.unlink(missing_ok=True)
        return
    paths.private_folder(file.parent)
    files.write(file, condition.model_dump_json())


def known(repo: Path) -> set[str]:
    """The machines of a repo of which something was heard, or to which something was told."""
    noted = {each.stem for each in _file(repo, "any").parent.glob("*.json")}
    return noted | {each.machine for each in documents.machines(repo)}


def read(repo: Path, machine: str, owned: owners.Owners | None = None) -> Condition | None:
    """How a machine was last; None for one of which nothing was heard. A report is verified once.

    `owned` are the owners of machines, for who asks for many.
    """
    noted = _noted(repo, machine)
    owner = (owned or owners.read()).machines.get(machine)
    if owner is None or owner.repo != repo.resolve():
        return noted
    place = Place.of(repo, machine)
    for number in reversed(documents.numbers(place)[-_LOOKED_AT:]):
        if noted is not None and number <= noted.report:
            break
        path = (place.folder, machine, "reports", f"{number:016d}.json")
        if (envelope := folders.read_regular(documents.said(), *path, most=MOST)) is None:
            continue
        seen = hashlib.sha256(repr((envelope, name_of(repo), machine, number, owner.host_keys)).encode()).digest()
        if seen in _forged:
            continue
        with contextlib.suppress(NotVerified):
            report = documents.verified(envelope, name_of(repo), machine, owner.host_keys)
            if report.number == number:
                found = Condition.of(report.details, folders.modified(documents.said(), *path), number)
                note(repo, machine, found)
                return found
        if len(_forged) >= _MOST_FORGED:
            _forged.clear()
        _forged.add(seen)
    return noted


def heard(repo: Path, machine: str, condition: Condition | None) -> float:
    """When a machine that was last in a `condition` was heard of, in seconds since 1970; 0 for never."""
    return max(condition.at if condition else 0, documents.contact(Place.of(repo, machine)))


def _noted(repo: Path, machine: str) -> Condition | None:
    try:
        return Condition.model_validate_json(_file(repo, machine).read_bytes())
    except (OSError, ValidationError):
        return None


def _is_fingerprint(word: object) -> bool:
    return isinstance(word, str) and _FINGERPRINT.fullmatch(word) is not None


def _file(repo: Path, machine: str) -> Path:
    return paths.repo_state_of(repo) / "conditions" / f"{machine}.json"
