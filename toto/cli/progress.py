"""Runs that are followed: their progress as plain lines, and at a terminal below them what is at work just now."""

import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from toto.git_host import follow
from toto.git_host.follow import Working


async def to_the_end(repo: Path, run: str, *, steps: bool = False, at_most: float = follow.AT_MOST) -> int:
    """Print a run's progress until it ends, or for `at_most` seconds; the exit status (see `toto.git_host.follow`).

    With `steps`, also what its steps log.
    """
    deadline = time.monotonic() + at_most
    if not sys.stdout.isatty():
        return await follow.to_the_end(repo, [run], deadline, steps=steps)
    with Live(console=Console(highlight=False), transient=True, refresh_per_second=4) as live:
        say = partial(live.console.print, markup=False, soft_wrap=True)
        return await follow.to_the_end(
            repo, [run], deadline, steps=steps, say=say, show=lambda working: live.update(_Table(working))
        )


class _Table:
    """What is at work: a line for each step, which turns and counts its seconds, and says its last word."""

    def __init__(self, working: Sequence[Working]) -> None:
        self.rows = [(Spinner("dots"), each) for each in working]

    def __rich__(self) -> Table:
        grid = Table.grid(padding=(0, 1), expand=True)
        for ratio in (None, None, None, 1):
            grid.add_column(no_wrap=True, overflow="ellipsis", ratio=ratio)
        for spinner, each in self.rows:
            seconds = (datetime.now(UTC) - datetime.fromisoformat(each.began.replace("Z", "+00:00"))).total_seconds()
            grid.add_row(spinner, Text(each.name), Text(f"{max(0, seconds):.0f} s"), Text(each.said, style="dim"))
        return grid
