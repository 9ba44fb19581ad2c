"""Detect: make the plan of a commit. Nothing outside toto is touched, and toto connects to no machine."""

import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from tasks import report
from toto.base import owned, process, runs
from toto.cell import limits
from toto.ledger.target import Target
from toto.machine import ssh
from toto.plan import make

T = TypeVar("T")


class Evaluations(make.Shown):
    """A task for all evaluations of a commit, which says how far they are, and one a target that is not as wanted.

    Whatever nobody has to look at costs no row in Prefect's database.
    """

    def __init__(self, repo: Path) -> None:
        self.repo = repo

    async def all(self, count: int, work: Callable[[make.Note], Awaitable[T]]) -> T:
        return await evaluate_all.with_options(task_run_name=f"evaluate {_counted(count, 'host', 'hosts')}")(
            self.repo, count, work
        )

    async def one(self, target: Target, work: Callable[[], Awaitable[T]]) -> T:
        return await evaluate.with_options(task_run_name=f"evaluate {target.label}")(work)


@task(name="evaluate all", task_run_name="evaluate all", cache_policy=NO_CACHE)
async def evaluate_all(repo: Path, count: int, work: Callable[[make.Note], Awaitable[T]]) -> T:
    """Find out what a commit wants its targets to be; a progress artifact says how far that is."""
    progress = report.Progress(repo, count)
    async with progress.shown():
        return await work(progress.note)


@task(name="evaluate", task_run_name="evaluate", cache_policy=NO_CACHE)
async def evaluate(work: Callable[[], Awaitable[T]]) -> T:
    """Evaluate what the steps of a target that has changed need; or tell why it does not evaluate."""
    return await work()


def clean_up(repo: Path) -> None:
    """End the processes and remove the directories of runs that have died, and what their cells have left."""
    killed, removed = process.clean_up(), runs.clean_up(repo)
    limits.clean_up()
    for place in {ssh.SHORT, Path(tempfile.gettempdir())}:
        owned.sweep(place)
    if removed:  # (what a run left that ended by itself is no news)
        ended = f"ended {_counted(len(killed), 'process', 'processes')} and " if killed else ""
        left = _counted(len(removed), "directory", "directories")
        get_run_logger().warning("a run had died: %sremoved %s", ended, left)


def _counted(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"
