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

    `home` is its folder when this user is root. One that is named in the environment is used. Raises `TotoError`.
    """
    if os.geteuid() != 0:
        async with by_sudo():
            yield
    elif daemon.SOCKET in os.environ:
        yield
    else:
        async with daemon.running(home) as socket:
            with _environment({daemon.SOCKET: str(socket)}):
                yield


@contextlib.asynccontextmanager
async def by_sudo() -> AsyncIterator[None]:
    """The same for a user who is not root; who asks nix directly asks that daemon too, for the store is root's.

    For root it does nothing: the `toto serve` of root's runs a daemon by itself.
    """
    if os.geteuid() == 0:
        yield
        return
    named = os.environ.get(daemon.SOCKET)
    async with contextlib.nullcontext(Path(named)) if named else _sudo() as socket:
        with _environment({daemon.SOCKET: str(socket), **daemon.client(socket)}):
            yield


@contextlib.asynccontextmanager
async def _sudo() -> AsyncIterator[Path]:
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
        yield home / "client" / "socket"
    finally:
        sudo.stdin.close()
        await asyncio.wait_for(sudo.wait(), 120)


@contextlib.contextmanager
def _environment(more: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in more}
    os.environ.update(more)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
