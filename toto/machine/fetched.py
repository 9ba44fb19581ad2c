"""What machines have asked of toto's cache, counted: by the web server that they ask, for whoever tells of it.

    api/said/REPO/MACHINE/fetched

A hit is a narinfo or a nar that a machine asked for and has got whole; a miss is one that it may not fetch. That server
is in a cell, so what it has written is read as a stranger's.
"""

import asyncio
import contextlib
import logging
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from toto.base import files, paths
from toto.cell import folders
from toto.machine.documents import FETCHED, Place, said

log = logging.getLogger(__name__)

EVERY: Final = 1.0  # seconds between two writings
_MOST: Final = 1_000  # bytes of the file

Count = Annotated[int, Field(strict=True, ge=0, lt=2**63)]


class Fetched(BaseModel):
    """The counts of one machine; `sent` are the bytes that it has got."""

    model_config = ConfigDict(frozen=True)

    hits: Count = 0
    misses: Count = 0
    sent: Count = 0


def read(place: Place) -> Fetched | None:
    """The counts of a machine; None for one that has asked for nothing."""
    if (found := folders.read_regular(said(), place.folder, place.machine, FETCHED, most=_MOST)) is None:
        return None
    with contextlib.suppress(ValidationError):
        return Fetched.model_validate_json(found)
    return None


class Counting:
    """The counts of all machines that ask one server, which go on from what an earlier one has written."""

    def __init__(self) -> None:
        self._counts: dict[Place, Fetched] = {}
        self._changed: set[Place] = set()

    def note(self, place: Place, *, hits: int = 0, misses: int = 0, sent: int = 0) -> None:
        """Add to the counts of a machine."""
        had = self._counts.get(place) or read(place) or Fetched()
        self._counts[place] = Fetched(hits=had.hits + hits, misses=had.misses + misses, sent=had.sent + sent)
        self._changed.add(place)

    def write(self) -> None:
        """Write what has changed. Raises OSError."""
        while self._changed:
            place = self._changed.pop()
            try:
                files.write(paths.private_folder(place.said) / FETCHED, self._counts[place].model_dump_json())
            except OSError:
                self._changed.add(place)
                raise

    async def keep(self) -> None:
        """Write what has changed, again and again, to the end of the program."""
        broken = False
        try:
            while True:
                await asyncio.sleep(EVERY)
                try:
                    self.write()
                    broken = False
                except OSError as error:
                    if not broken:
                        log.error("what machines have fetched is not counted: %s", error)
                    broken = True
        finally:
            with contextlib.suppress(OSError):
                self.write()
