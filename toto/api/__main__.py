"""The program of the web server that machines ask. `toto.api.run` starts it, in a cell.

    python -m toto.api LISTENER READY

Both are descriptors: of a socket that listens, and of a pipe that is written to once the server serves.
"""

import asyncio
import logging
import os
import resource
import socket
import sys
from types import FrameType
from typing import Final

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from toto.api import certificate
from toto.api.app import create_app
from toto.api.published import Published
from toto.base import paths

_BEGINS: Final = 20.0  # seconds without a request on a connection
_CONNECTIONS: Final = 4_000


class _Prompt(H11Protocol):
    """A connection on which no request comes, or never a whole one, is closed: it could stay for ever."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._look(None)

    def _look(self, before: object) -> None:
        if self.transport.is_closing():
            return
        idle = self.cycle is None or self.cycle.response_complete
        if idle and before == (self.cycle,):
            self.transport.abort()
        else:
            self.loop.call_later(_BEGINS, self._look, (self.cycle,) if idle else None)


class _Server(uvicorn.Server):
    """A server that says when it serves, and lets those go who wait for a document when it is told to stop."""

    def __init__(self, config: uvicorn.Config, published: Published, ready: int) -> None:
        super().__init__(config)
        self._published, self._ready = published, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        os.write(self._ready, b"1")
        os.close(self._ready)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._published.end()
        super().handle_exit(sig, frame)


def main(listener: int, ready: int) -> None:
    """Serve until SIGTERM."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    tls = paths.state_home() / "api" / "tls"
    app = create_app()
    config = uvicorn.Config(
        app,
        http=_Prompt,
        ws="none",
        access_log=False,
        log_level="warning",
        server_header=False,
        timeout_keep_alive=20,
        timeout_graceful_shutdown=2,
        limit_concurrency=_CONNECTIONS,
        h11_max_incomplete_event_size=16_384,
        ssl_certfile=str(tls / certificate.CERTIFICATE),
        ssl_keyfile=str(tls / certificate.KEY),
    )
    _Server(config, app.state.published, ready).run(sockets=[socket.socket(fileno=listener)])


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
