"""A machine that did not answer is tried again by itself, without waiting for the next push."""

import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from prefect.deployments import arun_deployment
from prefect.logging import get_run_logger

LATER: Final = 15 * 60  # seconds


async def try_again_later(repo: Path, hosts: list[str]) -> None:
    """Schedule a run for these hosts in a quarter of an hour; runs that ask for it meanwhile share it."""
    if not hosts:
        return
    at = datetime.now(UTC) + timedelta(seconds=LATER)
    try:
        await arun_deployment(
            "reconcile/reconcile", scheduled_time=at, timeout=0, as_subflow=False, tags=["retry"],
            idempotency_key=f"{repo}-{','.join(hosts)}-{int(time.time()) // LATER}",
            parameters={"repo": str(repo), "origin": "schedule", "only": hosts})
    except Exception as error:  # the next run tries again as well
        get_run_logger().warning("no run could be scheduled for %s: %s", ", ".join(hosts), error)
    else:
        get_run_logger().info("%s will be tried again at %s", ", ".join(hosts), at.strftime("%H:%M UTC"))
