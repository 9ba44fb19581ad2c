"""toto's nix daemon for demo and tests: as root in this process, else by sudo."""

import asyncio
import contextlib
import grp
import os
import shutil
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from toto.base.errors import TotoError
from toto.nix import daemon


def possible() -> bool:
    """Whether this user can have a daemon run."""
    return shutil.which("nix-daemon") is not None and (os.geteuid() == 0 or shutil.which("sudo") is not None)


@contextlib.asynccontextmanager
async def running(home: Path) -> AsyncIterator[None]:
    """Have a nix daemon of toto's run to the end of the block, for this process and what it starts.

    `home` is its folder when this user is root. Nothing, where one runs. Raises `TotoError`.
    """
    if os.geteuid() == 0 and daemon.SOCKET not in os.environ:
        async with daemon.running(home) as socket:
            with _named(socket):
                yield
    else:
        async with by_sudo():
            yield


@contextlib.asynccontextmanager
async def by_sudo() -> AsyncIterator[None]:
    """The same for a user who is not root. (For root nothing: the `toto serve` of root's runs one by itself.)"""
    if os.geteuid() == 0 or daemon.SOCKET in os.environ:
        yield
        return
    home = Path(f"/run/toto-nix-{os.getuid()}-{os.getpid()}")
    names = {"PATH", "PYTHONPATH", "NIX_CONF_DIR", "NIX_CONFIG"} & os.environ.keys()
    argv = [
        *("sudo", "--", "env", "-i", *(f"{name}={os.environ[name]}" for name in sorted(names))),
        *(sys.executable, "-m", "toto.cli", "nix-daemon", "--lifeline", "--home", str(home)),
        *("--group", grp.getgrgid(os.getgid()).gr_name),
    ]
    # In this session, so that sudo can ask for a password. Nothing of root's can be ended by a signal of this user's:
    # the lifeline ends it, also when this process is killed.
    pipe = asyncio.subprocess.PIPE
    sudo = await asyncio.create_subprocess_exec(*argv, stdin=pipe, stdout=pipe)
    assert sudo.stdin is not None and sudo.stdout is not None
    try:
        if b"answers" not in await sudo.stdout.readline():
            raise TotoError(
                "toto's nix daemon does not start by sudo", hint="run this as root, or as a user who may use sudo"
            )
        with _named(home / "client" / "socket"):
            yield
    finally:
        sudo.stdin.close()
        await asyncio.wait_for(sudo.wait(), 30)


@contextlib.contextmanager
def _named(socket: Path) -> Iterator[None]:
    os.environ[daemon.SOCKET] = str(socket)
    try:
        yield
    finally:
        del os.environ[daemon.SOCKET]
