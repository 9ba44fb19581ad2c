"""A small client of the QEMU Machine Protocol (QMP)."""

import asyncio
import contextlib
import itertools
import json
import os
import stat
from pathlib import Path
from typing import Any

from toto.rehearsal.errors import SandboxError


class Qmp:
    """A connection to QEMU by QMP, for one command at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer, self.lock = reader, writer, asyncio.Lock()
        self.numbers = itertools.count()

    @classmethod
    async def connect(cls, directory: Path) -> "Qmp":
        """Connect to qmp.sock in `directory` as soon as QEMU has made it."""
        while True:
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                # The folder is the guest's: what is there may be a link to somebody else's socket.
                place = os.open(directory / "qmp.sock", os.O_PATH | os.O_NOFOLLOW)
                try:
                    if not stat.S_ISSOCK(os.fstat(place).st_mode):
                        raise SandboxError("qmp.sock is not a socket")
                    # Through /proc, because the path of a socket may have 107 bytes, and this one may be longer.
                    reader, writer = await asyncio.open_unix_connection(f"/proc/self/fd/{place}")
                    break
                finally:
                    os.close(place)
            await asyncio.sleep(0.05)
        qmp = cls(reader, writer)
        try:
            await reader.readline()  # the greeting
        except OSError:
            raise SandboxError("QEMU ended before it greeted") from None
        except ValueError:
            raise SandboxError("what listens at qmp.sock is not QEMU") from None
        await qmp.execute("qmp_capabilities")
        return qmp

    async def execute(self, command: str, **arguments: object) -> Any:
        """Run a command and return its answer. Raises `SandboxError` when QEMU refuses it or has ended."""
        number = next(self.numbers)
        request = {"execute": command, "arguments": arguments, "id": number}
        with contextlib.suppress(OSError, ValueError):  # (a line that is too long, or no JSON: it is not QEMU)
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
        raise SandboxError(f"QEMU ended before it answered {command}")

    async def human(self, command: str) -> str:
        """Run a command of QEMU's monitor and return its text."""
        return str(await self.execute("human-monitor-command", **{"command-line": command}))

    def close(self) -> None:
        self.writer.close()
