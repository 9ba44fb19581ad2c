"""Measures detect (`toto.plan.make.make`, without Prefect), compared with bare `nix-instantiate` of the same hosts."""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

from bench.fleets import Known, bare, known, side_by_side
from bench.row import Row
from toto.base import process
from toto.nix import commands as nix
from toto.nix import hosts

COUNTS: Final = (1, 5, 10)
ROUNDS: Final = 5
_MB: Final = 1 << 20


@dataclass
class Memory:
    """Resident memory (MB) of this process's nix processes: the peak of their sum, and of the largest one."""

    sums: list[float] = field(default_factory=list)
    largest: list[float] = field(default_factory=list)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Measure every 2 ms until the end of the block; add one value to each list."""
        stop = threading.Event()
        self.sums.append(0)
        self.largest.append(0)
        watcher = threading.Thread(target=self._watch, args=(stop,))
        watcher.start()
        try:
            yield
        finally:
            stop.set()
            watcher.join()

    def _watch(self, stop: threading.Event) -> None:
        while not stop.wait(0.002):
            sizes = [size for task in Path("/proc/self/task").iterdir() for size in _children(task)]
            self.sums[-1] = max(self.sums[-1], sum(sizes))
            self.largest[-1] = max(self.largest[-1], *sizes, 0)


def _children(task: Path) -> Iterator[float]:
    with contextlib.suppress(OSError):
        for pid in (task / "children").read_text().split():
            with contextlib.suppress(OSError, ValueError):
                child = Path("/proc", pid)
                if child.joinpath("comm").read_text().startswith("nix"):
                    yield int(child.joinpath("statm").read_text().split()[1]) * 4096 / _MB


async def _timed(times: list[float], work: Callable[[], Awaitable[object]]) -> None:
    began = time.monotonic()
    await work()
    times.append(time.monotonic() - began)


async def measure(folder: Path) -> AsyncIterator[Row]:
    """For each number of hosts. A round has one of everything, so that the machine's load affects all equally."""
    for count in COUNTS:
        async with known(folder / str(count), count) as fleet:
            everything = [await _new(fleet)] if count == COUNTS[-1] else []
            await fleet.make_good()
            async for row in _nothing_due(fleet, count):
                yield row
            for row in everything:
                yield row
    async with known(folder / "evaluation", 1) as fleet:
        yield await _evaluation(fleet)
    yield await _process()


async def _evaluation(fleet: Known) -> Row:
    """One host, in its cell and by toto's daemon; beside it bare nix, which writes to the store itself."""
    confined: list[float] = []
    plain: list[float] = []
    (host,) = hosts.in_files(fleet.tree, (), unlisted=True)
    root = fleet.fleet.directory / "root"
    for _ in range(2 * ROUNDS):
        await _timed(plain, partial(bare, fleet.files, 1))
        await _timed(confined, partial(nix.instantiate, fleet.tree, host, root))
    return Row("a host's evaluation, in its cell", confined, "nix-instantiate", plain)


async def _nothing_due(fleet: Known, count: int) -> AsyncIterator[Row]:
    toto: list[float] = []
    parallel: list[float] = []
    one_by_one: list[float] = []
    memory, bare_memory = Memory(), Memory()
    assert (await fleet.plan("bench-warm")).changes.empty
    width = side_by_side()
    for number in range(ROUNDS):
        await _timed(parallel, partial(bare, fleet.files, width))
        await _timed(toto, partial(fleet.plan, f"bench-{number}"))
        await _timed(one_by_one, partial(bare, fleet.files, 1))
    for number in range(3):  # separate rounds, because measuring memory takes time
        with bare_memory.watched():
            await bare(fleet.files, width)
        with memory.watched():
            await fleet.plan(f"bench-memory-{number}")
    name = f"detect, {count} host{'s' if count > 1 else ''}, nothing due"
    yield Row(name, toto, f"nix-instantiate, {width} side by side", parallel)
    yield Row(name, toto, "nix-instantiate, one by one", one_by_one)
    yield Row(
        "  RSS of its nix processes, summed, peak", memory.sums, "the same of the bare runs", bare_memory.sums, "MB"
    )
    yield Row(
        "  RSS of its largest nix process", memory.largest, "the same of the bare runs", bare_memory.largest, "MB"
    )


async def _new(fleet: Known) -> Row:
    """All hosts are due: toplevels and VMs are evaluated."""
    toto: list[float] = []
    twice: list[float] = []
    for number in range(3):
        await _timed(twice, partial(bare, fleet.files * 2, side_by_side()))
        await _timed(toto, partial(fleet.plan, f"bench-new-{number}"))
    return Row(
        f"detect, {len(fleet.files)} hosts, all new (systems and VMs)", toto, "nix-instantiate, each host twice", twice
    )


async def _process() -> Row:
    """What `toto.base.process` adds to the time of a process that does nothing."""
    toto: list[float] = []
    bare_runs: list[float] = []

    async def plain() -> None:
        await (await asyncio.create_subprocess_exec("true")).wait()

    for _ in range(20):
        await _timed(toto, partial(process.run, ["true"]))
        await _timed(bare_runs, plain)
    return Row("a process that does nothing, by toto", toto, "by asyncio alone", bare_runs)
