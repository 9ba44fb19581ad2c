"""QEMU's own protocol, as far as a sandbox needs it."""

import asyncio
import contextlib
import itertools
import json
import os
from pathlib import Path
from typing import Any

from toto.rehearsal.errors import SandboxError


class Qmp:
    """As much of the QEMU Machine Protocol as a sandbox needs: one command at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer, self.lock = reader, writer, asyncio.Lock()
        self.numbers = itertools.count()

    @classmethod
    async def connect(cls, directory: Path) -> "Qmp":
        """Connect to qmp.sock in `directory` as soon as QEMU has made it."""
        place = os.open(directory, os.O_PATH | os.O_DIRECTORY)
        try:
            while True:
                with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                    # Through /proc, because a socket's path may not be longer than 107 bytes, and ours may be.
                    reader, writer = await asyncio.open_unix_connection(f"/proc/self/fd/{place}/qmp.sock")
                    break
                await asyncio.sleep(0.05)
        finally:
            os.close(place)
        qmp = cls(reader, writer)
        await reader.readline()  # the greeting
        await qmp.execute("qmp_capabilities")
        return qmp

    async def execute(self, command: str, **arguments: object) -> Any:
        """The command's answer. Raises `SandboxError` when QEMU refuses it or is gone."""
        number = next(self.numbers)
        request = {"execute": command, "arguments": arguments, "id": number}
        with contextlib.suppress(OSError):
            async with self.lock:
                self.writer.write(json.dumps(request).encode() + b"\n")
                await self.writer.drain()
                while line := await self.reader.readline():
                    answer = json.loads(line)
                    if answer.get("id") != number:
                        continue  # an event, or the answer to a command that was cancelled
                    if "error" in answer:
                        raise SandboxError(f"QEMU refuses {command}: {answer['error']['desc']}")
                    return answer["return"]
        raise SandboxError(f"QEMU is gone before it answered {command}")

    async def human(self, command: str) -> str:
        return str(await self.execute("human-monitor-command", **{"command-line": command}))

    def close(self) -> None:
        self.writer.close()
