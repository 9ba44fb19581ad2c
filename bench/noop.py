"""Measures a run of `reconcile` that has nothing to do, with real server, worker, hook and push."""

import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

from bench.fleets import bare, known, side_by_side
from bench.row import Row, Target
from tests import postgres

HOSTS: Final = 5
ROUNDS: Final = 5


async def measure(folder: Path) -> AsyncIterator[Row | Target]:
    """Push changes of the README to a fleet whose hosts are all as they should be, compared with bare evaluation.

    Prefect's database is PostgreSQL.
    """
    runs: list[float] = []
    pushes: list[float] = []
    bare_runs: list[float] = []
    async with postgres.running() as cluster, known(folder, HOSTS) as it:
        await it.make_good()
        it.fleet.database_url = cluster.url
        try:
            await it.fleet.start_server()
            for number in range(ROUNDS + 1):
                began = time.monotonic()
                await bare(it.files, side_by_side())
                bare_runs.append(time.monotonic() - began)
                it.fleet.commit("say more in the README", {"README.md": f"{number}\n"})
                began = time.monotonic()
                ended = await it.fleet.ended(it.fleet.push(), 120)
                pushes.append(time.monotonic() - began)
                runs.append(ended.seconds)
                if ended.state != "COMPLETED" or "nothing to do" not in ended.message:
                    raise RuntimeError(f"not a no-op: {ended.state}: {ended.message}")
        finally:
            await it.fleet.stop()
    beside = f"nix-instantiate, {side_by_side()} side by side"
    # The first push warms caches.
    run = Row(f"a no-op reconcile of {HOSTS} hosts, its run time", runs[1:], beside, bare_runs[1:])
    whole = Row("  from `git push` to the end of the run", pushes[1:], beside, bare_runs[1:])
    yield run
    yield Target("the run", run, 1.3, 3)
    yield whole
    yield Target("push to end", whole, 1.3, 3)
