"""Reports that toto has not got yet: signed, on the disk, in order. They wait there while toto is away."""

import contextlib
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

from flying_monkey import durable, proof, signature
from flying_monkey.report import Report

MOST: Final = 64  # reports that wait; the oldest are given up
_NAME: Final = re.compile(r"([0-9]{16})\.json")


class Outbox:
    """The reports in `folder`, which is made when missing. What is written is on the disk, whatever happens then."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        self.folder, self.clock = folder, clock
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def add(self, report: Report, key: Path) -> Report:
        """Queue a report, signed by the host key in the file `key`; it is returned with its number.

        The number is above all before, and the time, so that it also grows when this folder is lost or put back.
        Raises OSError, `CannotSign`.
        """
        counter = self.folder / "number"
        last = 0
        with contextlib.suppress(FileNotFoundError, ValueError):
            last = int(counter.read_text())
        number = max(last, *self.waiting(), int(self.clock()) - 1, 0) + 1
        durable.write(counter, f"{number}\n".encode())
        made = replace(report, number=number)
        durable.write(self._file(number), signature.seal(made.write(), key, proof.REPORT))
        for old in self.waiting()[:-MOST]:
            self._file(old).unlink(missing_ok=True)
        return made

    def send(self, hand_over: Callable[[bytes], object]) -> int:
        """Hand over what waits, the oldest first, and forget it; how many. What `hand_over` raises ends it."""
        numbers = self.waiting()
        for number in numbers:
            hand_over(self._file(number).read_bytes())
            self._file(number).unlink(missing_ok=True)
        if numbers:
            durable.sync(self.folder)
        return len(numbers)

    def waiting(self) -> list[int]:
        """The numbers of the reports that wait, the oldest first."""
        names = (_NAME.fullmatch(each.name) for each in self.folder.iterdir())
        return sorted(int(found[1]) for found in names if found)

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:016d}.json"
