"""A red team's ways out of toto's cells, each a small file in `ways/`: none reaches anything.

Each runs as its author would have it run: a test script against a sandbox (with internet) or a real machine, or in
place of a host's run-NAME-vm. `make attack` runs all of them; `make test` a sample that is the same each time.
"""

import asyncio
import contextlib
import os
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import pytest

from tests.attack.victim import CANARY, Victim, victim
from tests.lab.fleet import command_of, processes
from toto.base import process
from toto.base.errors import TotoError
from toto.cell.namespace import namespace, own_addresses
from toto.machine.ssh import SshTarget, plain
from toto.rehearsal import sandbox
from toto.rehearsal.phase_run import Endpoint, bench
from toto.rehearsal.run import run_script
from toto.rehearsal.suite import Phase, Script

pytestmark = pytest.mark.minutes(2)

WAYS: Final = Path(__file__).parent / "ways"
SAMPLE: Final = 40
BY_SCRIPT: Final = sorted(each.name for each in (WAYS / "script").iterdir())
BY_VM: Final = sorted(each.name for each in (WAYS / "vm").iterdir())
ALL: Final = [
    *((place, f"script/{way}") for place in ("sandbox", "machine", "vm") for way in BY_SCRIPT),
    *(("vm", f"vm/{way}") for way in BY_VM),
]
SURVIVOR: Final = b"765432"


def chosen() -> list[tuple[str, str]]:
    """All ways for `make attack`, else some."""
    return ALL if os.environ.get("TOTO_ATTACK") else random.Random(1).sample(ALL, SAMPLE)


@pytest.fixture
async def toto(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Victim]:
    monkeypatch.setenv("CANARY", CANARY)
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", f"admin:{CANARY}")
    monkeypatch.setenv("TOTO_ACCELERATION", "tcg")
    async with victim(tmp_path / "victim") as there:
        there.remember()
        yield there


async def as_script(toto: Victim, way: Path, tmp_path: Path, place: str) -> str:
    """Run the way as a test script; what it printed."""
    tree, scratch, tools = tmp_path / "tree", tmp_path / "scratch", tmp_path / "tools"
    for folder in (tree, scratch, tools):
        folder.mkdir()
    script = tree / "attack"
    told = "".join(f"export {name}={value!r}\n" for name, value in toto.environment.items())
    addresses = f"export VICTIM_ADDRESSES='{' '.join(own_addresses())}'\n"
    script.write_text(f"#!/bin/bash\n{told}{addresses}{way.read_text()}")
    script.chmod(0o755)
    (tools / "ssh").write_text("#!/bin/sh\necho 'the machine is far away' >&2\nexit 255\n")
    (tools / "ssh").chmod(0o755)
    key = toto.state / "keys" / "machines"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
        target = SshTarget("web1", "127.0.0.1", identity=key, throwaway=True)
        connection = plain(target, tmp_path / "ssh")
        async with contextlib.AsyncExitStack() as stack:
            endpoint = Endpoint(connection, {})
            if place == "sandbox":
                network = await stack.enter_async_context(namespace())
                await network.attach()
                (tmp_path / "sandbox-key").write_text("of a sandbox")
                endpoint = Endpoint(connection, {80: 1}, network, tmp_path / "sandbox-key")
            phase = Phase.WITH_INTERNET if place == "sandbox" else Phase.SMOKE
            where = await stack.enter_async_context(bench(endpoint, "web1", phase, tree, scratch))
            result = await run_script(Script(phase, "attack", script), where, tree=tree, timeout=25)
    assert list(scratch.iterdir()) == []
    return f"{result.output}\n{result.reason}"


async def as_vm(toto: Victim, way: Path, tmp_path: Path) -> str:
    """Run the way in place of a host's run-NAME-vm; what its console says."""
    script = tmp_path / "vm" / "bin" / "run-web1-vm"
    script.parent.mkdir(parents=True)
    told = "".join(f"export {name}={value!r}\n" for name, value in toto.environment.items())
    script.write_text(f"#!/bin/bash\n{told}{way.read_text()}")
    script.chmod(0o755)
    lines: list[str] = []
    state = tmp_path / "sandboxes"
    with contextlib.suppress(TotoError):
        async with sandbox.sandbox(
            tmp_path / "vm",
            host="web1",
            state=state,
            key=toto.state / "keys" / "sandbox",
            boot_timeout=8,
            on_console=lines.append,
        ):
            pass
    assert [each for each in state.iterdir() if each.name != "acceleration"] == []
    return "\n".join(lines)


@pytest.mark.parametrize(("place", "way"), chosen(), ids=lambda each: each)
async def test_it_reaches_nothing(toto: Victim, tmp_path: Path, place: str, way: str) -> None:
    file = WAYS / way
    said = await (as_vm(toto, file, tmp_path) if place == "vm" else as_script(toto, file, tmp_path, place))
    # Lines in which a shell repeats the attack's own words.
    said = "\n".join(line for line in said.splitlines() if "echo" not in line)
    assert toto.harm(said) == []
    async with asyncio.timeout(120):
        while any(SURVIVOR in command_of(pid) and process.started(pid) for pid in processes()):
            await asyncio.sleep(0.1)
    assert process.started(os.getpid())


async def test_the_victim_notices(toto: Victim) -> None:
    """The judge itself: what an attack would do is seen."""
    reader, _ = await asyncio.open_connection("127.0.0.1", toto.tcp)
    assert CANARY in (await reader.read()).decode()
    (toto.state / "keys" / "machines").write_text("other")
    (toto.home / "new").touch()
    harm = toto.harm(f"a line with {CANARY}")
    assert len(harm) == 4, harm
