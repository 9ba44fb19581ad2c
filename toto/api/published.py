"""Wakes whoever waits for a document, when one is published: one look at one file for all machines."""

import asyncio
import contextlib
from pathlib import Path
from typing import Final

from toto.machine import documents

LOOK: Final = 0.25  # seconds between two looks


class Published:
    """Knows when anything was published for any machine. `watch` must run meanwhile."""

    def __init__(self) -> None:
        self._changed = asyncio.Event()
        self.ended = False

    def end(self) -> None:
        """Let everybody who waits go: the server stops."""
        self.ended = True
        self._changed.set()

    async def watch(self) -> None:
        """Look for changes, to the end of the program."""
        file, seen = documents.stamp(), None
        while True:
            now = _seen(file)
            if now != seen:
                seen = now
                self._changed.set()
                self._changed = asyncio.Event()
            await asyncio.sleep(LOOK)

    async def change(self, seconds: float) -> None:
        """Wait until something is published, for up to so many seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()


def _seen(file: Path) -> tuple[int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns
