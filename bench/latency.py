"""Measures how long a push waits, with a real Prefect, worker, hook and repository, and a flow of one line."""

import asyncio
import os
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.conftest import TINY_DEPLOYMENT, TINY_FLOW, free_port
from toto.base import process
from toto.base.prefect_api import Api
from toto.git_host import host as git_host
from toto.server import deployments, environment, fork_server
from toto.server import serve as server

ROUNDS = 20
COLD_ROUNDS = 4
CROWD = 4


@dataclass
class Latency:
    """Seconds, one entry for each round.

    `cold` is like `first_lines`, without a fork server. `crowds` is from the last of several quick pushes to its first
    line.
    """

    pushes: list[float] = field(default_factory=list)
    bare_pushes: list[float] = field(default_factory=list)
    first_lines: list[float] = field(default_factory=list)
    cold: list[float] = field(default_factory=list)
    crowds: list[float] = field(default_factory=list)
    whole_runs: list[float] = field(default_factory=list)
    cli: list[float] = field(default_factory=list)
    imports: list[float] = field(default_factory=list)


async def measure(folder: Path, database_url: str | None = None) -> Latency:
    """Push, wait for the run, and push again; then push several times at once. Prefect's default database is SQLite."""
    folder.mkdir()
    (folder / "flows").mkdir()
    (folder / "flows" / "reconcile.py").write_text(TINY_FLOW)
    (folder / "prefect.yaml").write_text(TINY_DEPLOYMENT)
    env = environment.server_environment(folder / "home", free_port(), database_url=database_url)
    found = Latency()
    async with server.running_server(env, folder / "server.log"):
        api = Api.of(env)
        ids = await deployments.deploy(env, root=folder)
        async with server.running_worker(env, folder / "worker.log", root=folder):
            hooked = await git_host.create(
                folder / "infra.git", api_url=api.url, ui_url="http://ui", deployment_id=ids["reconcile/reconcile"]
            )
            bare = folder / "bare.git"
            await process.run(["git", "init", "--quiet", "--bare", bare])
            await process.run(["git", "init", "--quiet", "--initial-branch=main", folder / "clone"])
            cold = Latency()
            for _ in range(COLD_ROUNDS + 1):
                await _round(folder / "clone", bare, hooked, api, cold)
            async with server.running_fork_server(env, folder / "runs.log", root=folder):
                async with asyncio.timeout(60):
                    while not Path(env["PREFECT_HOME"], fork_server.NAME).exists():  # noqa: ASYNC110
                        await asyncio.sleep(0.1)
                for number in range(ROUNDS + 1):
                    await _round(folder / "clone", bare, hooked, api, found)
                    if number == 0:
                        found = Latency(cold=cold.first_lines[1:])  # the first run warms caches
                for _ in range(3):
                    found.crowds.append(await _crowd(folder / "clone", hooked, api))
            for _ in range(3):
                found.cli.append(
                    (
                        await process.run(
                            [
                                sys.executable,
                                "-m",
                                "prefect",
                                "deployment",
                                "run",
                                "reconcile/reconcile",
                                "-p",
                                "repo=x",
                            ],
                            env=env,
                        )
                    ).seconds
                )
                found.imports.append((await process.run([sys.executable, "-c", "import prefect"], env=env)).seconds)
    return found


async def _round(clone: Path, bare: Path, hooked: Path, api: Api, found: Latency) -> None:
    await _commit(clone)
    found.bare_pushes.append((await process.run(["git", "push", bare, "main"], cwd=clone)).seconds)
    began = time.time()
    pushed = await process.run(["git", "push", hooked, "main"], cwd=clone)
    found.pushes.append(pushed.seconds)
    run = _run_of(pushed.stderr)
    async with asyncio.timeout(60):
        while (await api.call("GET", f"/flow_runs/{run}"))["state_type"] != "COMPLETED":  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    found.whole_runs.append(time.time() - began)
    found.first_lines.append(await _first_line(api, run) - began)


async def _crowd(clone: Path, hooked: Path, api: Api) -> float:
    """Push several times as fast as git allows; the seconds from the last push to its first line."""
    for _ in range(CROWD):
        await _commit(clone)
        began = time.time()
        pushed = await process.run(["git", "push", hooked, "main"], cwd=clone)
    return await _first_line(api, _run_of(pushed.stderr)) - began


async def _commit(clone: Path) -> None:
    who = {f"GIT_{role}_{what}": "bench@localhost" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    await process.run(["git", "commit", "--quiet", "--allow-empty", "-m", "x"], cwd=clone, env=os.environ | who)


def _run_of(output: str) -> str:
    run = re.search(r"/runs/flow-run/(\S+)", output)
    assert run, output
    return run[1]


async def _first_line(api: Api, run: str) -> float:
    """The time at which the flow printed its first line, by its own clock. (Logs arrive in batches.)"""
    wanted = {"logs": {"flow_run_id": {"any_": [run]}}}
    async with asyncio.timeout(60):
        while True:
            for line in await api.call("POST", "/logs/filter", wanted):
                if line["message"].startswith("first line"):
                    return float(line["message"].split()[2])
            await asyncio.sleep(0.1)
