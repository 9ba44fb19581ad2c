"""Detect: from a commit to a plan. Nothing outside toto is touched, no machine is connected to."""

from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from toto.base import process, runs
from toto.plan import make
from toto.plan.changes import Desired
from toto.plan.kind import Found, Kind, Source


async def identify(kind: Kind[Any], source: Source, found: Found[Any]) -> Desired:
    """What a commit wants of one target, in a task of its own where that takes an evaluation."""
    if not kind.evaluated:
        return await kind.identify(source, found)
    return await evaluate.with_options(task_run_name=f"evaluate {found.target.label}")(kind, source, found)


@task(name="evaluate", task_run_name="evaluate", cache_policy=NO_CACHE)
async def evaluate(kind: Kind[Any], source: Source, found: Found[Any]) -> Desired:
    """One target's desired identity, evaluated in a process of its own."""
    return await make.identify(kind, source, found)


def clean_up(repo: Path) -> None:
    """End processes and remove directories whose toto is no longer alive."""
    killed, removed = process.clean_up(), runs.clean_up(repo)
    if killed or removed:
        get_run_logger().warning("ended %s processes and removed %s directories of runs that had died",
                                 len(killed), len(removed))
