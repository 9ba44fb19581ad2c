"""A signed binary cache in a folder: makes it, and makes of it others that have a part of it, by hard links."""

import contextlib
import os
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from toto.base import process
from toto.nix import commands as nix

KEPT: Final = 86_400.0  # seconds that a cache keeps what no part of it has
_FOLDERS: Final = ("nar", "log", "realisations")  # nix makes them wherever it reads a cache; who reads this may not
_ABOUT: Final = "nix-cache-info"
_NAR: Final = re.compile(rb"^URL: (nar/[0-9a-z]{52}\.nar(?:\.zst)?)$", re.MULTILINE)
_REFERENCES: Final = re.compile(rb"^References: (.*)$", re.MULTILINE)


async def add(closure: str, cache: Path, key: Path, *, timeout: float, target: str) -> dict[str, bytes]:
    """Have a closure in the binary cache in a folder, compressed, and signed with a secret key file; its narinfos.

    What is there already stays, unless a different key has signed it. Raises `CopyFailed`, `CommandFailed` for what is
    not in the store, `CommandTimeout` after `timeout` seconds.
    """
    named = (await nix.public_key(key.read_text())).partition(":")[0]
    needed = [f"{path.rpartition('/')[2][:32]}.narinfo" for path in await nix.closure(closure)]
    for each in needed:
        _forget_other_keys(cache / each, named)
    with tempfile.TemporaryDirectory(prefix="toto-cache-") as short:  # (whatever the folder is called)
        Path(short, "cache").symlink_to(cache)
        Path(short, "key").symlink_to(key)
        store = f"file://{short}/cache?compression=zstd&secret-key={short}/key"
        try:
            await process.run(
                ["nix", *nix.NEW, "copy", "--to", store, closure], env=nix.environment(), timeout=timeout, target=target
            )
        except process.CommandFailed as error:
            raise nix.CopyFailed(
                f"the closure could not be offered to the machine:\n{error.tail}",
                target=target,
                hint="is there room where toto's state is? see nix.signing_key in toto.toml",
            ) from None
    return {each: (cache / each).read_bytes() for each in needed}


def _forget_other_keys(narinfo: Path, key: str) -> None:
    """A narinfo that a different key signed is written anew."""
    with contextlib.suppress(FileNotFoundError):
        if f"\nSig: {key}:".encode() not in narinfo.read_bytes():
            narinfo.unlink()


def link(cache: Path, part: Path, narinfos: Mapping[str, bytes]) -> None:
    """Make `part` have these narinfos of `cache` with what they name, and nothing else, for everybody to read.

    A nar is there before it is named, and is named no more before it goes.
    """
    for folder in (part, *(part / each for each in _FOLDERS)):
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o755)
    nars = {found[1].decode() for text in narinfos.values() if (found := _NAR.search(text))}
    wanted = [*sorted(nars), *sorted(narinfos), _ABOUT]
    for name in wanted:
        if _same(cache / name, part / name):
            continue
        fresh = part / f".{os.getpid()}.new"
        fresh.unlink(missing_ok=True)
        fresh.hardlink_to(cache / name)
        fresh.chmod(0o644)
        fresh.replace(part / name)
    for file in _files(part):
        if str(file.relative_to(part)) not in wanted:
            file.unlink()


def _same(one: Path, two: Path) -> bool:
    return two.exists() and one.samefile(two)


def has(cache: Path, closure: str) -> bool:
    """Whether a closure is in a binary cache, whole."""
    wanted, seen = {closure.rpartition("/")[2]}, set[str]()
    while wanted:
        seen.add(name := wanted.pop())
        try:
            text = (cache / f"{name[:32]}.narinfo").read_bytes()
        except FileNotFoundError:
            return False
        if (nar := _NAR.search(text)) is None or not (cache / nar[1].decode()).exists():
            return False
        if references := _REFERENCES.search(text):
            wanted |= {*references[1].decode().split()} - seen
    return True


def prune(cache: Path) -> None:
    """Remove what no part of the cache has any more, and had not lately."""
    for file in _files(cache):
        seen = file.stat()
        if seen.st_nlink == 1 and seen.st_ctime < time.time() - KEPT and file.name != _ABOUT:
            file.unlink()


def _files(cache: Path) -> Iterator[Path]:
    """Its files, those that name others first."""
    for folder in (cache, cache / "nar"):
        if folder.is_dir():
            yield from (each for each in folder.iterdir() if each.is_file())
