"""Retries what did not work, without waiting for the next push: machines that did not answer, jobs of a commit."""

import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from prefect.deployments import arun_deployment
from prefect.logging import get_run_logger

LATER: Final = 15 * 60  # seconds


async def retry_later(repo: Path, hosts: list[str]) -> None:
    """Schedule a run for these hosts in a quarter of an hour. Runs that ask for the same hosts meanwhile share it."""
    if hosts:
        await run_later(repo, ", ".join(hosts), hosts)


async def run_later(repo: Path, what: str, only: list[str] | None) -> None:
    """Schedule a run in a quarter of an hour, limited to `only` (None: all). `what` says what for."""
    at = datetime.now(UTC) + timedelta(seconds=LATER)
    try:
        await arun_deployment(
            "reconcile/reconcile",
            scheduled_time=at,
            timeout=0,
            as_subflow=False,
            tags=["retry"],
            idempotency_key=f"{repo}-{','.join(only or ['*'])}-{int(time.time()) // LATER}",
            parameters={"repo": str(repo), "origin": "schedule", "only": only},
        )
    except Exception as error:  # the next run retries as well
        get_run_logger().warning("could not schedule a run for %s: %s", what, error)
    else:
        get_run_logger().info("%s will be retried at %s", what, at.strftime("%H:%M UTC"))
