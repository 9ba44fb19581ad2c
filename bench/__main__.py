"""`make bench`: what toto costs, as ratios side by side. A row is a measure beside the thing that it is compared with.

Add a row: an async function that yields `Row`s, listed in MEASURES. `python -m bench NAME…` runs some of them.
"""

import asyncio
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from bench import latency


@dataclass(frozen=True)
class Row:
    """A measure (median of `times`, seconds) and what it is held against, in the same unit."""

    what: str
    times: list[float]
    against: str
    other: list[float]

    def __str__(self) -> str:
        mine, theirs = statistics.median(self.times), statistics.median(self.other)
        return f"{self.what:<44} {mine:9.3f} s   {self.against:<34} {theirs:9.3f} s   ratio {mine / theirs:7.2f}"


Measure: TypeAlias = Callable[[Path], AsyncIterator[Row]]


async def push_to_first_line(folder: Path) -> AsyncIterator[Row]:
    """A push until the flow's first line, and the hook alone, beside starting the same flow with Prefect's CLI."""
    found = await latency.measure(folder)
    yield Row("push, until git returns", found.pushes, "the same push without a hook", found.bare_pushes)
    yield Row("push, until the flow's first line", found.first_lines, "`prefect deployment run` alone", found.cli)
    yield Row("a flow run that does nothing, in all", found.whole_runs, "`python -c 'import prefect'`", found.imports)


MEASURES: Final[dict[str, Measure]] = {"latency": push_to_first_line}


async def main(names: list[str]) -> None:
    if unknown := set(names) - set(MEASURES):
        sys.exit(f"no such measure: {', '.join(sorted(unknown))} (there are: {', '.join(MEASURES)})")
    for name in names or MEASURES:
        with tempfile.TemporaryDirectory(prefix="toto-bench-") as folder:
            async for row in MEASURES[name](Path(folder)):
                print(row, flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
