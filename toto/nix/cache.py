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
ROOM: Final = "is there room where toto's state is (`df -h`, `df -i`)? see nix.signing_key in toto.toml"
_FOLDERS: Final = ("nar", "log", "realisations")  # nix makes them wherever it reads a cache; who reads this may not
_ABOUT: Final = "nix-cache-info"
_NAR: Final = re.compile(rb"^URL: (nar/[0-9a-z]{52}\.nar(?:\.zst)?)$", re.MULTILINE)
_SIZE: Final = re.compile(rb"^FileSize: ([0-9]+)$", re.MULTILINE)
_REFERENCES: Final = re.compile(rb"^References: (.*)$", re.MULTILINE)


async def add(closure: str, cache: Path, key: Path, *, timeout: float, target: str) -> dict[str, bytes]:
    """Have a closure in the binary cache in a folder, compressed, and signed with a secret key file; its narinfos.

    What is there already stays, unless a different key has signed it, or it is not whole, as after a power failure.
    Raises `CopyFailed`, `CommandFailed` for what is not in the store, `CommandTimeout` after `timeout` seconds.
    """
    named = (await nix.public_key(key.read_text())).partition(":")[0]
    needed = [f"{path.rpartition('/')[2][:32]}.narinfo" for path in await nix.closure(closure)]
    for _ in range(2):  # (Of a narinfo that was lost, nix takes the nar that it finds there, whole or not.)
        for each in needed:
            _forget_unless_sound(cache, each, named)
        await _copy(closure, cache, key, timeout, target)
        found = {each: (cache / each).read_bytes() for each in needed}
        if all(_names_all_of_it(cache, text) for text in found.values()):
            return found
    raise nix.CopyFailed(f"{cache} does not hold what was copied there", target=target, hint="is that disk sound?")


async def _copy(closure: str, cache: Path, key: Path, timeout: float, target: str) -> None:
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
                f"the closure could not be offered to the machine:\n{error.tail}", target=target, hint=ROOM
            ) from None


def _forget_unless_sound(cache: Path, narinfo: str, key: str) -> None:
    """A narinfo that this key has not signed is written anew, and so is one with what it names if that is not whole."""
    with contextlib.suppress(FileNotFoundError):
        text = (cache / narinfo).read_bytes()
        if not (whole := _names_all_of_it(cache, text)) and (nar := _NAR.search(text)):
            (cache / nar[1].decode()).unlink(missing_ok=True)
        if not whole or f"\nSig: {key}:".encode() not in text:
            (cache / narinfo).unlink()


def _names_all_of_it(cache: Path, narinfo: bytes) -> bool:
    """Whether what a narinfo names is there, and as long as it says."""
    nar, size = _NAR.search(narinfo), _SIZE.search(narinfo)
    with contextlib.suppress(FileNotFoundError):
        return bool(nar and size and (cache / nar[1].decode()).stat().st_size == int(size[1]))
    return False


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
        if not _names_all_of_it(cache, text):
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
