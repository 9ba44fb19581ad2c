"""Measures 20 machines that fetch one closure of 200 MB at once from toto's cache, compared with pushing it to each.

The machines are simulated: each is a nix store of its own in a folder here, with a real host key and a real `nix copy`,
by real TLS or real ssh. What leaves toto is counted on the way.
"""

import asyncio
import contextlib
import os
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final
from urllib.parse import quote

from bench.row import Row
from tests.api.conftest import ADDRESS, World
from tests.conftest import free_port
from tests.lab import nix_daemon
from tests.machine.test_ssh import sshd
from tests.repos import git
from toto.api.run import running_api
from toto.base import process
from toto.machine import keys, ssh
from toto.nix import commands as nix
from toto.store import grants

MACHINES: Final = 20
NAMES: Final = [f"web{number}" for number in range(MACHINES)]
SIZE: Final = 200_000_000  # bytes
_PIECES: Final = 20  # store paths
_CHUNK: Final = 262_144  # bytes


class Counting:
    """A relay that counts the bytes that go to the machines: `up` when these are not who connects."""

    def __init__(self, port: int, up: bool) -> None:
        self.port, self.up, self.count = port, up, 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass one connection on."""
        there, back = await asyncio.open_connection(ADDRESS, self.port)
        with contextlib.suppress(ConnectionError):
            await asyncio.gather(self._pass(reader, back, self.up), self._pass(there, writer, not self.up))

    async def _pass(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, counts: bool) -> None:
        try:
            while data := await source.read(_CHUNK):
                self.count += len(data) if counts else 0
                sink.write(data)
                await sink.drain()
        finally:
            sink.close()


@contextlib.asynccontextmanager
async def _counted(port: int, *, up: bool = False) -> AsyncIterator[tuple[int, Counting]]:
    """A port that leads to the given one, and what counts there."""
    relay = Counting(port, up)
    async with await asyncio.start_server(relay, ADDRESS, 0) as server:
        yield server.sockets[0].getsockname()[1], relay


async def measure(folder: Path) -> AsyncIterator[Row]:
    """The rows: bytes that leave toto, and seconds until the last machine has all."""
    before = os.environ.get("TOTO_STATE")
    os.environ["TOTO_STATE"] = str(folder / "state")
    try:
        git("init", "--quiet", "--bare", "infra.git", cwd=folder)
        async with nix_daemon.running(folder / "nix"):
            closure = await _closure(folder)
            fetched, fetching = await _fetch(folder, closure)
            pushed, pushing = await _push(folder, closure)
            size = await nix.closure_size(closure) / 1e6
    finally:
        os.environ.pop("TOTO_STATE")
        if before is not None:
            os.environ["TOTO_STATE"] = before
    what = f"{MACHINES} machines fetch {size:.0f} MB: sent by toto"
    yield Row(what, [fetched / 1e6], "pushed to each", [pushed / 1e6], "MB")
    yield Row("  until the last has it", [fetching], "pushed to each", [pushing])


async def _closure(folder: Path) -> str:
    """A new closure of programs and libraries of this machine, in some store paths."""
    pieces: list[str] = []
    piece, size = folder / "piece", 0
    for file in sorted(Path("/usr/lib").rglob("*")):
        if len(pieces) == _PIECES:
            break
        if not file.is_file() or file.is_symlink() or not os.access(file, os.R_OK):
            continue
        if file.stat().st_size > SIZE / _PIECES / 10:  # (so that no piece is much larger than the others)
            continue
        piece.mkdir(exist_ok=True)
        shutil.copyfile(file, piece / f"{len(os.listdir(piece))}-{file.name}")  # noqa: PTH208
        size += file.stat().st_size
        if size > SIZE / _PIECES:
            (piece / "once").write_text(os.urandom(8).hex())
            done = await process.run(["nix-store", "--add", piece], env=nix.environment(), timeout=120)
            pieces.append(done.stdout.strip())
            shutil.rmtree(piece)
            size = 0
    words = " ".join(f"${{builtins.storePath {each}}}" for each in pieces)
    expression = (
        'derivation { name = "bench"; system = builtins.currentSystem; builder = "/bin/sh"; '
        f'args = [ "-c" "echo {words} > $out" ]; }}'
    )
    made = await process.run(["nix-instantiate", "--expr", expression], env=nix.environment())
    return await nix.build(made.stdout.strip(), folder / "root", timeout=60, target="bench")


async def _fetch(folder: Path, closure: str) -> tuple[int, float]:
    """Bytes that left toto, and seconds: all machines at once, each with a token of its own."""
    world = World(folder, folder / "infra.git", free_port())
    key = await keys.make(world.repo, keys.STORE, "signing")
    for number, name in enumerate(NAMES):
        await world.claim(name, number + 1)
        await grants.grant(world.repo, name, [closure], key, timeout=600)
    public = await keys.public_half(key)
    async with running_api(folder / "api.log", host=ADDRESS, port=world.port), _counted(world.port) as (port, relay):
        netrcs = {}
        async with world.client() as client:
            for name in NAMES:
                token = (await world.token(client, name))["Authorization"].removeprefix("Bearer ")
                netrcs[name] = folder / f"{name}.netrc"
                netrcs[name].write_text(f"machine {ADDRESS} login toto password {token}\n")

        async def one(name: str) -> None:
            options = {
                "netrc-file": str(netrcs[name]),
                "trusted-public-keys": public,
                "narinfo-cache-negative-ttl": "0",
            }
            words = [word for pair in options.items() for word in ("--option", *pair)]
            cache = f"https://{ADDRESS}:{port}/cache"
            store = f"local?root={folder}/fetched/{name}"
            argv = ["--from", cache, "--to", store, *words, closure]
            await _copied(argv, NIX_SSL_CERT_FILE=str(world.ca), XDG_CACHE_HOME=str(folder / f"{name}.cache"))

        return await _all_at_once(one, relay, folder / "fetched")


async def _push(folder: Path, closure: str) -> tuple[int, float]:
    """The same by `nix copy` over ssh to each."""
    async with (
        sshd(folder, ADDRESS, f"MaxStartups {2 * MACHINES}") as server,
        _counted(server.target.port, up=True) as (port, relay),
    ):
        target = replace(server.target, port=port)
        async with ssh.connection(target, folder / "ssh") as connection:

            async def one(name: str) -> None:
                store = quote(f"local?root={folder}/pushed/{name}", safe="")
                config = connection.config
                words = ["--to", f"ssh://{target.name}?remote-store={store}", "--no-check-sigs", closure]
                await _copied(words, cwd=config.parent, NIX_SSHOPTS=f"-F {config.name} -o ControlPath=none")

            return await _all_at_once(one, relay, folder / "pushed")


async def _copied(words: Sequence[process.Argument], *, cwd: Path | None = None, **more: str) -> None:
    await process.run(["nix", *nix.NEW, "copy", *words], env=nix.environment() | more, cwd=cwd, timeout=1_800)


async def _all_at_once(one: Callable[[str], Awaitable[None]], relay: Counting, stores: Path) -> tuple[int, float]:
    began = time.monotonic()
    await asyncio.gather(*map(one, NAMES))
    took = time.monotonic() - began
    assert all((stores / name / "nix/store").is_dir() for name in NAMES)
    await process.run(["chmod", "-R", "u+w", stores], timeout=600)
    shutil.rmtree(stores)
    return relay.count, took
