"""What `toto --help` takes: it and a shell's completion are asked for at a terminal, by someone who waits."""

import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

from bench.row import Row, Spread
from toto.base import process

ROUNDS: Final = 20
PROMISED: Final = 0.2  # seconds


async def measure(_: Path) -> AsyncIterator[Row | Spread]:
    """`toto --help` beside a Python that does nothing."""
    row = Row("toto --help", [], "`python -c pass`", [])
    for _round in range(ROUNDS):
        row.others.append((await process.run([sys.executable, "-c", "pass"])).seconds)
        row.values.append((await process.run([sys.executable, "-m", "toto.cli", "--help"])).seconds)
    yield row
    yield Spread("toto --help", row.values, PROMISED)
