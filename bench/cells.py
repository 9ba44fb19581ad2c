"""What a cell costs: bare, with a closure, with a network namespace, with an uplink."""

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from bench.row import Row
from toto.base import process
from toto.cell.cell import STORE, Cell
from toto.cell.namespace import namespace

ROUNDS = 40


async def measure(_folder: Path) -> AsyncIterator[Row]:
    """Each runs `true`, or makes a namespace; in turns, so that the machine's load is the same for all."""
    paths = sorted(str(each) for each in STORE.glob("*-*") if not each.name.startswith("."))[:1200]
    bare, cell, closure, bwrap, net, uplink = (list[float]() for _ in range(6))

    async def timed(into: list[float], work: Callable[[], Awaitable[object]]) -> None:
        began = time.perf_counter()
        await work()
        into.append(time.perf_counter() - began)

    plain = ["bwrap", "--unshare-all", "--ro-bind", "/", "/", "--", "true"]
    for _round in range(ROUNDS):
        await timed(bare, lambda: process.run(["true"]))
        await timed(bwrap, lambda: process.run(plain))
        await timed(cell, lambda: process.run(["true"], cell=Cell()))
        if paths:
            await timed(closure, lambda: process.run(["true"], cell=Cell(store=paths)))
        began = time.perf_counter()
        async with namespace() as network:
            net.append(time.perf_counter() - began)
            await timed(uplink, network.attach)
    yield Row("a process in a cell", cell, "the same process without one", bare)
    yield Row("a process in a cell", cell, "the same in a plain bwrap", bwrap)
    if paths:
        yield Row(f"  with a closure of {len(paths)} store paths", closure, "the same without", cell)
    yield Row("a network namespace for cells", net, "a process without a cell", bare)
    yield Row("  an uplink for it", uplink, "a network namespace for cells", net)
