"""The compliance of machines, with a real sshd as the machine, real testinfra, and a Prefect server."""

import getpass
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings

from blocks.venues import WebhookVenue
from flows.compliance import compliance
from tests.conftest import PrefectServer
from tests.machine.test_ssh import Server, needs_sshd, sshd
from tests.repos import InfraRepo
from tests.venue_servers import HttpServer, http_server
from toto.base import paths
from toto.compliance import history
from toto.compliance.results import Outcome
from toto.fleet import artifacts
from toto.fleet.state import Fleet
from toto.ledger.ledger import Deployed, Entry, Ledger
from toto.ledger.target import HOST, Target
from toto.machine import keys

pytestmark = [needs_sshd, pytest.mark.skipif(os.geteuid() != 0, reason="toto logs in as root, or by sudo")]

MODULE = """
import pytest

@pytest.mark.impact(0.9)
def test_the_motd(host):
    '''The machine says who it is.'''
    assert host.file({file!r}).content_string == "web1\\n"

@pytest.mark.skip(reason="not on NixOS")
def test_a_package(host):
    pass
"""


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    (tmp_path / "machine").mkdir()
    async with sshd(tmp_path / "machine") as made:
        yield made


def listed(server: Server, *more: str) -> str:
    here: dict[str, Any] = {
        "address": server.target.address,
        "ssh": {"port": server.target.port, "user": getpass.getuser()},
    }
    machines: list[dict[str, Any]] = [
        {"name": "web1", "tags": ["production"], **here},
        {"name": "web2", "address": "192.0.2.2", "tags": ["production"], "deploy": "pull", "ssh": {"host_key": PULLS}},
        {"name": "web3", "address": "127.0.0.1", "ssh": {"port": 9, "user": "root"}},
        {"name": "waits", "address": "192.0.2.4"},
    ]
    return json.dumps({"machines": [each for each in machines if each["name"] not in more]})


PULLS = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIC4cjgBtzIuVLhKP5xnnXZ6i/I7pvtnvg0TKpwiy4Jsb"


async def test_machines_are_checked_and_what_was_found_is_told_once(
    prefect_server: PrefectServer, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOTO_STATE", str(tmp_path / "state"))
    repo, motd = InfraRepo(tmp_path / "repo"), tmp_path / "machine" / "motd"
    toml = '[compliance]\ntags = ["production"]\n[roll_out]\nconnect_timeout = 2\n[venues]\nfleet = ["auditors"]\n'
    first = repo.commit(
        {"machines.yaml": listed(server), "toto.toml": toml, "compliance/who.py": MODULE.format(file=str(motd))}
    )
    identity = await keys.of_machines(repo.bare)
    with (server.directory / "authorized").open("a") as file:
        file.write(await keys.public_half(identity) + "\n")
    ledger = Ledger(repo.bare)
    good = Deployed(identity="x", commit=first, run="r", at="2026-11-01T00:00:00Z")
    for name in ("web1", "web2", "web3"):
        await ledger.write(Target(HOST, name), lambda _: Entry(good=good), "deployed")

    with (
        http_server() as web,
        temporary_settings({PREFECT_API_URL: prefect_server.api_url, PREFECT_HOME: tmp_path / "prefect"}),
    ):
        await WebhookVenue(url=web.address).save("auditors", overwrite=True)

        async def checked(**more: Any) -> tuple[str, str, str]:
            state = await compliance(repo.bare, origin="schedule", return_state=True, **more)
            return state.type.value, str(state.name), str(state.message)

        motd.write_text("web1\n")
        kind, name, said = await checked()
        assert (kind, name) == ("COMPLETED", "Partial"), said
        assert said == (
            f"{first[:8]}: web1 checked; web1: 1 control was not checked; "
            "web2: it pulls: toto runs no command on it, so nothing is known of it"
        )
        assert told(web) == []

        motd.write_text("somebody else\n")
        for _ in range(2):
            kind, _, said = await checked()
            assert kind == "FAILED", said
            assert said.startswith(
                f"{first[:8]}: web1: compliance check failed: 1 failed, 1 not checked; nothing was touched"
            )
        (message,) = told(web)
        assert "not ok compliance/who.py: test_the_motd (The machine says who it is.), impact 0.9" in message

        fleet = Fleet(repo.bare.parent, prefect_server.api)
        key = artifacts.of_target("compliance", "infra", Target(HOST, "web1"))
        rows = json.loads((await fleet.shown([key]))[key])
        assert [(row["result"], row["impact"], row["what"]) for row in rows] == [
            ("failed", "0.9", "The machine says who it is."),
            ("not checked", "0.5", ""),
        ]
        junit = (paths.repo_state(repo.bare) / "junit" / "web1.compliance.xml").read_text()
        assert 'failures="1"' in junit and 'skipped="1"' in junit

        motd.write_text("web1\n")
        await checked()
        assert "web1" in told(web)[-1] and "fine again" in told(web)[-1] and len(told(web)) == 2
        trend = history.read(repo.bare).machines["web1"].trend
        assert [each.controls.get(Outcome.FAILED, 0) for each in trend] == [0, 1, 1, 0]
        assert [each.worst for each in trend] == [0, 0.9, 0.9, 0] and {each.commit for each in trend} == {first}

        assert (await checked(only=["waits"]))[2] == f"{first[:8]}: nothing to do; waits: toto has not deployed it"
        kind, name, said = await checked(only=["web3"])
        assert (kind, name, said) == ("COMPLETED", "Partial", f"{first[:8]}: web3 unreachable")
        assert "there is no target" in (await checked(only=["nobody"]))[2]
        assert (await checked(only=[" "]))[2] == "`only` names nothing: nothing is checked"
        repo.commit({"machines.yaml": listed(server, "web1")})
        await checked()
        assert history.read(repo.bare).machines == {}, "what has left the manifest is forgotten"


def told(web: HttpServer) -> list[str]:
    return [json.dumps(json.loads(each.body), ensure_ascii=False) for each in web.requests]
