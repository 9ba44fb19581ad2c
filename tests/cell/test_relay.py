"""Relays: a cell reaches exactly the address and port that they stand for, by the name too, and nothing beside it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from toto.base import process
from toto.base.errors import InputError
from toto.cell.cell import Cell
from toto.cell.namespace import Namespace, namespace
from toto.cell.relay import Endpoint, reach, relay

ASK = """
import socket, sys
for place in sys.argv[1:]:
    host, port = place.rsplit(":", 1)
    try:
        with socket.create_connection((host, int(port)), timeout=20) as there:
            there.sendall(b"x" * 1_000_000)
            there.shutdown(socket.SHUT_WR)
            got = b""
            while part := there.recv(65536):
                got += part
            print(place, got.decode())
    except OSError as error:
        print(place, type(error).__name__)
"""


@contextlib.asynccontextmanager
async def serving(name: str) -> AsyncIterator[int]:
    """A server on this machine's loopback that reads to the end, then says its name and how much it got."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        got = await reader.read(-1)
        writer.write(f"{name} {len(got)}".encode())
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]


async def asked(net: Namespace, *places: str) -> list[str]:
    """What a program in a cell of the namespace gets from each place."""
    cell = Cell(network=net, user=net.user)
    return (await process.run(["python3", "-c", ASK, *places], cell=cell, timeout=120)).lines


async def test_a_cell_reaches_the_relayed_place_by_its_own_address_and_nothing_beside_it() -> None:
    async with serving("pve") as port, serving("secret") as other, namespace() as net:
        await net.attach()
        async with relay(net, {("192.168.7.5", 8006): ("127.0.0.1", port), ("127.0.0.1", port): ("127.0.0.1", port)}):
            places = [
                "192.168.7.5:8006",
                f"127.0.0.1:{port}",
                f"127.0.0.1:{other}",
                f"192.168.7.5:{other}",
                f"192.168.7.5:{port}",
                "192.168.7.6:8006",
            ]
            assert await asked(net, *places) == [
                "192.168.7.5:8006 pve 1000000",
                f"127.0.0.1:{port} pve 1000000",
                *(f"{place} ConnectionRefusedError" for place in places[2:]),
            ]
        assert await asked(net, places[0]) == ["192.168.7.5:8006 ConnectionRefusedError"]


async def test_a_cell_reaches_an_endpoint_by_its_name() -> None:
    async with serving("db") as port, namespace() as net, reach(net, [Endpoint.parse(f"localhost:{port}")]):
        assert await asked(net, f"localhost:{port}") == [f"localhost:{port} db 1000000"]


async def test_a_relay_whose_place_does_not_answer_ends_the_connection() -> None:
    async with serving("gone") as port:
        pass
    async with namespace() as net, relay(net, {("10.9.8.7", 1): ("127.0.0.1", port)}):
        assert await asked(net, "10.9.8.7:1") in (["10.9.8.7:1 ConnectionResetError"], ["10.9.8.7:1 BrokenPipeError"])


@pytest.mark.parametrize("text", ["", "host", "host:0", "host:65536", ":1", "a b:1", "http://host:1", "::1:5"])
def test_what_is_no_endpoint_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="is no endpoint"):
        Endpoint.parse(text)


async def test_a_name_that_does_not_exist_is_reported() -> None:
    async with namespace() as net:
        with pytest.raises(InputError, match=r"no-such-host\.invalid:1: the name"):
            async with reach(net, [Endpoint("no-such-host.invalid", 1)]):
                pass
