"""Schedules of the real deployments, in a whole `toto serve`: they yield runs, which end, and they outlive restarts."""

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import free_port
from tests.git_host.test_host import Pusher
from tests.server.test_serve import Part
from toto.base import process
from toto.base.prefect_api import Api, saved_auth
from toto.git_host import host as git_host
from toto.server import deployments
from toto.server.environment import PROFILES

pytestmark = pytest.mark.minutes(2)

SOON = {"interval": 4}


class Toto:
    """`toto serve` on a home and an infra repo of its own, which asks for nothing."""

    def __init__(self, folder: Path) -> None:
        self.home, self.port, self.repo = folder / "home", free_port(), folder / "infra.git"
        self.state = folder / "state"

    @property
    def api(self) -> Api:
        return Api(f"http://127.0.0.1:{self.port}/api", saved_auth(self.home / PROFILES))

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Part]:
        part = await Part.begin(
            deployments.ROOT, self.home, self.port, "--sqlite", TOTO_STATE=str(self.state), TOTO_REPO=str(self.repo)
        )
        try:
            yield part
            await part.end()
        finally:
            part.kill()

    async def schedules(self) -> dict[str, tuple[str, dict[str, Any]]]:
        """By deployment, the path of its schedule and what it says; those that have one."""
        found = await self.api.call("POST", "/deployments/filter", {})
        flows = {each["id"]: each["name"] for each in await self.api.call("POST", "/flows/filter", {})}
        return {
            f"{flows[each['flow_id']]}/{each['name']}": (
                f"/deployments/{each['id']}/schedules/{schedule['id']}",
                schedule,
            )
            for each in found
            for schedule in each["schedules"]
        }

    async def runs(self, deployment_path: str, *states: str, name: str | None = None) -> list[dict[str, Any]]:
        """The runs that a schedule's deployment got from its schedule, and that are in one of the states."""
        found = await self.api.call(
            "POST",
            "/flow_runs/filter",
            {
                "flow_runs": {
                    "deployment_id": {"any_": [deployment_path.split("/")[2]]},
                    "state": {"type": {"any_": list(states)}},
                }
            },
        )
        return [each for each in found if each["auto_scheduled"] and name in (None, each["state_name"])]


@pytest.mark.logs(
    "Execution was cancelled by the runtime environment", reason="toto is stopped, perhaps while a run of prune goes on"
)
@pytest.mark.logs(
    "Failed to update state of flow run",
    r"_propose_pending_state.*ObjectNotFound|404 Not Found.*/set_state.*Flow run with id \S+ not found",
    reason="a schedule is switched off just as a run of it is begun: Prefect deletes that run",
)
async def test_schedules_yield_runs_that_end_and_outlive_a_restart(tmp_path: Path) -> None:
    toto = Toto(tmp_path)
    await git_host.create(toto.repo, api_url=toto.api.url)
    pusher = Pusher(tmp_path / "clone", toto.repo)
    (pusher.folder / "machines.yaml").write_text("machines: []\n")
    pusher.git("add", "--all")
    pusher.commit()
    pusher.git("push", "-o", "skip", str(toto.repo), "main")

    async with toto.running():
        # Scripts still call it by its old name, and its parameter.
        profiles = str(toto.home / PROFILES)
        env = {**os.environ, "PREFECT_PROFILES_PATH": profiles, "PREFECT_HOME": str(tmp_path / "prefect")}
        done = await process.run(
            [sys.executable, "-m", "prefect", "deployment", "run", "reconcile/toto", "-p", "again=true", "--watch"],
            env=env,
            timeout=300,
        )
        [run] = await toto.api.call("POST", "/flow_runs/filter", {"deployments": {"name": {"any_": ["toto"]}}})
        assert run["state_type"] == "COMPLETED", done.stdout
        assert run["name"] == f"infra {pusher.git('rev-parse', 'HEAD')[:8]} (ui)"
        schedules = await toto.schedules()
        assert schedules.keys() == {
            "reconcile/reconcile",
            "drift/drift",
            "compliance/compliance",
            "build/build",
            "prune/prune",
        }
        for path, _ in schedules.values():
            await toto.api.call("PATCH", path, {"active": True})
        async with asyncio.timeout(180):
            for path, _ in schedules.values():
                while not await toto.runs(path, "SCHEDULED"):
                    await asyncio.sleep(0.5)
        for name, (path, _) in schedules.items():
            await toto.api.call("PATCH", path, {"schedule": SOON})
            async with asyncio.timeout(300):  # (a run in a few seconds, unless the machine has much else to do)
                while not await toto.runs(path, "COMPLETED"):
                    assert not await toto.runs(path, "FAILED", "CRASHED"), name
                    await asyncio.sleep(0.5)
            [*_, run] = await toto.runs(path, "COMPLETED")
            tip = pusher.git("rev-parse", "HEAD")[:8]
            names = {"reconcile/reconcile": f"infra {tip} (schedule)", "build/build": f"build infra {tip}"}
            assert run["name"] == names.get(name, f"{name.split('/')[0]} infra")
            if name != "prune/prune":  # that one goes on
                await toto.api.call("PATCH", path, {"active": False})
        assert (toto.home / "tmp" / "runner_storage").is_dir()  # and not in /tmp, where one user would have it for all
        # What an operator does with a schedule: another time, off, gone; and one of their own.
        reconcile, drift, prune = (schedules[f"{name}/{name}"][0] for name in ("reconcile", "drift", "prune"))
        await toto.api.call("PATCH", reconcile, {"schedule": {"cron": "5 4 * * *", "timezone": "Europe/Berlin"}})
        await toto.api.call("DELETE", drift)
        await toto.api.call("POST", drift.rpartition("/")[0], [{"schedule": {"cron": "0 5 * * 1"}, "active": True}])
        await toto.api.call("PATCH", drift.partition("/schedules")[0], {"paused": True})
        changed = {"parameters": {"repo": str(toto.repo), "days": 30}}
        await toto.api.call("PATCH", prune.partition("/schedules")[0], changed)
        before = await toto.schedules()

    left, due = time.time(), 0.0
    while due < 3 * SOON["interval"]:  # runs of prune come due while toto is down
        await asyncio.sleep(1)
        due = time.time() - left

    async with toto.running() as part:
        after = await toto.schedules()
        assert after.keys() == before.keys()
        for name, (path, schedule) in before.items():
            assert after[name][0] == path
            assert {key: after[name][1][key] for key in ("active", "schedule", "slug")} == {
                key: schedule[key] for key in ("active", "schedule", "slug")
            }, name
        assert (await toto.api.call("GET", drift.partition("/schedules")[0]))["paused"] is True
        assert (await toto.api.call("GET", prune.partition("/schedules")[0]))["parameters"] == changed["parameters"]
        assert "skipped" in part.said
        skipped = await toto.runs(prune, "CANCELLED", name="Skipped")
        assert len(skipped) >= 2
        newest = max(each["expected_start_time"] for each in skipped)
        async with asyncio.timeout(180):  # the newest one that had come due is started
            while not [each for each in await toto.runs(prune, "COMPLETED") if each["expected_start_time"] > newest]:
                await asyncio.sleep(0.5)
