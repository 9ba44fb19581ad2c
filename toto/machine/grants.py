"""What a machine that pulls may fetch: a signed binary cache of its own, and nothing of other machines'.

Closures are compressed and signed once, into a cache of the repo's that is served to nobody. A machine's `cache/` has
hard links of what it needs.
"""

import contextlib
import os
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from toto.base import paths
from toto.machine import documents
from toto.nix import commands as nix

_NAR: Final = re.compile(rb"^URL: (nar/[0-9a-z]{52}\.nar(?:\.zst)?)$", re.MULTILINE)
_KEPT: Final = 86_400.0  # seconds that the repo's cache keeps what no machine has


async def grant(repo: Path, machine: str, closures: Iterable[str], key: Path, *, timeout: float) -> None:
    """Let a machine fetch these closures, signed by the secret `key`, and nothing else that it could fetch before.

    Raises `CopyFailed`, `CommandTimeout` after `timeout` seconds.
    """
    closures = sorted({*closures})
    place = documents.Place.of(repo, machine).told
    async with paths.alone(paths.repo_state(repo) / "cache.lock"):
        pool = paths.private_folder(paths.repo_state(repo) / "cache")
        named = (await nix.public_key(key.read_text())).partition(":")[0]
        found: dict[str, bytes] = {}
        for closure in closures:
            needed = [f"{path.rpartition('/')[2][:32]}.narinfo" for path in await nix.closure(closure)]
            for each in needed:
                _forget_other_keys(pool / each, named)
            await nix.copy_to_cache(closure, pool, key, timeout=timeout, target=machine)
            found |= {each: (pool / each).read_bytes() for each in needed}
        _link(pool, place / "cache", found)
        _prune(pool)


def _forget_other_keys(narinfo: Path, key: str) -> None:
    """A narinfo that a different key signed is written anew."""
    with contextlib.suppress(FileNotFoundError):
        if f"\nSig: {key}:".encode() not in narinfo.read_bytes():
            narinfo.unlink()


def _link(pool: Path, cache: Path, narinfos: dict[str, bytes]) -> None:
    """Make `cache` have these narinfos with what they name, and nothing else; a nar is there before it is named."""
    (cache / "nar").mkdir(parents=True, exist_ok=True)
    for each in (cache.parent.parent, cache.parent, cache, cache / "nar"):
        each.chmod(0o755)  # the server's user reads it
    nars = {found[1].decode() for text in narinfos.values() if (found := _NAR.search(text))}
    wanted = [*sorted(nars), *sorted(narinfos), "nix-cache-info"]
    for name in wanted:
        if _same(pool / name, cache / name):
            continue
        fresh = cache / f".{os.getpid()}.new"
        fresh.unlink(missing_ok=True)
        fresh.hardlink_to(pool / name)
        fresh.chmod(0o644)
        fresh.replace(cache / name)
    for file in _files(cache):
        if str(file.relative_to(cache)) not in wanted:
            file.unlink()


def _same(one: Path, two: Path) -> bool:
    return two.exists() and one.samefile(two)


def _prune(pool: Path) -> None:
    """Remove what no machine has any more, and had not lately."""
    for file in _files(pool):
        seen = file.stat()
        if seen.st_nlink == 1 and seen.st_ctime < time.time() - _KEPT and file.name != "nix-cache-info":
            file.unlink()


def _files(cache: Path) -> Iterator[Path]:
    for folder in (cache, cache / "nar"):
        if folder.is_dir():
            yield from (each for each in folder.iterdir() if each.is_file())
