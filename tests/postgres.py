"""A PostgreSQL for tests of other things: a cluster of toto's own (`toto.server.database`), without its server.

It dies with the process that started it.
"""

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
        self._running = contextlib.AsyncExitStack()
        self._server: process.Running | None = None

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
        yield made
    finally:
        await made.end()
        shutil.rmtree(home, ignore_errors=True)
