"""Accepting what is there of a release, on the real API server."""

from collections.abc import AsyncIterator
from pathlib import Path
from uuid import uuid4

import pytest
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings

from flows.accept import accept
from tests.conftest import PrefectServer
from tests.helm.test_cluster import Lab, lab
from tests.repos import InfraRepo
from toto.ledger import steps
from toto.ledger.ledger import Intent, Ledger
from toto.ledger.target import Target
from toto.plan.release import DeployedRelease, ReleaseBefore

__all__ = ["lab"]

PAGE = Target("helm", "page")


@pytest.fixture
async def repo(
    prefect_server: PrefectServer, lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[InfraRepo]:
    """An infra repo with the release; an intent of a dead run is open on it."""
    monkeypatch.setenv("TOTO_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("KUBECONFIG", str(lab.cluster.kubeconfig))
    lab.release()
    made = InfraRepo(tmp_path / "repo")
    files = {str(each.relative_to(lab.tree)): each.read_text() for each in lab.tree.rglob("*") if each.is_file()}
    commit = made.commit({"machines.yaml": "machines: []\n", **files})
    desired = DeployedRelease(identity="x", commit=commit, run=str(uuid4()), at="2026-01-01T00:00:00Z")
    left = Intent(desired=desired, before=ReleaseBefore(), run=desired.run, owner="elsewhere/0/1-1", at=desired.at)
    await Ledger(made.bare).write(PAGE, steps.intend(left), "intent")
    with temporary_settings({PREFECT_API_URL: prefect_server.api_url, PREFECT_HOME: tmp_path / "prefect"}):
        yield made


async def test_the_present_revision_of_a_release_is_accepted(repo: InfraRepo, lab: Lab) -> None:
    state = await accept(repo.bare, "helm/page", "there is none, and there should be none", "alice", return_state=True)
    assert f"it is not installed in namespace {lab.namespace}" in str(state.message), state.message
    entry = Ledger(repo.bare).read().get(PAGE)
    assert state.is_completed() and entry.good is None and entry.intent is None and entry.accepted is not None

    first = await lab.upgrade(text="one")
    desired = DeployedRelease(
        identity="x", commit=repo.commit({}), run=str(uuid4()), at="2026-01-01T00:00:00Z", revision=first.number
    )
    left = Intent(desired=desired, before=ReleaseBefore(), run=desired.run, owner="elsewhere/0/1-1", at=desired.at)
    await Ledger(repo.bare).write(PAGE, steps.intend(left), "intent")
    state = await accept(repo.bare, "helm/page", "it works", "alice", return_state=True)
    assert "it is at revision 1, which is deployed" in str(state.message), state.message
    good = DeployedRelease.of(Ledger(repo.bare).read().get(PAGE).good)
    assert good is not None and good.revision == 1 and good.commit == desired.commit
    assert (await lab.helm.current(lab.release())) == first, "nothing of it is touched"
