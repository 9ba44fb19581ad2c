"""Figures of the fleet: from the ledgers, from what machines said, and from files in toto's state.

A ledger, and a machine's report, are read again only when they have changed.
"""

import contextlib
import logging
import ssl
import time
from datetime import datetime
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from cryptography import x509
from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from flying_monkey.desired import BadDocument, Desired
from flying_monkey.signature import NotGenuine, unsealed
from toto.base import paths
from toto.base.errors import InputError, TotoError
from toto.compliance import history
from toto.compliance.results import Outcome
from toto.fleet.state import described
from toto.git_host import host as git_host
from toto.git_host.shared import name_of
from toto.ledger.ledger import Entry, Ledger, Snapshot
from toto.ledger.target import HOST, Target
from toto.machine import condition, documents, fetched, owners, signing_key
from toto.nix.memory import MB, Remembered

log = logging.getLogger(__name__)

BACKED_UP: Final = "backed-up"  # a file in toto's state, of the time of the last backup
_HOUR: Final = 3600.0
_TARGET: Final = ("repo", "kind", "target")
_MACHINE: Final = ("repo", "machine")
_FIGURES: Final[dict[str, tuple[str, tuple[str, ...]]]] = {
    "ledger_readable": ("1 when the ledger could be read", ("repo",)),
    "target_state": ("1 for the state of a target", (*_TARGET, "state")),
    "target_info": ("1 for the commit that is deployed, in eight digits", (*_TARGET, "commit")),
    "target_good_timestamp_seconds": ("when a target became what it is", _TARGET),
    "target_intent_timestamp_seconds": ("since when a target is being changed", _TARGET),
    "target_unreachable_timestamp_seconds": ("since when a target does not answer", _TARGET),
    "pushes_waiting": ("pushes for which no run was started yet", ("repo",)),
    "evaluation_memory_bytes": ("what the last evaluation of a host used", ("repo", "host")),
    "agent_contact_timestamp_seconds": ("when a machine that pulls asked for something last", _MACHINE),
    "agent_reboot_needed": ("1 when a machine says that a different kernel is booted next", _MACHINE),
    "agent_drift": ("1 when a machine says that it differs from what it was last told to be", _MACHINE),
    "document_expiry_timestamp_seconds": ("until when a machine obeys its document", _MACHINE),
    "signer_certificate_expiry_timestamp_seconds": ("until when a machine obeys by a certificate alone", _MACHINE),
    "cache_requests_total": ("files that a machine asked of the cache, by hit and miss", (*_MACHINE, "result")),
    "cache_sent_bytes_total": ("bytes that a machine has got of the cache", _MACHINE),
    "compliance_controls": ("how many controls ended so when a machine was checked last", (*_MACHINE, "outcome")),
    "compliance_failed_impact": ("the highest impact, 0 to 1, of what failed or broke when it was", _MACHINE),
    "compliance_timestamp_seconds": ("when a machine was checked last", _MACHINE),
    "backup_timestamp_seconds": ("when toto was backed up last; 0 for never", ()),
    "certificate_expiry_timestamp_seconds": ("until when the certificate of the UI's address is valid", ("name",)),
}


class Fleet:
    """The figures of all repositories in the folder `repos`, and of the server whose UI has the address `ui_url`."""

    def __init__(self, repos: Path, ui_url: str) -> None:
        self.repos, self.ui = repos, urlsplit(ui_url)
        self._compliance: dict[Path, history.Known] = {}
        self._certificate: tuple[float, float] = (0.0, 0.0)  # when it was looked at, and until when it is valid

    def read(self) -> list[Metric]:
        """The figures as they are now. Raises `TotoError`, OSError."""
        self.families = {
            name: (CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily)(
                f"toto_{name}", what, labels=labels
            )
            for name, (what, labels) in _FIGURES.items()
        }
        owned = owners.read()
        for repo in git_host.infra_repos(self.repos):
            self._add("pushes_waiting", len(git_host.waiting(repo)), name_of(repo))
            try:
                ledger = Ledger(repo).read()
            except TotoError as error:
                log.error("metrics: %s", error)
                self._add("ledger_readable", 0, name_of(repo))
                continue
            self._add("ledger_readable", 1, name_of(repo))
            self._repo(repo, ledger, owned)
            self._checked(repo)
        self._add("backup_timestamp_seconds", _modified(paths.state_home() / BACKED_UP))
        if self.ui.scheme == "https" and (until := self._valid_until()):
            self._add("certificate_expiry_timestamp_seconds", until, self.ui.hostname or "")
        return [each for each in self.families.values() if each.samples]

    def _add(self, figure: str, value: float, *labels: str) -> None:
        self.families[figure].add_metric(labels, value)

    def _repo(self, repo: Path, ledger: Snapshot, owned: owners.Owners) -> None:
        name, folder = name_of(repo), paths.repo_folder(repo)
        for target, entry in ledger.entries.items():
            self._target(name, target, entry)
        for host, mb in Remembered.in_repo(repo).used.items():
            if "#" not in host:
                self._add("evaluation_memory_bytes", mb * MB, name, host)
        for machine in condition.known(repo):
            if Target(HOST, machine) in ledger.entries:
                self._machine(repo, documents.Place(folder, machine), owned)

    def _checked(self, repo: Path) -> None:
        """What compliance checks found last on each machine; an outcome without controls is told too, as 0."""
        known = self._compliance[repo] = history.read(repo, self._compliance.get(repo))
        for machine, its in known.machines.items():
            labels, last = (name_of(repo), machine), its.trend[-1]
            for outcome in Outcome:
                self._add("compliance_controls", last.controls.get(outcome, 0), *labels, outcome.value)
            self._add("compliance_failed_impact", last.worst, *labels)
            self._add("compliance_timestamp_seconds", _seconds(last.at), *labels)

    def _target(self, repo: str, target: Target, entry: Entry) -> None:
        labels = (repo, target.kind, target.name)
        self._add("target_state", 1, *labels, described(entry)[0])
        if entry.good is not None:
            self._add("target_info", 1, *labels, entry.good.commit[:8])
            self._add("target_good_timestamp_seconds", _seconds(entry.good.at), *labels)
        if entry.intent is not None:
            self._add("target_intent_timestamp_seconds", _seconds(entry.intent.at), *labels)
        if entry.unreachable is not None:
            self._add("target_unreachable_timestamp_seconds", _seconds(entry.unreachable.at), *labels)

    def _machine(self, repo: Path, place: documents.Place, owned: owners.Owners) -> None:
        labels = (name_of(repo), place.machine)
        if contact := documents.contact(place):
            self._add("agent_contact_timestamp_seconds", contact, *labels)
        if (said := condition.read(repo, place.machine, owned)) is not None:
            self._add("agent_reboot_needed", float(said.reboot_needed), *labels)
            self._add("agent_drift", float(bool(said.drift)), *labels)
        if (counts := fetched.read(place)) is not None:
            self._add("cache_requests_total", counts.hits, *labels, "hit")
            self._add("cache_requests_total", counts.misses, *labels, "miss")
            self._add("cache_sent_bytes_total", counts.sent, *labels)
        with contextlib.suppress(InputError):
            if until := signing_key.vouched_until(repo, place.machine):
                self._add("signer_certificate_expiry_timestamp_seconds", until, *labels)
        with contextlib.suppress(NotGenuine, BadDocument):
            if envelope := documents.published(place):
                expires = Desired.read(unsealed(envelope)[0]).expires
                self._add("document_expiry_timestamp_seconds", expires.timestamp(), *labels)

    def _valid_until(self) -> float:
        """Until when the certificate with which the UI's address answers is valid, looked at once an hour; else 0."""
        looked, until = self._certificate
        if time.monotonic() - looked > _HOUR or not looked:
            with contextlib.suppress(OSError, ValueError):
                place = (self.ui.hostname or "", self.ui.port or 443)
                found = x509.load_pem_x509_certificate(ssl.get_server_certificate(place, timeout=3).encode())
                until = found.not_valid_after_utc.timestamp()
            self._certificate = (time.monotonic(), until)
        return until


def _seconds(at: str) -> float:
    return datetime.fromisoformat(at).timestamp()


def _modified(file: Path) -> float:
    with contextlib.suppress(FileNotFoundError):
        return file.stat().st_mtime
    return 0.0
