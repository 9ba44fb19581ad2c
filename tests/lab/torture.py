"""`make torture`: kill parts of toto at random instants, start it again, and see that nothing is left half done.

Each round pushes the other variant of a host and, at a random instant of the run, sends SIGKILL to the worker, to
Prefect's server, to the flow run, or to everything at once. Then toto is started again. What must hold within two
minutes: no run stays Running, no intent is open, the machine runs its last good, its boot default is the same, no
sandbox is left, and the next push is deployed.
"""

import argparse
import asyncio
import contextlib
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests.lab import nix_daemon, setup
from tests.lab.fleet import command_of
from tests.lab.test_whole import GOOD, Whole

PARTS = {
    "worker": b"\0worker\0start",
    "server": b"uvicorn",
    "run": b"fork_server.py\0run",
    "forks": b"toto.server.fork_server",
}
MORTAL = {"worker", "server"}  # toto ends when one of them has died; whoever keeps it starts it again
LONGEST = 25.0  # seconds after a push at which there may still be something to interrupt


async def main(rounds: int, seed: int) -> int:
    """Run the rounds; the exit status."""
    dice = random.Random(seed)
    print(f"torture: {rounds} rounds, seed {seed}", flush=True)
    await asyncio.to_thread(setup.setup)
    with tempfile.TemporaryDirectory(prefix="toto-torture-") as directory:
        whole = Whole(Path(directory), net=4)
        try:
            await _prepare(whole)
            for number in range(1, rounds + 1):
                part = dice.choice([*PARTS, "all"])
                after = dice.uniform(0, LONGEST)
                print(f"{number:3}  kill {part:6} {after:5.1f} s after the push: ", end="", flush=True)
                print(await _round(whole, part, after), flush=True)
        finally:
            await asyncio.shield(whole.stop())
    print("torture: every round ended whole")
    return 0


async def _prepare(whole: Whole) -> None:
    await whole.prepare()
    whole.alone()
    for phase in ("smoke", "post-switch"):
        whole.test(phase, f"#!/bin/sh\nsleep 3\n{GOOD}")
    await asyncio.gather(whole.start_server(), whole.start_machines(["web1"]))
    for variant in "AB":  # so that their rehearsals are known: most of a round is then the roll-out
        run = await whole.deploy(variant, whole.web1(variant))
        assert run.state == "COMPLETED", whole.logs(run.id)


async def _round(whole: Whole, part: str, after: float) -> str:
    run = whole.begin_other(f"killed after {after:.1f} s")
    await asyncio.sleep(after)
    state = whole.api("GET", f"/flow_runs/{run}")["state_type"]
    if part == "all":
        whole.kill()
    else:
        victims = [pid for pid in sorted(whole.processes()) if PARTS[part] in command_of(pid)]
        for pid in victims[:1] if part == "forks" else victims:  # (a fork has the command line of its server)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if part in MORTAL:
            await asyncio.to_thread(whole.wait_for_server_end)
    if whole.server is None:
        await whole.start_server()
    began = time.monotonic()
    async with asyncio.timeout(180):
        while not await _at_rest(whole):
            await asyncio.sleep(0.5)
    settled = time.monotonic() - began
    await whole.settled()
    again = await whole.deploy("the next push", whole.web1(whole.next_variant()))
    assert again.state == "COMPLETED", whole.logs(again.id)
    await whole.settled()
    end = whole.api("GET", f"/flow_runs/{run}")["state"]
    return f"was {state}, ended {end['type']}, whole again after {settled:.0f} s"


async def _at_rest(whole: Whole) -> bool:
    busy = {"type": {"any_": ["RUNNING", "PENDING", "CANCELLING"]}}
    due = [
        each
        for each in whole.api("POST", "/flow_runs/filter", {"flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}})
        if not each["auto_scheduled"] and "retry" not in each["tags"]
    ]
    return not (
        due
        or whole.api("POST", "/flow_runs/filter", {"flow_runs": {"state": busy}})
        or whole.entry("web1").intent is not None
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="torture", description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    chosen = parser.parse_args()

    async def whole() -> int:
        async with nix_daemon.by_sudo():
            return await main(chosen.rounds, chosen.seed)

    sys.exit(asyncio.run(whole()))
