"""The figures of a fleet, from real ledgers and what a machine really signed."""

import ssl
import threading
import time
from collections.abc import Callable
from http.server import HTTPServer
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric

from tests.ledger.test_ledger import WEB1, note
from tests.metrics.fleet import SmallFleet
from tests.repos import InfraRepo
from toto.api import certificate
from toto.base import paths
from toto.infra_repo import branch
from toto.ledger.ledger import REF, Entry, Ledger
from toto.machine import documents
from toto.metrics import token
from toto.metrics.fleet import BACKED_UP, Fleet
from toto.metrics.machines import targets


class Read(CollectorRegistry):
    """What was read, to be asked for single samples."""

    def __init__(self, fleet: Fleet) -> None:
        super().__init__()
        self._found = fleet.read()

    def collect(self) -> list[Metric]:
        return self._found

    def one(self, name: str, /, **labels: str) -> float | None:
        found = [
            sample.value
            for metric in self._found
            for sample in metric.samples
            if sample.name == f"toto_{name}" and labels.items() <= sample.labels.items()
        ]
        assert len(found) <= 1, found
        return found[0] if found else None


def test_a_fleet_is_told_as_it_is(fleet: SmallFleet) -> None:
    read = Read(Fleet(fleet.repos, "http://127.0.0.1:4200"))
    for kind, target, how in (
        ("host", "web1", "good"),
        ("host", "web2", "half done"),
        ("host", "nas", "unreachable"),
        ("terraform", "dns", "good"),
    ):
        assert read.one("target_state", repo="infra", kind=kind, target=target, state=how) == 1
        assert read.one("target_state", target=target) == 1, "a target is in one state"
    begun = 1_767_225_600  # 2026-01-01
    assert read.one("target_good_timestamp_seconds", target="web1") == begun
    assert read.one("target_info", target="web1", commit="cccccccc") == 1
    assert read.one("target_intent_timestamp_seconds", target="web2") == begun
    assert read.one("target_unreachable_timestamp_seconds", target="nas") == begun
    assert read.one("pushes_waiting", repo="infra") == 0
    assert read.one("evaluation_memory_bytes", host="web1") == 300e6
    contact, expires = read.one("agent_contact_timestamp_seconds"), read.one("document_expiry_timestamp_seconds")
    assert contact is not None and abs(contact - time.time()) < 60
    assert expires is not None and 6.9 < (expires - time.time()) / 86_400 < 7
    assert read.one("agent_reboot_needed", machine="web1") == 1 and read.one("agent_drift", machine="web1") == 0
    for result, asked in (("hit", 5), ("miss", 1)):
        assert read.one("cache_requests_total", repo="infra", machine="web1", result=result) == asked
    assert read.one("cache_sent_bytes_total", machine="web1") == 1_000
    for outcome, count in (("failed", 1), ("passed", 1), ("not checked", 0)):
        assert read.one("compliance_controls", repo="infra", machine="web2", outcome=outcome) == count
    assert read.one("compliance_failed_impact", machine="web2") == 0.9
    checked = read.one("compliance_timestamp_seconds", machine="web2")
    assert checked is not None and abs(checked - time.time()) < 60
    assert read.one("backup_timestamp_seconds") == 0
    assert read.one("certificate_expiry_timestamp_seconds") is None


async def test_what_has_changed_is_read_again_and_nothing_else(
    fleet: SmallFleet, new_key: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Fleet(fleet.repos, "")
    Read(made)
    parsed, verified = Ledger._parsed, documents.verified

    def never(*_: object) -> None:
        raise AssertionError("it was read already")

    monkeypatch.setattr(Ledger, "_parsed", never)
    monkeypatch.setattr(documents, "verified", never)
    assert Read(made).one("agent_reboot_needed") == 1
    monkeypatch.setattr(Ledger, "_parsed", parsed)
    monkeypatch.setattr(documents, "verified", verified)
    fleet.says(2, reboot_needed=False)
    fleet.fetches(hits=2)  # (a server goes on where the one before it ended)
    await Ledger(fleet.bare).write(WEB1, lambda _: Entry(reverted=note()), "reverted")
    read = Read(made)
    assert read.one("agent_reboot_needed") == 0 and read.one("target_state", target="web1", state="reverted") == 1
    assert read.one("cache_requests_total", result="hit") == 7
    fleet.says(3, new_key("stranger"), reboot_needed=True)  # by somebody else
    assert Read(made).one("agent_reboot_needed") == 0
    (paths.state_home() / BACKED_UP).touch()
    assert time.time() - (Read(made).one("backup_timestamp_seconds") or 0) < 60
    await Ledger(fleet.bare).write(WEB1, lambda _: None, "retired")
    assert Read(made).one("agent_contact_timestamp_seconds") is None, "a machine that is retired is not waited for"


async def test_a_ledger_that_cannot_be_read_hides_no_other(fleet: SmallFleet, tmp_path: Path) -> None:
    other = InfraRepo(tmp_path / "more").bare.rename(fleet.repos / "other.git")
    await Ledger(other).write(WEB1, lambda _: Entry(reverted=note()), "reverted")
    await branch.change(
        fleet.bare, REF, ["host/web1.json"], lambda _: {"host/web1.json": "{"}, "broken", named=lambda: []
    )
    read = Read(Fleet(fleet.repos, ""))
    assert [read.one("ledger_readable", repo=repo) for repo in ("infra", "other")] == [0, 1]
    assert read.one("target_state", state="reverted") == 1 and read.one("target_state", repo="infra") is None


def test_the_certificate_of_the_ui_s_address_is_looked_at_once_an_hour(
    fleet: SmallFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = certificate.own(["127.0.0.1"])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(made.certificate, made.key)
    with HTTPServer(("127.0.0.1", 0), None) as server:  # type: ignore[arg-type]
        server.handle_error = lambda *_: None  # type: ignore[method-assign]
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        read = Fleet(fleet.repos, f"https://127.0.0.1:{server.server_address[1]}")
        try:
            until = Read(read).one("certificate_expiry_timestamp_seconds", name="127.0.0.1")
        finally:
            server.shutdown()
            thread.join()
    assert until is not None and until > 250_000_000_000  # the year 9999
    assert Read(read).one("certificate_expiry_timestamp_seconds") == until, "it is not asked again"
    later = time.monotonic() + 3_601
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert Read(read).one("certificate_expiry_timestamp_seconds") == until, "nobody answers: what was known stays"


def test_machines_are_told_with_what_relabelling_needs(fleet: SmallFleet) -> None:
    web1, web2, nas = targets([fleet.bare])
    assert web1["targets"] == ["127.0.0.1"] and web2["targets"] == ["[fd00::2]"]
    assert web1["labels"] == {
        "__meta_toto_repo": "infra",
        "__meta_toto_machine": "web1",
        "__meta_toto_role": "nixos",
        "__meta_toto_tags": ",nginx,web,",
    }
    assert nas["labels"]["__meta_toto_role"] == "other" and nas["labels"]["__meta_toto_tags"] == ",,"
    fleet.repo.commit({"machines.yaml": None})
    assert targets([fleet.bare]) == []


def test_the_token_is_made_once_and_anew_when_it_is_removed(fleet: SmallFleet) -> None:
    first = token.file().read_text()
    assert len(first) > 40 and token.file().read_text() == first
    assert token.file().stat().st_mode & 0o777 == 0o600
    token.file().unlink()
    assert token.file().read_text() != first
