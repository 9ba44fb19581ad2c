"""Builds of a commit, with real nix and a Prefect server; what was built is kept, and what was not is told."""

import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings

from flows.build import build
from tests.conftest import PrefectServer
from tests.lab import nix_daemon
from tests.nix.test_evaluation import NIXOS
from tests.repos import InfraRepo
from toto.base import process
from toto.fleet import builds
from toto.fleet.state import Fleet
from toto.ledger.ledger import Ledger
from toto.nix import commands as nix

pytestmark = pytest.mark.skipif(not nix_daemon.possible(), reason="toto's nix daemon needs root or sudo")

MACHINES = "machines:\n" + "".join(f"  - {{name: {name}, address: 192.0.2.{ord(name[0])}}}\n" for name in "abc")


async def test_a_commit_is_built_and_kept_and_each_host_says_how_it_went(
    prefect_server: PrefectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nixpkgs/nixos").mkdir(parents=True)
    nixpkgs = tmp_path / "nixpkgs/nixos/default.nix"
    nixpkgs.write_text(NIXOS.replace("echo made > $out", "[ $said != broken ] && echo $said > $out"))
    monkeypatch.setenv("NIX_PATH", f"nixpkgs={tmp_path / 'nixpkgs'}")
    monkeypatch.setenv("TOTO_STATE", str(tmp_path / "state"))
    repo = InfraRepo(tmp_path / "repo")
    word = f"{tmp_path.name}-{time.time_ns()}"  # (of this session alone)
    hosts = {"a": f'"{word}"', "b": '"broken"', "c": "nothing"}
    first = repo.commit(
        {"machines.yaml": MACHINES, **{f"hosts/{name}.nix": f"{{ said = {said}; }}" for name, said in hosts.items()}}
    )

    async def built(**more: Any) -> Any:
        with temporary_settings({PREFECT_API_URL: prefect_server.api_url, PREFECT_HOME: tmp_path / "prefect"}):
            return await build(repo.bare, return_state=True, **more)

    state = await built()
    assert (state.type.value, state.message) == ("FAILED", f"{first[:8]}: 1 of 3 hosts built; not b, c")
    fleet = Fleet(repo.bare.parent, prefect_server.api)
    (seen,) = [each for each in await fleet.builds("infra") if each.commit == first]
    a, b, c = (seen.rows[name] for name in "abc")
    assert a["result"] == builds.BUILT and int(a["bytes"]) > 0 and re.fullmatch(r"built by toto [1-9][0-9]*", a["why"])
    assert (b["result"], c["result"]) == (builds.FAILED, builds.NOT_EVALUATED)
    assert "did not build" in b["why"] and "hosts/c.nix:1" in c["why"]
    assert str(builds.root(repo.bare, first, "a").readlink()) == a["path"] and await nix.valid(a["path"])
    roots = await process.run(["nix-store", "--query", "--roots", a["path"]], env=nix.environment())
    assert str(builds.root(repo.bare, first, "a")) in roots.stdout, "garbage collection leaves it alone"
    assert Ledger(repo.bare).read().entries == {}, "nothing is deployed"

    second = repo.commit({"hosts/b.nix": f'{{ said = "{word}-mended"; }}', "hosts/c.nix": '{ said = "c"; }'})
    ago = time.time() - 7_200  # (within an hour a different run may still build there)
    os.utime(builds.folder(repo.bare) / first, (ago, ago))
    state = await built(only=["b"], keep=1)
    assert (state.type.value, state.message) == ("COMPLETED", f"{second[:8]}: 1 of 1 hosts built")
    assert [each.name for each in builds.folder(repo.bare).iterdir()] == [second], "one commit is kept"
    state = await built()
    (newer, older) = [each for each in await fleet.builds("infra") if each.commit in (first, second)]
    assert (newer.commit, older.commit) == (second, first)
    assert {name: row["result"] for name, row in newer.rows.items()} == dict.fromkeys("abc", builds.BUILT)
    assert (await built(only=[" "])).message == "`only` names nothing: nothing is built"
