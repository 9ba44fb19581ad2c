"""Finds runs whose process has died, and runs that came due while toto was down.

Runs that a dead worker left are settled when the next worker starts. A run whose process was killed together with its
worker is found because its heartbeat stops. A run of `settle` then reverts what the dead run had half done, and
notifies people of its death.
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
NOTIFIED_WITHIN: Final = 86_400  # seconds: nobody is notified of a death that is older
PAGE: Final = 200  # runs; the API returns no more at once
_UNDER_WAY: Final = ("RUNNING", "CANCELLING", "PENDING")


async def settle_orphans(api: Api, *, pool: str = POOL) -> list[str]:
    """Settle the runs that a dead worker of `pool` left behind; return their ids.

    Call it before the worker starts, when the pool has no other worker: then no run that the database calls running
    has a process any more. Running becomes Crashed and Cancelling becomes Cancelled, subflows with their parents;
    Pending (the worker took it and did not begin it) becomes Scheduled again, so that no push is lost.
    Raises `ServerError`.
    """
    return await _settle(api, await _under_way(api, pool, _UNDER_WAY), "the worker died and left this run behind")


async def skip_missed(api: Api, *, pool: str = POOL) -> list[str]:
    """Skip runs that came due while no worker ran, except each schedule's newest; return the ids of the skipped ones.

    The newest is started late, so that a machine that was off catches up. A run for every night of a holiday would only
    do the same thing many times, so the others become Cancelled with the name Skipped. Raises `ServerError`.
    """
    due = await _runs(
        api,
        {
            "flow_runs": {
                "state": {"type": {"any_": ["SCHEDULED"]}},
                "expected_start_time": {"before_": datetime.now(UTC).isoformat()},
            },
            "work_pools": {"name": {"any_": [pool]}},
            "sort": "EXPECTED_START_TIME_DESC",
        },
    )
    newest: dict[str, dict[str, Any]] = {}
    skipped: list[str] = []
    for run in due:
        if not run["auto_scheduled"]:  # someone asked for this one
            continue
        kept = newest.setdefault((run["created_by"] or {}).get("id") or run["deployment_id"], run)
        if kept is not run:
            state = {
                "type": "CANCELLED",
                "name": "Skipped",
                "message": f"toto was down when it was due; the run of {kept['expected_start_time'][:16]} replaces it",
            }
            await api.call("POST", f"/flow_runs/{run['id']}/set_state", {"state": state, "force": True})
            skipped.append(run["id"])
    return skipped


async def watch(api: Api, *, pool: str = POOL) -> NoReturn:
    """Until it is cancelled, mark each run of `pool` whose heartbeat has stopped as crashed, and have it settled.

    (Prefect's way is an automation on the heartbeat's event. It also fires for runs that ended before their heartbeat
    arrived, as short ones do: https://github.com/PrefectHQ/prefect/issues/18653.)
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
            log.warning("could not check for runs that have died: %s", error)


async def crash_silent(api: Api, *, pool: str = POOL, silence: float = SILENCE) -> list[str]:
    """Settle the runs of `pool` that have run without a heartbeat for `silence` seconds; return their ids."""
    since = datetime.now(UTC) - timedelta(seconds=silence)
    silent = []
    for run in await _under_way(api, pool, ("RUNNING", "CANCELLING")):
        if run["start_time"] is None or datetime.fromisoformat(run["start_time"]) > since or _lives_here(run):
            continue
        heard = await api.call(
            "POST",
            "/events/filter",
            {
                "limit": 1,
                "filter": {
                    "event": {"name": ["prefect.flow-run.heartbeat"]},
                    "occurred": {"since": since.isoformat()},
                    "resource": {"id": [f"prefect.flow-run.{run['id']}"]},
                },
            },
        )
        if not heard["events"]:
            silent.append(run)
    return await _settle(api, silent, f"no heartbeat for {silence:g} s: its process is gone")


async def have_settled(api: Api, left_behind: Sequence[str], repos: Path | None = None) -> None:
    """Start runs of `settle` that revert what dead runs left half done and notify people: one for each dead run.

    `left_behind` are the ids of runs that were found running; others were marked Crashed before. With `repos` (when no
    run is running) everything that is half done in one of them is reverted as well. Raises `ServerError`.
    """
    ids = await deployments(api)
    if SETTLE not in ids:
        return
    since = datetime.now(UTC) - timedelta(seconds=NOTIFIED_WITHIN)
    crashed = await api.call(
        "POST",
        "/flow_runs/filter",
        {
            "flow_runs": {
                "state": {"type": {"any_": ["CRASHED"]}},
                "end_time": {"after_": since.isoformat()},
                "deployment_id": {"any_": [ids[name] for name in ids if name.startswith(("settle/", "reconcile/"))]},
            }
        },
    )
    settles = {ids[name] for name in ids if name.startswith("settle/")}  # under its old name as well
    asked = {}
    for run in crashed:
        parameters = run["parameters"]
        if run["deployment_id"] not in settles:
            asked[f"died-{run['id']}"] = {"repo": parameters["repo"], "died": [run["id"]]}
        elif run["id"] in left_behind:  # its work still has to be done
            asked[f"retry-{run['id']}"] = {"repo": parameters["repo"], "died": parameters.get("died") or []}
    for repo in git_host.infra_repos(repos) if repos else ():
        try:
            if Ledger(repo).read().open_intents:
                asked[f"start-{repo.name}-{time.time()}"] = {"repo": str(repo.resolve())}
        except TotoError as error:
            log.error("%s", error)
    for key, parameters in asked.items():
        try:
            await api.call(
                "POST",
                f"/deployments/{ids[SETTLE]}/create_flow_run",
                {"parameters": parameters, "idempotency_key": key},
            )
        except TotoError as error:
            log.error("%s: what a dead run left is not settled yet: %s", Path(parameters["repo"]).name, error)


async def _under_way(api: Api, pool: str, states: Sequence[str]) -> list[dict[str, Any]]:
    """The runs of a pool in one of the states, without subflows (they have no pool)."""
    return await _runs(
        api, {"flow_runs": {"state": {"type": {"any_": list(states)}}}, "work_pools": {"name": {"any_": [pool]}}}
    )


async def _runs(api: Api, wanted: dict[str, Any]) -> list[dict[str, Any]]:
    """All runs that match a filter. (The API returns them in pages.)"""
    found: list[dict[str, Any]] = []
    while page := await api.call("POST", "/flow_runs/filter", {**wanted, "limit": PAGE, "offset": len(found)}):
        found += page
        if len(page) < PAGE:
            break
    return found


async def _settle(api: Api, runs: Iterable[dict[str, Any]], why: str) -> list[str]:
    """Set dead runs, and their subflows, to the state that they are really in; return their ids."""
    crashed = {"type": "CRASHED", "name": "Crashed", "message": why}
    outcome = {
        "RUNNING": crashed,
        "CANCELLING": {"type": "CANCELLED", "name": "Cancelled"},
        "PENDING": {"type": "SCHEDULED", "name": "Scheduled"},
    }
    settled: list[str] = []
    parents = list(runs)
    while parents:
        for run in parents:
            # No worker would start a subflow that has not begun: it ends with its parent.
            state = outcome[run["state_type"]] if run["deployment_id"] else crashed
            await api.call("POST", f"/flow_runs/{run['id']}/set_state", {"state": state, "force": True})
            settled.append(run["id"])
        found = await _runs(
            api,
            {
                "flow_runs": {
                    "state": {"type": {"any_": list(_UNDER_WAY)}},
                    "parent_flow_run_id": {"any_": [run["id"] for run in parents]},
                }
            },
        )
        parents = [run for run in found if run["id"] not in settled]
    return settled


def _lives_here(run: dict[str, Any]) -> bool:
    """Whether the run's process is alive on this machine: then only its heartbeats were lost."""
    host, _, pid = (run["infrastructure_pid"] or "").rpartition(":")
    if host != socket.gethostname() or not pid.isdigit():
        return False
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(int(pid), 0)
        return True
    return False
