"""What keeps toto running: Prefect's API server, a worker, and the deployments that they serve.

Library functions over `toto.base.process`, and `toto serve`, which runs all of it in the foreground. Nothing
here imports Prefect: its server and worker are processes, its API is HTTP. What a run does is in `flows/`.

Where the settings come from: each was measured; the comment beside it says what it is for.
"""

import argparse
import asyncio
import contextlib
import fcntl
import logging
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final, Literal, TypeAlias, get_args

from toto.base import process
from toto.base.errors import TotoError
from toto.base.prefect_api import Api, ServerError
from toto.git_host import host as git_host
from toto.server import database, orphans
from toto.server.deployments import POOL, ROOT, deploy, ensure_pool, register_blocks
from toto.server.environment import PORT, server_environment

log = logging.getLogger(__name__)

DEPLOYMENT: Final = git_host.DEPLOYMENT
Part: TypeAlias = Literal["all", "server", "worker"]
PATIENCE: Final = 120  # seconds in which a worker that is started alone wants to see its server
SETTLED: Final = 60  # seconds after which a fork server that dies is started again
LEFT_BEHIND: Final = 20  # seconds after which a request is none that its hook is just sending


@contextlib.asynccontextmanager
async def running_server(env: Mapping[str, str], log_file: Path, *, timeout: float = 120
                         ) -> AsyncIterator[process.Running]:
    """Prefect's API server, from the moment it answers to the end of the block.

    Raises `ServerError` with the log's last lines when it dies before it answers, or takes longer than `timeout`
    seconds (a new database takes 10 to 20 on a slow machine).
    """
    host, port = env["PREFECT_SERVER_API_HOST"], int(env["PREFECT_SERVER_API_PORT"])
    _refuse_taken_port(host, port)
    # uvicorn itself, not `prefect server start`, which is a second process around much the same call.
    argv = [sys.executable, "-m", "uvicorn", "--app-dir", str(ROOT), "--factory", "toto.server.app:create_app",
            "--host", host, "--port", str(port), "--timeout-keep-alive", "5", "--timeout-graceful-shutdown", "3",
            "--no-access-log", "--log-level", "warning"]
    api = Api.of(env)
    async with _logged(argv, env, log_file, grace=10) as running:
        await _until_answers(running, api, log_file, timeout)
        yield running


async def _until_answers(running: process.Running, api: Api, log_file: Path, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while not await api.wait(0.2):
        if running.status is not None:
            raise ServerError(f"Prefect's server exited with status {running.status}:\n{_tail(log_file)}",
                              hint=f"see {log_file}")
        if time.monotonic() > deadline:
            raise ServerError(f"Prefect's server did not answer within {timeout:g} s:\n{_tail(log_file)}",
                              hint=f"see {log_file}")


@contextlib.asynccontextmanager
async def running_worker(env: Mapping[str, str], log_file: Path, *, pool: str = POOL,
                         name: str | None = None) -> AsyncIterator[process.Running]:
    """A process worker of `pool`, to the end of the block; its flow runs end with it."""
    argv = [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--type", "process", "--name",
            name or f"toto@{socket.gethostname()}", "--install-policy", "never"]
    async with _logged(argv, env, log_file, grace=15) as running:
        yield running


@contextlib.asynccontextmanager
async def running_fork_server(env: Mapping[str, str], log_file: Path, *, root: Path = ROOT
                              ) -> AsyncIterator[process.Running]:
    """What makes flow runs begin at once (`toto.server.fork_server`), for the flows in `root`, to the end of the block.

    It is not waited for: without it runs begin slowly. The runs that it has forked end with it.
    """
    flows = [f"flows.{each.stem}" for each in sorted((root / "flows").glob("[a-z]*.py"))]
    argv = [sys.executable, "-m", "toto.server.fork_server", "serve", *flows]
    async with _logged(argv, env, log_file, grace=5, cwd=root) as running:
        yield running


@contextlib.asynccontextmanager
async def _logged(argv: Sequence[str], env: Mapping[str, str], log_file: Path, grace: float,
                  cwd: Path | None = None) -> AsyncIterator[process.Running]:
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with log_file.open("ab") as sink:
        async with process.start(argv, env=env, cwd=cwd, stdout=sink.fileno(), stderr=sink.fileno(),
                                 grace=grace) as running:
            yield running


def _tail(log_file: Path) -> str:
    return process.tail(log_file.read_text(errors="replace")) if log_file.exists() else ""


def _refuse_taken_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServerError(f"{host}:{port} cannot be listened on: {error.strerror}",
                              hint="stop what listens there, or choose another --port") from None


@contextlib.contextmanager
def only_one(home: Path, part: str) -> Iterator[None]:
    with (home / f"{part}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ServerError(f"a toto {part} already runs in {home}",
                              hint="stop it, or choose another --home") from None
        yield


async def serve(home: Path, port: int, *, stop: asyncio.Event, part: Part = "all", repos: Path | None = None,
                branch: str = "main", host: str = "127.0.0.1", database_url: str | None = None, sqlite: bool = False,
                auth: str | None = None, ui_url: str | None = None, root: Path = ROOT,
                ready: asyncio.Event | None = None) -> None:
    """Server, deployments and worker until `stop` is set; or the server with the deployments, or the worker alone.

    The server starts what pushes leave in the spools of `repos`/*.git. The worker settles what an earlier one left.
    Prefect's database is at `database_url`, else a PostgreSQL of toto's own, else (or with `sqlite`) a file.
    """
    settings = server_environment(home, port, host=host, database_url=database_url, auth=auth, ui_url=ui_url)
    home = Path(settings["PREFECT_HOME"])
    repos = repos or home / "repos"
    watched: dict[Path, process.Running] = {}
    async with contextlib.AsyncExitStack() as stack:
        for each in ("server", "worker") if part == "all" else (part,):
            stack.enter_context(only_one(home, each))
        _say(f"starting in {home}; logs are in {home / 'logs'}")
        stack.callback(process.clean_up)
        if killed := process.clean_up():
            log.warning("ended %d processes that an earlier toto had left behind", len(killed))
        if part != "server":  # runs, which may go on while the server is started again, work in there
            _clear_old(Path(settings["TMPDIR"]))
        if part != "worker":
            if not (database_url or sqlite) and (cluster := await database.choose(home)):
                _say(f"starting PostgreSQL {cluster.programs.major}, toto's own")
                log_file = home / "logs" / "database.log"
                watched[log_file] = await stack.enter_async_context(cluster.running(log_file))
                settings = server_environment(home, port, host=host, database_url=cluster.url, auth=auth, ui_url=ui_url)
            elif not database_url:
                _say(f"the database is {home / 'prefect.db'} (SQLite, for trying out"
                     f"{'' if sqlite else '; `toto database move` takes it to PostgreSQL'})")
            serving = _serving(settings, home / "logs" / "server.log", repos, branch, root)
            watched |= await stack.enter_async_context(serving)
        if part != "server":
            working = _working(settings, home / "logs" / "worker.log", repos, root)
            watched |= await stack.enter_async_context(working)
        _say("ready" if part == "worker" else f"ready at {settings['PREFECT_UI_URL']}")
        if ready is not None:
            ready.set()
        try:
            await _until(stop, watched)
        finally:
            _say("stopping")


def _say(text: str) -> None:
    print(f"toto: {text}", flush=True)


def _clear_old(folder: Path) -> None:
    """Remove from toto's temporary folder what processes that were killed have left, a day ago or longer."""
    for each in folder.iterdir():
        with contextlib.suppress(OSError):
            if each.lstat().st_mtime < time.time() - 86_400:
                shutil.rmtree(each) if each.is_dir() and not each.is_symlink() else each.unlink()


@contextlib.asynccontextmanager
async def _serving(env: Mapping[str, str], log_file: Path, repos: Path, branch: str,
                   root: Path) -> AsyncIterator[dict[Path, process.Running]]:
    """Server, deployments, hooks, and whoever starts what hooks could not."""
    _say("starting Prefect's server (the first start makes its tables: up to 20 s)")
    async with running_server(env, log_file) as server:
        _say("registering the deployments")
        ids = await deploy(env, root=root)
        await register_blocks(env)
        served = git_host.Served(
            api_url=env["PREFECT_API_URL"], ui_url=env["PREFECT_UI_URL"], deployment=DEPLOYMENT,
            deployment_id=ids.get(DEPLOYMENT), branch=branch, auth=env.get("PREFECT_API_AUTH_STRING"))
        await _adopt_all(repos, served)
        async with _beside(_drain(repos)), _beside(orphans.watch(Api.of(env))):
            yield {log_file: server}


@contextlib.asynccontextmanager
async def _working(env: Mapping[str, str], log_file: Path, repos: Path,
                   root: Path) -> AsyncIterator[dict[Path, process.Running]]:
    """The worker, and what makes its runs begin at once."""
    _say("starting the worker")
    api = Api.of(env)
    if not await api.wait(PATIENCE):
        raise ServerError(f"Prefect's server does not answer at {api.url}", hint="start `toto serve --part server`")
    await ensure_pool(api, POOL)
    if settled := await orphans.settle_orphans(api):
        log.warning("settled %d runs that an earlier worker had left behind", len(settled))
    if skipped := await orphans.skip_missed(api):
        log.warning("skipped %d runs of schedules that came due while toto was away; the newest are started",
                    len(skipped))
    await orphans.have_settled(api, settled, repos)
    async with _beside(_keep_warm(env, log_file.with_name("runs.log"), root)), running_worker(env, log_file) as worker:
        yield {log_file: worker}


@contextlib.asynccontextmanager
async def _beside(work: Coroutine[None, None, None]) -> AsyncIterator[None]:
    """Let `work` go on beside the block, and no longer."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait((task,))
        if not task.cancelled() and (error := task.exception()):
            log.error("unexpectedly: %r", error)


async def _keep_warm(env: Mapping[str, str], log_file: Path, root: Path) -> None:
    """A fork server; another one when it has died (not at once: it would die again)."""
    while True:
        began = time.monotonic()
        try:
            async with running_fork_server(env, log_file, root=root) as forks:
                while forks.status is None:  # noqa: ASYNC110
                    await asyncio.sleep(1)
        except OSError as error:  # no memory for another process just now
            log.error("the fork server: %s", error)
            await asyncio.sleep(SETTLED)
        if time.monotonic() - began < SETTLED:
            log.warning("runs begin slowly, for their fork server does not stay: see %s", log_file)
            return


async def _adopt_all(repos: Path, served: git_host.Served) -> None:
    try:
        await git_host.remember(repos, served)
    except TotoError as error:
        log.error("%s", error)
    for repo in git_host.infra_repos(repos):
        await _adopt(repo, served)


async def _adopt(repo: Path, served: git_host.Served) -> None:
    """Tell a repository's hook where toto is now, and start what was pushed while it was away."""
    try:
        await git_host.create(repo, **asdict(await git_host.as_chosen(repo, served)))
        if drained := await git_host.drain_spool(repo):
            _say(f"{repo.name}: started {len(drained)} pushes that had waited")
    except TotoError as error:
        log.error("%s", error)


async def _drain(repos: Path) -> None:
    """Start what hooks could not, again and again: Prefect was too busy to answer them in time."""
    while True:
        await asyncio.sleep(5)
        for repo in git_host.infra_repos(repos):
            try:
                late = any(push.file.stat().st_mtime < time.time() - LEFT_BEHIND for push in git_host.waiting(repo))
                if late and (drained := await git_host.drain_spool(repo)):
                    _say(f"{repo.name}: started {len(drained)} pushes that had waited")
            except FileNotFoundError:
                continue  # a hook was quicker
            except (TotoError, OSError) as error:
                log.error("%s: %s", repo.name, error)


async def _until(stop: asyncio.Event, parts: Mapping[Path, process.Running]) -> None:
    """Wait for `stop`. When server or worker (by their logs) dies, all of toto ends: half of it helps nobody."""
    while not stop.is_set():
        for log_file, part in parts.items():
            if part.status is not None:
                raise ServerError(f"the {log_file.stem} exited with status {part.status}:\n{_tail(log_file)}",
                                  hint=f"see {log_file}; start toto again, it settles what was left")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), 1)


def main(arguments: Sequence[str] | None = None) -> int:
    """`toto serve`: run toto in the foreground until SIGTERM or SIGINT."""
    state = Path(os.environ.get("TOTO_STATE") or Path.home() / ".local/state/toto")
    parser = argparse.ArgumentParser("toto serve", description="Run toto: Prefect's server, a worker, deployments.")
    parser.add_argument("--home", type=Path, default=state / "server", help="database, results, logs (%(default)s)")
    parser.add_argument("--port", type=int, default=PORT, help="(%(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on (%(default)s)")
    parser.add_argument("--ui-url", help="where a browser finds the UI, when that is not host and port")
    parser.add_argument("--repos", type=Path, help="folder of the bare infra repos (default: HOME/repos)")
    parser.add_argument("--branch", default="main", help="the deployed branch of a new infra repo (%(default)s)")
    parser.add_argument("--root", type=Path, default=ROOT, help="where prefect.yaml is (%(default)s)")
    parser.add_argument("--sqlite", action="store_true",
                        help="keep Prefect's database in a file, for trying out, though PostgreSQL is on PATH")
    parser.add_argument("--part", choices=get_args(Part), default="all",
                        help="server (with the deployments) and worker as units of their own (%(default)s)")
    # Secrets come by the environment: arguments are visible to every user of the machine.
    parser.epilog = "environment: TOTO_DATABASE_URL, TOTO_AUTH (user:password)"
    chosen = parser.parse_args(arguments)
    logging.addLevelName(logging.ERROR, "error: ")
    logging.addLevelName(logging.WARNING, "")
    logging.basicConfig(level=logging.WARNING, format="toto: %(levelname)s%(message)s")
    database_url, auth = os.environ.pop("TOTO_DATABASE_URL", None), os.environ.pop("TOTO_AUTH", None)

    async def until_signalled() -> None:
        stop, ready = asyncio.Event(), asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        work = asyncio.create_task(serve(
            chosen.home, chosen.port, stop=stop, part=chosen.part, repos=chosen.repos, root=chosen.root,
            branch=chosen.branch, host=chosen.host, database_url=database_url, sqlite=chosen.sqlite, auth=auth,
            ui_url=chosen.ui_url, ready=ready))
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait((work, stopping), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        # Asked to stop before it was ready: give up the start. After that `serve` ends by itself, and a cancel
        # would only disturb it while it ends its processes.
        if not ready.is_set():
            work.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await work

    try:
        asyncio.run(until_signalled())
    except TotoError as error:
        print(f"toto: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
