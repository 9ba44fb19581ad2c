"""Prune: remove old files that pile up on toto over the months."""

from pathlib import Path

from prefect import flow
from prefect.logging import get_run_logger
from prefect.settings import get_current_settings

from tasks import names
from toto.server.prune import DAYS
from toto.server.prune import prune as remove_old


@flow(name="prune", flow_run_name=names.of_flow, persist_result=False)
async def prune(repo: Path, days: int = DAYS) -> None:
    """Remove old cached results, test reports and refused pushes, and shorten long logs.

    Args:
        repo: the bare infra repo on toto.
        days: files that are older are removed.
    """
    removed = remove_old(get_current_settings().home, [repo], days=days)
    get_run_logger().info("removed %d files", removed)
