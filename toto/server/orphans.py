"""Runs that nobody works on any more, and runs that came due while nobody worked.

What a dead worker left is settled when the next one starts; a run whose process was killed together with its worker
is known by its silence. A run of `settle` reverts what such a run had half done, and notifies people of its death.
"""

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, NoReturn

from toto.base.errors import TotoError
from toto.base.prefect_api import Api
from toto.git_host import host as git_host
from toto.ledger.ledger import Ledger
from toto.server.deployments import POOL, deployments

log = logging.getLogger(__name__)

SETTLE: Final = "settle/settle"
HEARTBEAT: Final = 30  # seconds; Prefect accepts no less
SILENCE: Final = 3 * HEARTBEAT  # seconds without a heartbeat after which a run has crashed
NOTIFIED_WITHIN: Final = 86_400  # seconds: of an older death nobody needs to hear any more
PAGE: Final = 200  # runs; the API gives no more at once
_UNDER_WAY: Final = ("RUNNING", "CANCELLING", "PENDING")


async def settle_orphans(api: Api, *, pool: str = POOL) -> list[str]:
    """Settle the runs that a dead worker of `pool` left behind; return their ids.

    For the start of a server whose only worker is this machine's, before that worker starts: what the database calls
    running has no process any more. Running becomes Crashed and Cancelling becomes Cancelled, subflows with their
    parents; Pending (taken by the worker, not begun) goes back to Scheduled, so that no push is lost.
    """
    return await _settle(api, await _under_way(api, pool, _UNDER_WAY), "the worker died and left this run behind")


async def skip_missed(api: Api, *, pool: str = POOL) -> list[str]:
    """Of each schedule's runs that came due while no worker was there, keep the newest; return the ids of the others.

    The newest is started late: a machine that was off catches up. To start one for every night of a holiday would
    only do the same thing again, so the others are Cancelled, by the name Skipped.
    """
    due = await _runs(api, {
        "flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}},
                      "expected_start_time": {"before_": datetime.now(UTC).isoformat()}},
        "work_pools": {"name": {"any_": [pool]}}, "sort": "EXPECTED_START_TIME_DESC"})
    newest: dict[str, dict[str, Any]] = {}
    skipped: list[str] = []
    for run in due:
        if not run["auto_scheduled"]:  # someone asked for this one
            continue
        kept = newest.setdefault((run["created_by"] or {}).get("id") or run["deployment_id"], run)
        if kept is not run:
            state = {"type": "CANCELLED", "name": "Skipped", "message":
                     f"toto was away when it was due; the run of {kept['expected_start_time'][:16]} stands for it"}
            await api.call("POST", f"/flow_runs/{run['id']}/set_state", {"state": state, "force": True})
            skipped.append(run["id"])
    return skipped


async def watch(api: Api, *, pool: str = POOL) -> NoReturn:
    """Mark each run of `pool` as crashed whose heartbeat has stopped, and have it settled; for as long as it is let.

    (Prefect's way is an automation on the heartbeat's event. It also fires for a run that ended before its heartbeat
    came through, as short ones do: https://github.com/PrefectHQ/prefect/issues/18653.)
    """
    began = time.monotonic()
    while True:
        await asyncio.sleep(HEARTBEAT)
        if time.monotonic() - began < SILENCE:  # heartbeats may have been missed while the server was away
            continue
        try:
            if silent := await crash_silent(api, pool=pool):
                log.warning("%d runs had no heartbeat for %d s: their processes are gone", len(silent), SILENCE)
                await have_settled(api, silent)
        except TotoError as error:
            log.warning("could not look for runs that have died: %s", error)


async def crash_silent(api: Api, *, pool: str = POOL, silence: float = SILENCE) -> list[str]:
    """Settle the runs of `pool` that have been under way, and silent, for `silence` seconds; return their ids."""
    since = datetime.now(UTC) - timedelta(seconds=silence)
    silent = []
    for run in await _under_way(api, pool, ("RUNNING", "CANCELLING")):
        if (run["start_time"] is None or datetime.fromisoformat(run["start_time"]) > since or _lives_here(run)):
            continue
        heard = await api.call("POST", "/events/filter", {"limit": 1, "filter": {
            "event": {"name": ["prefect.flow-run.heartbeat"]}, "occurred": {"since": since.isoformat()},
            "resource": {"id": [f"prefect.flow-run.{run['id']}"]}}})
        if not heard["events"]:
            silent.append(run)
    return await _settle(api, silent, f"no heartbeat for {silence:g} s: its process is gone")


async def have_settled(api: Api, left_behind: Sequence[str], repos: Path | None = None) -> None:
    """Have what dead runs left half done reverted, and people notified that they died: once for each run.

    `left_behind` are the runs that were found under way; some others were marked Crashed before. With `repos`, where
    no run is under way, whatever is half done in one of them is reverted as well.
    """
    ids = await deployments(api)
    if SETTLE not in ids:
        return
    since = datetime.now(UTC) - timedelta(seconds=NOTIFIED_WITHIN)
    crashed = await api.call("POST", "/flow_runs/filter", {"flow_runs": {
        "state": {"type": {"any_": ["CRASHED"]}}, "end_time": {"after_": since.isoformat()},
        "deployment_id": {"any_": [ids[name] for name in ids if name.startswith(("settle/", "reconcile/"))]}}})
    settles = {ids[name] for name in ids if name.startswith("settle/")}  # under its old name as well
    asked = {}
    for run in crashed:
        parameters = run["parameters"]
        if run["deployment_id"] not in settles:
            asked[f"died-{run['id']}"] = {"repo": parameters["repo"], "died": [run["id"]]}
        elif run["id"] in left_behind:  # what it was to do is still to be done
            asked[f"retry-{run['id']}"] = {"repo": parameters["repo"], "died": parameters.get("died") or []}
    for repo in git_host.infra_repos(repos) if repos else ():
        try:
            if Ledger(repo).read().open_intents:
                asked[f"start-{repo.name}-{time.time()}"] = {"repo": str(repo.resolve())}
        except TotoError as error:
            log.error("%s", error)
    for key, parameters in asked.items():
        try:
            await api.call("POST", f"/deployments/{ids[SETTLE]}/create_flow_run",
                           {"parameters": parameters, "idempotency_key": key})
        except TotoError as error:
            log.error("%s: what a dead run left is not settled yet: %s", Path(parameters["repo"]).name, error)


async def _under_way(api: Api, pool: str, states: Sequence[str]) -> list[dict[str, Any]]:
    """The runs of a pool that are in one of the states (subflows have no pool)."""
    return await _runs(api, {"flow_runs": {"state": {"type": {"any_": list(states)}}},
                             "work_pools": {"name": {"any_": [pool]}}})


async def _runs(api: Api, wanted: dict[str, Any]) -> list[dict[str, Any]]:
    """All runs that a filter finds: the API gives them in pages."""
    found: list[dict[str, Any]] = []
    while page := await api.call("POST", "/flow_runs/filter", {**wanted, "limit": PAGE, "offset": len(found)}):
        found += page
        if len(page) < PAGE:
            break
    return found


async def _settle(api: Api, runs: Iterable[dict[str, Any]], why: str) -> list[str]:
    """Give runs that nobody works on the state in which they are, and their subflows."""
    crashed = {"type": "CRASHED", "name": "Crashed", "message": why}
    outcome = {"RUNNING": crashed, "CANCELLING": {"type": "CANCELLED", "name": "Cancelled"},
               "PENDING": {"type": "SCHEDULED", "name": "Scheduled"}}
    settled: list[str] = []
    parents = list(runs)
    while parents:
        for run in parents:
            # A subflow that had not begun has no worker to begin it: it goes with its parent.
            state = outcome[run["state_type"]] if run["deployment_id"] else crashed
            await api.call("POST", f"/flow_runs/{run['id']}/set_state", {"state": state, "force": True})
            settled.append(run["id"])
        found = await _runs(api, {"flow_runs": {
            "state": {"type": {"any_": list(_UNDER_WAY)}},
            "parent_flow_run_id": {"any_": [run["id"] for run in parents]}}})
        parents = [run for run in found if run["id"] not in settled]
    return settled


def _lives_here(run: dict[str, Any]) -> bool:
    """Whether the run's process is one of this machine's that lives: then its heartbeats were lost, and it was not."""
    host, _, pid = (run["infrastructure_pid"] or "").rpartition(":")
    if host != socket.gethostname() or not pid.isdigit():
        return False
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(int(pid), 0)
        return True
    return False
