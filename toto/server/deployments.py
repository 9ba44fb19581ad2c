"""Registers in Prefect what toto needs: the work pool, the deployments of prefect.yaml with their schedules, limits.

Operators change schedules and parameters in the UI. Toto's start adds what is new in prefect.yaml and does not touch
what they changed. A Prefect variable records what toto itself wrote last, so toto can tell the two apart.

A deployment with a new name takes over from the old one: the pause, the limit and the parameters once, the schedules at
every start. An alias has no schedules, so that nothing runs twice. If an operator (or an older toto that was started in
between) gives it one, that moves to the new name as well.
"""

import asyncio
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import yaml

from toto.base import paths, process
from toto.base.prefect_api import Api, ServerError
from toto.server import moves

POOL: Final = "toto"
_LONGEST: Final = 600  # seconds for a command of Prefect's: on an emulated machine its imports take minutes
ROOT: Final = Path(__file__).resolve().parents[2]
WRITTEN: Final = "toto_deployments"  # the variable
ALIASES: Final[Mapping[str, str]] = {  # old names by new name; both are in prefect.yaml
    "reconcile/reconcile": "reconcile/toto",
    "reconcile/deploy-host": "reconcile/host",
    "settle/settle": "settle/toto",
    "drift/drift": "drift/toto",
    "prune/prune": "prune/toto",
}
IN_FLIGHT: Final = 2.0  # seconds for which Prefect's scheduler may still use schedules that have been deleted
MOVING: Final = "toto-moving"  # the parameter that marks a schedule at its new deployment until it is switched on there
OLD_AUTOMATION: Final = "toto: a run whose heartbeat stopped has crashed"  # made by versions that left that to Prefect


@dataclass(frozen=True)
class Written:
    """What toto wrote for one deployment: the slugs of all schedules that it ever made, and the parameters."""

    schedules: tuple[str, ...]
    parameters: Mapping[str, Any]


async def deploy(
    env: Mapping[str, str], *, pool: str = POOL, root: Path = ROOT, limits: Mapping[str, int] | None = None
) -> dict[str, str]:
    """Create or update the work pool, the global concurrency `limits` and the deployments in `root`/prefect.yaml.

    What an operator has changed in a deployment stays: schedules (also a deleted one), a pause, a limit, parameters.
    When the deployment has a new name (`ALIASES`), these move to it; if that breaks off anywhere, the next call
    continues. Returns {"flow/deployment": id} of the pool. Idempotent. Takes about 1.5 s for `prefect deploy`; the rest
    are single requests, because each start of Prefect's CLI costs 1.5 s. Raises `ServerError`, `CommandFailed`.
    """
    api = Api.of(env)
    await ensure_pool(api, pool, root)
    for limit, slots in (limits or {}).items():
        await ensure_limit(api, limit, slots)
    await _delete_old_automation(api)
    before, written = await _found(api, pool), await _read_written(api)
    listed = yaml.safe_load((root / "prefect.yaml").read_text())
    slugs = {_name(each): _slugs(each) for each in listed["deployments"]}
    # An older toto that runs in between must not make the schedules of the old names anew.
    inherited = {alias: slugs.get(name, ()) for name, alias in ALIASES.items()}
    ours: dict[str, Written] = {}
    added: dict[str, list[dict[str, Any]]] = {}
    for each in listed["deployments"]:
        name = _name(each)
        old = before.get(ALIASES.get(name, ""))
        # (When a deployment that toto wrote is gone, an operator has deleted it: it is created anew.)
        if (there := before.get(name) or (old if name not in written else None)) is None:
            ours[name] = Written((*_slugs(each), *inherited.get(name, ())), {})
            continue
        known = (
            written.get(name)
            or written.get(ALIASES.get(name, ""))
            or Written((*_slugs(there), *_slugs(old or {})), there["parameters"])
        )
        parameters, before_that = (_renamed(name, each) for each in (there["parameters"], known.parameters))
        changed = {key: value for key, value in parameters.items() if before_that.get(key) != value}
        each["parameters"] = each.get("parameters", {}) | changed
        each["paused"] = there["paused"]
        if limit := there["global_concurrency_limit"]:
            options = {key: value for key, value in (there["concurrency_options"] or {}).items() if value is not None}
            each["concurrency_limit"] = {"limit": limit["limit"], **options} if options else limit["limit"]
        # Deploying a schedule again would reset it to what prefect.yaml says, whatever an operator has changed.
        schedules = each.pop("schedules", [])
        had = {*known.schedules, *_slugs(there), *_slugs(old or {})}
        added[name] = [new for new in schedules if new["slug"] not in had]
        ours[name] = Written(
            tuple(dict.fromkeys([*known.schedules, *(new["slug"] for new in added[name]), *inherited.get(name, ())])),
            {key: known.parameters.get(key) for key in changed},
        )
    began = datetime.now(UTC).isoformat()
    listed["pull"] = []  # by default Prefect would add a step, and a run with steps is refused: `toto.server.engine`
    file = Path(env["PREFECT_HOME"]) / "prefect.yaml"
    file.write_text(yaml.safe_dump(listed, allow_unicode=True))
    await process.run(
        [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", file],
        env=env,
        cwd=root,
        timeout=_LONGEST,
        target=str(root / "prefect.yaml"),
    )
    after = await _found(api, pool)
    for name, new in added.items():
        if new:
            await api.call("POST", f"/deployments/{after[name]['id']}/schedules", [_schedule(each) for each in new])
    if moves.read(paths.state_home()):
        await _rename_in_waiting_runs(api, after)
    for name, each in after.items():
        await _hide_origin(api, each)
        await _rename_in_schedules(api, name, each)
        if any(schedule["active"] for schedule in each["schedules"]):
            # Prefect has deleted the future runs, and would not create one again that is due right now.
            await _make_runs(api, each, began)
    taken_over = [(after[alias], after[name]) for name, alias in ALIASES.items() if name in after and alias in after]
    if due := [
        (old["id"], new["id"])
        for old, new in taken_over
        if old["schedules"] or any(MOVING in each["parameters"] for each in new["schedules"])
    ]:
        for old, new in due:
            await move_schedules(api, old, new)
        await asyncio.sleep(IN_FLIGHT)
    await _take_runs_away(api, [old["id"] for old, _ in taken_over])
    await _write_written(
        api,
        written | {name: Written(of.schedules, after[name]["parameters"] | of.parameters) for name, of in ours.items()},
    )
    return {name: each["id"] for name, each in after.items()}


async def move_schedules(api: Api, old: str, new: str) -> None:
    """Move the schedules of the deployment `old` (an id) to `new`, each on or off as it is.

    A schedule is never on at both. Between two requests it may be on at neither; it is then marked at `new`, and if the
    move breaks off, the next call finishes it. When two have the same slug, the one of `old` stays. Runs of `old` that
    are due already are kept.
    """
    path, since = f"/deployments/{new}/schedules", datetime.now(UTC).isoformat()
    origin, target = [await api.call("GET", f"/deployments/{each}") for each in (old, new)]
    if origin["schedules"]:
        there = {each["id"] for each in origin["schedules"]}
        for each in target["schedules"]:  # left by a call that broke off; the originals may have changed since
            if each["parameters"].get(MOVING, {}).get("id") in there:
                await api.call("DELETE", f"{path}/{each['id']}")
        await api.call(
            "POST",
            path,
            [
                {
                    "schedule": each["schedule"],
                    "max_scheduled_runs": each["max_scheduled_runs"],
                    "active": False,
                    "parameters": {**each["parameters"], MOVING: {key: each[key] for key in ("id", "active", "slug")}},
                }
                for each in origin["schedules"]
            ],
        )
        since = datetime.now(UTC).isoformat()
        # This deletes all schedules and future runs at once, and keeps the runs that are due. (Deleting a schedule
        # would delete those as well.) Parameters that are left out would be reset.
        await api.call(
            "POST",
            "/deployments/",
            {"name": origin["name"], "flow_id": origin["flow_id"], "parameters": origin["parameters"], "schedules": []},
        )
        target = await api.call("GET", f"/deployments/{new}")
    for each in target["schedules"]:
        if moving := each["parameters"].pop(MOVING, None):
            for other in target["schedules"]:
                if moving["slug"] and other["slug"] == moving["slug"]:
                    await api.call("DELETE", f"{path}/{other['id']}")
            await api.call(
                "PATCH",
                f"{path}/{each['id']}",
                {"active": moving["active"], "slug": moving["slug"], "parameters": each["parameters"]},
            )
    await _make_runs(api, target, since)


async def _take_runs_away(api: Api, ids: Sequence[str]) -> None:
    """Delete the future runs that Prefect's scheduler made for the deployments `ids`, which have no schedules."""
    wanted = {
        "flow_runs": {
            "deployment_id": {"any_": list(ids)},
            "state": {"type": {"any_": ["SCHEDULED"]}},
            "expected_start_time": {"after_": datetime.now(UTC).isoformat()},
        }
    }
    for run in await api.call("POST", "/flow_runs/filter", wanted) if ids else ():
        if run["auto_scheduled"]:
            await api.call("DELETE", f"/flow_runs/{run['id']}")


async def _make_runs(api: Api, deployment: Mapping[str, Any], since: str) -> None:
    """Create the runs that a deployment's schedules have from the time `since` on. (A paused deployment gets none.)"""
    if not deployment["paused"]:
        await api.call("POST", f"/deployments/{deployment['id']}/schedule", {"start_time": since})


async def _hide_origin(api: Api, deployment: Mapping[str, Any]) -> None:
    """Take `origin` out of a deployment's form: whoever fills one in starts the run from the UI."""
    schema = deployment["parameter_openapi_schema"] or {}
    shown = {name: each for name, each in schema.get("properties", {}).items() if name != "origin"}
    if shown != schema.get("properties", {}):
        asked = {"parameter_openapi_schema": {**schema, "properties": shown}}
        await api.call("PATCH", f"/deployments/{deployment['id']}", asked)


async def _rename_in_schedules(api: Api, name: str, deployment: Mapping[str, Any]) -> None:
    """Rename parameters in the schedules of a deployment, as `_renamed` does."""
    for each in deployment["schedules"]:
        if (renamed := _renamed(name, each["parameters"])) != each["parameters"]:
            # (Prefect deletes parameters that are left out.)
            await api.call(
                "PATCH",
                f"/deployments/{deployment['id']}/schedules/{each['id']}",
                {"active": each["active"], "parameters": renamed},
            )


async def _rename_in_waiting_runs(api: Api, deployments: Mapping[str, Mapping[str, Any]]) -> None:
    """Rename parameters in the runs that have not begun, as `_renamed` does: those from before toto's state moved."""
    names = {each["id"]: name for name, each in deployments.items()}
    wanted = {"deployment_id": {"any_": list(names)}, "state": {"type": {"any_": ["SCHEDULED"]}}}
    for run in await api.call("POST", "/flow_runs/filter", {"flow_runs": wanted}):
        if (renamed := _renamed(names[run["deployment_id"]], run["parameters"])) != run["parameters"]:
            await api.call("PATCH", f"/flow_runs/{run['id']}", {"parameters": renamed})


def _renamed(name: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters that an operator has saved, as they are called by now: `force` of reconcile was called `again`, and
    a repository may have moved with toto's state."""
    renamed = dict(parameters)
    if isinstance(repo := renamed.get("repo"), str):
        renamed["repo"] = str(moves.moved(Path(repo), moves.read(paths.state_home())))
    if name.startswith("reconcile/") and "again" in renamed:
        again = renamed.pop("again")
        renamed["force"] = renamed.get("force") or again
    return renamed


async def _found(api: Api, pool: str) -> dict[str, dict[str, Any]]:
    """The deployments of a work pool as the API returns them, by "flow/deployment"."""
    found = await api.call("POST", "/deployments/filter", {"work_pools": {"name": {"any_": [pool]}}})
    flows = await api.call("POST", "/flows/filter", {"flows": {"id": {"any_": [each["flow_id"] for each in found]}}})
    names = {flow["id"]: flow["name"] for flow in flows}
    return {f"{names[each['flow_id']]}/{each['name']}": each for each in found}


def _name(listed: Mapping[str, Any]) -> str:
    """The "flow/deployment" of an entry in prefect.yaml. (A flow is named after its function.)"""
    return f"{re.split('[.:]', listed['entrypoint'])[-1].replace('_', '-')}/{listed['name']}"


def _slugs(deployment: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(each["slug"] for each in deployment.get("schedules", ()) if each["slug"])


def _schedule(listed: Mapping[str, Any]) -> dict[str, Any]:
    """A schedule of prefect.yaml in the format of the API."""
    about = {key: listed[key] for key in ("slug", "active", "parameters") if key in listed}
    return {**about, "schedule": {key: value for key, value in listed.items() if key not in about}}


async def _read_written(api: Api) -> dict[str, Written]:
    try:
        variable = await api.call("GET", f"/variables/name/{WRITTEN}")
    except ServerError as error:
        if error.status != 404:
            raise
        return {}
    return {name: Written(tuple(each["schedules"]), each["parameters"]) for name, each in variable["value"].items()}


async def _write_written(api: Api, written: Mapping[str, Written]) -> None:
    value = {"value": {name: asdict(each) for name, each in written.items()}}
    await _update(api, f"/variables/name/{WRITTEN}", value, "/variables/", {"name": WRITTEN, "tags": ["toto"]})


async def _update(api: Api, path: str, changes: Mapping[str, Any], collection: str, rest: Mapping[str, Any]) -> None:
    """Change the object at `path`; if it does not exist, create it in `collection` with the `rest` of its fields.

    In this order, because creating a name that exists would be a traceback in the server's log.
    """
    try:
        await api.call("PATCH", path, changes)
    except ServerError as error:
        if error.status != 404:
            raise
        await api.call("POST", collection, {**rest, **changes})


async def _delete_old_automation(api: Api) -> None:
    """It also marked runs that had ended, when a heartbeat came late. `toto.server.orphans` checks the run itself."""
    for old in await api.call("POST", "/automations/filter", {"automations": {"name": {"any_": [OLD_AUTOMATION]}}}):
        await api.call("DELETE", f"/automations/{old['id']}")


async def register_blocks(env: Mapping[str, str]) -> None:
    """Register the forms of toto's blocks in the UI, or update them. Idempotent; takes about 1.5 s."""
    await process.run(
        [sys.executable, "-m", "prefect", "--no-prompt", "block", "register", "--module", "blocks"],
        env=env,
        cwd=ROOT,
        timeout=_LONGEST,
    )


async def deployments(api: Api, pool: str = POOL) -> dict[str, str]:
    """{"flow/deployment": id} of a work pool."""
    return {name: each["id"] for name, each in (await _found(api, pool)).items()}


async def ensure_limit(api: Api, name: str, slots: int) -> None:
    """Create the global concurrency limit `name`, or set it to `slots` slots (0: nothing may run)."""
    await _update(
        api,
        f"/v2/concurrency_limits/{name}",
        {"limit": slots, "active": True},
        "/v2/concurrency_limits/",
        {"name": name},
    )


async def ensure_pool(api: Api, pool: str, root: Path = ROOT) -> None:
    """Create or update the work pool, whose runs are started by `toto.server.fork_server` for the flows in `root`.

    Its template has no variables: no deployment and no run can change the command, its environment or its folder.
    Raises `ServerError`.
    """
    starter = str(ROOT / "toto" / "server" / "fork_server.py")
    command = shlex.join([sys.executable, "-I", "-S", starter, "run", str(root)])
    template = {
        "job_configuration": {"command": command, "stream_output": True},
        "variables": {"type": "object", "properties": {}, "additionalProperties": False},
    }
    about = {"description": "toto's own processes, on the machine that toto runs on", "base_job_template": template}
    await _update(api, f"/work_pools/{pool}", about, "/work_pools/", {"name": pool, "type": "process"})
