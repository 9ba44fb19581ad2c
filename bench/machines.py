"""Measures the server that machines ask, with 200 simulated agents over real TLS, and a real agent that idles.

The simulated ones prove themselves by host keys of their own, and wait for documents as agents do.
"""

import asyncio
import json
import os
import resource
import ssl
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Final, TypeAlias

from bench.row import Row, Spread, Target
from flying_monkey.signature import seal
from tests.api.conftest import ADDRESS, Asking, World
from tests.conftest import free_port
from tests.flying_monkey.pulling import Pulling
from tests.repos import git
from toto.api.run import running_api
from toto.base import process
from toto.machine import documents, owners

AGENTS: Final = 200
IDLE: Final = 20.0  # seconds
REQUESTS: Final = 1_000
_TICK: Final = os.sysconf("SC_CLK_TCK")


async def measure(folder: Path) -> AsyncIterator[Row | Spread | Target]:
    """The rows: what agents cost the server, how soon a change reaches them, and what an agent costs its machine."""
    before = os.environ.get("TOTO_STATE")
    os.environ["TOTO_STATE"] = str(folder / "state")
    try:
        world = _world(folder)
        async with running_api(folder / "api.log", host=ADDRESS, port=world.port) as api:
            server = process.descendants(api.pid)[-1]  # in its cell
            await asyncio.sleep(1)
            alone = await _cpu(server)
            toto = Toto(world)
            cpu, began = _ticks(server), time.monotonic()
            agents = await asyncio.gather(*(toto.proven(each) for each in world.machines.values()))
            spent = (_ticks(server) - cpu) / _TICK / AGENTS
            signing = [await _verifying(next(iter(world.machines.values()))) for _ in range(10)]
            yield Row("a machine proves itself, the server's CPU", [spent * 1e3], "`ssh-keygen -Y`", signing, "ms")
            cpu, began = _ticks(server), time.monotonic()
            await asyncio.gather(*(toto.document(agents[each % AGENTS], wait=0) for each in range(REQUESTS)))
            took, spent = time.monotonic() - began, (_ticks(server) - cpu) / _TICK
            yield Row(
                "requests a second, each a new TLS connection",
                [REQUESTS / took],
                f"what {AGENTS} agents ask, each every 240 s",
                [AGENTS / 240],
                "/s",
            )
            yield Row("  CPU of the server for one of them", [spent / REQUESTS * 1e3], "a second", [1e3], "ms")
            waiting = [asyncio.create_task(toto.document(each, wait=50)) for each in agents]
            await asyncio.sleep(3)
            busy = await _cpu(server)
            yield Row(
                f"CPU of the server, {AGENTS} agents waiting", [busy * 100], "no agent", [max(alone * 100, 0.01)], "%"
            )
            for each in waiting:
                each.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            one_by_one = await _reach(toto, agents, pause=0.2)
            yield Spread(f"a change reaches the one of {AGENTS} agents that it is for", one_by_one, 2)
            yield Spread(f"{AGENTS} changes at once, each its agent", await _reach(toto, agents, pause=0), 2)
            async for row in _agent(world, folder):
                yield row
    finally:
        os.environ.pop("TOTO_STATE")
        if before is not None:
            os.environ["TOTO_STATE"] = before


def _world(folder: Path) -> World:
    git("init", "--quiet", "--bare", "infra.git", cwd=folder)
    world = World(folder, folder / "infra.git", free_port())
    repo = world.repo.resolve()
    for number in range(AGENTS):
        name = f"web{number}"
        world.machines[name] = Asking(name, folder / "machines" / name)
    owners._write(
        owners.Owners(),
        {
            name: owners.Owner(repo=repo, at="", address=f"10.0.0.{number}", port=22, host_keys=(each.host_key,))
            for number, (name, each) in enumerate(world.machines.items())
        },
    )
    return world


Agent: TypeAlias = tuple[str, str]  # a machine's name, and its token


class Toto:
    """The server, as simulated agents ask it: each request is a connection of its own."""

    def __init__(self, world: World) -> None:
        self.world, self.context = world, ssl.create_default_context(cafile=str(world.ca))
        self.signing = asyncio.Semaphore(2)

    async def proven(self, machine: Asking) -> Agent:
        async with self.signing:  # (machines have addresses of their own, and the server lets few of one wait at once)
            challenge = json.loads((await self._ask("POST", "/challenge", b""))[1])["challenge"]
            proof = await asyncio.to_thread(machine.proof, challenge)
            _, said = await self._ask("POST", "/session", json.dumps(proof).encode())
        return machine.name, json.loads(said)["token"]

    async def document(self, agent: Agent, wait: int, has: str = "") -> tuple[str, bytes]:
        """The tag and text of a document, or the same tag."""
        lines = [f"Authorization: Bearer {agent[1]}", f"If-None-Match: {has}"]
        return await self._ask("GET", f"/document?wait={wait}", None, lines)

    async def _ask(self, method: str, path: str, body: bytes | None, more: Sequence[str] = ()) -> tuple[str, bytes]:
        reader, writer = await asyncio.open_connection(ADDRESS, self.world.port, ssl=self.context)
        lines = [f"{method} {path} HTTP/1.1", f"Host: {ADDRESS}", "Connection: close", *more]
        lines += [] if body is None else [f"Content-Length: {len(body)}"]
        writer.write("\r\n".join([*lines, "", ""]).encode() + (body or b""))
        try:
            head, _, text = (await reader.read()).partition(b"\r\n\r\n")
        finally:
            writer.transport.abort()
        tags = [line.split(": ")[1] for line in head.decode().split("\r\n") if line.lower().startswith("etag: ")]
        return (tags or [""])[0], text


async def _verifying(machine: Asking) -> float:
    """Milliseconds of CPU for one signature by ssh-keygen; to verify one takes as long."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    await asyncio.to_thread(machine.proof, "x" * 40)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) * 1e3


async def _reach(toto: Toto, agents: list[Agent], pause: float) -> list[float]:
    """Seconds until each agent has what is published for it, with a pause between two of them."""
    word = os.urandom(8).hex().encode()
    got: dict[str, float] = {}

    async def wait(agent: Agent) -> None:
        tag, text = "", b""
        while text != word:
            tag, text = await toto.document(agent, 50, tag)
        got[agent[0]] = time.monotonic()

    waiting = [asyncio.create_task(wait(each)) for each in agents]
    await asyncio.sleep(3)
    published: dict[str, float] = {}
    for name, _ in agents:
        published[name] = time.monotonic()
        documents.publish(toto.world.repo, name, word)
        await asyncio.sleep(pause)
    await asyncio.gather(*waiting)
    return [got[name] - published[name] for name in published]


async def _cpu(pid: int) -> float:
    """The share of a core that a process takes while nothing happens."""
    before = _ticks(pid)
    await asyncio.sleep(IDLE)
    return (_ticks(pid) - before) / _TICK / IDLE


def _ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15]))  # with the children that it has waited for


async def _agent(world: World, folder: Path) -> AsyncIterator[Row | Spread | Target]:
    """What a real agent takes of its machine while it waits; its helper is a stand-in that imports nothing more."""
    machine = world.machines["web0"]
    documents.publish(world.repo, "web0", seal(b"{}", machine.key))
    pulling = Pulling(folder / "agent", "web0", machine.keys, world.url, world.ca, machine.key, "x:AAAA")
    async with pulling.running() as agent:
        async with asyncio.timeout(30):
            while not (folder / "agent" / "metrics.prom").exists():  # noqa: ASYNC110
                await asyncio.sleep(0.2)
        await asyncio.sleep(6)
        resident, shares = [], []
        for _ in range(3):
            found = [_memory(each) for each in process.descendants(agent.pid)]
            resident.append(found[0][0])
            shares.append(sum(share for _, share in found))
            await asyncio.sleep(1)
        cpu = await _cpu(agent.pid)
    bare = [await _bare() for _ in range(3)]
    row = Row("the agent, resident (one process)", resident, "a Python that only sleeps", bare, "MB")
    yield row
    yield Row("  with its child that waits, shared once", shares, "the most that it may be", [25.0], "MB")
    yield Row("  CPU, asking every 4 s (in use: 240 s)", [cpu * 100], "a core", [100.0], "%")


def _memory(pid: int) -> tuple[float, float]:
    """MB of a process: resident, and with what it shares with others divided among them."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) / 1_000 for line in lines[1:]}
    return found["Rss"], found["Pss"]


async def _bare() -> float:
    async with process.start([sys.executable, "-ISc", "import time; time.sleep(60)"]) as running:
        await asyncio.sleep(1)
        return _memory(running.pid)[0]
