"""Accepting what is there, on a machine of the lab: what it runs is recorded, and who said that it is good."""

import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import uuid4

import pytest
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings

from flows.accept import accept
from tasks.roll_out import whose
from tests.conftest import PrefectServer
from tests.lab.machine import SSH_PORT, Machine
from tests.lab.test_lab import lab
from tests.repos import InfraRepo
from toto.infra_repo.settings import Settings
from toto.ledger import steps
from toto.ledger.ledger import Entry, Intent, Ledger
from toto.ledger.target import Target
from toto.machine import keys
from toto.machine.activation import MachineState
from toto.plan.changes import Action, Change, Why
from toto.plan.host import DeployedHost, DesiredHost, HostOrder

pytestmark = [pytest.mark.lab, pytest.mark.minutes(1)]
__all__ = ["lab"]

WEB1, WEB2 = Target("host", "web1"), Target("host", "web2")
ADDRESS = "127.0.7.1"
MANIFEST = f"machines:\n  - {{ name: web1, address: {ADDRESS}, ssh: {{ port: {SSH_PORT} }} }}\n"


@pytest.fixture
async def infra(
    lab: Path, prefect_server: PrefectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[InfraRepo, Machine]]:
    """A repo with the machine web1, which lets its key in."""
    monkeypatch.setenv("TOTO_STATE", str(tmp_path / "state"))
    key = tmp_path / "id"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    repo = InfraRepo(tmp_path / "repo")
    repo.commit({"machines.yaml": MANIFEST, "toto.toml": "[roll_out]\nconnect_timeout = 10\n"})
    await keys.import_key(repo.bare, keys.MACHINES, key)
    with temporary_settings({PREFECT_API_URL: prefect_server.api_url, PREFECT_HOME: tmp_path / "prefect"}):
        async with Machine("web1", tmp_path / "web1", key, address=ADDRESS) as machine:
            yield repo, machine


async def half_done(repo: InfraRepo) -> None:
    """Have a dead run's intent be open on web1."""
    desired = DeployedHost(
        identity="x",
        path=f"/nix/store/{'0' * 32}-x",
        commit=repo.commit({}),
        run=str(uuid4()),
        at="2026-01-01T00:00:00Z",
    )
    left = Intent(desired=desired, before=MachineState(), run=desired.run, owner="elsewhere/0/1-1", at=desired.at)
    await Ledger(repo.bare).write(WEB1, steps.intend(left), "intent")


async def test_what_a_machine_runs_is_accepted_and_what_is_away_is_not(infra: tuple[InfraRepo, Machine]) -> None:
    repo, machine = infra
    system = await machine.current_system()
    await half_done(repo)
    state = await accept(repo.bare, "web1", "it works", "alice", return_state=True)
    assert state.is_completed() and f"web1: it runs {system}" in str(state.message), state.message
    entry = Ledger(repo.bare).read().get(WEB1)
    good = DeployedHost.of(entry.good)
    assert good is not None and good.path == system and entry.intent is None
    assert entry.accepted is not None and (entry.accepted.by, entry.accepted.why) == ("alice", "it works")
    assert await machine.current_system() == system == await machine.profile(), "nothing of it is touched"

    # It runs the system of a different host: that is said before anything is done to it.
    of_web2 = good.model_copy(update={"path": system})
    await Ledger(repo.bare).write(WEB2, lambda _: Entry(good=of_web2), "good")
    wanted = DesiredHost(target=WEB1, file="hosts/web1.nix", identity="y", path="/nix/store/y", tests="")
    change = Change(desired=wanted, why=Why.CHANGED, action=Action.DEPLOY)
    order = HostOrder(repo=repo.bare, run="r", commit=good.commit, change=change, settings=Settings(), machine=None)
    assert whose(system, order) == [], "it is web1's own as well"
    await Ledger(repo.bare).write(WEB1, lambda _: None, "forgotten")
    assert whose(system, order) == ["web2"]
    assert whose("/nix/store/z-nixos-system-web2-26.05", order) == ["web2"]
    assert whose("/nix/store/z-nixos-system-web1-26.05", order) == []

    # A machine that is away cannot be accepted, unless it has left for good.
    await machine.power_cut()
    await half_done(repo)
    state = await accept(repo.bare, "web1", "it burnt", "alice", return_state=True)
    assert state.is_failed() and "its present state cannot be read, so it is not accepted: ssh" in str(state.message)
    assert Ledger(repo.bare).read().get(WEB1).intent is not None
    repo.commit({"machines.yaml": "machines: []\n"})
    state = await accept(repo.bare, "web1", "it burnt", "alice", return_state=True)
    assert state.is_completed() and "the record of it is gone" in str(state.message), state.message
    assert WEB1 not in Ledger(repo.bare).read().entries
