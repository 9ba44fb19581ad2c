"""A toto with a fleet: a real Prefect server with the page, and an infra repo with a ledger."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx
import pytest_asyncio

from tests.api.conftest import state
from tests.conftest import free_port
from tests.ledger.test_ledger import deployed, intent, note
from tests.repos import InfraRepo
from toto.base.prefect_api import Api
from toto.fleet import results
from toto.ledger import steps
from toto.ledger.ledger import Ledger
from toto.ledger.target import Target
from toto.server import environment
from toto.server import serve as server

__all__ = ["state"]  # a fixture
HOSTILE: Final = "<script>alert(1)</script>\x1b[2J"
WEB1, WEB2, DNS = Target("host", "web1"), Target("host", "web2"), Target("terraform", "dns")


@dataclass
class World:
    """A toto: its server at `url`, with one infra repo."""

    url: str
    api: Api
    repo: InfraRepo
    state: Path

    @property
    def book(self) -> Ledger:
        return Ledger(self.repo.bare)

    def client(self) -> httpx.AsyncClient:
        assert self.api.auth is not None
        name, _, password = self.api.auth.partition(":")
        return httpx.AsyncClient(base_url=self.url, auth=(name, password), timeout=60)

    async def fleet(self) -> dict[str, Any]:
        async with self.client() as client:
            found: dict[str, Any] = (await client.get("/fleet/", headers={"Accept": "application/json"})).json()
            return found

    async def line(self, target: Target) -> dict[str, Any]:
        """One target, once it is as it is now."""
        await asyncio.sleep(1.1)
        (found,) = (each for each in (await self.fleet())["targets"] if each["target"] == str(target))
        return dict(found)

    async def keep(self, *rows: dict[str, str]) -> None:
        """As the end of a run does."""
        artifact = {"key": results.key("infra"), "type": "table", "data": json.dumps(rows)}
        await self.api.call("POST", "/artifacts/", artifact)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(state: Path) -> AsyncIterator[World]:
    repo = InfraRepo(state / "repos")
    commit = repo.commit({"hosts/web1.nix": "{ }"}, f"web: {HOSTILE}")
    book, path = Ledger(repo.bare), "/nix/store/" + "0" * 32 + "-nixos-system-web1"
    new = deployed(path).model_copy(update={"commit": commit})
    await book.write(WEB1, steps.intend(intent("run-1", path)), "web1: intent")
    await book.write(WEB1, steps.good(new, "run-1"), "web1: good")
    await book.write(WEB2, steps.intend(intent("run-2")), "web2: intent")
    await book.write(WEB2, steps.revert(None, note("run-2"), "run-2"), "web2: reverted")
    home, port = state / "state/server", free_port()
    env = environment.server_environment(home, port, auth="toto:secret", ui_url="https://toto.example.org")
    env |= {environment.REPOS: str(repo.bare.parent), environment.GRAFANA: "https://grafana.example.org"}
    async with server.running_server(env, home / "server.log"):
        yield World(f"http://127.0.0.1:{port}", Api.of(env), repo, state)
