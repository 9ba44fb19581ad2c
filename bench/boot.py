"""Measures a boot until ssh answers: a sandbox of toto, compared with a lab machine that a test starts itself."""

import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

from bench.fleets import known
from bench.row import Row
from tests.lab import nix as lab
from tests.lab.machine import Machine
from toto.base import runs
from toto.machine import keys
from toto.plan import make as plan
from toto.plan.host import HostOrder, build_vm
from toto.rehearsal import acceleration, sandbox

ROUNDS: Final = 2
ADDRESS: Final = "127.0.1.99"  # not one of the demo's, which may run at the same time


async def measure(folder: Path) -> AsyncIterator[Row]:
    """Start one of each, one after the other. Nothing else of toto runs meanwhile."""
    boxes: list[float] = []
    machines: list[float] = []
    async with known(folder / "fleet", 1) as it:
        state, repo = folder / "sandboxes", it.fleet.repo
        async with runs.claimed(repo, "bench-boot"):
            (order,) = (await plan.make(repo, it.commit, "bench-boot")).orders
            assert isinstance(order, HostOrder)
            vm = await build_vm(order)
        await acceleration.acceleration(state)  # probed once per boot of this machine
        key = await keys.private("sandbox")
        for _ in range(ROUNDS):
            began = time.monotonic()
            async with sandbox.sandbox(vm, host="host1", state=state, key=key, ports=[8080]):
                boxes.append(time.monotonic() - began)
            machines.append(await _machine(folder / f"machine{len(machines)}", it.fleet.key))
    yield Row("a sandbox, until it answers ssh", boxes, "a lab machine's first boot, without toto", machines)


async def _machine(directory: Path, key: Path) -> float:
    directory.mkdir()
    public = key.with_name(key.name + ".pub").read_text().strip()
    await lab.build(lab.bootstrap("bench", [public]), "vm", link=directory / "vm")
    machine = Machine("bench", directory, key, address=ADDRESS)
    began = time.monotonic()
    async with machine:
        return time.monotonic() - began
