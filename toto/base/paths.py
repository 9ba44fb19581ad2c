"""The folders for what is not in git, the nix store or Prefect: exports, keys, GC roots, sandboxes."""

import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import anyio

from toto.base import files
from toto.base.errors import InputError, TotoError

STATE: Final = "TOTO_STATE"  # of toto's environment: the state directory
LEAST_FREE: Final = 200_000_000  # bytes: for the ledger, logs and exports of a run, and what else runs meanwhile


def state_home() -> Path:
    """toto's state directory: $TOTO_STATE, else ~/.local/state/toto. It is made when missing, with mode 0700.

    Raises `InputError` when its name has control characters, or white space other than blanks.
    """
    home = Path(os.environ.get(STATE) or Path.home() / ".local/state/toto").absolute()
    if re.search(r"[^\S ]|[\x00-\x1f\x7f]", str(home)):
        raise InputError(f"the state directory {str(home)!a} is no plain path", hint="set TOTO_STATE")
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    return home


def private_folder(path: Path) -> Path:
    """Make a folder, when it is missing, that only this user may enter, and return it."""
    path.mkdir(parents=True, exist_ok=True)
    path.chmod(0o700)
    return path


def repo_state(repo: Path) -> Path:
    """The directory for one infra repo, made when missing."""
    path = repo_state_of(repo)
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


def repo_state_of(repo: Path) -> Path:
    """The path of `repo_state`, which is not made."""
    return state_home() / "repos" / repo_folder(repo)


def repo_folder(repo: Path) -> str:
    """The name of the directory for one infra repo: the repo's name and a hash of its path."""
    real = repo.resolve()
    name = re.sub(r"[^A-Za-z0-9._-]", "_", real.name.removesuffix(".git")) or "repo"
    return f"{name}-{hashlib.sha256(os.fsencode(real)).hexdigest()[:8]}"


def require_room(repo: Path) -> None:
    """Raise `TotoError` when the disk of the ledger, of toto's state or of the nix store is almost full.

    A roll-out that cannot write down what it does could not be reverted.
    """
    for what, place in (("the ledger", repo), ("toto's state", state_home()), ("the nix store", Path("/nix/store"))):
        if place.exists() and (free := shutil.disk_usage(place).free) < LEAST_FREE:
            raise TotoError(
                f"only {free / 1e6:.0f} MB are free where {what} is, and a roll-out needs "
                f"{LEAST_FREE / 1e6:.0f} MB: nothing is rolled out",
                target=str(place),
                hint="look at `df -h`, make room (nix-collect-garbage, prune/prune), and push again",
            )


@asynccontextmanager
async def alone(lock: Path) -> AsyncIterator[None]:
    """Hold the file `lock` for this block; wait first while any other block, in any process, holds it.

    The lock ends with the process that holds it, however that process ends.
    """
    lock.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with files.lock(lock) as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                await anyio.sleep(0.1)
        yield
