"""Measures the page of the fleet, with 1,000 machines of one repo, beside one with ten."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

from bench.row import Row, Spread
from tests.ledger.test_ledger import deployed
from tests.repos import InfraRepo, git
from toto.base.prefect_api import Api
from toto.fleet.page import create_page
from toto.fleet.state import Fleet

MANY: Final = 1_000
FEW: Final = 10
_TIMES: Final = 10


class NoRuns(Api):
    """Prefect's API, with nothing in it: what the page itself costs is measured."""

    async def call(self, method: str, path: str, body: object = None, *, timeout: float = 30) -> Any:
        """Nothing."""
        return []


async def measure(folder: Path) -> AsyncIterator[Row | Spread]:
    """The rows: a page's first reading of the ledger, and each page after that, when one entry has changed."""
    many, few = [await _pages(folder / str(count), count) for count in (MANY, FEW)]
    yield Row(f"the page of {MANY} machines, first", many[:1], f"that of {FEW}", few[:1])
    yield Row("  after a change of the ledger", many[1:], f"that of {FEW}", few[1:])
    yield Spread(f"the page of {MANY}", many, 0.3)


async def _pages(folder: Path, count: int) -> list[float]:
    repo = InfraRepo(folder)
    entries = {f"host/web{number}.json": _entry(number) for number in range(count)}
    fleet = Fleet(folder, NoRuns(""))
    page = create_page(fleet, auth=None)
    took = []
    for each in range(_TIMES):
        commit = await asyncio.to_thread(repo.commit, {**entries, "host/web1.json": _entry(-each)})
        git("update-ref", "refs/toto/ledger", commit, cwd=repo.bare)
        fleet._read_at = float("-inf")
        began = time.monotonic()
        assert await _get(page) > count * 100
        took.append(time.monotonic() - began)
    return took


def _entry(number: int) -> str:
    return json.dumps({"good": json.loads(deployed(f"/nix/store/{number}").model_dump_json())})


async def _get(page: Any) -> int:
    """The bytes of the page."""
    sent = 0

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        nonlocal sent
        sent += len(message.get("body", b""))

    scope = {"type": "http", "method": "GET", "path": "/", "raw_path": b"/", "query_string": b"", "headers": []}
    await page({**scope, "root_path": "", "scheme": "http", "server": ("127.0.0.1", 80)}, receive, send)
    return sent
