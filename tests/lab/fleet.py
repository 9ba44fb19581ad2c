"""A whole toto in one folder: server and worker, a bare infra repo with its hook, a clone to push from, lab machines.

For the demo and for tests of the whole. Everything is real, and started as an operator would: the server
by `python -m toto.server.serve`, a run by `git push`. What it says of a machine it reads from the machine.
"""

import asyncio
import base64
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tests import clean_logs
from tests.lab.machine import Machine
from tests.lab.parts import Part
from tests.lab.setup import environment
from toto.base.prefect_api import saved_auth
from toto.git_host import host as git_host
from toto.ledger.ledger import Entry, Ledger
from toto.ledger.target import Target
from toto.nix import daemon
from toto.plan.host import DeployedHost
from toto.server.environment import PROFILES

EXAMPLE: Final = Path(__file__).parents[2] / "examples/infra"
ENDED: Final = {"COMPLETED", "FAILED", "CANCELLED", "CRASHED"}
LOOK: Final = 0.7  # seconds between two looks; a request costs toto 20 ms of a core, and the machines need that
PATIENCE: Final = 600.0  # seconds after which something hangs, however busy this machine is
NET: Final = "127.0.1."  # what the example says; a fleet that stands beside another has a net of its own
SEEN_BY_GUESTS: Final = "10.0.2.2"  # the loopback of this machine, from a lab machine
ADDRESSES: Final = {"gate": "127.0.1.11", "web1": "127.0.1.12", "web2": "127.0.1.13"}
PORTS: Final = {"gate": (8081,), "web1": (8080,), "web2": (8080,)}


@dataclass(frozen=True)
class Run:
    """One flow run of `reconcile`: how it ended, in its own words, and how long it took (seconds)."""

    id: str
    state: str
    message: str
    seconds: float
    begun_after: float


class Fleet:
    """See `fleet`."""

    def __init__(self, directory: Path, net: int = 1) -> None:
        self.directory = directory
        self.addresses = {name: address.replace(NET, f"127.0.{net}.") for name, address in ADDRESSES.items()}
        self.state, self.home = directory / "state", directory / "server"
        self.repo, self.work = directory / "repos" / "infra.git", directory / "work"
        self.key = self.state / "keys" / "machines"
        self.machines: dict[str, Machine] = {}
        self.port, self.machines_port = _free_port(), _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.server: subprocess.Popen[bytes] | None = None
        self.kubeconfig: Path | None = None
        self.database_url: str | None = None
        self.serves_machines = False
        self.readable: list[Path] = []  # folders that every cell may read

    @property
    def environment(self) -> dict[str, str]:
        more = {"KUBECONFIG": self.kubeconfig and str(self.kubeconfig), "TOTO_DATABASE_URL": self.database_url}
        return (
            environment()
            | {"TOTO_STATE": str(self.state), "TOTO_REPO": str(self.repo)}
            | {"TOTO_CELL_READ": os.pathsep.join(map(str, self.readable))}
            | {name: value for name, value in more.items() if value}
        )

    @property
    def log_places(self) -> tuple[Path, ...]:
        """What toto logs: `toto serve` itself, its parts (a folder), and what the hook printed to the pusher."""
        return self.directory / "toto.log", self.home / "logs", self.directory / "hook.log"

    @property
    def parts(self) -> list[Part]:
        """The programs that are to run: toto, and the machines."""
        server = [] if self.server is None else [Part("toto serve", self.server.poll(), self.directory / "toto.log")]
        return server + [part for machine in self.machines.values() for part in machine.parts]

    # The parts

    async def prepare(self, example: Path = EXAMPLE) -> None:
        """Keys, the bare repo with its hook, and a clone that holds the example; nothing is pushed yet."""
        self.key.parent.mkdir(mode=0o700, parents=True)
        self.state.chmod(0o700)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "toto", "-f", self.key], check=True)
        await git_host.create(self.repo, api_url=f"{self.url}/api", ui_url=self.url)
        shutil.copytree(example, self.work)
        manifest = self.work / "machines.yaml"
        for name, address in ADDRESSES.items():
            manifest.write_text(manifest.read_text().replace(address, self.addresses[name]))
        self.git("init", "--quiet", "--initial-branch=main")
        self.git("remote", "add", "toto", str(self.repo))
        shutil.copy(self.key.with_suffix(".pub"), self.work / "keys" / "toto.pub")

    async def start_server(self) -> None:
        """Server and worker, ready for pushes."""
        for place in self.log_places:
            clean_logs.watch(place)
        log = (self.directory / "toto.log").open("ab")
        self.server = subprocess.Popen(
            [
                "setpriv",
                "--pdeathsig",
                "TERM",
                sys.executable,
                "-m",
                "toto.server.serve",
                "--home",
                self.home,
                "--port",
                str(self.port),
                "--repos",
                self.repo.parent,
                "--sqlite",
                *(self._for_machines() if self.serves_machines else []),
            ],
            # As root it runs a nix daemon of its own, whatever the session of tests has.
            env={name: value for name, value in self.environment.items() if name != daemon.SOCKET or os.geteuid() != 0},
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
        )
        log.close()
        assert self.server.stdout is not None
        while line := await asyncio.to_thread(self.server.stdout.readline):
            if b"toto: ready" in line:
                return
        await asyncio.to_thread(self.server.wait)
        raise self.parts[0].died()

    def _for_machines(self) -> list[str]:
        return ["--machines", f"127.0.0.1:{self.machines_port}", "--machines-name", SEEN_BY_GUESTS]

    async def stop_server(self) -> None:
        """An orderly stop."""
        if self.server is not None:
            self.server.send_signal(signal.SIGTERM)
            try:
                await asyncio.to_thread(self.server.wait, 120)
            except subprocess.TimeoutExpired:
                self.server.kill()
                self.server.wait()
            assert self.server.stdout is not None
            self.server.stdout.close()
            self.server = None

    def kill(self) -> None:
        """SIGKILL server, worker and flow runs, all at once, as a power cut of toto would."""
        assert self.server is not None
        victims = [
            pid for pid in self.processes() if b"qemu" not in command_of(pid) or b"sandboxes" in _environment(pid)
        ]
        for pid in [self.server.pid, *victims]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.wait_for_server_end()

    def wait_for_server_end(self) -> None:
        """Wait for a server that has died, or is about to; then there is none."""
        assert self.server is not None
        self.server.wait(60)
        assert self.server.stdout is not None
        self.server.stdout.close()
        self.server = None

    def processes(self) -> list[int]:
        """The server's, the worker's and the flow runs' processes: those that were started with this fleet's state."""
        needle = f"TOTO_STATE={self.state}".encode()
        return [
            pid
            for pid in processes()
            if needle in _environment(pid) and pid != os.getpid() and b"/machines/" not in command_of(pid)
        ]

    async def start_machines(self, names: Iterable[str] = ADDRESSES) -> None:
        """Freshly installed machines that let toto in, and run nothing yet."""
        for name in names:
            machine = Machine(
                name,
                self.directory / "machines" / name,
                self.key,
                address=self.addresses[name],
                ports=PORTS[name],
                user="admin",
            )
            self.machines[name] = machine
        await asyncio.gather(*(self.machines[name].start() for name in names))
        await asyncio.gather(*(self.machines[name].wait_ssh() for name in names))

    async def stop(self) -> None:
        """Everything off."""
        await self.stop_server()
        await asyncio.gather(*(machine.power_cut() for machine in self.machines.values()))

    # What an operator does

    def toto(self, *arguments: str) -> str:
        """The output of a command of toto's, on the machine that it runs on."""
        command = [sys.executable, "-m", "toto.cli", *arguments, "--repos", str(self.repo.parent)]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=True).stdout

    def git(self, *arguments: str) -> str:
        """git in the clone; what it printed, to the pusher's eye (stdout and stderr)."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        who = {
            f"GIT_{role}_{what}": value
            for role in ("AUTHOR", "COMMITTER")
            for what, value in (("NAME", "operator"), ("EMAIL", "operator@example.org"))
        }
        done = subprocess.run(
            ["git", *arguments],
            cwd=self.work,
            env=clean | who | {"GIT_CONFIG_GLOBAL": "/dev/null"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"git {' '.join(arguments)}: {done.stdout}")
        return done.stdout

    def commit(self, message: str, files: dict[str, str | None] | None = None) -> str:
        """Write (None: remove) files and commit; the commit."""
        for name, text in (files or {}).items():
            path = self.work / name
            if text is None:
                path.unlink()
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            path.chmod(0o755 if text.startswith("#!") else 0o644)
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "-m", message)
        return self.git("rev-parse", "HEAD").strip()

    def push(self) -> str:
        """`git push`; the id of the run that its hook started."""
        output = self.git("push", "toto", "main")
        with (self.directory / "hook.log").open("a") as log:
            log.write(output)
        if found := re.search(r"/runs/flow-run/([0-9a-f-]{36})", output):
            return found[1]
        # On a very busy machine Prefect may not answer the hook in time: then the server starts the run.
        return self.run_of(self.git("rev-parse", "HEAD").strip())

    def run_of(self, commit: str, timeout: float = PATIENCE) -> str:
        """The id of the run that a push of `commit` started, or will have started within `timeout` seconds."""
        asked = {"flow_runs": {"tags": {"all_": ["push"]}}, "sort": "EXPECTED_START_TIME_DESC"}
        deadline = time.monotonic() + timeout
        while True:
            for each in self.api("POST", "/flow_runs/filter", asked):
                if each["parameters"].get("commit") == commit:
                    return str(each["id"])
            if time.monotonic() > deadline:
                raise TimeoutError(f"no run of {commit} after {timeout:g} s")
            time.sleep(1)

    async def deploy(
        self, message: str, files: dict[str, str | None] | None = None, *, timeout: float = PATIENCE
    ) -> Run:
        """Commit, push, and wait for the end of the run."""
        self.commit(message, files)
        return await self.ended(self.push(), timeout)

    # What there is to see

    def api(self, method: str, path: str, body: object = None) -> Any:
        """One request to Prefect's API."""
        data = None if body is None else json.dumps(body).encode()
        auth = base64.b64encode((saved_auth(self.home / PROFILES) or "").encode()).decode()
        headers = {"Content-Type": "application/json", "Authorization": f"Basic {auth}"}
        request = urllib.request.Request(f"{self.url}/api{path}", data, headers, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        for attempt in range(60):
            try:
                with opener.open(request, timeout=30) as answer:
                    return json.loads(answer.read() or b"null")
            except urllib.error.HTTPError as error:
                if error.code != 503 or attempt == 59:  # on SQLite no more than "locked just now"
                    raise
            time.sleep(0.5)
        raise AssertionError

    async def ended(self, run: str, timeout: float = PATIENCE) -> Run:
        """Wait until a run has ended."""
        return await self.until(run, ENDED, timeout)

    async def until(self, run: str, states: set[str], timeout: float = PATIENCE) -> Run:
        """Wait until a run is in one of the states (types, in capitals)."""
        deadline = time.monotonic() + timeout
        while True:
            found = await asyncio.to_thread(self.api, "GET", f"/flow_runs/{run}")
            if found["state_type"] in states:
                return Run(
                    run,
                    found["state_type"],
                    found["state"]["message"] or "",
                    found["total_run_time"],
                    found["estimated_start_time_delta"],
                )
            if time.monotonic() > deadline:
                raise TimeoutError(f"run {run} is {found['state_type']} after {timeout} s\n{self.logs(run)}")
            await asyncio.sleep(LOOK)

    async def log_line(self, run: str, text: str, timeout: float = PATIENCE) -> None:
        """Wait until a run, or one of its subflows, has logged `text`."""
        deadline = time.monotonic() + timeout
        while text not in await asyncio.to_thread(self.logs, run):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{text!r} did not appear in the log of run {run}:\n{self.logs(run)}")
            await asyncio.sleep(LOOK)

    def family(self, run: str) -> list[str]:
        """A run and its subflows, at any depth."""
        found, parents = [run], [run]
        while parents:
            children = self.api("POST", "/flow_runs/filter", {"flow_runs": {"parent_flow_run_id": {"any_": parents}}})
            parents = [each["id"] for each in children]
            found += parents
        return found

    def logs(self, run: str) -> str:
        """What a run and its subflows logged, in order of time."""
        lines: list[dict[str, Any]] = []
        for offset in range(0, 4000, 200):
            page = self.api(
                "POST",
                "/logs/filter",
                {
                    "logs": {"flow_run_id": {"any_": self.family(run)}},
                    "sort": "TIMESTAMP_ASC",
                    "limit": 200,
                    "offset": offset,
                },
            )
            lines += page
            if len(page) < 200:
                break
        return "\n".join(f"{each['timestamp'][11:19]} {each['message']}" for each in lines)

    def subflows(self, run: str) -> list[str]:
        """What a run does with its targets, as they began, as the UI names it: `roll out host / web1`.

        Of the stages above them only `revert` is there, which has no subflows (`tests.graph` shows them all).
        """
        stages = self._children([run])
        found = [*self._children([stage["id"] for stage in stages]), *stages]
        flows = {id: self.api("GET", f"/flows/{id}")["name"] for id in {each["flow_id"] for each in found}}
        stage_ids = {stage["id"] for stage in stages}
        return [
            f"{flows[each['flow_id']]} / {each['name']}"
            for each in found
            if (each["id"] not in stage_ids or flows[each["flow_id"]] == "revert")
            and each["state_type"] not in ("SCHEDULED", "PENDING")  # it has its name when it runs
        ]

    def _children(self, parents: list[str]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = (
            self.api(
                "POST",
                "/flow_runs/filter",
                {"flow_runs": {"parent_flow_run_id": {"any_": parents}}, "sort": "START_TIME_ASC"},
            )
            if parents
            else []
        )
        return found

    def artifacts(self, run: str) -> dict[str, str]:
        """The newest artifact of each key of a run and its subflows, as text."""
        found = self.api(
            "POST",
            "/artifacts/filter",
            {"artifacts": {"flow_run_id": {"any_": self.family(run)}}, "sort": "UPDATED_DESC"},
        )
        return {each["key"]: str(each["data"]) for each in reversed(found) if each["key"]}

    def entry(self, name: str) -> Entry:
        """What the ledger says of a host."""
        return Ledger(self.repo).read().get(Target("host", name))

    def runs_its_good(self, name: str, system: str) -> bool:
        """Whether what a machine runs is what the ledger calls its last good."""
        good = DeployedHost.of(self.entry(name).good)
        return good is not None and good.path == system

    def terraform_state(self, root: str) -> dict[str, Any]:
        """Terraform's own state file, not toto's word: the attributes of each resource of a root."""
        (file,) = self.state.glob(f"repos/*/terraform/{root}/terraform.tfstate")
        return {
            f"{each['type']}.{each['name']}": each["instances"][0]["attributes"]
            for each in json.loads(file.read_text())["resources"]
            if each["instances"]
        }

    async def systems(self) -> dict[str, str]:
        """What each machine runs, asked over ssh: `readlink /run/current-system`."""
        names = list(self.machines)
        return dict(
            zip(names, await asyncio.gather(*(self.machines[name].current_system() for name in names)), strict=True)
        )


@contextlib.asynccontextmanager
async def fleet(
    directory: Path, *, machines: Iterable[str] = ADDRESSES, kubeconfig: Path | None = None
) -> AsyncIterator[Fleet]:
    """A whole toto under `directory`, for as long as the block lasts; its releases go where `kubeconfig` says."""
    whole = Fleet(directory)
    whole.kubeconfig, whole.serves_machines = kubeconfig, True
    try:
        await whole.prepare()
        await asyncio.gather(whole.start_server(), whole.start_machines(machines))
        yield whole
    finally:
        await asyncio.shield(whole.stop())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def processes() -> list[int]:
    """Every process of this machine."""
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def command_of(pid: int) -> bytes:
    """The command line of a process, "" when it has gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def mounts_of(pid: int) -> str:
    """The mounts that a process sees, "" when it has gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/mountinfo").read_text()
    return ""


def _environment(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/environ").read_bytes()
    return b""
