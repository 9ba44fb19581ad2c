"""What people fetch of what they had built: a signed cache that nix takes, from repositories of theirs alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.machine.test_ssh import keygen
from tests.repos import InfraRepo
from tests.store.test_grants import closure
from toto.base import paths, process
from toto.base.errors import InputError
from toto.fleet import builds, on_request
from toto.fleet.on_request import Wanted
from toto.git_host import access
from toto.git_host import host as git_host
from toto.machine import keys
from toto.nix import commands as nix

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="toto runs its nix daemon here only as root")


@pytest.fixture
def repos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TOTO_STATE", str(tmp_path / "a state"))
    there = git_host.default_repos()
    there.mkdir(parents=True)
    return there


def repository(repos: Path, name: str, folder: Path) -> tuple[Path, str]:
    made = InfraRepo(folder / name)
    commit = made.commit({"machines.yaml": "machines: []\n"})
    return made.bare.rename(repos / f"{name}.git"), commit


def fetched(words: list[str], have: str, to: Path) -> "subprocess.CompletedProcess[bytes]":
    """What `toto fetch` gives, unpacked as the printed line does it."""
    argv = [sys.executable, "-m", "toto.cli", "fetch", *words]
    done = subprocess.run(argv, input=have.encode(), capture_output=True, check=False)
    if done.returncode == 0:
        to.mkdir()
        subprocess.run(["tar", "-x", "-C", str(to)], input=done.stdout, check=True)
    return done


async def test_what_was_built_is_fetched_signed_and_without_what_one_has(repos: Path, tmp_path: Path) -> None:
    repo, commit = repository(repos, "infra", tmp_path)
    wanted = await Wanted.of(repos, "web1", None)
    assert (wanted.repo, wanted.commit, str(wanted)) == (repo, commit, f"web1@{commit[:8]}")
    refused = fetched(["web1"], "", tmp_path / "none")
    assert refused.returncode == 2 and refused.stdout == b""
    assert f"web1@{commit[:8]}: was not built" in refused.stderr.decode()

    path, other = await closure(tmp_path)
    builds.root(repo, commit, "web1").symlink_to(path)
    assert path in await on_request.how_to_fetch(wanted, path)
    whole, rest, store = tmp_path / "whole", tmp_path / "rest", tmp_path / "store"
    assert fetched([str(wanted), "--repo", "infra"], "", whole).returncode == 0
    assert fetched(["web1"], f"{other}\n", rest).returncode == 0
    sizes = [len([*each.glob("nar/*")]) for each in (whole, rest)]
    assert sizes[1] == sizes[0] - 1, "what one has is not sent"

    async def copied(cache: Path, trusted: str) -> process.Completed:
        words = ["copy", "--from", f"file://{cache}", "--to", f"local?root={store}", path]
        env = {**os.environ, "NIX_CONFIG": f"extra-trusted-public-keys = {trusted}\nrequire-sigs = true\n"}
        return await process.run(
            ["nix", "--extra-experimental-features", "nix-command", *words], env=env, check=False, timeout=60
        )

    key = await keys.public_half(await keys.for_closures(repo, None))
    assert "signature" in (await copied(whole, await nix.public_key(await nix.new_key("other-1")))).stderr
    done = await copied(whole, key)
    assert done.status == 0, done.stderr
    assert (store / path[1:]).read_text() == Path(path).read_text()
    assert await nix.valid(path)
    left = [each for each in (paths.state_home() / "store").iterdir() if each.name.startswith("toto-")]
    assert left == [], "nothing is left of it on toto"


async def test_only_those_who_may_rehearse_have_hosts_built_and_fetch_them(repos: Path, tmp_path: Path) -> None:
    await keygen(tmp_path / "alice")
    await git_host.make_admin(repos, "alice", (tmp_path / "alice.pub").read_text())
    repository(repos, "infra", tmp_path)
    repository(repos, "private", tmp_path)
    rules = access.Rules(
        {"alice": (), "bob": (), "eve": ()},
        repos={
            "infra": access.Allowed(rehearse=frozenset({"bob"}), read=frozenset({"eve"})),
            "private": access.Allowed(deploy=frozenset({"alice"})),
        },
    )
    with pytest.MonkeyPatch.context() as own:

        async def in_force(_: Path) -> access.Rules:
            return rules

        own.setattr(access, "in_force", in_force)
        assert (await Wanted.of(repos, "web1", "bob")).repo.name == "infra.git"
        for user, named in (("eve", None), ("eve", "infra"), ("bob", "private"), ("mallory", None)):
            with pytest.raises(InputError, match="there is no repository"):
                await Wanted.of(repos, "web1", user, named)
    with pytest.raises(InputError, match=r"built of infra, private\nnext: say which"):
        await Wanted.of(repos, "web1", None)
    for wrong in ("../web1", "web1@", "web1@-x", "web1@a..b", "web 1", "", "web1@nothing"):
        with pytest.raises(InputError):
            await Wanted.of(repos, wrong, None, "infra")
