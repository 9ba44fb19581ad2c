"""No build on a builder while something else is done with it, such as a roll-out.

nix has a lock for each build that a builder may do at once, its slots, and holds one while it builds there. So whoever
holds all of them knows that nothing is built there, and nix gives what is to be built to others, or waits. They are
root's. So toto asks (`quiet`), by holding a lock that it may open, and its nix daemon takes the slots (`Slots`), each
as soon as it is free. All of it ends with the processes that hold the locks.

    HOME/asked/NAME.lock    toto holds it, for as long as no build is to be there
    HOME/quiet/NAME         is there when the daemon holds all slots
"""

import asyncio
import contextlib
import fcntl
import logging
import os
import time
from collections.abc import AsyncIterator, Collection, Mapping
from pathlib import Path
from typing import Final

from toto.base import files
from toto.base.errors import TotoError
from toto.base.server_rules import Builder

log = logging.getLogger(__name__)

ASKED: Final = "asked"  # the folder below the daemon's home that is toto's to write
_QUIET: Final = "quiet"
_SLOTS: Final = Path("/nix/var/nix/current-load")  # as nix names them, in `nix __build-remote`
_OPENED: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # (toto may have put anything there)
_PAUSE: Final = 0.5  # seconds between two looks


class StillBuilds(TotoError):
    """A builder had builds for longer than one may take."""


@contextlib.asynccontextmanager
async def quiet(home: Path, names: Collection[str], *, patience: float) -> AsyncIterator[None]:
    """Have nothing built on these builders of the daemon in `home`, for this block; what they build now ends first.

    With a `patience` of 0 no build begins there, and those that are there are not waited for.
    Raises `StillBuilds` after `patience` seconds.
    """
    async with contextlib.AsyncExitStack() as held:
        for name in names:
            file = held.enter_context(files.lock(home / ASKED / f"{name}.lock"))
            while not _locked(file.fileno(), fcntl.LOCK_SH):  # noqa: ASYNC110 - the daemon gives the slots back
                await asyncio.sleep(_PAUSE)
        deadline = time.monotonic() + patience
        waiting = False
        while patience and (busy := [name for name in names if not (home / _QUIET / name).exists()]):
            if time.monotonic() > deadline:
                raise StillBuilds(
                    f"builds for others, and has for {patience:.0f} s: it is not rolled out meanwhile",
                    target=", ".join(busy),
                    hint="push again later; see the runs that build, or nix.build_timeout in toto.toml",
                )
            if not waiting:
                log.warning("waiting until nothing is built on %s: it is a builder", ", ".join(busy))
                waiting = True
            await asyncio.sleep(_PAUSE)
        yield


class Slots:
    """The slots that the daemon in `home` holds."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._held: dict[str, dict[int, int]] = {}  # builder → slot → descriptor
        folder = home / _QUIET
        folder.mkdir(mode=0o755, exist_ok=True)
        folder.chmod(0o755)
        for left in folder.iterdir():
            left.unlink()

    def look(self, builders: Mapping[str, Builder]) -> None:
        """Take those of builders that are asked for, as far as they are free; give the others back."""
        for name in {*builders, *self._held}:
            with contextlib.suppress(FileNotFoundError):
                asked = os.open(self._home / ASKED / f"{name}.lock", _OPENED)
                try:
                    if name in builders and not _locked(asked, fcntl.LOCK_EX):
                        self._take(name, builders[name].jobs)
                    else:  # nobody can ask before they are given back
                        self._give_back(name)
                finally:
                    os.close(asked)

    def close(self) -> None:
        """Give all of them back."""
        for name in [*self._held]:
            self._give_back(name)

    def _take(self, name: str, jobs: int) -> None:
        held = self._held.setdefault(name, {})
        _SLOTS.mkdir(mode=0o755, exist_ok=True)
        for slot in set(range(jobs)) - held.keys():
            opened = os.open(_SLOTS / f"ssh:__{name}-{slot}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            if _locked(opened, fcntl.LOCK_EX):
                held[slot] = opened
            else:
                os.close(opened)
        if held.keys() >= set(range(jobs)):
            (self._home / _QUIET / name).touch()

    def _give_back(self, name: str) -> None:
        (self._home / _QUIET / name).unlink(missing_ok=True)
        for opened in self._held.pop(name, {}).values():
            os.close(opened)


def _locked(opened: int, how: int) -> bool:
    try:
        fcntl.flock(opened, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
