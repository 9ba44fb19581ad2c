"""The door of a job's cell: a unix socket by which its scripts ask for runs of jobs of the same repo (`laminarc`).

Whoever asks is a stranger. The job gets no key: toto does what is asked, and only what a job may. Sizes and numbers are
bounded.
"""

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from toto.base.errors import InputError, TotoError
from toto.base.model import shown
from toto.jobs import queue
from toto.jobs.conf import GIVEN
from toto.jobs.folder import Jobs
from toto.jobs.history import History, Run, State
from toto.jobs.registered import Call

NAME: Final = "door"
_REQUEST: Final = 1 << 18  # bytes
_ARRIVES: Final = 10.0  # seconds for a request
_AT_ONCE: Final = 64  # requests
_QUEUED: Final = 200  # runs by one run
_SET: Final = 200  # variables
_SET_SIZE: Final = 1 << 16  # characters of all of them
_PAUSE: Final = 0.5  # seconds between two looks at a run that is waited for


@dataclass
class Door:
    """What the scripts of a run may ask for.

    `call` asks Prefect's API; without it nothing can be queued. `set` has the variables for later scripts.
    """

    jobs: Jobs
    run: Run
    history: History
    call: Call | None = None
    set: dict[str, str] = field(default_factory=dict)
    _queued: int = 0
    _asking: int = 0
    _one: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer a request."""
        self._asking += 1
        try:
            said = await self._said(reader)
            writer.write(json.dumps(said).encode() + b"\n")
            async with asyncio.timeout(_ARRIVES):
                await writer.drain()
        except (OSError, TimeoutError):
            pass
        finally:
            self._asking -= 1
            writer.close()

    async def _said(self, reader: asyncio.StreamReader) -> dict[str, Any]:
        if self._asking > _AT_ONCE:
            return {"error": f"more than {_AT_ONCE} questions at once"}
        try:
            async with asyncio.timeout(_ARRIVES):
                asked = json.loads(await reader.readuntil())
            return await self._done(asked)
        except TotoError as error:
            return {"error": str(error)}
        except (ValueError, LookupError, TypeError, RecursionError, asyncio.IncompleteReadError, TimeoutError):
            return {"error": "this is no question"}
        except asyncio.LimitOverrunError:
            return {"error": f"more than {_REQUEST >> 10} KiB"}

    async def _done(self, asked: dict[str, Any]) -> dict[str, Any]:
        match asked["do"]:
            case "queue" | "start" | "run" as verb:
                runs = await self._queue(asked)
                until = {"queue": _any, "start": _begun, "run": _ended}[verb]
                return {"runs": [(each.label, str((await self._waited(each, until)).state)) for each in runs]}
            case "set":
                self._set(str(asked["name"]), str(asked["value"]))
            case "abort":
                run = self.history.get(str(asked["job"]), int(asked["number"]))
                await queue.abort(self._call, self.history.repo, run)
            case "show-jobs":
                return {"lines": list(self.jobs.jobs)}
            case "show-queued":
                return {"lines": [each.label for each in self.history.open() if each.state is State.QUEUED]}
            case "show-running":
                return {"lines": [each.label for each in self.history.open() if each.state is State.RUNNING]}
            case _:
                raise ValueError
        return {}

    async def _queue(self, asked: dict[str, Any]) -> list[Run]:
        given = {str(name): str(value) for name, value in dict(asked["parameters"]).items()}
        job = self.jobs.job(str(asked["job"]))
        async with self._one:
            self._queued += len(job.runs(given))
            if self._queued > _QUEUED:
                raise InputError(f"a run queues at most {_QUEUED} others", target=self.run.label)
            return await queue.queue(
                self._call,
                self.history.repo,
                job,
                given,
                reason=str(asked["reason"])[:1000],
                parent=self.run.label,
                first=bool(asked["next"]),
            )

    async def _waited(self, run: Run, until: Callable[[Run], bool]) -> Run:
        looks = 0
        while not until(run):
            await asyncio.sleep(_PAUSE)
            looks += 1
            if looks % 20 == 0 and run.state is State.QUEUED:  # it may have been cancelled
                with contextlib.suppress(TotoError):
                    await queue.settle(self._call, self.history.repo)
            run = self.history.get(run.job, run.number)
        return run

    def _set(self, name: str, value: str) -> None:
        if not name or "=" in name or "\0" in name + value or name in GIVEN - {"PATH", "HOME"}:
            raise InputError(f"{shown(name)} cannot be set", target=self.run.label)
        changed = {**self.set, name: value}
        if len(changed) > _SET or sum(len(key) + len(text) for key, text in changed.items()) > _SET_SIZE:
            raise InputError(f"at most {_SET} variables, and {_SET_SIZE >> 10} KiB of them", target=self.run.label)
        self.set[name] = value

    @property
    def _call(self) -> Call:
        if self.call is None:
            raise InputError("no run can be queued from here", target=self.run.label)
        return self.call


def _any(_: Run) -> bool:
    return True


def _begun(run: Run) -> bool:
    return run.state is not State.QUEUED


def _ended(run: Run) -> bool:
    return run.state.ended


@asynccontextmanager
async def opened(folder: Path, door: Door) -> AsyncIterator[None]:
    """Answer who connects to the socket `NAME` in a folder of toto's own, as long as the block lasts."""
    listening = socket.socket(socket.AF_UNIX)
    place = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        listening.bind(f"/proc/self/fd/{place}/{NAME}")  # (the path itself may be longer than a socket's may be)
    finally:
        os.close(place)
    (folder / NAME).chmod(0o666)  # the cell's user is a stranger; nobody else may enter the run's folder
    answering: set[asyncio.Task[None]] = set()

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(door.answer(reader, writer))
        answering.add(task)
        task.add_done_callback(answering.discard)

    server = await asyncio.start_unix_server(connected, sock=listening, limit=_REQUEST, backlog=_AT_ONCE)
    try:
        yield
    finally:
        server.close()
        for task in (left := list(answering)):
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
