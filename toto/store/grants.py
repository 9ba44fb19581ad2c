"""What a machine may fetch: a signed binary cache of its own, and nothing of other machines'.

    store/made/REPO/               the binary cache of all that a repo's machines may fetch; it is served to nobody
    store/granted/REPO/MACHINE/    what one of them may fetch: a binary cache, of hard links
    store/granted/changed          changes whenever a grant does

There is no other record of grants: the web server that machines ask (`toto.api`) serves these folders, and an NFS
server exports them (`toto.store.exports`).
"""

import contextlib
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from toto.base import files, paths
from toto.ledger.ledger import Ledger
from toto.ledger.target import HOST, Target
from toto.nix import cache
from toto.nix import commands as nix


def granted() -> Path:
    """The folder of all that is granted. (Cells' users read it; its parent is toto's.)"""
    return paths.state_home() / "store" / "granted"


def prepare() -> Path:
    """Make the folder of all that is granted, for a server to read, and return it."""
    paths.private_folder(granted().parent)
    return _open(granted())


async def take_over() -> None:
    """Take over the caches that a toto had in other places, before there was this folder. Raises OSError."""
    state = paths.state_home()
    for made in state.glob("repos/*/cache/nix-cache-info"):
        repo = made.parents[1]
        async with paths.alone(repo / "store.lock"):
            for part in state.glob(f"api/told/{repo.name}/*/cache"):
                _move(part, _open(prepare() / repo.name) / part.parent.name)
            if made.exists():  # (server and worker may begin together)
                _move(made.parent, paths.private_folder(prepare().parent / "made") / repo.name)
            _note_change()


def _move(old: Path, new: Path) -> None:
    """Move a folder, or remove it where the new one is there already."""
    if new.exists():
        shutil.rmtree(old)
    else:
        old.rename(new)


def _open(folder: Path) -> Path:
    """Make a folder, when it is missing, that everybody may read who gets there."""
    folder.mkdir(exist_ok=True)
    folder.chmod(0o755)
    return folder


def of(folder: str, machine: str) -> Path:
    """The binary cache of a machine, which may not be there; `folder` is that of its repo."""
    return granted() / folder / machine


async def grant(repo: Path, machine: str, closures: Iterable[str], key: Path, *, timeout: float) -> None:
    """Let a machine fetch these closures, signed by the secret `key`, and nothing else that it could fetch before.

    Its name has been checked. Raises `CopyFailed`, `CommandFailed` for what is not in the store, `CommandTimeout` after
    `timeout` seconds.
    """
    folder = paths.repo_folder(repo)
    with _told(machine):
        async with _alone(repo):
            part, made = prepare() / folder / machine, paths.private_folder(granted().parent / "made" / folder)
            found: dict[str, bytes] = {}
            for closure in sorted({*closures}):
                found |= await cache.add(closure, made, key, timeout=timeout, target=machine)
            _open(part.parent)
            cache.link(made, part, found)
            cache.prune(made)
            _note_change()


async def lend(repo: Path, part: Path, closure: str, key: Path, *, timeout: float, target: str) -> None:
    """Make `part`, a new folder on the same disk, a signed binary cache of one closure, until somebody removes it.

    Raises what `grant` raises.
    """
    with _told(target):
        async with _alone(repo):
            made = paths.private_folder(granted().parent / "made" / paths.repo_folder(repo))
            cache.link(made, part, await cache.add(closure, made, key, timeout=timeout, target=target))


async def good(repo: Path, machine: str) -> list[str]:
    """The closures of a machine's last good and the one before, as far as toto has them; none without a last good."""
    entry = Ledger(repo).get(Target(HOST, machine))
    found = [getattr(each, "path", None) for each in (entry.good, entry.previous) if entry.good and each]
    return [each for each in found if isinstance(each, str) and await nix.valid(each)]


async def take_back(repo: Path, machine: str) -> None:
    """Let a machine fetch nothing any more."""
    async with _alone(repo):
        part = of(paths.repo_folder(repo), machine)
        if part.is_dir():
            shutil.rmtree(part)
            _note_change()


def _alone(repo: Path) -> AbstractAsyncContextManager[None]:
    return paths.alone(paths.repo_state(repo) / "store.lock")


@contextlib.contextmanager
def _told(target: str) -> Iterator[None]:
    """A disk that takes no more is told like other reasons for which there is no grant."""
    try:
        yield
    except OSError as error:
        said = f"the closure could not be offered to the machine: {error}"
        raise nix.CopyFailed(said, target=target, hint=cache.ROOM) from None


def _note_change() -> None:
    files.write(granted() / "changed", secrets.token_hex(8), 0o644)
