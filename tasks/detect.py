"""Detect: make the plan of a commit. Nothing outside toto is touched, and toto connects to no machine."""

import tempfile
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from toto.base import owned, process, runs
from toto.cell import limits
from toto.machine import ssh
from toto.plan import make
from toto.plan.changes import Desired
from toto.plan.kind import Found, Kind, Source


async def identify(kind: Kind[Any], source: Source, found: Found[Any]) -> Desired:
    """What a commit wants a target to be; in a task of its own when that needs an evaluation. Raises `TotoError`."""
    if not kind.evaluated:
        return await kind.identify(source, found)
    return await evaluate.with_options(task_run_name=f"evaluate {found.target.label}")(kind, source, found)


@task(name="evaluate", task_run_name="evaluate", cache_policy=NO_CACHE)
async def evaluate(kind: Kind[Any], source: Source, found: Found[Any]) -> Desired:
    """What a commit wants a target to be, evaluated in a process of its own. Raises `TotoError`."""
    return await make.identify(kind, source, found)


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
