"""The programs that the lab runs, and what it says when one of them ends by itself."""

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from toto.base import process
from toto.base.errors import TotoError

T = TypeVar("T")


class PartDied(TotoError):
    """A program of the lab has ended by itself; the message has the last lines of its log, whose name is the hint."""


@dataclass(frozen=True)
class Part:
    """A program that is to run until it is stopped. `status` is None while it does."""

    name: str
    status: int | None
    log: Path

    def died(self) -> PartDied:
        """What to say of one that has ended."""
        said = process.tail(self.log.read_text(errors="replace"), 10) if self.log.exists() else ""
        return PartDied(f"{self.name} ended with status {self.status}; its last lines:\n{said}", hint=f"see {self.log}")


async def while_all_live(parts: Callable[[], Iterable[Part]], work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns. Raises `PartDied` as soon as one of `parts` has ended, also for what work stumbled over."""
    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(_first_death(parts))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if working.done() and not working.cancelled() and working.exception():
            await asyncio.wait((watching,), timeout=2)  # it may have noticed a death before we did
        if watching.done():
            raise watching.exception() or AssertionError
        return await working
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.wait((working, watching))


async def _first_death(parts: Callable[[], Iterable[Part]]) -> NoReturn:
    while True:
        for part in _dead(parts()):
            raise part.died()
        await asyncio.sleep(0.5)


def _dead(parts: Iterable[Part]) -> Iterator[Part]:
    return (part for part in parts if part.status is not None)
