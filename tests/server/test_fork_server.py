"""Flow runs as forks of a process that has imported everything: to Prefect's worker they are what others are."""

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TINY_DEPLOYMENT, PrefectServer, background, free_port
from tests.server.test_serve import until
from toto.base import process
from toto.base.prefect_api import Api
from toto.server import deployments, environment, fork_server
from toto.server import serve as server

pytestmark = [
    pytest.mark.minutes(2),
    # On a busy machine the log of one test's runs may be there only in the next.
    pytest.mark.logs(
        r"exited with status code: (7|-11|137)", "ValueError: on purpose", reason="runs that end in every way"
    ),
]

FLOW = '''
import os, signal, time
from prefect import flow
from prefect.exceptions import TerminationSignal

@flow(log_prints=True, persist_result=False)
def reconcile(then: str = "end") -> None:
    """Says who it is, then ends as its argument says."""
    print(f"pid {os.getpid()} of {os.getppid()}")
    match then:
        case "exit": os._exit(7)
        case "crash": os.kill(os.getpid(), signal.SIGSEGV)
        case "raise": raise ValueError("on purpose")
        case "sleep": time.sleep(60)
        case "clean up":
            signal.signal(signal.SIGTERM, lambda *_: None)
            signal.pause()
            time.sleep(40)
            open(os.environ["PREFECT_HOME"] + "/clean", "w").close()
            raise TerminationSignal(signal=signal.SIGTERM)  # as toto's own do
'''


@dataclass
class Warm:
    """A worker with a fork server, and a deployment of `FLOW`."""

    api: Api
    deployment: str
    log: Path
    pid: int

    async def begin(self, then: str) -> str:
        """Start a run; its id."""
        run = await self.api.call(
            "POST", f"/deployments/{self.deployment}/create_flow_run", {"parameters": {"then": then}}
        )
        return str(run["id"])

    async def who(self, run: str) -> tuple[int, int]:
        """The run's process and its parent."""
        async with asyncio.timeout(60):
            while True:
                logs = await self.api.call("POST", "/logs/filter", {"logs": {"flow_run_id": {"any_": [run]}}})
                for line in logs:
                    if found := re.match(r"pid (\d+) of (\d+)", line["message"]):
                        return int(found[1]), int(found[2])
                await asyncio.sleep(0.1)

    async def ended(self, then: str, state: str) -> dict[str, Any]:
        return await until(self.api, await self.begin(then), {state})


@pytest.fixture(scope="module")
def warm(prefect_server: PrefectServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    # (Longer than a socket's path may be.)
    home = prefect_server.home / ("a" * 60) / ("b" * 60)
    project = tmp_path_factory.mktemp("warm")
    (project / "flows").mkdir()
    (project / "flows" / "reconcile.py").write_text(FLOW)
    (project / "prefect.yaml").write_text(TINY_DEPLOYMENT)
    env = prefect_server.env | {"PREFECT_HOME": str(home)}
    home.mkdir(parents=True)
    made: list[Warm] = []

    async def until_stopped(stop: asyncio.Event, ready: Callable[[], None]) -> None:
        ids = await deployments.deploy(env, root=project)
        log = home / "runs.log"
        async with (
            server.running_fork_server(env, log, root=project) as forks,
            server.running_worker(env, home / "worker.log", name="warm", root=project),
        ):
            async with asyncio.timeout(60):
                while not (home / fork_server.NAME).exists():
                    await asyncio.sleep(0.1)
            made.append(Warm(prefect_server.api, ids["reconcile/reconcile"], log, forks.pid))
            ready()
            await stop.wait()

    with background(until_stopped):
        yield made[0]


async def test_runs_are_forks_and_end_as_they_end(warm: Warm) -> None:
    runs = {then: await warm.begin(then) for then in ("end", "raise", "exit", "crash")}
    assert (await until(warm.api, runs["end"], {"COMPLETED"}))["state_type"] == "COMPLETED"
    assert (await warm.who(runs["end"]))[1] == warm.pid
    failed = await until(warm.api, runs["raise"], {"FAILED"})
    assert "on purpose" in failed["state"]["message"]
    assert "status code: 7" in (await until(warm.api, runs["exit"], {"CRASHED"}))["state"]["message"]
    assert f"status code: -{signal.SIGSEGV}" in (await until(warm.api, runs["crash"], {"CRASHED"}))["state"]["message"]
    assert warm.log.read_text() == "", "nothing to complain of"


async def test_a_cancel_reaches_the_fork(warm: Warm) -> None:
    run = await warm.begin("sleep")
    pid, _ = await warm.who(run)
    await warm.api.call("POST", f"/flow_runs/{run}/set_state", {"state": {"type": "CANCELLING"}})
    await until(warm.api, run, {"CANCELLED"})
    assert process.started(pid) is None


async def test_a_cancelled_run_has_more_time_to_clean_up_than_the_worker_gives(warm: Warm) -> None:
    """As terraform does, which has a minute to save its state; Prefect's worker kills after half of that."""
    run = await warm.begin("clean up")
    pid, _ = await warm.who(run)
    await warm.api.call("POST", f"/flow_runs/{run}/set_state", {"state": {"type": "CANCELLING"}})
    async with asyncio.timeout(120):
        while process.started(pid) is not None:
            await asyncio.sleep(0.1)
    assert warm.log.with_name("clean").exists()
    await until(warm.api, run, {"CANCELLED", "CRASHED"})  # (the worker's word, and then the run's own)


async def test_the_fork_goes_with_the_process_that_the_worker_sees(warm: Warm) -> None:
    run = await warm.begin("sleep")
    pid, _ = await warm.who(run)
    callers = subprocess.run(["pgrep", "-f", "fork_server.py run"], capture_output=True, text=True, check=True)
    for caller in callers.stdout.split():
        if run.encode() in Path(f"/proc/{caller}/environ").read_bytes():
            os.kill(int(caller), signal.SIGKILL)
    assert "status code: -9" in (await until(warm.api, run, {"CRASHED"}))["state"]["message"]
    async with asyncio.timeout(60):
        while process.started(pid) is not None:
            await asyncio.sleep(0.05)


@pytest.mark.logs("exited with status code: 137", reason="the fork server is killed, and its runs with it")
async def test_without_a_fork_server_runs_begin_slowly(warm: Warm) -> None:
    run = await warm.begin("sleep")
    pid, _ = await warm.who(run)
    os.kill(warm.pid, signal.SIGKILL)
    assert (await until(warm.api, run, {"CRASHED"}))["state"]["message"]
    async with asyncio.timeout(60):
        while process.started(pid) is not None:
            await asyncio.sleep(0.05)
    cold = await warm.begin("end")
    await until(warm.api, cold, {"COMPLETED"})
    assert (await warm.who(cold))[1] != warm.pid


async def test_what_totos_own_flows_import_can_be_forked(tmp_path: Path) -> None:
    env = environment.server_environment(tmp_path / "home", free_port())
    log = tmp_path / "log"
    async with server.running_fork_server(env, log) as forks, asyncio.timeout(120):
        while not (tmp_path / "home" / fork_server.NAME).exists():
            assert forks.status is None, log.read_text()
            await asyncio.sleep(0.1)


async def test_a_fork_server_that_does_not_answer_is_none(tmp_path: Path) -> None:
    """Nor does a fork that comes too late begin."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as silent:
        silent.bind(str(tmp_path / fork_server.NAME))
        silent.listen()
        program = (
            f"import sys; sys.argv = ['', 'run', {str(tmp_path)!r}]; sys.path.append("
            f"{str(Path(fork_server.__file__).parent)!r}); import fork_server; fork_server.PATIENCE = 0.3; "
            "fork_server.run()"
        )
        done = await process.run(
            [sys.executable, "-c", program],
            check=False,
            timeout=60,
            env=environment.server_environment(tmp_path, free_port()) | {"PREFECT__FLOW_RUN_ID": "a-run"},
        )
    assert done.status == 1 and "run a-run: toto does not start it: " in done.stderr and "no answer" in done.stderr


def test_the_caller_of_a_worker_imports_little() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-I",
            "-S",
            "-c",
            "import sys; sys.argv = ['', '']; sys.path.append("
            f"{str(Path(fork_server.__file__).parent)!r}); import fork_server; "
            "print(len(sys.modules), 'prefect' in sys.modules, 'asyncio' in sys.modules)",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    count, *heavy = done.stdout.split()
    assert heavy == ["False", "False"]
    assert int(count) < 120
