"""Starts the web server that machines ask, as a process of its own: for `toto serve`."""

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from toto.base import process
from toto.base.errors import TotoError

PORT: Final = 4201
_PATIENCE: Final = 60.0  # seconds until it answers


class ApiFailed(TotoError):
    """The web server that machines ask did not start."""


@contextlib.asynccontextmanager
async def running_api(
    env: Mapping[str, str],
    log_file: Path,
    *,
    host: str = "127.0.0.1",
    port: int = PORT,
    names: Sequence[str] = (),
    plain: bool = False,
) -> AsyncIterator[process.Running]:
    """Serve machines, from the moment the server listens to the end of the block.

    `names` are those by which machines reach it, for its certificate. `plain` is for a proxy with TLS on this machine.
    It has toto's state in `env` (TOTO_STATE) and nothing else of toto's. Raises `ApiFailed`.
    """
    argv = [sys.executable, "-m", "toto.api", "--host", host, "--port", str(port)]
    argv += [word for each in names for word in ("--name", each)] + (["--plain"] if plain else [])
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with log_file.open("ab") as sink:
        own = process.without_secrets(env)
        async with process.start(argv, env=own, stdout=sink.fileno(), stderr=sink.fileno(), grace=10) as running:
            deadline = time.monotonic() + _PATIENCE
            while not await _listens(host, port):
                if running.status is not None or time.monotonic() > deadline:
                    raise ApiFailed(
                        f"the server for machines does not listen on {host}:{port}:\n"
                        f"{process.tail(log_file.read_text(errors='replace'))}",
                        hint=f"see {log_file}",
                    )
                await asyncio.sleep(0.1)
            yield running


async def _listens(host: str, port: int) -> bool:
    try:
        async with asyncio.timeout(5):
            _, writer = await asyncio.open_connection(host, port)
    except (OSError, TimeoutError):
        return False
    writer.close()
    return True
