"""`python -m toto.api`: serve machines. See `toto.api.run` for how toto starts it."""

import argparse
import asyncio
import ipaddress
import logging
import resource
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any, Final

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from toto.api import certificate
from toto.api.app import create_app
from toto.api.published import Published

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
    """A server that lets those go who wait for a document, when it is told to stop."""

    def __init__(self, config: uvicorn.Config, published: Published) -> None:
        super().__init__(config)
        self._published = published

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._published.end()
        super().handle_exit(sig, frame)


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser("toto.api", description="The web server that machines ask.")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--name", action="append", default=[], help="a name or address of this server, for its TLS")
    parser.add_argument("--plain", action="store_true", help="no TLS: a proxy on this machine does that; loopback only")
    chosen = parser.parse_args(arguments)
    if chosen.plain and not ipaddress.ip_address(chosen.host).is_loopback:
        print("toto: without TLS it listens on loopback only: leave out --plain, or --host", file=sys.stderr)
        return 1
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 65_536) if most > 0 else 65_536, most))
    tls: dict[str, Any] = {}
    if not chosen.plain:
        own = certificate.own([*chosen.name, chosen.host])
        tls = {"ssl_certfile": str(own.certificate), "ssl_keyfile": str(own.key)}
    app = create_app()
    _Server(
        uvicorn.Config(
            app,
            host=chosen.host,
            port=chosen.port,
            http=_Prompt,
            ws="none",
            access_log=False,
            log_level="warning",
            server_header=False,
            timeout_keep_alive=20,
            timeout_graceful_shutdown=2,
            limit_concurrency=_CONNECTIONS,
            h11_max_incomplete_event_size=16_384,
            **tls,
        ),
        app.state.published,
    ).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
