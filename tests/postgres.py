"""A PostgreSQL for tests of other things: a cluster of toto's own (`toto.server.database`), without its server.

It listens on a socket; for what has only a network, this process joins a port of the loopback to that socket.

It dies with the process that started it.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

from toto.base import process
from toto.server.database import NAME, USER, Cluster, Programs

PREFIX = "toto-postgres."


class Postgres:
    """A cluster; `dsn` is for libpq and its clients, `url` for Prefect."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.url = cluster, cluster.url
        self.dsn = f"host={cluster.socket} user={USER} dbname={NAME} sslmode=disable"
        self.network_dsn = ""
        self._running = contextlib.AsyncExitStack()
        self._server: process.Running | None = None

    @contextlib.asynccontextmanager
    async def on_loopback(self) -> AsyncIterator[None]:
        """Have `network_dsn` lead to the server while the block lasts, on a port of the loopback."""
        path = f"{self.cluster.socket}/.s.PGSQL.5432"

        async def joined(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                answers, asks = await asyncio.open_unix_connection(path)
            except OSError:
                writer.close()
                return
            await asyncio.wait([asyncio.create_task(_copy(reader, asks)), asyncio.create_task(_copy(answers, writer))])

        async with await asyncio.start_server(joined, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            self.network_dsn = f"host=127.0.0.1 port={port} user={USER} dbname={NAME} sslmode=disable"
            yield

    async def start(self) -> None:
        """Start the server and wait until it answers."""
        self._server = await self._running.enter_async_context(self.cluster.running(self.cluster.home / "log"))

    async def crash(self) -> None:
        """The power goes; its data stays."""
        assert self._server is not None
        os.killpg(self._server.pid, signal.SIGKILL)
        await self._server.process.wait()
        await self._running.aclose()

    async def end(self) -> None:
        await self._running.aclose()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while chunk := await reader.read(65_536):
            writer.write(chunk)
            await writer.drain()
    writer.close()


@contextlib.asynccontextmanager
async def running() -> AsyncIterator[Postgres]:
    """A server for as long as the block lasts. What a killed test session left of an earlier one is removed."""
    folder = Path(tempfile.gettempdir())  # not pytest's own: the path of a socket must be short
    for left in folder.glob(f"{PREFIX}*"):
        if not process.lives(".".join(left.name.removeprefix(PREFIX).split(".")[:2])):
            shutil.rmtree(left, ignore_errors=True)
    home = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{process.owner()}.", dir=folder))
    made = Postgres(Cluster(home, max(await Programs.installed(), key=lambda each: each.major)))
    try:
        await made.start()
        async with made.on_loopback():
            yield made
    finally:
        await made.end()
        shutil.rmtree(home, ignore_errors=True)
