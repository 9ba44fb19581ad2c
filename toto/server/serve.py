"""`toto serve`: runs Prefect's API server, a worker, and everything that they need, in the foreground.

The functions here are also a library, over `toto.base.process`. Nothing here imports Prefect: its server and worker
are processes, and its API is HTTP. What a run does is in `flows/`.

Each number was measured; the comment beside it says what it is for.
"""

import argparse
import asyncio
import contextlib
import fcntl
import ipaddress
import logging
import os
import re
import shutil
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Literal, Self, TypeAlias, get_args

from toto.api import run as api_run
from toto.api.run import running_api
from toto.base import files, paths, process
from toto.base.errors import TotoError
from toto.base.prefect_api import Api, ServerError
from toto.git_host import host as git_host
from toto.git_host import shared
from toto.jobs.history import History
from toto.machine import fleet_builders, keys, owners, renewal
from toto.nix import builders
from toto.nix import daemon as nix_daemon
from toto.server import database, moves, orphans
from toto.server.deployments import POOL, ROOT, deploy, ensure_pool, register_blocks
from toto.server.environment import BLOCK_KEY, PORT, REPOS, block_key_file, password, server_environment
from toto.store import grants

log = logging.getLogger(__name__)

DEPLOYMENT: Final = git_host.DEPLOYMENT
Part: TypeAlias = Literal["all", "server", "worker"]
PATIENCE: Final = 120  # seconds that a worker without a server of its own waits for the server
STARTS: Final = 600  # seconds until a server of its own must answer; when it dies nobody waits
CLEANING_UP: Final = 75.0  # seconds for runs when toto stops: terraform has a minute of them to save its state
AGAIN: Final = 5  # seconds until the server for machines is started again
SETTLED: Final = 60  # seconds that a fork server must live to be started again when it dies
IDLE: Final = 2  # seconds between two looks at whether a run is under way
LEFT_BEHIND: Final = 20  # seconds: an older request is not one that its hook is just sending


@dataclass(frozen=True)
class Machines:
    """Where the web server for machines listens, and the names by which they reach it."""

    host: str
    port: int
    names: tuple[str, ...] = ()

    @classmethod
    def of(cls, place: str, names: Sequence[str]) -> Self:
        """By `ADDRESS:PORT`, `[ADDRESS]:PORT`, or an address alone. Raises `ServerError`."""
        found = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([0-9.]+))(?::([0-9]{1,5}))?", place)
        try:
            if found is None:
                raise ValueError(place)
            host, port = str(ipaddress.ip_address(found[1] or found[2])), int(found[3] or api_run.PORT)
        except ValueError:
            raise ServerError(f"--machines {place}: not an address, such as 0.0.0.0:{api_run.PORT}") from None
        if wrong := [each for each in names if re.fullmatch(r"[A-Za-z0-9.:-]+", each) is None]:
            raise ServerError(f"--machines-name {wrong[0]!a}: neither a host name nor an address")
        return cls(host, port, tuple(names))


@contextlib.asynccontextmanager
async def running_server(
    env: Mapping[str, str], log_file: Path, *, timeout: float = STARTS
) -> AsyncIterator[process.Running]:
    """Run Prefect's API server, from the moment it answers to the end of the block.

    Raises `ServerError` with the log's last lines when it dies before it answers, or takes longer than `timeout`
    seconds (with a new database it takes 10 to 20 s on a slow machine, and minutes on an emulated one).
    """
    host, port = env["PREFECT_SERVER_API_HOST"], int(env["PREFECT_SERVER_API_PORT"])
    _refuse_taken_port(host, port)
    # uvicorn itself: `prefect server start` is a second process around almost the same call.
    argv = [
        sys.executable,
        "-m",
        "uvicorn",
        "--app-dir",
        str(ROOT),
        "--factory",
        "toto.server.app:create_app",
        "--host",
        host,
        "--port",
        str(port),
        "--timeout-keep-alive",
        "5",
        "--timeout-graceful-shutdown",
        "3",
        "--no-access-log",
        "--log-level",
        "warning",
    ]
    api = Api.of(env)
    async with _logged(argv, env, log_file, grace=10) as running:
        await _until_answers(running, api, log_file, timeout)
        yield running


async def _until_answers(running: process.Running, api: Api, log_file: Path, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while not await api.wait(0.2):
        if running.status is not None:
            raise ServerError(
                f"Prefect's server exited with status {running.status}:\n{_tail(log_file)}", hint=f"see {log_file}"
            )
        if time.monotonic() > deadline:
            raise ServerError(
                f"Prefect's server did not answer within {timeout:g} s:\n{_tail(log_file)}", hint=f"see {log_file}"
            )


@contextlib.asynccontextmanager
async def running_worker(
    env: Mapping[str, str], log_file: Path, *, pool: str = POOL, name: str | None = None, root: Path = ROOT
) -> AsyncIterator[process.Running]:
    """Run a process worker of `pool` to the end of the block; its flow runs end with it.

    It runs in `root`, where it finds the flows whose hooks it calls when a run crashes.
    """
    argv = [
        sys.executable,
        "-m",
        "prefect",
        "worker",
        "start",
        "--pool",
        pool,
        "--type",
        "process",
        "--name",
        name or f"toto@{socket.gethostname()}",
        "--install-policy",
        "never",
    ]
    async with _logged(argv, env, log_file, grace=CLEANING_UP, cwd=root) as running:
        yield running


@contextlib.asynccontextmanager
async def running_fork_server(
    env: Mapping[str, str], log_file: Path, *, root: Path = ROOT
) -> AsyncIterator[process.Running]:
    """Run a fork server (`toto.server.fork_server`) for the flows in `root`, to the end of the block.

    It does not wait until the fork server is ready; before that, runs begin slowly. The runs that the fork server has
    forked end with it.
    """
    flows = [f"flows.{each.stem}" for each in sorted((root / "flows").glob("[a-z]*.py"))]
    argv = [sys.executable, "-m", "toto.server.fork_server", "serve", *flows]
    async with _logged(argv, env, log_file, grace=5, cwd=root) as running:
        yield running


@contextlib.asynccontextmanager
async def running_signer(env: Mapping[str, str], log_file: Path) -> AsyncIterator[process.Running]:
    """Run the signer (`toto.machine.signer`) to the end of the block. It gets no word of Prefect's."""
    own = {name: value for name, value in env.items() if not name.startswith("PREFECT_")}
    async with _logged([sys.executable, "-m", "toto.machine.signer"], own, log_file, grace=5) as running:
        yield running


@contextlib.asynccontextmanager
async def _logged(
    argv: Sequence[str], env: Mapping[str, str], log_file: Path, grace: float, cwd: Path | None = None
) -> AsyncIterator[process.Running]:
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with log_file.open("ab") as sink:
        async with process.start(
            argv, env=env, cwd=cwd, stdout=sink.fileno(), stderr=sink.fileno(), grace=grace
        ) as running:
            yield running


def _tail(log_file: Path) -> str:
    return process.tail(log_file.read_text(errors="replace")) if log_file.exists() else ""


def _refuse_taken_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServerError(
                f"toto cannot listen on {host}:{port}: {error.strerror}",
                hint="stop the program that uses it, or choose a different --port",
            ) from None


@contextlib.contextmanager
def only_one(home: Path, part: str) -> Iterator[None]:
    """Hold the lock of a part ("server" or "worker") in `home`. Raises `ServerError` when it already runs there."""
    with files.lock(home / f"{part}.lock") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ServerError(
                f"a toto {part} already runs in {home}", hint="stop it, or choose a different --home"
            ) from None
        yield


async def serve(
    home: Path,
    port: int,
    *,
    stop: asyncio.Event,
    part: Part = "all",
    repos: Path | None = None,
    branch: str = "main",
    host: str = "127.0.0.1",
    database_url: str | None = None,
    sqlite: bool = False,
    auth: str | None = None,
    ui_url: str | None = None,
    root: Path = ROOT,
    machines: Machines | None = None,
    ready: asyncio.Event | None = None,
    leave: asyncio.Event | None = None,
) -> None:
    """Run server, deployments and worker until `stop` is set, or only one `part` ("server" includes the deployments).

    With `machines` it also runs the web server that machines ask, beside Prefect's.

    Once `leave` is set, it ends as soon as no run is under way.

    The server starts runs for pushes that wait in the spools of `repos`/*.git. The worker settles what an earlier
    worker left. Prefect's database is at `database_url`, else in a PostgreSQL of toto's own, else (or with `sqlite`) in
    a file. Sets `ready` when everything runs. Raises `ServerError`, `DatabaseError`.
    """
    moves.refuse_old(paths.state_home())
    paths.private_folder(home)
    with files.lock(home / "profiles.lock") as lock:  # server and worker may begin together, and one password is made
        fcntl.flock(lock, fcntl.LOCK_EX)
        auth = auth or password(home)
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
        await grants.take_over()
        if part != "server":  # runs use the folder, and may go on while the server is restarted
            _clear_old(Path(settings["TMPDIR"]))
        if part != "server" and os.geteuid() == 0 and nix_daemon.SOCKET not in os.environ:
            _say("starting the nix daemon, toto's own")
            await stack.enter_async_context(nix_daemon.running(nix_daemon.home()))
        if part != "worker":
            if not (database_url or sqlite) and (cluster := await database.choose(home)):
                _say(f"starting PostgreSQL {cluster.programs.major}, toto's own")
                log_file = home / "logs" / "database.log"
                watched[log_file] = await stack.enter_async_context(cluster.running(log_file))
                settings = server_environment(home, port, host=host, database_url=cluster.url, auth=auth, ui_url=ui_url)
            elif not database_url:
                _say(
                    f"the database is {home / 'prefect.db'} (SQLite, for trying out"
                    f"{'' if sqlite else '; `toto database move` moves it to PostgreSQL'})"
                )
            serving = _serving(settings, home / "logs" / "server.log", repos, branch, root)
            watched |= await stack.enter_async_context(serving)
            if machines is not None:
                await stack.enter_async_context(_asked(machines, home / "logs" / "machines.log"))
                _say(f"machines that pull ask at {machines.host}, port {machines.port}")
        if part != "server":
            working = _working(settings, home / "logs" / "worker.log", repos, root)
            watched |= await stack.enter_async_context(working)
        _say(
            "ready"
            if part == "worker"
            else f"ready at {settings['PREFECT_UI_URL']} (`toto password` prints its password)"
        )
        if ready is not None:
            ready.set()
        if leave is not None:
            await stack.enter_async_context(_beside(_when_idle(leave, stop, Api.of(settings))))
        try:
            await _until(stop, watched)
        finally:
            _say("stopping")


def _say(text: str) -> None:
    print(f"toto: {text}", flush=True)


def _clear_old(folder: Path) -> None:
    """Remove files older than a day from toto's temporary folder: killed processes have left them."""
    for each in folder.iterdir():
        with contextlib.suppress(OSError):
            if each.lstat().st_mtime < time.time() - 86_400:
                shutil.rmtree(each) if each.is_dir() and not each.is_symlink() else each.unlink()


@contextlib.asynccontextmanager
async def _serving(
    env: Mapping[str, str], log_file: Path, repos: Path, branch: str, root: Path
) -> AsyncIterator[dict[Path, process.Running]]:
    """Run the server, register deployments and hooks, and start runs for pushes whose hooks could not."""
    _say("starting Prefect's server (the first start creates its tables: up to 20 s)")
    # (The worker and its runs do not get the file's place; they have no use for it.)
    async with running_server({**env, BLOCK_KEY: str(block_key_file()), REPOS: str(repos)}, log_file) as server:
        _say("registering the deployments")
        ids = await deploy(env, root=root)
        await register_blocks(env)
        served = git_host.Served(
            api_url=env["PREFECT_API_URL"],
            ui_url=env["PREFECT_UI_URL"],
            deployment=DEPLOYMENT,
            deployment_id=ids.get(DEPLOYMENT),
            branch=branch,
            auth=Api.of(env).auth,
        )
        await _adopt_all(repos, served)
        async with _beside(_drain(repos)), _beside(orphans.watch(Api.of(env))):
            yield {log_file: server}


@contextlib.asynccontextmanager
async def _asked(machines: Machines, log_file: Path) -> AsyncIterator[None]:
    """Run the server that machines ask, and start it again when it has ended: whatever a stranger does to it, the rest
    of toto goes on. Raises `ApiFailed` when it does not start at all."""
    started: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def keep() -> None:
        while True:
            try:
                async with running_api(log_file, host=machines.host, port=machines.port, names=machines.names) as api:
                    if not started.done():
                        started.set_result(None)
                    while api.status is None:  # noqa: ASYNC110
                        await asyncio.sleep(1)
                used = f"it used more than {api.exceeded}" if api.exceeded else f"status {api.status}"
                log.error("the server for machines has ended (%s) and is started again: see %s", used, log_file)
            except Exception as error:  # whatever it is, the rest of toto goes on
                if not started.done():
                    started.set_exception(error)
                    return
                log.error("the server for machines: %s", error or repr(error))
            await asyncio.sleep(AGAIN)

    async with _beside(keep()):
        await started
        yield


@contextlib.asynccontextmanager
async def _working(
    env: Mapping[str, str], log_file: Path, repos: Path, root: Path
) -> AsyncIterator[dict[Path, process.Running]]:
    """Run the worker, its fork server, and the signer of documents for machines."""
    _say("starting the worker")
    api = Api.of(env)
    if not await api.wait(PATIENCE):
        raise ServerError(f"Prefect's server does not answer at {api.url}", hint="start `toto serve --part server`")
    await ensure_pool(api, POOL, root)
    if settled := await orphans.settle_orphans(api):
        log.warning("settled %d runs that an earlier worker had left behind", len(settled))
    for repo in git_host.infra_repos(repos):
        History(repo).settle()
    if skipped := await orphans.skip_missed(api):
        log.warning(
            "skipped %d runs of schedules that came due while toto was down; the newest are started", len(skipped)
        )
    await orphans.have_settled(api, settled, repos)
    signed = log_file.with_name("signer.log")
    async with (
        running_signer(env, signed) as signer,
        _beside(_keep_warm(env, log_file.with_name("runs.log"), root)),
        _beside(renewal.keep_up(repos)),
        _beside(fleet_builders.keep_told(repos)),
        running_worker(env, log_file, root=root) as worker,
    ):
        yield {log_file: worker, signed: signer}


@contextlib.asynccontextmanager
async def _beside(work: Coroutine[None, None, None]) -> AsyncIterator[None]:
    """Run `work` until the end of the block."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait((task,))
        if not task.cancelled() and (error := task.exception()):
            log.error("unexpected error: %r", error)


async def _keep_warm(env: Mapping[str, str], log_file: Path, root: Path) -> None:
    """Run a fork server, and start it again when it has died (unless it died soon: it would die again)."""
    while True:
        began = time.monotonic()
        try:
            async with running_fork_server(env, log_file, root=root) as forks:
                while forks.status is None:  # noqa: ASYNC110
                    await asyncio.sleep(1)
        except OSError as error:  # no memory for one more process just now
            log.error("the fork server: %s", error)
            await asyncio.sleep(SETTLED)
        if time.monotonic() - began < SETTLED:
            log.warning("runs begin slowly because their fork server does not stay up: see %s", log_file)
            return


async def _adopt_all(repos: Path, served: git_host.Served) -> None:
    try:
        await git_host.remember(repos, served)
    except TotoError as error:
        log.error("%s", error)
    for repo in git_host.infra_repos(repos):
        await _adopt(repo, served)
        try:
            paths.repo_state(repo)
            shared.claim(repo, shared.block_name(shared.name_of(repo)))
        except TotoError as error:
            log.warning("%s", error)
    try:
        known = git_host.infra_repos(repos)
        for line in (*await owners.adopt(known), *keys.with_the_old_key(known), *builders.unused()):
            log.warning("%s", line)
    except TotoError as error:
        log.error("%s", error)


async def _adopt(repo: Path, served: git_host.Served) -> None:
    """Update toto's address in a repository's hook, and start runs for pushes that came while toto was down."""
    try:
        await git_host.create(repo, **asdict(await git_host.as_chosen(repo, served)))
        if drained := await git_host.drain_spool(repo):
            _say(f"{repo.name}: started {len(drained)} pushes that had waited")
    except TotoError as error:
        log.error("%s", error)


async def _drain(repos: Path) -> None:
    """Every 5 s, start runs for pushes whose hooks could not, since Prefect was too busy to answer in time."""
    while True:
        await asyncio.sleep(5)
        for repo in git_host.infra_repos(repos):
            try:
                late = any(push.file.stat().st_mtime < time.time() - LEFT_BEHIND for push in git_host.waiting(repo))
                if late and (drained := await git_host.drain_spool(repo)):
                    _say(f"{repo.name}: started {len(drained)} pushes that had waited")
            except FileNotFoundError:
                continue  # a hook was faster
            except (TotoError, OSError) as error:
                log.error("%s: %s", repo.name, error)


async def _when_idle(leave: asyncio.Event, stop: asyncio.Event, api: Api) -> None:
    """Once asked to `leave`, set `stop` as soon as no run is under way, such as one that deploys toto's own machine."""
    await leave.wait()
    _say("asked to leave: it ends as soon as no run is under way")
    under_way = {"flow_runs": {"state": {"type": {"any_": ["PENDING", "RUNNING", "PAUSED", "CANCELLING"]}}}, "limit": 1}
    while True:
        with contextlib.suppress(ServerError):
            if not await api.call("POST", "/flow_runs/filter", under_way):
                break
        await asyncio.sleep(IDLE)
    stop.set()


async def _until(stop: asyncio.Event, parts: Mapping[Path, process.Running]) -> None:
    """Wait for `stop`. Raises `ServerError` when a part (by its log file) dies: then all of toto ends."""
    while not stop.is_set():
        for log_file, part in parts.items():
            if part.status is not None:
                raise ServerError(
                    f"the {log_file.stem} exited with status {part.status}:\n{_tail(log_file)}",
                    hint=f"see {log_file}; start toto again: it settles what was left",
                )
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), 1)


def _is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def main(arguments: Sequence[str] | None = None) -> int:
    """`toto serve`: run toto in the foreground until SIGTERM or SIGINT; the exit status.

    SIGHUP ends it when no run is under way: its unit then starts what is installed now.
    """
    state = paths.state_home()
    parser = argparse.ArgumentParser("toto serve", description="Run toto: Prefect's server, a worker, deployments.")
    parser.add_argument("--home", type=Path, default=state / "server", help="database, results, logs (%(default)s)")
    parser.add_argument("--port", type=int, default=PORT, help="(%(default)s)")
    parser.add_argument(
        "--host", default="127.0.0.1", help="the address to listen on (%(default)s); another needs --behind-proxy"
    )
    parser.add_argument(
        "--behind-proxy",
        action="store_true",
        help="a proxy does TLS for everybody who connects from elsewhere; give its address by --ui-url",
    )
    parser.add_argument("--ui-url", help="the UI's address in a browser, when that is not host and port")
    parser.add_argument("--repos", type=Path, help="folder of the bare infra repos (default: HOME/repos)")
    parser.add_argument("--branch", default="main", help="the deployed branch of a new infra repo (%(default)s)")
    parser.add_argument("--root", type=Path, default=ROOT, help="where prefect.yaml is (%(default)s)")
    parser.add_argument(
        "--sqlite",
        action="store_true",
        help="keep Prefect's database in a file, for trying out, even if PostgreSQL is on PATH",
    )
    parser.add_argument(
        "--part",
        choices=get_args(Part),
        default="all",
        help="run only the server (with the deployments) or only the worker (%(default)s)",
    )
    parser.add_argument(
        "--machines",
        metavar="ADDRESS:PORT",
        help=f"also serve machines that pull, with TLS, at this address; the usual port is {api_run.PORT}",
    )
    parser.add_argument(
        "--machines-name",
        metavar="NAME",
        action="append",
        default=[],
        help="a name or address by which machines reach it, for its certificate; may be given more than once",
    )
    # Secrets come from the environment: every user of the machine can see arguments.
    parser.epilog = "environment: TOTO_DATABASE_URL, TOTO_AUTH (user:password)"
    chosen = parser.parse_args(arguments)
    if not (chosen.behind_proxy and chosen.ui_url) and not _is_loopback(chosen.host):
        print(
            f"toto: {chosen.host} is not loopback, and the password would cross the network as it is\n"
            "next: let a proxy with TLS connect to toto, and say so: --behind-proxy --ui-url https://NAME",
            file=sys.stderr,
        )
        return 1
    logging.addLevelName(logging.ERROR, "error: ")
    logging.addLevelName(logging.WARNING, "")
    logging.basicConfig(level=logging.WARNING, format="toto: %(levelname)s%(message)s")
    try:
        machines = Machines.of(chosen.machines, chosen.machines_name) if chosen.machines else None
    except ServerError as error:
        print(f"toto: {error}", file=sys.stderr)
        return 1
    database_url, auth = os.environ.pop("TOTO_DATABASE_URL", None), os.environ.pop("TOTO_AUTH", None)

    async def until_signalled() -> None:
        stop, ready, leave = asyncio.Event(), asyncio.Event(), asyncio.Event()
        for number, event in ((signal.SIGTERM, stop), (signal.SIGINT, stop), (signal.SIGHUP, leave)):
            asyncio.get_running_loop().add_signal_handler(number, event.set)
        work = asyncio.create_task(
            serve(
                chosen.home,
                chosen.port,
                stop=stop,
                part=chosen.part,
                repos=chosen.repos,
                root=chosen.root,
                branch=chosen.branch,
                host=chosen.host,
                database_url=database_url,
                sqlite=chosen.sqlite,
                auth=auth,
                ui_url=chosen.ui_url,
                machines=machines,
                ready=ready,
                leave=leave,
            )
        )
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait((work, stopping), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        # If it was asked to stop before it was ready, give up the start. Later `serve` ends by itself, and a cancel
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
