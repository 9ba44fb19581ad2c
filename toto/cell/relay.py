"""Relays: a port in a cell's network namespace that leads to one endpoint outside, and to nothing else."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TypeAlias

from toto.cell.namespace import Namespace

Endpoint: TypeAlias = tuple[str, int]  # address or name, port


@asynccontextmanager
async def relay(network: Namespace, leads: Mapping[Endpoint, Endpoint]) -> AsyncIterator[None]:
    """Relay connections while the block runs: from each address and port in the namespace to its endpoint outside.

    A name is looked up by toto. Raises OSError when an address in the namespace cannot be listened on.
    """
    async with AsyncExitStack() as stack:
        for (address, port), outside in leads.items():
            listener = await network.listen(port, address)
            await stack.enter_async_context(await asyncio.start_server(_leading_to(outside), sock=listener))
        yield


def _leading_to(outside: Endpoint) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            try:
                there_reader, there_writer = await asyncio.open_connection(*outside)
            except OSError:
                writer.transport.abort()
                return
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(_pump(reader, there_writer))
                    group.create_task(_pump(there_reader, writer))
            except* OSError:
                pass
            finally:
                for each in (writer, there_writer):
                    each.transport.abort()

    return serve


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while chunk := await reader.read(65_536):
        writer.write(chunk)
        await writer.drain()
    with contextlib.suppress(OSError):
        writer.write_eof()
