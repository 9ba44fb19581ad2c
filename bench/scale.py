"""Measures what a push costs that changes nothing, at 10, 100 and 1,000 hosts, when an evaluation costs nothing.

A stub answers in nix's place, at once: what is left is what toto and Prefect cost. Push, hook, worker, fork server,
ledger and database (PostgreSQL) are real.
"""

import asyncio
import json
import os
import re
import resource
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

from bench.row import Exponent, Row, Target
from tests import postgres
from tests.conftest import TINY_DEPLOYMENT, free_port
from tests.repos import InfraRepo, git
from toto.base import paths, process
from toto.base.prefect_api import Api
from toto.git_host import host as git_host
from toto.ledger import ledger
from toto.machine import owners
from toto.nix import commands as nix
from toto.plan import make
from toto.plan.kinds import kind_of
from toto.server import deployments, environment, fork_server
from toto.server import serve as server

COUNTS: Final = (10, 100, 1_000)
ROUNDS: Final = 5
DRVS: Final = "TOTO_BENCH_DRVS"  # the folder in which the stub has its derivations
FLOW: Final = "from bench import scale\nscale.stub()\nfrom flows.reconcile import reconcile\n"


def stub() -> None:
    """Answer in nix's place from now on, in this process."""

    async def instantiate(_tree: Path, host: Any, *_: object, **__: object) -> str:
        return str(_drv(host.name))

    async def instantiate_vm(_tree: Path, host: Any, *_: object, **__: object) -> nix.Vm:
        return nix.Vm(str(_drv(host.name)))

    nix.instantiate, nix.instantiate_vm = instantiate, instantiate_vm  # type: ignore[assignment]


def _drv(name: str) -> Path:
    drv = Path(os.environ[DRVS], f"{name}.drv")
    if not drv.exists():
        drv.write_text(f'Derive([("out","{_path(name)}","","")],[],[],"x","x",[],[])')
    return drv


def _path(name: str) -> str:
    return f"/nix/store/{'0' * 32}-nixos-system-{name}"


async def measure(folder: Path) -> AsyncIterator[Row | Exponent | Target]:
    """The rows: a plan in this process, a run by push, and what the run adds to the database."""
    plans, runs, grown = dict[int, list[float]](), dict[int, list[float]](), dict[int, list[float]]()
    async with postgres.running() as cluster:
        env = environment.server_environment(folder / "home", free_port(), database_url=cluster.url)
        os.environ[DRVS] = env[DRVS] = str(folder / "drvs")
        os.environ[paths.STATE] = env[paths.STATE] = str(folder / "state")
        (folder / "drvs").mkdir()
        (folder / "flows").mkdir()
        (folder / "flows" / "reconcile.py").write_text(FLOW)
        (folder / "prefect.yaml").write_text(TINY_DEPLOYMENT)
        stub()
        async with server.running_server(env, folder / "server.log"):
            api = Api.of(env)
            ids = await deployments.deploy(env, root=folder)
            async with (
                server.running_worker(env, folder / "worker.log", root=folder),
                server.running_fork_server(env, folder / "runs.log", root=folder),
            ):
                async with asyncio.timeout(120):
                    while not Path(env["PREFECT_HOME"], fork_server.NAME).exists():  # noqa: ASYNC110
                        await asyncio.sleep(0.1)
                for count in COUNTS:
                    repo = await _fleet(folder / str(count), count, api, ids["reconcile/reconcile"])
                    plans[count] = [await _plan(repo, number) for number in range(ROUNDS)]
                    runs[count], grown[count] = [], []
                    for number in range(ROUNDS + 1):
                        seconds, size = await _run(repo, number, api, cluster.dsn)
                        runs[count].append(seconds)
                        grown[count].append(size)
                    del runs[count][0], grown[count][0]  # the first run warms caches
    few, *_, many = COUNTS
    for what, taken, unit in (
        ("a plan, processor time", plans, "s"),
        ("a run that does nothing", runs, "s"),
        ("  what it adds to the database", grown, "kB"),
    ):
        for count in COUNTS[1:]:
            yield Row(f"{count} hosts: {what}", taken[count], f"{few} hosts", taken[few], unit)
        yield Exponent(f"from {COUNTS[1]} to {many} hosts", many / COUNTS[1], taken[many], taken[COUNTS[1]])
    run, growth = (Row("", each[many], "nothing", [0], unit) for each, unit in ((runs, "s"), (grown, "kB")))
    yield Target(f"a run of {many} hosts that does nothing", run, 0, 2)
    yield Target(f"what a push of the README adds at {many} hosts", growth, 0, 100)


async def _fleet(folder: Path, count: int, api: Api, deployment: str) -> InfraRepo:
    """A repo of so many hosts, all of them as wanted by its ledger, and owned."""
    repo = InfraRepo(folder)
    names = [f"host{number}" for number in range(count)]
    addresses = {name: f"10.{count % 251}.{number // 250}.{number % 250 + 1}" for number, name in enumerate(names)}
    listed = "".join(f"  - {{ name: {name}, address: {addresses[name]} }}\n" for name in names)
    commit = repo.commit({"machines.yaml": f"machines:\n{listed}", **{f"hosts/{name}.nix": "{ }\n" for name in names}})
    await git_host.create(repo.bare, api_url=api.url, ui_url="http://ui", deployment_id=deployment)
    made = await make.make(repo.bare, commit, "first")
    entries = dict[str, str | None]()
    for change in made.changes.changes:
        good = kind_of(change.target).deployed(change.desired, commit=commit, run="run", at="now")
        entries[f"host/{change.target.name}.json"] = json.dumps({"good": good.model_dump()})
    book = InfraRepo(folder / "book")
    git("fetch", "--quiet", book.bare, book.commit(entries), cwd=repo.bare)
    git("update-ref", ledger.REF, "FETCH_HEAD", cwd=repo.bare)
    git("tag", make.LAST_GOOD, commit, cwd=repo.bare)
    owned = {name: owners.Owner(repo=repo.bare, address=addresses[name], port=22, at="now") for name in names}
    owners._write(owners.read(), {**owners.read().machines, **owned})
    return repo


async def _plan(repo: InfraRepo, number: int) -> float:
    commit = git("rev-parse", "main", cwd=repo.bare)
    began = _cpu()
    made = await make.make(repo.bare, commit, f"plan-{number}")
    assert made.changes.empty
    return _cpu() - began


def _cpu() -> float:
    """The processor seconds of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


async def _run(repo: InfraRepo, number: int, api: Api, dsn: str) -> tuple[float, float]:
    """A push of the README: the seconds from the start of its run to its end, and the kB that the database grew."""
    before = await _size(dsn)
    (repo.work / "README").write_text(f"{number}\n")
    git("add", "--all", cwd=repo.work)
    git("commit", "--quiet", "-m", "more in the README", cwd=repo.work)
    pushed = await process.run(["git", "push", "origin", "main"], cwd=repo.work)
    found = re.search(r"/runs/flow-run/(\S+)", pushed.stderr)
    assert found, pushed.stderr
    async with asyncio.timeout(300):
        while (run := await api.call("GET", f"/flow_runs/{found[1]}"))["end_time"] is None:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    if run["state_type"] != "COMPLETED" or "nothing to do" not in run["state"]["message"]:
        sys.exit(f"not a no-op: {run['state']}")
    await asyncio.sleep(3)  # events and logs are written in batches
    return run["total_run_time"], await _size(dsn) - before


async def _size(dsn: str) -> float:
    words = ["psql", "-At", dsn, "-c", "select pg_database_size(current_database()) / 1000"]
    return float((await process.run(words)).stdout)
