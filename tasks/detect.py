"""Detect: from a commit to a plan. Nothing outside toto is touched, no machine is spoken to."""

from collections.abc import Awaitable
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from toto.base import process, runs
from toto.infra_repo.manifest import Machine
from toto.infra_repo.settings import Settings
from toto.nix.hosts import Host
from toto.plan import make as plan
from toto.plan.changes import Desired
from toto.plan.order import Plan


@task(name="detect", task_run_name="detect", cache_policy=NO_CACHE)
async def detect(repo: Path, commit: str, run: str, only: list[str], *, override: str | None = None,
                 again: bool = False) -> Plan:
    """The plan of a commit; each host is evaluated in a task of its own."""
    def named(tree: Path, host: Host, machine: Machine | None, settings: Settings, roots: Path) -> Awaitable[Desired]:
        return evaluate.with_options(task_run_name=f"evaluate {host.name}")(tree, host, machine, settings, roots)

    return await plan.make(repo, commit, run, only, override=override, again=again, evaluate=named)


@task(name="evaluate", task_run_name="evaluate", cache_policy=NO_CACHE)
async def evaluate(tree: Path, host: Host, machine: Machine | None, settings: Settings, roots: Path) -> Desired:
    """One host's desired identity, in a nix process of its own."""
    return await plan.desire(tree, host, machine, settings, roots)


@task(name="clear what a dead run left", task_run_name="clear what a dead run left", cache_policy=NO_CACHE)
async def sweep(repo: Path) -> None:
    """End processes and remove directories whose toto is no longer alive."""
    killed, removed = process.sweep(), runs.sweep(repo)
    if killed or removed:
        get_run_logger().warning("ended %s processes and removed %s directories of runs that had died",
                                 len(killed), len(removed))
