"""Deployments get new names: what operators made of them moves along, however often toto is killed meanwhile."""

import inspect
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows import aliases
from flows import reconcile as real
from tests.conftest import PrefectServer
from toto.base import process
from toto.base.prefect_api import Api
from toto.server import deployments
from toto.server.deployments import ALIASES, MOVING, WRITTEN

FLOW = """
from prefect import flow

@flow
def reconcile(repo: str, only: list[str] | None = None, {more}) -> None:
    pass
"""
ENTRY = """
  - name: {name}
    entrypoint: flows/{file}.py:reconcile
    tags: [toto]
    parameters: {{repo: infra, only: []}}
    work_pool: {{name: {pool}}}
"""
SCHEDULES = """\
    schedules:
      - {slug: nightly, cron: "1 3 * * *", active: false}
      - {slug: weekly, cron: "2 3 * * 0", active: false}
      - {slug: daily, cron: "3 3 * * *"}
"""


def project(root: Path, pool: str, **entries: str) -> Path:
    """A prefect.yaml, `entries` with their files; the first one has the schedules."""
    (root / "flows").mkdir(exist_ok=True)
    (root / "flows" / "before.py").write_text(FLOW.format(more="again: bool = False"))
    (root / "flows" / "after.py").write_text(FLOW.format(more="force: bool = False"))
    (root / "flows" / "aliases.py").write_text(FLOW.format(more="force: bool = False, again: bool = False"))
    listed = [ENTRY.format(name=name, file=file, pool=pool) for name, file in entries.items()]
    (root / "prefect.yaml").write_text(f"name: tiny\ndeployments:{listed[0]}{SCHEDULES}{''.join(listed[1:])}")
    return root


class Stand:
    """A pool of its own with deployments under old names, and what an operator has made of them."""

    def __init__(self, server: PrefectServer, root: Path, pool: str) -> None:
        self.server, self.api, self.pool = server, server.api, pool
        self.root = root

    async def deploy(self) -> dict[str, str]:
        return await deployments.deploy(self.server.env, root=self.root, pool=self.pool)

    async def read(self, name: str) -> dict[str, Any]:
        found = await self.api.call("GET", f"/deployments/name/{name}")
        assert isinstance(found, dict)
        return found

    async def operate(self, name: str) -> None:
        """Switch `nightly` on at another time, delete `weekly`, add one, limit runs, save parameters."""
        found = await self.read(name)
        path = f"/deployments/{found['id']}"
        ids = {each["slug"]: each["id"] for each in found["schedules"]}
        await self.api.call(
            "PATCH",
            f"{path}/schedules/{ids['nightly']}",
            {"active": True, "schedule": {"cron": "5 5 * * *"}, "parameters": {"again": True, "only": ["web"]}},
        )
        await self.api.call("DELETE", f"{path}/schedules/{ids['weekly']}")
        await self.api.call(
            "POST",
            f"{path}/schedules",
            [{"schedule": {"cron": "6 6 * * *"}, "active": True}, {"schedule": {"cron": "7 7 * * *"}, "active": False}],
        )
        await self.api.call(
            "PATCH", path, {"concurrency_limit": 2, "parameters": {"repo": "infra", "only": ["db"], "again": True}}
        )
        await self.api.call("POST", f"{path}/schedule", {})

    async def due(self, name: str) -> list[tuple[str, str]]:
        """The runs to come of a deployment: the schedule's id, and when."""
        found = await self.api.call(
            "POST",
            "/flow_runs/filter",
            {
                "flow_runs": {
                    "deployment_id": {"any_": [(await self.read(name))["id"]]},
                    "state": {"type": {"any_": ["SCHEDULED"]}},
                }
            },
        )
        return sorted((each["created_by"]["id"], each["expected_start_time"]) for each in found)

    async def delete(self) -> None:
        for each in await self.api.call("POST", "/deployments/filter", {"work_pools": {"name": {"any_": [self.pool]}}}):
            await self.api.call("DELETE", f"/deployments/{each['id']}")


@pytest.fixture
async def stand(
    prefect_server: PrefectServer, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Any:
    monkeypatch.setattr(
        deployments, "ALIASES", {"reconcile/new": "reconcile/old", "reconcile/quiet-new": "reconcile/quiet"}
    )
    made = Stand(prefect_server, tmp_path, request.node.name)
    yield made
    await made.delete()
    variable = await made.api.call("GET", f"/variables/name/{WRITTEN}")
    left = {
        name: each
        for name, each in variable["value"].items()
        if name.split("/")[1] not in {"new", "old", "quiet", "quiet-new"}
    }
    await made.api.call("PATCH", f"/variables/name/{WRITTEN}", {"value": left})


def by_cron(deployment: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    return {
        each["schedule"]["cron"]: (each["slug"], each["active"], each["parameters"]) for each in deployment["schedules"]
    }


MOVED = {
    "5 5 * * *": ("nightly", True, {"force": True, "only": ["web"]}),
    "6 6 * * *": (None, True, {}),
    "7 7 * * *": (None, False, {}),
    "3 3 * * *": ("daily", True, {}),
}


async def test_what_an_operator_made_of_a_deployment_moves_to_its_new_name(stand: Stand) -> None:
    project(stand.root, stand.pool, old="before", quiet="before", other="before")
    old = await stand.deploy()
    await stand.operate("reconcile/old")
    quiet = f"/deployments/{old['reconcile/quiet']}"
    await stand.api.call("POST", f"{quiet}/schedules", [{"schedule": {"cron": "8 8 * * *"}, "active": True}])
    await stand.api.call("PATCH", quiet, {"paused": True})
    other = f"/deployments/{old['reconcile/other']}"
    await stand.api.call("PATCH", other, {"parameters": {"repo": "infra", "only": [], "again": True}})
    await stand.api.call(
        "POST",
        f"{other}/schedules",
        [{"schedule": {"cron": "9 9 * * *"}, "active": True, "parameters": {"again": False}}],
    )
    project(
        stand.root, stand.pool, new="after", **{"quiet-new": "after"}, other="after", old="aliases", quiet="aliases"
    )
    for _ in range(2):  # the second start changes nothing
        new = await stand.deploy()
        assert {name: id for name, id in new.items() if name in old} == old
        found = await stand.read("reconcile/new")
        assert by_cron(found) == MOVED
        assert found["parameters"] == {"repo": "infra", "only": ["db"], "force": True}
        assert found["global_concurrency_limit"]["limit"] == 2 and not found["paused"]
        assert {schedule for schedule, _ in await stand.due("reconcile/new")} == {
            each["id"] for each in found["schedules"] if each["active"]
        }
        alias = await stand.read("reconcile/old")
        assert alias["schedules"] == [] and await stand.due("reconcile/old") == []
        assert alias["global_concurrency_limit"]["limit"] == 2
        found = await stand.read("reconcile/quiet-new")
        assert found["paused"] and by_cron(found) == {"8 8 * * *": (None, True, {})}
        assert await stand.due("reconcile/quiet-new") == await stand.due("reconcile/quiet") == []
        found = await stand.read("reconcile/other")
        assert found["parameters"] == {"repo": "infra", "only": [], "force": True}
        assert by_cron(found) == {"9 9 * * *": (None, True, {"force": False})}
    # What an operator does with the new one stays as well.
    path = f"/deployments/{new['reconcile/new']}"
    for each in (await stand.read("reconcile/new"))["schedules"]:
        await stand.api.call("DELETE", f"{path}/schedules/{each['id']}")
    await stand.api.call("PATCH", path, {"paused": True})
    await stand.deploy()
    found = await stand.read("reconcile/new")
    assert found["schedules"] == [] and found["paused"]


async def test_a_schedule_that_an_alias_is_given_moves_at_the_next_start(stand: Stand) -> None:
    project(stand.root, stand.pool, new="after", old="aliases")
    path = f"/deployments/{(await stand.deploy())['reconcile/old']}"
    await stand.api.call(
        "POST",
        f"{path}/schedules",
        [
            {"schedule": {"cron": "4 4 * * *"}, "active": True, "parameters": {"again": True}},
            {"schedule": {"cron": "5 5 * * *"}, "active": False, "slug": "daily"},
        ],
    )
    await stand.deploy()
    assert (await stand.read("reconcile/old"))["schedules"] == []
    assert by_cron(await stand.read("reconcile/new")) == {
        "1 3 * * *": ("nightly", False, {}),
        "2 3 * * 0": ("weekly", False, {}),
        "4 4 * * *": (None, True, {"force": True}),
        "5 5 * * *": ("daily", False, {}),
    }


async def test_a_run_that_was_due_when_toto_stopped_is_not_lost(stand: Stand) -> None:
    project(stand.root, stand.pool, old="before")
    path = f"/deployments/{(await stand.deploy())['reconcile/old']}"
    await stand.api.call(
        "POST", f"{path}/schedule", {"start_time": (datetime.now(UTC) - timedelta(days=2)).isoformat(), "max_runs": 1}
    )
    [late] = [each for each in await stand.due("reconcile/old") if each[1] < datetime.now(UTC).isoformat()]
    project(stand.root, stand.pool, new="after", old="aliases")
    await stand.deploy()
    assert await stand.due("reconcile/old") == [late]


class Killed(BaseException):
    """Toto was killed just before it sent this request."""


async def test_killed_between_any_two_requests_no_schedule_vanishes_or_is_on_twice(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deployments, "IN_FLIGHT", 0.2)
    monkeypatch.setattr(process, "run", stand_in_for_prefect_deploy(stand))
    call, sent, most = Api.call, 0, 10**6

    async def counted(api: Api, method: str, path: str, body: object = None, *, timeout: float = 30) -> Any:
        nonlocal sent
        if method != "GET" and not path.endswith("/filter"):
            if sent == most:
                raise Killed
            sent += 1
        return await call(api, method, path, body, timeout=timeout)

    monkeypatch.setattr(Api, "call", counted)
    kills = 0
    while True:
        most = 10**6
        await stand.delete()
        await forget_written(stand.api)
        project(stand.root, stand.pool, old="before")
        await stand.deploy()
        await stand.operate("reconcile/old")
        project(stand.root, stand.pool, new="after", old="aliases")
        sent, most = 0, kills
        try:
            await stand.deploy()
        except Killed:
            kills += 1
        else:
            break
        finally:
            most = 10**6
        await assert_on_once(stand, kills)
        sent, most = 0, 8 + kills % 5  # and once more, somewhere in the start that would repair it
        try:
            await stand.deploy()
        except Killed:
            most = 10**6
            await assert_on_once(stand, kills)
        finally:
            most = 10**6
        await stand.deploy()
        found = await stand.read("reconcile/new")
        assert by_cron(found) == MOVED, kills
        assert found["parameters"] == {"repo": "infra", "only": ["db"], "force": True}, kills
        assert found["global_concurrency_limit"]["limit"] == 2 and not found["paused"], kills
        assert (await stand.read("reconcile/old"))["schedules"] == [] == await stand.due("reconcile/old"), kills
        assert len({schedule for schedule, _ in await stand.due("reconcile/new")}) == 3, kills
    assert kills > 10


async def assert_on_once(stand: Stand, kills: int) -> None:
    """Each schedule that is on is on at one of the two, or marked to be switched on by the next start."""
    new = await stand.api.call("POST", "/deployments/filter", {"deployments": {"name": {"any_": ["new"]}}})
    old = (await stand.read("reconcile/old"))["schedules"]
    there = [each for deployment in new for each in deployment["schedules"]]
    for cron, (_, active, _) in MOVED.items():
        on = [each for each in (*old, *there) if each["schedule"]["cron"] == cron and each["active"]]
        marked = [
            each
            for each in there
            if each["schedule"]["cron"] == cron and each["parameters"].get(MOVING, {}).get("active")
        ]
        assert len(on) == 1 or (active and not on and len(marked) == 1) or (not active and not on), (kills, cron)


async def forget_written(api: Api) -> None:
    await api.call("PATCH", f"/variables/name/{WRITTEN}", {"value": {}})


def stand_in_for_prefect_deploy(stand: Stand) -> Any:
    """The requests that `prefect deploy --all` sends, without the seconds that its imports take."""

    async def deploy(argv: list[Any], **_: object) -> None:
        flow = await stand.api.call("POST", "/flows/", {"name": "reconcile"})
        known = {
            each["name"]: each["id"]
            for each in await stand.api.call(
                "POST", "/deployments/filter", {"work_pools": {"name": {"any_": [stand.pool]}}}
            )
        }
        for each in yaml.safe_load(Path(argv[-1]).read_text())["deployments"]:
            about = {key: each[key] for key in ("parameters", "tags", "paused", "concurrency_limit") if key in each}
            if each["name"] in known:
                await stand.api.call("PATCH", f"/deployments/{known[each['name']]}", about)
            else:
                await stand.api.call(
                    "POST",
                    "/deployments/",
                    {
                        **about,
                        "name": each["name"],
                        "flow_id": flow["id"],
                        "work_pool_name": stand.pool,
                        "schedules": [deployments._schedule(schedule) for schedule in each.get("schedules", ())],
                    },
                )

    return deploy


def listed() -> Iterator[tuple[str, dict[str, Any]]]:
    for each in yaml.safe_load((deployments.ROOT / "prefect.yaml").read_text())["deployments"]:
        yield deployments._name(each), each


def test_every_old_name_is_an_alias_without_schedules_that_does_the_same() -> None:
    entries = dict(listed())
    assert {
        "reconcile/reconcile",
        "reconcile/rehearse",
        "reconcile/deploy-host",
        "reconcile/revert-to",
        "settle/settle",
        "accept/accept",
        "build/build",
        "compliance/compliance",
        "drift/drift",
        "prune/prune",
        *ALIASES.values(),
    } == entries.keys()
    for new, old in ALIASES.items():
        assert "schedules" not in entries[old] and "alias" in entries[old]["tags"]
        assert entries[old]["description"] == f"The old name of `{new}`."
        assert entries[old]["parameters"] == entries[new]["parameters"]
        expected = "flows.aliases.reconcile" if old.startswith("reconcile/") else entries[new]["entrypoint"]
        assert entries[old]["entrypoint"] == expected


@pytest.mark.parametrize("old", [{"again": True}, {"force": True}, {"again": False}, {}])
async def test_again_reaches_reconcile_as_force(monkeypatch: pytest.MonkeyPatch, old: dict[str, Any]) -> None:
    asked: dict[str, Any] = {}

    async def reconcile(*given: Any, **named: Any) -> str:
        asked.update(inspect.signature(fn).bind(*given, **named).arguments)
        return "its end"

    fn = real.reconcile.fn
    monkeypatch.setattr(real.reconcile, "fn", reconcile)
    ended: object = await aliases.reconcile.fn(Path("/infra.git"), "v1", "ui", ["web1"], False, True, "why", **old)
    assert ended == "its end"
    assert asked == {
        "repo": Path("/infra.git"),
        "commit": "v1",
        "origin": "ui",
        "only": ["web1"],
        "plan_only": False,
        "rehearse_only": True,
        "override": "why",
        "force": any(old.values()),
        "venues": None,
        "accept": None,
        "reason": None,
        "try_for": 0,
    }


def test_alias_of_reconcile_takes_what_reconcile_takes_and_the_old_name_of_force() -> None:
    old, new = (flow.parameters.properties for flow in (aliases.reconcile, real.reconcile))
    assert {key: {**each, "description": ""} for key, each in old.items() if key != "again"} == {
        key: {**each, "description": ""} for key, each in new.items()
    }
    assert old["again"]["description"] == "the old name of `force`."
    assert aliases.reconcile.on_crashed_hooks == real.reconcile.on_crashed_hooks != []
    assert aliases.reconcile.on_cancellation_hooks == real.reconcile.on_cancellation_hooks != []
    assert aliases.reconcile.name == real.reconcile.name
