"""Each repo has a key of its own for its machines; the one key of version 0.1.0 stays with who has deployed by it."""

import asyncio
import shutil
import subprocess
from pathlib import Path

import pytest

from blocks.names import names as block_names
from blocks.names import own_or_shared, used
from tests.ledger.test_ledger import deployed
from tests.machine.test_ssh import keygen
from toto.base import paths
from toto.base.errors import InputError
from toto.git_host import host as git_host
from toto.infra_repo import git
from toto.ledger import steps
from toto.ledger.ledger import Ledger
from toto.ledger.target import Target
from toto.machine import keys


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TOTO_STATE", str(tmp_path / "state"))
    return paths.state_home()


async def made(repos: Path, *names: str) -> list[Path]:
    return [await git_host.make(repos, name) for name in names]


async def has_deployed(repo: Path, name: str) -> None:
    await Ledger(repo).write(Target("host", name), steps.verified(deployed("drv")), "good")


async def test_each_repo_has_a_key_of_its_own_and_nobody_else_reads_it(tmp_path: Path) -> None:
    infra, lab = await made(tmp_path / "repos", "infra", "lab")
    first, again, other = [await keys.of_machines(each) for each in (infra, infra, lab)]
    assert first == again and first.read_text() != other.read_text()
    assert first.stat().st_mode & 0o777 == 0o600 and first.parent.stat().st_mode & 0o777 == 0o700
    assert first.with_suffix(".pub").read_text().startswith(await keys.public_half(first))
    assert first.with_suffix(".pub").read_text().endswith("toto infra\n")


async def test_of_many_that_need_it_at_once_one_makes_the_key(tmp_path: Path) -> None:
    [infra] = await made(tmp_path / "repos", "infra")
    found = await asyncio.gather(*(keys.of_machines(infra) for _ in range(5)))
    assert len({(each, each.read_text()) for each in found}) == 1
    assert sorted(each.name for each in found[0].parent.iterdir()) == ["machines", "machines.pub"]


async def test_the_old_key_stays_with_the_repo_whose_ledger_has_the_machines(tmp_path: Path, state: Path) -> None:
    (state / "keys").mkdir()
    await keygen(state / "keys" / "machines")
    old = (state / "keys" / "machines").read_text()
    infra, lab, more = await made(tmp_path / "repos", "infra", "lab", "more")
    await has_deployed(infra, "web1")
    [theirs, its_own] = [(await keys.of_machines(each)).read_text() for each in (infra, lab)]
    assert theirs == old and its_own != old
    assert keys.with_the_old_key([infra, lab, more]) == []
    await has_deployed(more, "db1")
    [said] = keys.with_the_old_key([infra, lab, more])
    assert "infra and more log in to their machines by the same key" in said
    fresh = tmp_path / "fresh"
    await keygen(fresh)
    await keys.import_key(more, keys.MACHINES, fresh)
    assert (await keys.of_machines(more)).read_text() == fresh.read_text()
    assert keys.with_the_old_key([infra, lab, more]) == []


async def test_the_only_repo_keeps_the_old_key_before_it_has_deployed_anything(tmp_path: Path, state: Path) -> None:
    (state / "keys").mkdir()
    await keygen(state / "keys" / "machines")
    [infra] = await made(tmp_path / "repos", "infra")
    key = await keys.of_machines(infra)
    assert key.read_text() == (state / "keys" / "machines").read_text()
    assert key.with_suffix(".pub").exists()
    key.with_suffix(".pub").unlink()  # as a kill between the two
    assert (await keys.of_machines(infra)) == key


async def test_a_manifest_names_keys_of_its_own_repo_only(tmp_path: Path, state: Path) -> None:
    infra, lab = await made(tmp_path / "repos", "infra", "lab")
    await keygen(tmp_path / "attic")
    await keys.import_key(infra, "attic", tmp_path / "attic")
    assert (await keys.identity(infra, "attic")).read_text() == (tmp_path / "attic").read_text()
    assert await keys.identity(infra, None) == await keys.of_machines(infra)
    with pytest.raises(InputError, match="this repository has no key attic") as missing:
        await keys.identity(lab, "attic")
    assert "next: on toto: toto key lab attic --import FILE" in str(missing.value)
    await keys.private("sandbox")
    (state / "keys" / "machines").write_text("old")
    for name in ("sandbox", "machines.pub"):
        with pytest.raises(InputError):
            await keys.identity(lab, name)
    (tmp_path / "text").write_text("no key")
    for file in ("text", "none", "attic.pub"):
        with pytest.raises(InputError):
            await keys.import_key(infra, "x", tmp_path / file)
    with pytest.raises(InputError):
        await keys.import_key(infra, "../x", tmp_path / "attic")


async def test_a_repo_names_keys_that_sign_and_each_key_has_one_use(tmp_path: Path) -> None:
    infra, lab = await made(tmp_path / "repos", "infra", "lab")
    first, again = [await keys.make(infra, "cache.1", "signing") for _ in range(2)]
    assert first == again == keys.signing(infra, "cache.1") and first.stat().st_mode & 0o777 == 0o600
    assert sorted(each.name for each in first.parent.iterdir()) == ["cache.1"]
    assert (public := await keys.public_half(first)).startswith("infra-cache.1:") and len(public) == 58
    await keys.import_key(lab, "theirs", first)
    assert await keys.public_half(keys.signing(lab, "theirs")) == public
    with pytest.raises(InputError, match=r"this repository has no key cache\.1, which nix\.sig") as missing:
        keys.signing(lab, "cache.1")
    assert "toto.toml: " in str(missing.value)
    assert "next: on toto: toto key lab cache.1 --import FILE, or --new signing" in str(missing.value)
    reader = await keys.make(infra, "read.only", "ssh")
    assert (await keys.public_half(reader)).startswith("ssh-ed25519 ") and Path(f"{reader}.pub").exists()
    for use, name in (("signing", "read.only"), ("ssh", "cache.1"), ("signing", "read.only.pub")):
        with pytest.raises(InputError, match=f"names the key {name}, which is not a"):
            keys.named(infra, name, "ssh" if use == "ssh" else "signing", "toto.toml: x")
    with pytest.raises(InputError, match=r"which is not a private ssh key"):
        await keys.identity(infra, "cache.1")
    with pytest.raises(InputError):  # the machines' key lets toto in
        await keys.make(infra, keys.MACHINES, "signing")
    with pytest.raises(InputError, match=r"is not a private ssh key$"):
        await keys.import_key(infra, keys.MACHINES, first)
    (tmp_path / "short").write_text("name:AAAA==")
    with pytest.raises(InputError, match="is not a private ssh key or a secret key of nix"):
        await keys.import_key(infra, "x", tmp_path / "short")


async def test_the_operators_commands(tmp_path: Path) -> None:
    repos = tmp_path / "repos"
    await keygen(tmp_path / "attic")

    def toto(*words: str | Path) -> str:
        done = subprocess.run(["toto", *words, "--repos", repos], capture_output=True, text=True, check=False)
        return done.stdout + done.stderr

    toto("repo", "create", "infra")
    infra = repos / "infra.git"
    assert (paths.repo_state(infra) / "keys" / "machines").exists(), "it is made with the repository"
    assert toto("key", "infra") == f"{await keys.public_half(await keys.of_machines(infra))} toto infra\n"
    attic = " ".join((tmp_path / "attic.pub").read_text().split()[:2])
    assert toto("key", "infra", "attic", "--import", tmp_path / "attic") == f"{attic} toto infra\n"
    assert "this repository has no key other" in toto("key", "infra", "other")
    assert "should be 1 to 63 letters" in toto("key", "infra", "..") and "not a file" in toto("key", "infra", "a/b")
    made = toto("key", "infra", "cache", "--new", "signing")
    assert made.startswith("infra-cache:") and made == toto("key", "infra", "cache")
    assert "which is not a private ssh key" in toto("key", "infra", "cache", "--new", "ssh")
    assert toto("key", "infra", "reader", "--new", "ssh").endswith("toto infra\n")
    assert "the blocks called toto stay with infra" in toto("repo", "create", "lab")
    assert (paths.state_home() / "server.toml").read_text().startswith('shared_blocks = "infra"')
    assert "shared_blocks" not in toto("repo", "create", "third")
    assert git.bare(repos / "third.git")


async def test_nobody_inherits_by_the_name_of_a_repository(tmp_path: Path) -> None:
    repos = tmp_path / "repos"

    def create(*words: str) -> str:
        done = subprocess.run(
            ["toto", "repo", "create", *words, "--repos", repos], capture_output=True, text=True, check=False
        )
        return done.stdout + done.stderr

    create("infra")
    create("lab")
    infra, lab = repos / "infra.git", repos / "lab.git"
    key = (await keys.of_machines(infra)).read_text()
    assert block_names(infra, "dns") == ["infra--dns", "infra", "dns", "toto"]
    used(infra, "dns")  # (a block of that name was there)
    assert "branch" in create("infra"), "one that is there is brought up to date"
    for name in ("dns", "toto"):
        assert "or a block of a different one has it" in create(name)
    shutil.rmtree(infra)
    refused = create("infra", "--by", "mallory")
    assert "a repository of this name was there before" in refused
    assert "next: choose a different name, or, if that is meant, on toto: toto repo create infra --inherit" in refused
    assert not infra.exists()
    # A different one, by whatever way it came there.
    infra.mkdir()
    for ask in (block_names, lambda repo: own_or_shared(repo, "ops")):
        with pytest.raises(InputError, match="belong to a different repository, or to one of this name that was there"):
            ask(infra)
    shutil.rmtree(infra)
    # The only one that is left has no blocks of the former one's, whatever they are called.
    rules = paths.state_home() / "server.toml"
    rules.rename(tmp_path / "rules")
    assert block_names(lab, "dns") == ["lab--dns", "lab", "toto"] and block_names(lab, "infra")[2:] == ["toto"]
    (tmp_path / "rules").rename(rules)
    assert "branch" in create("infra", "--inherit")
    assert block_names(infra, "dns") == ["infra--dns", "infra", "dns", "toto"]
    assert (await keys.of_machines(infra)).read_text() == key
    # The name of a repository moves with its folder, and the blocks of its new name are its own.
    lab.rename(repos / "moved.git")
    assert block_names(repos / "moved.git") == ["moved"]
