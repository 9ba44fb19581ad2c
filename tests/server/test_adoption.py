"""The first start on a state that version 0.1.0 has made: one key for all machines, and nobody owns any of them."""

import subprocess
from pathlib import Path

import pytest

from tests.git_host.test_host import Pusher
from tests.ledger.test_ledger import deployed
from tests.machine.test_ssh import keygen
from toto.base import paths
from toto.git_host import host as git_host
from toto.ledger import steps
from toto.ledger.ledger import Ledger
from toto.ledger.target import Target
from toto.machine import keys, owners
from toto.server import serve


async def test_keys_and_machines_stay_with_the_repos_that_have_deployed_them_and_conflicts_are_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TOTO_STATE", str(tmp_path / "state"))
    (paths.state_home() / "keys").mkdir()
    await keygen(paths.state_home() / "keys" / "machines")
    repos, served = tmp_path / "repos", git_host.Served(api_url="http://127.0.0.1:1/api")
    for name, machines, at in (
        ("infra", {"web1": "10.0.0.1", "web2": "10.0.0.2"}, "2026-02-01T00:00:00Z"),
        ("lab", {"web2": "10.0.0.2", "db1": "10.0.0.3"}, "2026-01-01T00:00:00Z"),
        ("empty", {}, ""),
    ):
        repo = await git_host.create(repos / f"{name}.git", api_url=served.api_url)
        pusher = Pusher(tmp_path / name, repo)
        lines = "".join(f"  {machine}: {{address: {address}}}\n" for machine, address in machines.items())
        (pusher.folder / "machines.yaml").write_text(f"machines:\n{lines}")
        pusher.git("add", "--all")
        commit = pusher.commit()
        subprocess.run(["git", "push", "--quiet", "-o", "skip", repo, "main"], cwd=pusher.folder, check=False)
        for machine in machines:
            good = deployed("drv").model_copy(update={"commit": commit, "at": at})
            await Ledger(repo).write(Target("host", machine), steps.verified(good), "good")
            subprocess.run(["git", "fetch", "--quiet", pusher.folder, "main"], cwd=repo, check=True)
    await serve._adopt_all(repos, served)
    said = [record.getMessage() for record in caplog.records]
    assert [line for line in said if "toto machine move web2 infra lab" in line], said
    assert [line for line in said if "infra and lab log in to their machines by the same key" in line], said
    assert {name: owner.repo.stem for name, owner in owners.read().machines.items()} == {
        "web1": "infra",
        "web2": "infra",
        "db1": "lab",
    }
    old = keys.old_key().read_text()
    for name, keeps in (("infra", True), ("lab", True), ("empty", False)):
        assert ((await keys.of_machines(repos / f"{name}.git")).read_text() == old) is keeps
    caplog.clear()
    await serve._adopt_all(repos, served)
    [again] = [record.getMessage() for record in caplog.records]
    assert "same key" in again, "what is decided is not said again"
