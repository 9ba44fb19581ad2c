"""How much memory this machine has free, and how many things may run side by side in it."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

SANDBOXES: Final = "toto-sandboxes"  # Prefect's limit of how many virtual machines run at once


def memory_available() -> int:
    """The megabytes that processes could still use, by the kernel's estimate (MemAvailable)."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) // 1024
    return 1024


def at_once(memory_each: int) -> int:
    """How many things of `memory_each` megabytes may run side by side, by free memory and cores; at least 1."""
    return max(1, min(os.cpu_count() or 1, memory_available() // max(1, memory_each)))


class Room:
    """Room for things of different sizes side by side: `memory` in megabytes, and as many as `most`.

    Who comes first goes first, so that a large one is not kept waiting by small ones. One always fits; for more, what
    other processes have taken meanwhile counts as well.
    """

    def __init__(self, memory: int, most: int) -> None:
        self.memory, self.most = memory, most
        self._sizes: list[int] = []
        self._next = asyncio.Lock()  # only who comes next waits for `_left`
        self._left = asyncio.Event()

    @asynccontextmanager
    async def of(self, memory: int) -> AsyncIterator[None]:
        """Have `memory` megabytes for this block, as soon as they are free."""
        async with self._next:
            while self._sizes and not self._fits(memory):
                await self._one_less()
            self._sizes.append(memory)
        try:
            yield
        finally:
            self._sizes.remove(memory)
            self._left.set()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Have all of it for this block, as soon as nothing else is there."""
        async with self._next:
            while self._sizes:
                await self._one_less()
            yield

    def _fits(self, memory: int) -> bool:
        return (
            len(self._sizes) < self.most and sum(self._sizes) + memory <= self.memory and memory <= memory_available()
        )

    async def _one_less(self) -> None:
        self._left.clear()
        await self._left.wait()
