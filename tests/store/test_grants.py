"""What a machine may fetch: its own closures, signed, and nothing else; and nix takes it from there."""

import asyncio
import os
import shutil
import subprocess
import uuid
from pathlib import Path

import pytest

from tasks.record import retire
from tests.repos import git
from toto.base import paths, process
from toto.ledger.target import HOST, Target
from toto.machine import keys
from toto.nix import cache as caches
from toto.nix import commands as nix
from toto.store import grants

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="toto runs its nix daemon here only as root")


@pytest.fixture
def repo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TOTO_STATE", str(tmp_path / "a state"))
    git("init", "--quiet", "--bare", "infra.git", cwd=tmp_path)
    return tmp_path / "infra.git"


async def closure(folder: Path, other: str = "") -> tuple[str, str]:
    """A new store path, and one that it refers to: `other`, or a new one."""
    source = folder / "source"
    source.write_text(str(uuid.uuid4()))
    other = other or (await process.run(["nix-store", "--add", source], env=nix.environment())).stdout.strip()
    expression = (
        '{ source, word }: derivation { name = "test"; system = "x86_64-linux"; builder = "/bin/sh"; inherit word; '
        'args = [ "-c" "echo ${builtins.storePath source} $word > $out" ]; }'
    )
    words = ["--argstr", "source", other, "--argstr", "word", str(uuid.uuid4())]
    made = await process.run(["nix-instantiate", "--expr", expression, *words], env=nix.environment())
    return await nix.build(made.stdout.strip(), folder / "root", timeout=60, target="test"), other


def served(repo: Path, machine: str) -> set[str]:
    """The names of the store paths that a machine may fetch, by their hashes."""
    cache = grants.of(paths.repo_folder(repo), machine)
    nars = {f"nar/{each.name}" for each in (cache / "nar").iterdir()}
    texts = {each.stem: each.read_text() for each in cache.glob("*.narinfo")}
    named = {line.split()[1] for text in texts.values() for line in text.splitlines() if line.startswith("URL: ")}
    assert nars == named, "each nar is named, and each that is named is there"
    return set(texts)


def hashes(*store_paths: str) -> set[str]:
    return {Path(each).name[:32] for each in store_paths}


async def test_a_machine_may_fetch_what_it_was_granted_last(repo: Path, tmp_path: Path) -> None:
    key = await keys.make(repo, "cache", "signing")
    (one, shared), (two, _) = await closure(tmp_path), await closure(tmp_path)
    three, _ = await closure(tmp_path, shared)
    await grants.grant(repo, "web1", [one], key, timeout=60)
    await grants.grant(repo, "web2", [two], key, timeout=60)
    assert served(repo, "web1") == hashes(one, shared)
    assert not served(repo, "web2") & hashes(one, shared)
    await grants.grant(repo, "web1", [one, three], key, timeout=60)
    assert served(repo, "web1") == hashes(one, three, shared)
    await grants.grant(repo, "web1", [three], key, timeout=60)
    assert served(repo, "web1") == hashes(three, shared)
    pool = grants.granted().parent / "made" / paths.repo_folder(repo)
    name = f"{Path(one).name[:32]}.narinfo"
    assert (pool / name).exists(), "it may be wanted again soon"
    twin = grants.of(paths.repo_folder(repo), "web1") / f"{Path(shared).name[:32]}.narinfo"
    assert twin.samefile(pool / twin.name), "compressed and signed once"


async def test_what_no_machine_has_had_for_a_day_is_removed(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = await keys.make(repo, "cache", "signing")
    (one, _), (two, _) = await closure(tmp_path), await closure(tmp_path)
    await grants.grant(repo, "web1", [one], key, timeout=60)
    monkeypatch.setattr(caches, "KEPT", -1.0)
    await grants.grant(repo, "web1", [two], key, timeout=60)
    pool = grants.granted().parent / "made" / paths.repo_folder(repo)
    left = {each.stem for each in pool.glob("*.narinfo")}
    assert left == served(repo, "web1") and len([*(pool / "nar").iterdir()]) == len(left)
    await grants.grant(repo, "web1", [one], key, timeout=60)
    assert served(repo, "web1") >= hashes(one)


async def test_a_new_key_signs_what_an_old_one_had_signed(repo: Path, tmp_path: Path) -> None:
    (one, shared), old = await closure(tmp_path), await keys.make(repo, "old", "signing")
    await grants.grant(repo, "web1", [one], old, timeout=60)
    new = await keys.make(repo, "new", "signing")
    await grants.grant(repo, "web1", [one], new, timeout=60)
    cache = grants.of(paths.repo_folder(repo), "web1")
    for each in hashes(one, shared):
        assert "Sig: infra-new:" in (cache / f"{each}.narinfo").read_text()
    machine = {"NIX_REMOTE": f"local?root={tmp_path / 'machine'}", "NIX_CONFIG": "build-users-group ="}
    words = ["nix", "--extra-experimental-features", "nix-command", "copy", "--from", f"file://{tmp_path}/link"]
    (tmp_path / "link").symlink_to(cache)
    for trusted, status in ((old, 1), (new, 0)):
        option = ["--option", "trusted-public-keys", await keys.public_half(trusted)]
        done = subprocess.run([*words, *option, one], env={**os.environ, **machine}, check=False)
        assert done.returncode == status
    assert Path(f"{tmp_path}/machine{one}").exists()


async def test_what_a_power_failure_has_left_half_is_made_anew(repo: Path, tmp_path: Path) -> None:
    key, (one, shared) = await keys.make(repo, "cache", "signing"), await closure(tmp_path)
    await grants.grant(repo, "web1", [one], key, timeout=60)
    part = grants.of(paths.repo_folder(repo), "web1")
    made = grants.granted().parent / "made" / paths.repo_folder(repo)
    for break_it in (lambda nar: os.truncate(nar, 5), Path.unlink):
        for nar in (made / "nar").iterdir():
            break_it(nar)
        os.truncate(made / f"{Path(shared).name[:32]}.narinfo", 0)
        await grants.grant(repo, "web1", [one], key, timeout=60)
        assert caches.has(part, one) and served(repo, "web1") == hashes(one, shared)
        assert all(each.stat().st_size > 5 for each in (part / "nar").iterdir())


async def test_what_is_not_in_the_store_is_not_granted(repo: Path) -> None:
    key = await keys.make(repo, "cache", "signing")
    with pytest.raises(process.CommandFailed):
        await grants.grant(repo, "web1", ["/nix/store/00000000000000000000000000000000-gone"], key, timeout=60)


async def test_caches_of_before_are_taken_over(repo: Path, tmp_path: Path) -> None:
    key, (one, shared) = await keys.make(repo, "cache", "signing"), await closure(tmp_path)
    folder, state = paths.repo_folder(repo), paths.state_home()
    helms = paths.private_folder(state / "repos" / folder / "helm/cache")

    def as_before() -> None:
        for new, old in (("granted/{}/web1", "api/told/{}/web1/cache"), ("made/{}", "repos/{}/cache")):
            place = state / old.format(folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            (state / "store" / new.format(folder)).rename(place)

    await grants.take_over()
    assert not grants.granted().exists(), "there is nothing to take over"
    await grants.grant(repo, "web1", [one], key, timeout=60)
    as_before()
    shutil.rmtree(state / "store")
    for _ in range(2):
        await grants.take_over()
        assert served(repo, "web1") == hashes(one, shared)
    assert {each.stat().st_mode & 0o777 for each in (grants.granted(), grants.granted() / folder)} == {0o755}
    as_before()
    two, _ = await closure(tmp_path)
    await grants.grant(repo, "web1", [two], key, timeout=60)
    async with grants._alone(repo):  # so that both have seen what is there
        both = [asyncio.create_task(grants.take_over()) for _ in range(2)]
        await asyncio.sleep(0.5)
    await asyncio.gather(*both)
    assert served(repo, "web1") >= hashes(two) and not served(repo, "web1") & hashes(one), "the newer one counts"
    assert not [*state.glob("repos/*/cache"), *state.glob("api/told/*/*/cache")] and helms.exists()


async def test_a_retired_machine_may_fetch_nothing(repo: Path, tmp_path: Path) -> None:
    key = await keys.make(repo, "cache", "signing")
    one, shared = await closure(tmp_path)
    for name in ("web1", "web2"):
        await grants.grant(repo, name, [one], key, timeout=60)
    changed = (grants.granted() / "changed").read_text()
    await retire.fn(repo, Target(HOST, "web1"))
    assert not grants.of(paths.repo_folder(repo), "web1").exists()
    assert served(repo, "web2") == hashes(one, shared)
    assert changed != (now := (grants.granted() / "changed").read_text())
    await grants.take_back(repo, "web1")
    assert (grants.granted() / "changed").read_text() == now, "it was granted nothing"
