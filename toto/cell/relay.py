"""Relays: how what runs in a cell reaches one address and port of a private network, or of this machine, and no other.

A relay listens in the cell's network namespace, on the very address and port that it stands for; the address is added
to the loopback there. Toto itself connects to the real one, for each connection that a relay accepts. Names are looked
up once, by toto, and written to the /etc/hosts of the cells.
"""

import asyncio
import contextlib
import ipaddress
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Final, Self, TypeAlias

from toto.base.errors import InputError
from toto.cell.namespace import Namespace, NamespaceFailed

Place: TypeAlias = tuple[str, int]
"""an IPv4 address and a port"""
Connect: TypeAlias = Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]
"""makes a connection; raises OSError"""

_MOST: Final = 256  # connections at once by one relay
_CHUNK: Final = 65_536
_PATIENCE: Final = 30.0  # seconds to connect


@dataclass(frozen=True)
class Endpoint:
    """A host, by its name or its IPv4 address, and a port: what somebody on the server allows cells to reach."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """The endpoint that a text like `192.168.7.5:8006` or `pve.example.org:8006` names. Raises `InputError`."""
        found = re.fullmatch(r"([A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?):([0-9]{1,5})", text.strip())
        if found is None or not 0 < int(found[3]) < 65_536:
            raise InputError(f"{text!r} is no endpoint", hint="write host:port, such as 192.168.7.5:8006")
        return cls(found[1], int(found[3]))

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


@asynccontextmanager
async def relay(namespace: Namespace, places: Mapping[Place, Place]) -> AsyncIterator[None]:
    """Have each place of the namespace (a key) stand for a real place (its value), while the block lasts.

    Raises `NamespaceFailed`.
    """
    async with AsyncExitStack() as stack:
        for address in sorted({address for address, _ in places if not ipaddress.IPv4Address(address).is_loopback}):
            await namespace.add_address(address)
        for (address, port), real in places.items():
            try:
                listening = await namespace.listen(port, address)
            except OSError as error:
                raise NamespaceFailed(f"a relay for {address}:{port} failed: {error}") from None
            await stack.enter_async_context(serving(listening, partial(asyncio.open_connection, *real)))
        yield


@asynccontextmanager
async def reach(namespace: Namespace, endpoints: Iterable[Endpoint]) -> AsyncIterator[None]:
    """Have the cells of a namespace reach the endpoints, by their names too, while the block lasts.

    Raises `InputError` for a name that cannot be looked up, `NamespaceFailed`.
    """
    names: dict[str, str] = {}
    places: dict[Place, Place] = {}
    for each in endpoints:
        if each.host not in names:
            names[each.host] = await _looked_up(each)
        place = (names[each.host], each.port)
        places[place] = place
    namespace.name({name: address for name, address in names.items() if name != address})
    async with relay(namespace, places):
        yield


async def _looked_up(endpoint: Endpoint) -> str:
    try:
        found = await asyncio.get_running_loop().getaddrinfo(
            endpoint.host, endpoint.port, family=socket.AF_INET, type=socket.SOCK_STREAM
        )
    except OSError as error:
        raise InputError(
            f"the name {endpoint.host} has no IPv4 address: {error.strerror}",
            target=str(endpoint),
            hint="fix the endpoint in the block or in the server's settings, or this machine's DNS",
        ) from None
    return str(found[0][4][0])


@asynccontextmanager
async def serving(listening: socket.socket, connect: Connect) -> AsyncIterator[None]:
    """Accept connections and join each with one of its own that `connect` makes, while the block lasts."""
    joined: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(joined) >= _MOST:
            writer.transport.abort()
            return
        task = asyncio.create_task(_join(reader, writer, connect))
        joined.add(task)
        task.add_done_callback(joined.discard)

    server = await asyncio.start_server(accept, sock=listening)
    try:
        yield
    finally:
        server.close()
        for task in (left := list(joined)):
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)


async def _join(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, connect: Connect) -> None:
    try:
        async with asyncio.timeout(_PATIENCE):
            onward, back = await connect()
    except (OSError, TimeoutError):
        writer.transport.abort()
        return
    try:
        await asyncio.gather(_copy(reader, back), _copy(onward, writer))
    except OSError:
        pass
    finally:
        for each in (writer, back):
            each.transport.abort() if each.transport.is_closing() else each.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while chunk := await reader.read(_CHUNK):
        writer.write(chunk)
        await writer.drain()
    with contextlib.suppress(OSError):
        writer.write_eof()
