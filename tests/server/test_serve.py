"""Toto's own server, worker and hook against a real Prefect; the flow is a stand-in of a few lines."""

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from tasks import limits
from tests import clean_logs, postgres
from tests.conftest import PrefectServer, free_port
from tests.git_host.test_host import Pusher
from toto.base import paths, process
from toto.base.prefect_api import Api, ServerError
from toto.git_host import host as git_host
from toto.metrics import token
from toto.server import deployments, environment, orphans
from toto.server import serve as server
from toto.store import grants

pytestmark = pytest.mark.minutes(2)


@pytest.fixture
def tmp_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short one: the path of PostgreSQL's socket has at most 107 characters. With a blank, as homes may have."""
    return tmp_path_factory.mktemp("d d")


async def until(api: Api, run: str, states: set[str], seconds: float = 120) -> dict[str, Any]:
    """The run, once its state is one of `states`."""
    deadline = time.monotonic() + seconds
    while (found := await api.call("GET", f"/flow_runs/{run}"))["state_type"] not in states:
        assert time.monotonic() < deadline, f"run is still {found['state_type']} after {seconds} s"
        await asyncio.sleep(0.1)
    assert isinstance(found, dict)
    return found


async def has_spoken(api: Api, run: str) -> None:
    """Wait for what the stand-in flow prints. (Prefect sends logs in batches.)"""
    async with asyncio.timeout(120):
        while not any(
            line["message"].startswith("first line")
            for line in await api.call("POST", "/logs/filter", {"logs": {"flow_run_id": {"any_": [run]}}})
        ):
            await asyncio.sleep(0.1)


@pytest.fixture
async def deployed(prefect_server: PrefectServer, tiny_project: Path) -> AsyncIterator[str]:
    """The id of the stand-in's deployment, with a worker at work."""
    ids = await deployments.deploy(prefect_server.env, root=tiny_project, limits={"one": 1})
    log = prefect_server.home / "worker.log"
    async with server.running_worker(prefect_server.env, log, name="here", root=tiny_project):
        yield ids["reconcile/reconcile"]


async def test_push_starts_the_flow(prefect_server: PrefectServer, deployed: str, tmp_path: Path) -> None:
    repo = await git_host.create(
        tmp_path / "infra.git", api_url=prefect_server.api_url, ui_url="http://ui", deployment_id=deployed
    )
    output = Pusher(tmp_path / "clone", repo).push()
    found = re.search(r"http://ui/runs/flow-run/(\S+)", output)
    assert found, output
    run = await until(prefect_server.api, found[1], {"COMPLETED"})
    assert run["tags"] == ["push"]
    await has_spoken(prefect_server.api, found[1])
    lines = await prefect_server.api.call("POST", "/logs/filter", {"logs": {"flow_run_id": {"any_": [found[1]]}}})
    assert {line["name"] for line in lines} == {"prefect.flow_runs"}, "the worker says nothing of itself"


async def test_deploying_again_changes_no_id(prefect_server: PrefectServer, tiny_project: Path) -> None:
    once = await deployments.deploy(prefect_server.env, root=tiny_project, limits={"one": 1})
    again = await deployments.deploy(prefect_server.env, root=tiny_project, limits={"one": 2})
    assert once == again
    form = (await prefect_server.api.call("GET", f"/deployments/{once['reconcile/reconcile']}"))[
        "parameter_openapi_schema"
    ]
    assert sorted(form["properties"]) == ["commit", "repo", "seconds"], "where a run came from is no field of a form"
    limit = await prefect_server.api.call("GET", "/v2/concurrency_limits/one")
    assert limit["limit"] == 2


async def test_deployment_of_an_older_toto_keeps_its_schedules_and_gets_new_ones(
    prefect_server: PrefectServer, tiny_project: Path
) -> None:
    api, file = prefect_server.api, tiny_project / "prefect.yaml"
    plain = file.read_text().replace("name: reconcile\n", "name: scheduled\n", 1)
    nightly, weekly = (
        '      - {slug: %s, cron: "%s", active: false}\n' % each  # noqa: UP031
        for each in (("nightly", "1 2 * * *"), ("weekly", "1 2 * * 0"))
    )
    file.write_text(f"{plain}    schedules:\n{nightly}")
    path = f"/deployments/{(await deployments.deploy(prefect_server.env, root=tiny_project))['reconcile/scheduled']}"
    [schedule] = (await api.call("GET", path))["schedules"]
    await api.call("PATCH", f"{path}/schedules/{schedule['id']}", {"active": True, "schedule": {"cron": "5 5 * * *"}})
    await api.call("PATCH", path, {"concurrency_limit": 1})
    await api.call("DELETE", f"/variables/name/{deployments.WRITTEN}")  # which an older one did not have
    for _ in range(2):
        file.write_text(f"{plain}    schedules:\n{nightly}{weekly}")
        await deployments.deploy(prefect_server.env, root=tiny_project)
        found = {
            each["slug"]: (each["active"], each["schedule"]["cron"])
            for each in (await api.call("GET", path))["schedules"]
        }
        assert (await api.call("GET", path))["global_concurrency_limit"]["limit"] == 1
        assert found == {"nightly": (True, "5 5 * * *"), "weekly": (False, "1 2 * * 0")}
    await api.call("DELETE", path)


async def test_a_work_queue_is_paused_and_goes_on_on_sqlite(prefect_server: PrefectServer, tiny_project: Path) -> None:
    """Prefect reads within its transaction by a second session, which must not wait for the first."""
    await deployments.deploy(prefect_server.env, root=tiny_project)
    for paused in (True, False):
        await prefect_server.api.call("PATCH", "/work_pools/toto/queues/default", {"is_paused": paused})
        queue = await prefect_server.api.call("GET", "/work_pools/toto/queues/default")
        assert queue["is_paused"] is paused


async def test_same_request_sent_twice_makes_one_run(
    prefect_server: PrefectServer, deployed: str, tmp_path: Path
) -> None:
    repo = await git_host.create(tmp_path / "infra.git", api_url=prefect_server.api_url, deployment_id=deployed)
    request = repo / "toto" / "spool" / f"1-{'a' * 40}.json"
    body = '{"parameters":{"repo":"x"},"idempotency_key":"%s"}' % tmp_path.name  # noqa: UP031
    request.write_text(body)
    once = await git_host.drain_spool(repo)
    request.write_text(body)
    assert await git_host.drain_spool(repo) == once
    # No worker of a later test is to find it.
    for each in await prefect_server.api.call(
        "POST", "/flow_runs/filter", {"flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}}
    ):
        await prefect_server.api.call(
            "POST", f"/flow_runs/{each['id']}/set_state", {"state": {"type": "CANCELLED"}, "force": True}
        )


async def test_run_of_a_dead_worker_is_settled_at_start(prefect_server: PrefectServer, tiny_project: Path) -> None:
    api = prefect_server.api
    ids = await deployments.deploy(prefect_server.env, root=tiny_project)

    async def run(state: str) -> str:
        made = await api.call(
            "POST", f"/deployments/{ids['reconcile/reconcile']}/create_flow_run", {"parameters": {"repo": "x"}}
        )
        # Prefect itself cancels at once what no worker ever took.
        await api.call("PATCH", f"/flow_runs/{made['id']}", {"infrastructure_pid": "1"})
        await api.call("POST", f"/flow_runs/{made['id']}/set_state", {"state": {"type": state}, "force": True})
        return str(made["id"])

    running, cancelling, pending = [await run(state) for state in ("RUNNING", "CANCELLING", "PENDING")]
    assert {running, cancelling, pending} <= set(await orphans.settle_orphans(api))
    states = [(await api.call("GET", f"/flow_runs/{each}"))["state_type"] for each in (running, cancelling, pending)]
    assert states == ["CRASHED", "CANCELLED", "SCHEDULED"]
    await api.call("POST", f"/flow_runs/{pending}/set_state", {"state": {"type": "CANCELLED"}, "force": True})


async def test_run_that_has_fallen_silent_crashes_and_no_other(
    prefect_server: PrefectServer, tiny_project: Path
) -> None:
    api = prefect_server.api
    ids = await deployments.deploy(prefect_server.env, root=tiny_project)

    async def run(state: str = "RUNNING", process: str = "elsewhere:1") -> str:
        made = await api.call(
            "POST", f"/deployments/{ids['reconcile/reconcile']}/create_flow_run", {"parameters": {"repo": "x"}}
        )
        await api.call("PATCH", f"/flow_runs/{made['id']}", {"infrastructure_pid": process})
        for each in ("RUNNING", state):
            await api.call("POST", f"/flow_runs/{made['id']}/set_state", {"state": {"type": each}, "force": True})
        return str(made["id"])

    silent, cancelling, ended, heard = await run(), await run("CANCELLING"), await run("COMPLETED"), await run()
    here = await run(process=f"{socket.gethostname()}:{os.getpid()}")
    gone = await run(process=f"{socket.gethostname()}:{2**22 + 1}")
    await asyncio.sleep(2)
    beat = time.time()
    await api.call(
        "POST",
        "/events",
        [
            {
                "occurred": datetime.now(UTC).isoformat(),
                "event": "prefect.flow-run.heartbeat",
                "id": str(uuid.uuid4()),
                "resource": {"prefect.resource.id": f"prefect.flow-run.{heard}"},
            }
        ],
    )
    stored = {
        "filter": {"event": {"name": ["prefect.flow-run.heartbeat"]}, "resource": {"id": [f"prefect.flow-run.{heard}"]}}
    }
    async with asyncio.timeout(60):
        while not (await api.call("POST", "/events/filter", stored))["events"]:
            await asyncio.sleep(0.2)
    young = await run()
    everyone = (silent, cancelling, ended, heard, here, gone, young)
    assert not set(everyone) & set(await orphans.crash_silent(api, silence=3600))
    # Silent since one second before that heartbeat, and a second or more after the first six had begun.
    crashed = await orphans.crash_silent(api, silence=time.time() - beat + 1)
    assert set(everyone) & set(crashed) == {silent, cancelling, gone}
    states = [(await api.call("GET", f"/flow_runs/{each}"))["state_type"] for each in everyone]
    assert states == ["CRASHED", "CANCELLED", "COMPLETED", "RUNNING", "RUNNING", "CRASHED", "RUNNING"]
    for each in (heard, here, young):
        await api.call("POST", f"/flow_runs/{each}/set_state", {"state": {"type": "CANCELLED"}, "force": True})


async def test_taken_port_is_reported_before_anything_starts(prefect_server: PrefectServer) -> None:
    with pytest.raises(ServerError, match="cannot listen on"):
        async with server.running_server(prefect_server.env, prefect_server.log):
            pass


@pytest.mark.logs("unable to open database file", "Application startup failed", reason="it is started to die")
async def test_server_that_dies_shows_its_last_lines(tmp_path: Path) -> None:
    env = environment.server_environment(
        tmp_path / "home", free_port(), database_url="sqlite+aiosqlite:////nowhere/x.db"
    )
    with pytest.raises(ServerError, match="exited with status"):
        async with server.running_server(env, tmp_path / "log"):
            pass


def test_environment_keeps_foreign_settings_out(tmp_path: Path) -> None:
    env = environment.server_environment(
        tmp_path / "h",
        1,
        auth="a:b",
        base={"PREFECT_API_URL": "https://elsewhere", "PREFECT_API_KEY": "x", "HOME": "/h"},
    )
    assert env["PREFECT_API_URL"] == "http://127.0.0.1:1/api"
    assert "PREFECT_API_KEY" not in env
    assert env["HOME"] == "/h"
    assert (tmp_path / "h").stat().st_mode & 0o777 == 0o700
    assert not any("a:b" in value for value in env.values()), "an environment is read by more than it is meant for"
    assert Api.of(env).auth == "a:b"
    assert (tmp_path / "h" / environment.PROFILES).stat().st_mode & 0o777 == 0o600
    again = environment.server_environment(tmp_path / "h", 1, base={})
    assert Api.of(again).auth == environment.password(tmp_path / "h") == "a:b"


def _tree(root: int) -> set[int]:
    """`root` and all that came from it."""
    parents = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = Path(entry.path, "stat").read_text().rpartition(")")[2].split()
                parents[int(entry.name)] = int(fields[1])
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


@dataclass
class Part:
    """`toto serve` of a test's own, or a part of it."""

    process: subprocess.Popen[str]
    said: str = ""

    @classmethod
    async def begin(cls, root: Path, home: Path, port: int, *options: str, **variables: str) -> "Part":
        """Start it, and wait until it is ready."""
        argv = [
            *("setpriv", "--pdeathsig", "TERM"),  # whatever ends this process ends it, also before it is ready
            sys.executable,
            "-m",
            "toto.server.serve",
            "--home",
            str(home),
            "--port",
            str(port),
            "--root",
            str(root),
        ]
        clean_logs.watch(home / "logs")
        part = cls(
            subprocess.Popen(
                [*argv, *options],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=os.environ | {"PYTHONPATH": str(deployments.ROOT)} | variables,
            )
        )
        assert part.process.stdout
        while "toto: ready" not in part.said:
            line = await asyncio.wait_for(asyncio.to_thread(part.process.stdout.readline), 180)
            assert line, part.said
            part.said += line
        return part

    async def end(self) -> None:
        """Ask it to end; it does, in time, and leaves no process."""
        family = _tree(self.process.pid)
        assert len(family) > 1
        self.process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(self.process.wait, 60) == 0
        assert {pid for pid in family if process.started(pid) is not None} == set()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()


async def test_whole_server_starts_what_waited_and_leaves_no_process(tiny_project: Path, tmp_path: Path) -> None:
    """One life of `python -m toto.server.serve`: a push before it, a run under way, SIGTERM."""
    home, port = tmp_path / "home", free_port()
    repo = await git_host.create(home / "repos" / "infra.git", api_url=f"http://127.0.0.1:{port}/api")
    pusher = Pusher(tmp_path / "clone", repo)
    assert "the push is accepted" in pusher.push()
    old = paths.private_folder(paths.repo_state(repo) / "cache") / "nix-cache-info"  # of a toto of before
    old.touch()
    whole = await Part.begin(tiny_project, home, port, TOTO_AUTH="admin:secret")
    try:
        assert "started 1 pushes that had waited" in whole.said
        assert (
            not old.parent.exists() and (grants.granted().parent / "made" / paths.repo_folder(repo) / old.name).exists()
        )
        api = Api(f"http://127.0.0.1:{port}/api", "admin:secret")
        with pytest.raises(ServerError, match="401"):
            await Api(api.url).call("POST", "/flow_runs/filter", {})
        [waited] = await api.call("POST", "/flow_runs/filter", {})
        await until(api, waited["id"], {"COMPLETED"})
        pusher.commit()
        assert "rehearsing" in pusher.push()  # with the password that the server wrote for the hook
        # What a hook had to leave, since Prefect was too busy to answer it, waits for no other push.
        request = repo / "toto" / "spool" / f"1-{'a' * 40}.json"
        request.write_text('{"parameters":{"repo":"x"},"tags":["left"],"idempotency_key":"left"}')
        os.utime(request, (0, 0))
        asked = {"flow_runs": {"tags": {"all_": ["left"]}}}
        async with asyncio.timeout(60):
            while not (left := await api.call("POST", "/flow_runs/filter", asked)):
                await asyncio.sleep(0.5)
        assert len(left) == 1
        [deployment] = (await deployments.deployments(api)).values()
        long = await api.call(
            "POST", f"/deployments/{deployment}/create_flow_run", {"parameters": {"repo": "x", "seconds": 300}}
        )
        await until(api, long["id"], {"RUNNING"})
        await whole.end()
    finally:
        whole.kill()


@pytest.mark.logs(
    r"(httpx|httpcore)\S*(ConnectError|ReadError|RemoteProtocolError|ReadTimeout|ConnectTimeout)",
    r"Failed the last \d+ attempts",
    r"ConnectionRefusedError",
    r"prefect/workers/base\.py.*CancelledError",
    r"FlowRunCancellingObserver\._handle_polling_task_done",
    r"in _handle_polling_task_done.*CancelledError",
    reason="the server is stopped while the worker asks it, and the worker while it asks",
)
async def test_server_and_worker_apart_on_postgresql(tiny_project: Path, tmp_path: Path) -> None:
    """As units of their own: the server is stopped and started again, and the worker goes on."""
    home, port = tmp_path / "home", free_port()
    api = Api(f"http://127.0.0.1:{port}/api", "admin:secret")
    parts: list[Part] = []

    async def one_run() -> None:
        [deployment] = (await deployments.deployments(api)).values()
        run = await api.call("POST", f"/deployments/{deployment}/create_flow_run", {"parameters": {"repo": "x"}})
        await until(api, run["id"], {"COMPLETED"}, 60)

    async with postgres.running() as cluster:
        given = {"TOTO_DATABASE_URL": cluster.url, "TOTO_AUTH": api.auth or ""}
        try:
            for part in ("server", "worker"):
                parts.append(await Part.begin(tiny_project, home, port, "--part", part, **given))
            await one_run()
            answer = httpx.get(f"http://127.0.0.1:{port}/metrics", auth=("prometheus", token.file().read_text()))
            assert "toto_worker_up 1.0" in answer.text and 'toto_metrics_complete{part="runs"} 1.0' in answer.text
            with temporary_settings({PREFECT_API_URL: api.url, PREFECT_API_AUTH_STRING: api.auth}):
                assert await limits.side_by_side() == limits.ON_POSTGRES
            with pytest.raises(AssertionError, match="a toto worker already runs in"):
                await Part.begin(tiny_project, home, port, "--part", "worker", **given)
            await parts[0].end()
            parts[0] = await Part.begin(tiny_project, home, port, "--part", "server", **given)
            await one_run()
            assert parts[1].process.poll() is None
            assert not (home / "prefect.db").exists()
            for each in reversed(parts):
                await each.end()
        finally:
            for each in parts:
                each.kill()
