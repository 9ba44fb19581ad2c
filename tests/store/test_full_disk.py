"""A full disk on toto: nothing half is served, it is told once, and all goes on when there is room.

The tests have a real, small file system each, in a mount namespace of their own.
"""

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from tests.repos import git
from tests.store.test_grants import closure, served
from toto.base import paths, process
from toto.base.errors import TotoError
from toto.machine import keys
from toto.nix import cache as caches
from toto.nix import commands as nix
from toto.store import grants

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="toto runs its nix daemon here only as root")

BIG: Final = 1_500_000  # bytes


@pytest.mark.parametrize(("case", "options"), [("cache", "size=2m,nr_inodes=400"), ("garbage", "size=64m")])
def test_a_full_disk(case: str, options: str, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f'mount -t tmpfs -o {options},mode=700 none {disk} && exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", mount, "sh", sys.executable, "-m", __spec__.name, case, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr


def full(disk: Path) -> Path:
    """Fill the disk; the file that does."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(b"x" * 4096):
                pass
        except OSError as error:
            assert error.errno == 28
    return filler


def nothing_half(repo: Path) -> None:
    """What a narinfo names is there, and all that is there is whole."""
    part = grants.of(paths.repo_folder(repo), "web1")
    made = grants.granted().parent / "made" / part.parent.name
    for cache in (made, part):
        for text in (each.read_bytes() for each in cache.glob("*.narinfo")):
            assert caches._names_all_of_it(cache, text)
    for nar in (part / "nar").iterdir():
        assert nar.samefile(made / "nar" / nar.name)


async def cache(folder: Path) -> None:
    """Publish into a disk without room, and into one without names."""
    disk = folder / "disk"
    os.environ["TOTO_STATE"] = str(disk / "state")
    git("init", "--quiet", "--bare", "infra.git", cwd=folder)
    repo, source = folder / "infra.git", folder / "big"
    key = await keys.make(repo, "cache", "signing")
    part = grants.of(paths.repo_folder(repo), "web1")
    source.write_bytes(os.urandom(BIG))
    added = (await process.run(["nix-store", "--add", source], env=nix.environment())).stdout.strip()
    (had, _), (big, _), (more, _) = await closure(folder), await closure(folder, added), await closure(folder)

    async def grant(*closures: str) -> str:
        try:
            await grants.grant(repo, "web1", closures, key, timeout=60)
        except nix.CopyFailed as error:
            return str(error)
        finally:
            assert caches.has(part, had), "what it had it has"
            nothing_half(repo)
        return ""

    assert await grant(had) == ""
    filler = full(disk)
    said = await grant(had, big)
    assert said.count("No space left on device") == 1 and "df -h" in said and not caches.has(part, big), said
    filler.unlink()
    assert await grant(had, big) == "" and caches.has(part, big)
    names = disk / "names"
    names.mkdir()
    try:
        for number in range(1_000):
            (names / str(number)).touch()
    except OSError as error:
        assert error.errno == 28
    try:  # where nothing was granted yet, and not even a folder can be made
        git("init", "--quiet", "--bare", "other.git", cwd=folder)
        await grants.grant(folder / "other.git", "web1", [had], key, timeout=60)
    except nix.CopyFailed as error:
        assert str(error).count("No space left on device") == 1
    else:
        raise AssertionError("there was no room")
    seen = []
    while said := await grant(had, more):  # whichever file there is no room for
        assert said.count("No space left on device") == 1, said
        seen.append("\n" in said.partition("next:")[0].strip())
        next(names.iterdir()).unlink()
    assert len(served(repo, "web1")) == 4 and {*seen} == {True, False}, "nix had no room, and later toto had none"


async def garbage(folder: Path) -> None:
    """Collect garbage where the store's disk has no byte left."""
    disk = folder / "disk"
    env = {**nix.environment(), "NIX_REMOTE": f"local?root={disk}", "NIX_CONFIG": "build-users-group ="}
    vars(nix).update(environment=lambda: env, STORE=disk)  # (this process has nothing else to do)
    added = []
    for name in ("needed", "garbage"):
        (folder / name).write_bytes(os.urandom(BIG))
        added.append((await process.run(["nix-store", "--add", folder / name], env=env)).stdout.strip())
    await nix.add_gc_root(added[0], folder / "root")
    log = disk / "log"
    log.write_bytes(bytes(2_000_000))
    full(disk)
    try:
        await nix.make_room(BIG)
    except TotoError as error:
        assert ": 0 bytes are free" in str(error) and "remove a file of 2 MB" in str(error)
    else:
        raise AssertionError("there was room for nix's database")
    log.unlink()
    (folder / "next").write_bytes(os.urandom(2 * BIG))
    done = await process.run(["nix-store", "--add", folder / "next"], env=env, check=False)
    assert done.status != 0, "it is full, all the same"
    assert await nix.make_room(3 * BIG) > 0
    assert [(disk / each[1:]).exists() for each in added] == [True, False]
    assert not [*(disk / "nix/store").glob("*-next")]
    await process.run(["nix-store", "--add", folder / "next"], env=env)


if __name__ == "__main__":
    asyncio.run({"cache": cache, "garbage": garbage}[sys.argv[1]](Path(sys.argv[2])))
