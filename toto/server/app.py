"""Prefect's API server as toto runs it: `uvicorn --factory toto.server.app:create_app`.

It differs from Prefect's own in six ways.

It has the page of the fleet, at /fleet (`toto.fleet.page`).

The key of its blocks is not in the database (`toto.server.block_key`).

It tells Prometheus of toto and its fleet (`toto.metrics`).

It answers under its own names only, and no page of another site may open a websocket to it.

The graph of a run has each edge once. Prefect's query repeats an edge once for each parameter of the step that it comes
from, and its UI draws every one of them.

On SQLite, transactions begin differently. Prefect begins most of them DEFERRED: such a transaction reads first. If a
different one has written before it writes itself, SQLite fails at once with "database is locked", however long its
timeout is (https://www.sqlite.org/isolation.html: SQLITE_BUSY_SNAPSHOT). Events are lost by that, and with them
automations and the UI's feed. Here every transaction takes the write lock when it begins, and waits for it in this
process, in order. (SQLite itself waits by polling, in which an unlucky transaction sleeps up to 0.1 s each time.)

Only this module, `block_key`, `toto.metrics.runs` and `fork_server` import Prefect in `toto/`: they run as its
processes.
"""

import asyncio
import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from pathlib import Path
from urllib.parse import urlsplit

from fastapi import FastAPI
from prefect.server.api.server import create_app as prefects_own
from prefect.server.database import query_components
from prefect.server.database.configurations import SQLITE_BEGIN_MODE, AioSqliteConfiguration
from prefect.server.database.dependencies import set_database_config
from prefect.server.schemas.graph import Edge, Node
from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL, PREFECT_SERVER_API_HOST, PREFECT_UI_URL
from pydantic import field_validator
from sqlalchemy.ext.asyncio import AsyncSession, AsyncSessionTransaction
from starlette.datastructures import Headers
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from toto.base.prefect_api import Api
from toto.fleet import page
from toto.fleet.state import Fleet
from toto.metrics import app as metrics
from toto.server import block_key
from toto.server.deployments import POOL
from toto.server.environment import BLOCK_KEY, GRAFANA, REPOS

_ours: ContextVar[object | None] = ContextVar("_ours", default=None)


class OneWriter(AioSqliteConfiguration):
    """SQLite with one transaction at a time. Reads outside of a transaction go on meanwhile (write-ahead log)."""

    def __init__(self, connection_url: str) -> None:
        super().__init__(connection_url)
        self._writing = asyncio.Lock()
        self._writer: object | None = None

    @asynccontextmanager
    async def begin_transaction(
        self, session: AsyncSession, with_for_update: bool = False
    ) -> AsyncGenerator[AsyncSessionTransaction, None]:
        """Begin a transaction as Prefect does, but with the write lock from the start."""
        if self._writer is not None and _ours.get() is self._writer:
            # A transaction inside one, on a second connection: waiting for the first would never end.
            async with super().begin_transaction(session, with_for_update) as transaction:
                yield transaction
            return
        async with self._writing:
            self._writer = object()
            writer, mode = _ours.set(self._writer), SQLITE_BEGIN_MODE.set("IMMEDIATE")
            try:
                async with session.begin() as transaction:
                    await session.connection()  # it begins now; nested reads begin as usual
                    SQLITE_BEGIN_MODE.set("DEFERRED")
                    yield transaction
            finally:
                SQLITE_BEGIN_MODE.reset(mode)
                _ours.reset(writer)
                self._writer = None


class DrawnOnce(Node):
    """A node of a run's graph that has each of its edges once."""

    @field_validator("parents", "children")
    @classmethod
    def _each_once(cls, edges: list[Edge]) -> list[Edge]:
        return list({edge.id: edge for edge in edges}.values())


def create_app() -> FastAPI:
    """Prefect's application, for the database that its settings name."""
    query_components.Node = DrawnOnce  # type: ignore[attr-defined]
    url = PREFECT_API_DATABASE_CONNECTION_URL.value()
    if url and url.startswith("sqlite"):
        set_database_config(OneWriter(url))
    app = prefects_own()
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts(), www_redirect=False)
    app.add_middleware(OwnPages)
    if file := os.environ.get(BLOCK_KEY):
        block_key.install(app, Path(file))
    if repos := os.environ.get(REPOS):
        api = Api.of(os.environ)
        fleet = page.create_page(Fleet(Path(repos), api), auth=api.auth, grafana=os.environ.get(GRAFANA, ""))
        page.install(app, fleet)
        metrics.install(app, Path(repos), PREFECT_UI_URL.value() or "", POOL)
    return app


def hosts() -> list[str]:
    """The names under which this server may be asked. A page of another site could have its name lead here."""
    known = {PREFECT_SERVER_API_HOST.value(), urlsplit(PREFECT_UI_URL.value() or "").hostname or ""}
    return sorted(known - {""} | {"127.0.0.1", "localhost", "::1"})


class OwnPages:
    """Refuses websockets of other sites' pages: browsers ask CORS for requests only."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            origin = urlsplit(Headers(scope=scope).get("origin", "")).hostname
            if origin is not None and origin not in hosts():
                await send({"type": "websocket.close", "code": 1008})
                return
        await self.app(scope, receive, send)
