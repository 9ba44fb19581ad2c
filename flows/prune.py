"""Prune: let go what gathers on toto over the months."""

from pathlib import Path

from prefect import flow
from prefect.logging import get_run_logger
from prefect.settings import get_current_settings

from tasks import names
from toto.server.prune import DAYS
from toto.server.prune import prune as let_go


@flow(name="prune", flow_run_name=names.of_flow, persist_result=False)
async def prune(repo: Path, days: int = DAYS) -> None:
    """Remove cached results, test reports and refused pushes that are old, and shorten long logs.

    Args:
        repo: the bare infra repo on toto.
        days: what is older goes.
    """
    gone = let_go(get_current_settings().home, [repo], days=days)
    get_run_logger().info("%d files went", gone)
