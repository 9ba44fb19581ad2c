"""`on-host`: a test script's way to run a command on the machine that it tests.

The command in the script's cell asks toto over a socket, and gives toto its own standard streams. Toto runs ssh, so no
key, agent or connection of the machine is in the cell. The socket is there for one machine, in one phase.

Standard input is empty unless the script asks for its own: an ssh in a `while read` loop would read the loop's list.
"""

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, TypeAlias

from toto.base import process
from toto.base.errors import TotoError
from toto.machine.ssh import LOST, Connection

PLACE: Final = Path("/toto")  # in the cell: the folder with the socket, `bin/on-host`, and what else scripts are given
SOCKET: Final = "on-host.sock"
LONGEST: Final = 1_000_000  # bytes of a request
LONGEST_LINE: Final = 120_000  # bytes of one word of a program, which is how ssh gets the command; Linux has 131,072
AT_ONCE: Final = 32  # commands; more wait

CLIENT: Final = '''\
#!/usr/bin/env -S {python} -IS
"""on-host [--stdin] WORD...: runs a command on the machine under test, with the same words as here.

on-host 'LINE': a single argument is run as a line by the machine's sh.
--stdin: the command reads this standard input; without it, it has none.
"""
import json, os, socket, sys
words = sys.argv[1:]
asked = words[:1] == ["--stdin"]
words = words[asked:]
if not words or words[0].startswith("--"):
    sys.exit(print("usage: on-host [--stdin] COMMAND [ARGUMENT...]", file=sys.stderr) or 64)
streams = [] if asked else [os.open("/dev/null", os.O_RDWR)]
for number in range(len(streams), 3):
    try:
        streams.append(os.dup(number))
    except OSError:  # the script has closed it
        streams.append(os.open("/dev/null", os.O_RDWR))
request = json.dumps(words).encode()
with socket.socket(socket.AF_UNIX) as toto:
    try:
        toto.connect("{socket}")
        socket.send_fds(toto, [len(request).to_bytes(4, "big")], streams)
        toto.sendall(request)
        status, _, said = toto.makefile().readline().partition(" ")
    except OSError as error:
        sys.exit(print(f"on-host: toto does not answer: {{error.strerror}}", file=sys.stderr) or 255)
if said:
    print(f"on-host: {{said}}", end="", file=sys.stderr)
sys.exit(int(status) if status else 255)
'''

Command: TypeAlias = Callable[[Sequence[str]], str]


@asynccontextmanager
async def serving(
    folder: Path,
    connection: Connection | None,
    python: Sequence[str],
    user: int | None,
    command: Command,
    place: Path = PLACE,
) -> AsyncIterator[None]:
    """Serve `on-host` from `folder`, which scripts see at `place`, while the block runs.

    There is no `connection` to a machine that pulls. `command` makes of the words what a login shell is given. `python`
    runs the interpreter in their cell, and `user` is the machine's user who may ask, when toto is root.
    """
    client = folder / "bin" / "on-host"
    client.parent.mkdir(mode=0o755)
    client.write_text(CLIENT.format(python=" ".join(python), socket=place / SOCKET))
    client.chmod(0o755)
    at_once = asyncio.Semaphore(AT_ONCE)
    loop, tasks = asyncio.get_running_loop(), set[asyncio.Task[None]]()
    with socket.socket(socket.AF_UNIX) as listener:
        opened = os.open(folder, os.O_PATH | os.O_DIRECTORY)
        try:
            listener.bind(f"/proc/self/fd/{opened}/{SOCKET}")  # (the path of a socket may have 107 bytes)
        finally:
            os.close(opened)
        (folder / SOCKET).chmod(0o600)
        if user is not None:
            os.chown(folder / SOCKET, user, user)
        listener.listen(64)
        listener.setblocking(False)

        async def accept() -> None:
            while True:
                asking, _ = await loop.sock_accept(listener)
                task = asyncio.create_task(_answer(asking, connection, command, at_once))
                tasks.add(task)
                task.add_done_callback(tasks.discard)

        accepting = asyncio.create_task(accept())
        try:
            yield
        finally:
            for task in (accepting, *tasks):
                task.cancel()
            await asyncio.gather(accepting, *tasks, return_exceptions=True)


async def _answer(
    asking: socket.socket, connection: Connection | None, make: Command, at_once: asyncio.Semaphore
) -> None:
    """Run one command for a client, and tell it the exit status. A client whose request is wrong gets no answer."""
    streams: list[int] = []
    asking.setblocking(False)
    with asking, contextlib.suppress(OSError, ValueError, TotoError):
        try:
            words = await _request(asking, streams)
            if connection is None:
                said = b"69 toto runs no command on a machine that pulls: test it at its address, or in its checks.d\n"
                return await asyncio.get_running_loop().sock_sendall(asking, said)
            if len(packed := make(words)) > LONGEST_LINE:
                said = b"64 the command is too long; give it by a file, or by --stdin\n"
                return await asyncio.get_running_loop().sock_sendall(asking, said)
            async with at_once:
                command = connection.command(packed, "-o", "BatchMode=yes")
                async with process.start(command, stdin=streams[0], stdout=streams[1], stderr=streams[2]) as running:
                    for stream in streams:
                        os.close(stream)
                    streams.clear()
                    await _ended(running, asking)
            status = LOST if running.status is None or running.status < 0 else running.status
            await asyncio.get_running_loop().sock_sendall(asking, b"%d\n" % status)
        finally:
            for stream in streams:
                os.close(stream)


async def _request(asking: socket.socket, streams: list[int]) -> list[str]:
    """The words that a client asks for; its streams are put into `streams`. Raises OSError, ValueError."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(asking, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(asking)
    head, received, *_ = socket.recv_fds(asking, 4, 3)
    streams += received
    size = int.from_bytes(head, "big")
    if len(head) != 4 or len(streams) != 3 or not 0 < size <= LONGEST:
        raise ValueError("not a request of on-host")
    data = b""
    while len(data) < size:
        if not (more := await loop.sock_recv(asking, size - len(data))):
            raise ValueError("the client has gone")
        data += more
    words = json.loads(data)
    if (
        not isinstance(words, list)
        or not words
        or not all(isinstance(word, str) and "\0" not in word for word in words)
    ):
        raise ValueError("not a list of words")
    return words


async def _ended(running: process.Running, asking: socket.socket) -> None:
    """Wait until the command has ended; raise ConnectionError when its client has gone, which ends the command."""
    gone = asyncio.create_task(asyncio.get_running_loop().sock_recv(asking, 1))
    try:
        while running.status is None:
            if gone.done():
                raise ConnectionError("the client has gone")
            await asyncio.sleep(0.01)
    finally:
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
