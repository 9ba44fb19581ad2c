"""Fixtures that more than one test module needs."""

import asyncio
import contextlib
import os
import socket
import threading
import warnings
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import clean_logs, postgres
from tests.lab import kube, nix_daemon
from toto.base import paths
from toto.base.prefect_api import Api
from toto.server import environment
from toto.server import serve as server


@dataclass(frozen=True)
class PrefectServer:
    """A real Prefect server of this test session: `env` for processes that talk to it, `home` for its files."""

    env: dict[str, str]
    api_url: str
    home: Path
    log: Path

    @property
    def api(self) -> Api:
        return Api.of(self.env)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def pytest_configure(config: pytest.Config) -> None:
    """Have the logs of whatever `toto.server.serve` starts in this process looked at."""
    config.addinivalue_line("markers", "logs(*patterns, reason): errors that may be logged while the test runs")
    logged = server._logged

    def watched(argv: Sequence[str], env: Mapping[str, str], log_file: Path, *rest: Any, **more: Any) -> Any:
        clean_logs.watch(log_file)
        return logged(argv, env, log_file, *rest, **more)

    server._logged = watched


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectServer]:
    """One server a session (10 to 20 s on a new database), on a free port, with a home of its own."""
    home = tmp_path_factory.mktemp("prefect")
    log = home / "server.log"
    env = environment.server_environment(home, free_port())

    async def until(stop: asyncio.Event, ready: Callable[[], None]) -> None:
        async with server.running_server({**env, environment.REPOS: str(home / "repos"), paths.STATE: str(home)}, log):
            ready()
            await stop.wait()

    with background(until):
        yield PrefectServer(env, env["PREFECT_API_URL"], home, log)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[kube.Cluster]:
    """One real Kubernetes API server a session, for whoever asks: a test takes a namespace of its own in it.

    Skips, and says so at the end of the session, where its programs are not there.
    """
    made: list[kube.Cluster] = []

    async def until(stop: asyncio.Event, ready: Callable[[], None]) -> None:
        async with kube.cluster(tmp_path_factory.mktemp("kube")) as each:
            made.append(each)
            ready()
            await stop.wait()

    try:
        asyncio.run(kube.assets())
    except kube.ClusterError as error:
        warnings.warn(f"NOT TESTED: helm against a real Kubernetes API server: {error}", stacklevel=1)
        pytest.skip(str(error))
    with background(until):
        yield made[0]


@pytest.fixture(scope="module")
def database() -> Iterator[postgres.Postgres]:
    """A real PostgreSQL for a module's tests."""
    made: list[postgres.Postgres] = []

    async def until(stop: asyncio.Event, ready: Callable[[], None]) -> None:
        async with postgres.running() as each:
            made.append(each)
            ready()
            await stop.wait()

    with background(until):
        yield made[0]


@contextlib.contextmanager
def background(until: Callable[..., object]) -> Iterator[None]:
    """Run the coroutine function `until(stop, ready)` in a thread with a loop of its own, from `ready()` to the end
    of the block. (A session's fixture outlives the loops of its tests.)"""
    started = threading.Event()
    failure: list[BaseException] = []
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    def work() -> None:
        asyncio.set_event_loop(loop)
        try:
            loop.run_until_complete(until(stop, started.set))  # type: ignore[arg-type]
        except BaseException as error:
            failure.append(error)
        finally:
            started.set()
            loop.close()

    thread = threading.Thread(target=work, name="background")
    thread.start()
    started.wait()
    try:
        if failure:
            raise failure[0]
        yield
    finally:
        if thread.is_alive():
            loop.call_soon_threadsafe(stop.set)
        thread.join(60)


@pytest.fixture(autouse=True, scope="session")
def _no_servers_by_accident() -> None:
    os.environ["PREFECT_SERVER_ALLOW_EPHEMERAL_MODE"] = "false"


@pytest.fixture(autouse=True)
def _clean_logs(request: pytest.FixtureRequest) -> Iterator[None]:
    """No test leaves an error in the log of a server, worker or hook, unless it says why (`tests.clean_logs`)."""
    yield
    marks = list(request.node.iter_markers("logs"))
    assert all(mark.kwargs["reason"] for mark in marks)
    found = list(clean_logs.faults([pattern for mark in marks for pattern in mark.args]))
    assert not found, "errors in the logs:\n" + "\n".join(found)[:20_000]


@pytest.fixture(autouse=True, scope="session")
def _nix_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """toto's nix daemon, one a session, for whatever asks nix. (`toto serve` begins its own where none is named.)"""
    if not nix_daemon.possible():
        yield
        return

    async def until(stop: asyncio.Event, ready: Callable[[], None]) -> None:
        async with nix_daemon.running(tmp_path_factory.mktemp("nix")):
            ready()
            await stop.wait()

    with background(until):
        yield


@pytest.fixture
async def tiny_project(tmp_path: Path) -> AsyncIterator[Path]:
    """A folder with a prefect.yaml like toto's own and a flow `reconcile` that only says when it began."""
    (tmp_path / "flows").mkdir()
    (tmp_path / "flows" / "reconcile.py").write_text(TINY_FLOW)
    (tmp_path / "prefect.yaml").write_text(TINY_DEPLOYMENT)
    yield tmp_path


TINY_FLOW = '''
import asyncio
import time
from prefect import flow

@flow(log_prints=True)
async def reconcile(repo: str, commit: str | None = None, origin: str = "ui", seconds: float = 0) -> None:
    """Stands in for the real one."""
    print(f"first line {time.time()}")
    await asyncio.sleep(seconds)
'''
TINY_DEPLOYMENT = """
name: tiny
deployments:
  - name: reconcile
    entrypoint: flows/reconcile.py:reconcile
    work_pool: {name: toto}
"""
