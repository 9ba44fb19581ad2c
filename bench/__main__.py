"""`make bench`: measures what toto costs, as one table of ratios. Each row compares a measure with a baseline.

Add a row: an async function that yields `Row`s, listed in MEASURES. `python -m bench NAME…` runs some of them.
"""

import asyncio
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Final, TypeAlias

from bench import boot, cells, cli, detect, fleet, latency, ledger, machines, noop, parsing, scale, store
from bench.row import HEAD, Exponent, Row, Spread, Target
from tests import postgres

Measure: TypeAlias = Callable[[Path], AsyncIterator[Row | Spread | Exponent | Target]]


async def push_to_first_line(folder: Path) -> AsyncIterator[Row | Spread]:
    """A push until the flow's first line, and the hook alone, compared with starting the flow by Prefect's CLI."""
    async with postgres.running() as cluster:
        found = await latency.measure(folder / "postgresql", cluster.url)
    yield Row("push, until git returns", found.pushes, "the same push without a hook", found.bare_pushes)
    yield Row("push, until the flow's first line", found.first_lines, "the same, each run a new Python", found.cold)
    yield Spread("push to first line", found.first_lines, 1.5)
    yield Row("  the same, 4 pushes at once, the last", found.crowds, "`prefect deployment run` alone", found.cli)
    yield Row("a flow run that does nothing, in all", found.whole_runs, "`python -c 'import prefect'`", found.imports)
    on_sqlite = await latency.measure(folder / "sqlite")
    yield Row(
        "push, until the flow's first line, on SQLite",
        on_sqlite.first_lines,
        "the same, on PostgreSQL",
        found.first_lines,
    )
    yield Spread("push to first line, on SQLite", on_sqlite.first_lines, 1.5)


MEASURES: Final[dict[str, Measure]] = {
    "detect": detect.measure,
    "noop": noop.measure,
    "latency": push_to_first_line,
    "boot": boot.measure,
    "cells": cells.measure,
    "cli": cli.measure,
    "parsing": parsing.measure,
    "ledger": ledger.measure,
    "scale": scale.measure,
    "machines": machines.measure,
    "fleet": fleet.measure,
    "store": store.measure,
}


async def main(names: list[str]) -> None:
    if unknown := set(names) - set(MEASURES):
        sys.exit(f"no such measure: {', '.join(sorted(unknown))} (there are: {', '.join(MEASURES)})")
    began = time.monotonic()
    print(
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before it starts\n\n{HEAD}\n{'-' * len(HEAD)}",
        flush=True,
    )
    for name in names or MEASURES:
        with tempfile.TemporaryDirectory(prefix="toto-bench-") as folder:
            async for row in MEASURES[name](Path(folder)):
                print(row, flush=True)
    print(f"\nin {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
