"""Prune: remove what piles up on toto over the months: old files, and the nix store's garbage."""

import logging
from pathlib import Path

from prefect import flow
from prefect.logging import get_run_logger
from prefect.settings import get_current_settings

from tasks import names
from toto.base import server_rules
from toto.nix import commands as nix
from toto.server.prune import DAYS
from toto.server.prune import prune as remove_old


@flow(name="prune", flow_run_name=names.of_flow, persist_result=False)
async def prune(repo: Path, days: int = DAYS) -> None:
    """Remove old cached results, test reports and refused pushes, shorten long logs, and collect garbage.

    Args:
        repo: the bare infra repo on toto.
        days: files that are older are removed.
    """
    removed = remove_old(get_current_settings().home, [repo], days=days)
    get_run_logger().info("removed %d files", removed)
    wanted = server_rules.load().store.free
    free = await nix.make_room(wanted)
    get_run_logger().log(
        logging.INFO if free >= wanted else logging.WARNING,
        "%.1f GB are free where the nix store is; store.free in server.toml asks for %.1f",
        free / 1e9,
        wanted / 1e9,
    )
