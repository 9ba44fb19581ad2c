"""What takes long: its progress as plain lines, and at a terminal what is at work just now."""

import itertools
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from toto.base.process import LineSink
from toto.cli.output import say
from toto.git_host import follow
from toto.git_host.follow import Working
from toto.plan.make import Note, Shown

T = TypeVar("T")


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


@contextmanager
def step(what: str, *, plain: bool = True) -> Iterator[LineSink]:
    """Tell of something that takes long, and of the lines that the result is given, on standard error.

    At a terminal only the newest line is there, with the seconds, and at the end how many they were. Elsewhere nothing
    is told unless `plain`.
    """
    if not sys.stderr.isatty():
        tell = say if plain else _silent
        tell(what)
        yield tell
        return
    began = datetime.now(UTC)
    with Live(console=Console(stderr=True, highlight=False), transient=True, refresh_per_second=4) as live:

        def hear(line: str) -> None:
            live.update(_Table([Working(what, began.isoformat(), follow.clean(line))]))

        hear("")
        yield hear
    say(f"{what}: {(datetime.now(UTC) - began).total_seconds():.0f} s")


def _silent(_line: str) -> None:
    """Tell nobody."""


class Evaluations(Shown):
    """Shows how many of the evaluations of a plan are made, at a terminal."""

    async def all(self, count: int, work: Callable[[Note], Awaitable[T]]) -> T:
        made = itertools.count(1)
        with step(f"evaluating {count} host{'s' if count > 1 else ''}", plain=False) as hear:
            return await work(lambda: hear(f"{next(made)} of {count}"))


class _Table:
    """What is at work: a line for each step, which turns and counts its seconds, and says its last word."""

    def __init__(self, working: Sequence[Working]) -> None:
        self.rows = [(Spinner("dots"), each) for each in working]

    def __rich__(self) -> Table:
        grid = Table.grid(padding=(0, 1), expand=True)
        for ratio in (None, None, None, 1):
            grid.add_column(no_wrap=True, overflow="ellipsis", ratio=ratio)
        for spinner, each in self.rows:
            seconds = (datetime.now(UTC) - datetime.fromisoformat(each.began)).total_seconds()
            grid.add_row(spinner, Text(each.name), Text(f"{max(0, seconds):.0f} s"), Text(each.said, style="dim"))
        return grid
