"""The cache that a machine is served, with real nix as the client."""

import asyncio
import os
import subprocess
import uuid
from pathlib import Path

import pytest

from flying_monkey.exchange import Server
from flying_monkey.fetch import Fetcher
from flying_monkey.machine import NotReady
from tests.api.conftest import World, until
from tests.store.test_grants import closure
from toto.base import process
from toto.machine import fetched, keys
from toto.nix import builders
from toto.nix import commands as nix
from toto.store import grants

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(os.geteuid() != 0, reason="toto runs its nix daemon here only as root"),
]


async def test_what_is_published_after_a_miss_is_found_at_once(world: World, tmp_path: Path) -> None:
    key = await keys.make(world.repo, "cache", "signing")
    (first, _), (path, other) = await closure(tmp_path), await closure(tmp_path)
    async with world.client() as client:
        token = (await world.token(client))["Authorization"].removeprefix("Bearer ")
    store = f"local?root={tmp_path}/machine&require-sigs=false"  # (nix does not know the key here)
    fetcher = Fetcher(Server.at(world.url, str(world.ca), None), store)
    with fetcher._prepared(token) as (words, environment, _):

        def seen(*more: str) -> bool:
            """Whether a nix that remembers what it has asked sees the path."""
            argv = ["nix", "--extra-experimental-features", "nix-command", "path-info", "--store", fetcher._from]
            done = subprocess.run(
                [*argv, *words, *more, path], env=environment | {"XDG_CACHE_HOME": str(tmp_path)}, check=False
            )
            return done.returncode == 0

        await grants.grant(world.repo, "web1", [first], key, timeout=60)
        with pytest.raises(NotReady, match="toto does not offer"):
            fetcher.fetch(path, token, longest=60)
        assert not seen()
        await grants.grant(world.repo, "web1", [first, path], key, timeout=60)
        remembered = ["--option", "narinfo-cache-negative-ttl", "3600"]
        assert not seen(*remembered) and seen(), "which is why the agent has nix remember no miss"
    fetcher.fetch(path, token, longest=60)
    for each in (path, other):
        assert Path(f"{tmp_path}/machine{each}").exists()


async def test_what_a_machine_has_got_and_has_missed_is_counted(world: World) -> None:
    cache = grants.of(world.place("web2").folder, "web2")
    cache.mkdir(parents=True)
    (cache / "nix-cache-info").write_text("StoreDir: /nix/store\n")
    (cache / f"{'1' * 32}.narinfo").write_text("x" * 100)
    async with world.client() as client:
        headers = await world.token(client, "web2")
        for name, times in (("nix-cache-info", 1), (f"{'1' * 32}.narinfo", 2), (f"{'2' * 32}.narinfo", 3)):
            for _ in range(times):
                await client.get(f"/cache/{name}", headers=headers)
        await client.head(f"/cache/{'1' * 32}.narinfo", headers=headers)
        await client.get("/cache/elsewhere", headers=headers)  # (that is no file of any cache)
    await until(lambda: fetched.read(world.place("web2")) == fetched.Fetched(hits=3, misses=3, sent=221))


async def test_it_serves_and_publishes_while_toto_builds(world: World, tmp_path: Path) -> None:
    expression = (
        'derivation { name = "slow"; system = builtins.currentSystem; builder = "/bin/sh"; '
        f'once = "{uuid.uuid4()}"; args = [ "-c" "echo at work; sleep 600" ]; }}'
    )
    drv = (await process.run(["nix-instantiate", "--expr", expression], env=nix.environment())).stdout.strip()
    at_work = asyncio.Event()
    heard = builders.Heard(lambda line: at_work.set() if line == "at work" else None)
    building = asyncio.create_task(nix.build(drv, tmp_path / "slow", timeout=600, target="slow", heard=heard))
    try:
        async with asyncio.timeout(120), world.client() as client:
            await at_work.wait()
            path, _ = await closure(tmp_path)
            await grants.grant(world.repo, "web1", [path], await keys.make(world.repo, "cache", "signing"), timeout=60)
            name = f"{Path(path).name[:32]}.narinfo"
            answer = await client.get(f"/cache/{name}", headers=await world.token(client))
            assert answer.status_code == 200 and f"StorePath: {path}\n" in answer.text
            assert not building.done()
    finally:
        building.cancel()
        await asyncio.gather(building, return_exceptions=True)
