"""Where toto keeps what is not in git, the nix store or Prefect: exports, keys, GC roots, sandboxes."""

import fcntl
import hashlib
import os
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio

from toto.errors import InputError


def state_home() -> Path:
    """The state directory of this toto: $TOTO_STATE, else ~/.local/state/toto; made private to its user."""
    home = Path(os.environ.get("TOTO_STATE") or Path.home() / ".local/state/toto").absolute()
    if re.search(r"\s", str(home)):
        # ssh options and NixOS's run-NAME-vm split at white space.
        raise InputError(f"the state directory {home} has white space in its name", hint="set TOTO_STATE")
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    return home


def repo_state(repo: Path) -> Path:
    """The directory that belongs to one infra repo; readable for people, unique by the repo's path."""
    real = repo.resolve()
    name = re.sub(r"[^A-Za-z0-9._-]", "_", real.name.removesuffix(".git")) or "repo"
    path = state_home() / "repos" / f"{name}-{hashlib.sha256(os.fsencode(real)).hexdigest()[:8]}"
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


@asynccontextmanager
async def alone(lock: Path) -> AsyncIterator[None]:
    """Wait until no other block, of this process or another, holds the file `lock`, and hold it for this block.

    The lock goes with the process that held it, however that ends.
    """
    lock.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with lock.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                await anyio.sleep(0.1)
        yield
