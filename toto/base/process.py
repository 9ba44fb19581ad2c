"""The one module that starts processes for toto.

A command is a list of words, never a shell string. Each process gets its own group and may have a timeout; it is ended
with its whole group, by SIGTERM and then SIGKILL. Its output is streamed line by line and kept within bounds, with
secrets masked. Children die with toto: the kernel kills the direct child (PR_SET_PDEATHSIG through setpriv, where there
is one). Whatever that child started carries a cookie in its environment, by which `clean_up` finds it even in a
session of its own. (The cookie is the idea of Jenkins' ProcessTreeKiller.) What ran in a cell needs none: the cell ends
with its first process.
"""

import asyncio
import contextlib
import itertools
import logging
import os
import re
import shlex
import shutil
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Final, Protocol, TypeAlias, TypedDict, Unpack, overload

from toto.base.bounded import Bounded
from toto.base.errors import TotoError

log = logging.getLogger(__name__)

Argument: TypeAlias = str | os.PathLike[str]
LineSink: TypeAlias = Callable[[str], None]

SECRETS: Final = frozenset(
    {
        "PREFECT_API_AUTH_STRING",
        "PREFECT_API_KEY",
        "PREFECT_SERVER_API_AUTH_STRING",
        "PREFECT_SERVER_DATABASE_CONNECTION_URL",
        "PREFECT_API_DATABASE_CONNECTION_URL",
        "PREFECT_SERVER_ENCRYPTION_KEY",
        "TOTO_AUTH",
        "TOTO_DATABASE_URL",
    }
)
COOKIE: Final = "TOTO_COOKIE"
LONGEST_LINE: Final = 16_384  # characters; a longer line reaches the log in pieces
KEPT: Final = 4_000_000  # bytes of each stream that are kept: the first half and the last half
LEFT_BEHIND: Final = 5.0  # seconds for processes that outlived their program to obey a signal
_ONCE: Final = 2.0  # seconds: in so few the kernel gives no process id twice
_CELL_FAILED: Final = re.compile(r"\A(?:prlimit: failed to execute (?P<program>\S+)|bwrap: |cell: )")
_numbers = itertools.count()


@dataclass(frozen=True)
class Completed:
    """What a finished process left: its exit status (negative: the signal that ended it), its output, its seconds.

    `memory` is the most that it was seen to use in a cell, in bytes; 0 for one that was not in a cell, or too short.
    """

    argv: tuple[str, ...]
    status: int
    stdout: str
    stderr: str
    seconds: float
    truncated: bool = False
    memory: int = 0

    @property
    def lines(self) -> list[str]:
        return self.stdout.splitlines()


class CommandFailed(TotoError):
    """A process exited with a status other than 0. Carries its argv, status and last lines."""

    def __init__(
        self, argv: Sequence[str], status: int, tail: str, *, target: str | None = None, hint: str | None = None
    ) -> None:
        what = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"
        said = f":\n{tail}" if tail else " and said nothing"
        super().__init__(f"`{shorten(shlex.join(argv))}` {what}{said}", target=target, hint=hint)
        self.argv = tuple(argv)
        self.status = status
        self.tail = tail


class CommandTimeout(TotoError):
    """A process ran for longer than its timeout (seconds) and was ended with its whole group."""

    def __init__(self, argv: Sequence[str], seconds: float, tail: str, *, target: str | None = None) -> None:
        said = f"; its last lines:\n{tail}" if tail else "; it had printed nothing"
        super().__init__(f"`{shorten(shlex.join(argv))}` did not end within {seconds:g} s{said}", target=target)
        self.argv = tuple(argv)
        self.seconds = seconds
        self.tail = tail


class CommandNotFound(TotoError):
    """The program is not on this machine."""

    def __init__(self, program: str) -> None:
        super().__init__(f"the program `{program}` is not on PATH", hint=f"install {program}, or set PATH")


class LimitExceeded(TotoError):
    """What ran in a cell used more than the cell's limits allow, and was ended."""

    def __init__(self, argv: Sequence[str], exceeded: str, *, target: str | None = None) -> None:
        super().__init__(f"`{shorten(shlex.join(argv))}` was ended: it used more than {exceeded}", target=target)
        self.exceeded = exceeded


@dataclass(frozen=True)
class Pushed:
    """A program or a file that somebody pushed, by its path in a cell. A command with one runs only in a cell."""

    path: Argument

    def __str__(self) -> str:
        return os.fspath(self.path)


class Cell(Protocol):
    """Where a process that runs something pushed is kept: `toto.cell.cell.Cell`."""

    def command(self, argv: Sequence[str], cwd: str | None = None) -> list[str]:
        """The command line that runs `argv` in the cell."""

    def environment(self, env: Mapping[str, str]) -> dict[str, str]:
        """The whole environment of a process in the cell."""

    def held(self, running: "Running") -> AbstractAsyncContextManager[None]:
        """Hold a process to the cell's limits."""


class _Lines:
    """Cuts a stream into lines for a sink, with secrets masked."""

    def __init__(self, sink: LineSink | None, secrets: Sequence[str]) -> None:
        self.sink, self.secrets, self.rest = sink, secrets, b""

    def feed(self, chunk: bytes) -> None:
        if self.sink is None:
            return
        *lines, self.rest = (self.rest + chunk).split(b"\n")
        while len(self.rest) > LONGEST_LINE:
            lines.append(self.rest[:LONGEST_LINE])
            self.rest = self.rest[LONGEST_LINE:]
        for line in lines:
            self.sink(mask(line.decode(errors="replace").rstrip("\r"), self.secrets))

    def close(self) -> None:
        if self.rest:
            self.feed(b"\n")


@dataclass
class Running:
    """A process that `start` has started.

    `confined` says that it runs in a cell; `exceeded` names the limit of the cell that it has exceeded. `memory` is the
    most that the cell was seen to use, in bytes.
    """

    argv: tuple[str, ...]
    process: asyncio.subprocess.Process
    cookie: str
    ended: bool = False
    confined: bool = False
    exceeded: str | None = None
    memory: int = 0
    began: float = field(default_factory=time.monotonic)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def status(self) -> int | None:
        """The exit status, or None while it runs."""
        return self.process.returncode

    async def wait(self) -> int:
        """Wait until the program has ended, and return its exit status, also of one in a cell."""
        await self._reaped()
        assert self.status is not None
        return _status_inside(self.status) if self.confined else self.status

    async def end(self, *, signals: Sequence[signal.Signals] = (signal.SIGTERM,), grace: float = 5.0) -> None:
        """End the process and its group: send each of `signals` and wait up to `grace` seconds, then send SIGKILL.

        When the program has ended by itself, what it left behind gets at most `LEFT_BEHIND` seconds.
        """
        if self.ended:  # its process id may belong to a different process by now
            return
        if self.status is not None:
            grace = min(grace, LEFT_BEHIND)
        for each in signals:
            if self.confined:
                _signal_inside(self.pid, each)
            else:
                _signal_group(self.pid, each)
            if await self._gone(grace):
                break
        _signal_group(self.pid, signal.SIGKILL)
        if not self.confined:  # (a cell ends with its first process)
            since = self.pid if time.monotonic() - self.began < _ONCE else None
            for _ in _kill_all(self.cookie.__eq__, since):
                await asyncio.sleep(0.003)
        self.ended = True
        with contextlib.suppress(TimeoutError):
            # Not bare wait(): it also waits for the pipes, which a daemon that we cannot kill may hold open.
            await asyncio.wait_for(asyncio.shield(self._reaped()), grace)

    async def _reaped(self) -> None:
        if self.process.returncode is None:
            await _exited(self.pid)
        pause = 0.0
        while self.process.returncode is None:  # (wait() would wait for the pipes too)
            await asyncio.sleep(pause)
            pause = min(pause + 0.0005, 0.02)

    async def _gone(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        pause = 0.0005
        while time.monotonic() < deadline:
            if self.process.returncode is not None and not _group_lives(self.pid):
                return True
            await asyncio.sleep(pause)
            pause = min(pause * 2, 0.02)
        return False


def without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment without the passwords of toto's that may be in it: no other program needs them."""
    return {name: value for name, value in environment.items() if name not in SECRETS}


def mask(text: str, secrets: Sequence[str]) -> str:
    """`text` with every secret replaced by asterisks."""
    for secret in secrets:
        if secret:
            text = text.replace(secret, "******")
    return text


def shorten(text: str, limit: int = 300) -> str:
    """`text` cut to about `limit` characters: its middle is left out."""
    return text if len(text) <= limit else f"{text[: limit // 2]} … {text[-limit // 2 :]}"


def tail(text: str, lines: int = 20) -> str:
    """The last lines of an output, for an error's message."""
    return "\n".join(shorten(line, 500) for line in text.strip().splitlines()[-lines:])


class _Started(TypedDict, total=False):
    env: Mapping[str, str] | None
    cwd: Argument | None
    stdin: int | None
    stdout: int | None
    stderr: int | None
    grace: float
    signals: Sequence[signal.Signals]
    pass_fds: Sequence[int]


class _Ran(TypedDict, total=False):
    env: Mapping[str, str] | None
    cwd: Argument | None
    stdin: bytes | None
    timeout: float | None
    check: bool
    on_line: LineSink | None
    on_error_line: LineSink | None
    keep: int
    secrets: Sequence[str]
    grace: float
    target: str | None
    signals: Sequence[signal.Signals]


@overload
def start(
    argv: Sequence[Argument], *, cell: None = None, **options: Unpack[_Started]
) -> AbstractAsyncContextManager[Running]: ...
@overload
def start(
    argv: Sequence[Argument | Pushed], *, cell: Cell, **options: Unpack[_Started]
) -> AbstractAsyncContextManager[Running]: ...
def start(
    argv: Sequence[Argument | Pushed], *, cell: Cell | None = None, **options: Unpack[_Started]
) -> AbstractAsyncContextManager[Running]:
    """Start a process that lives as long as the `async with` block, then end it and its group.

    With a `cell` it runs there: `env` is then all that it gets besides what `Cell.environment` has, and `cwd` is one of
    the cell's folders. Raises `CommandNotFound`, or OSError when the kernel refuses (no memory, not executable).
    """
    return _start(argv, cell, **options)


@contextlib.asynccontextmanager
async def _start(
    argv: Sequence[Argument | Pushed],
    cell: Cell | None,
    *,
    env: Mapping[str, str] | None = None,
    cwd: Argument | None = None,
    stdin: int | None = asyncio.subprocess.DEVNULL,
    stdout: int | None = asyncio.subprocess.DEVNULL,
    stderr: int | None = asyncio.subprocess.DEVNULL,
    grace: float = 5.0,
    signals: Sequence[signal.Signals] = (signal.SIGTERM,),
    pass_fds: Sequence[int] = (),
) -> AsyncIterator[Running]:
    words = tuple(word if isinstance(word, str) else str(word) for word in argv)
    cookie = f"{owner()}.{_pid_namespace()}.{next(_numbers)}"
    if cell is None:
        environment = without_secrets(os.environ) if env is None else dict(env)
        program = shutil.which(words[0], path=environment.get("PATH"))
        if program is None:
            raise CommandNotFound(words[0])
        environment[COOKIE] = cookie
        command = [*_dies_with_us(), program, *words[1:]]
    else:
        environment = cell.environment(env or {})
        command, cwd = cell.command(words, None if cwd is None else os.fspath(cwd)), "/"
    process = await asyncio.create_subprocess_exec(
        *command,
        env=environment,
        cwd=cwd,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        pass_fds=pass_fds,
        start_new_session=True,
    )
    running = Running(words, process, cookie, confined=cell is not None)
    if cell is not None:
        async with _held(running, cell, grace, signals):
            yield running
        return
    try:
        yield running
    finally:
        await asyncio.shield(running.end(grace=grace, signals=signals))


@contextlib.asynccontextmanager
async def _held(
    running: Running, cell: Cell, grace: float, signals: Sequence[signal.Signals]
) -> AsyncIterator[Running]:
    try:
        async with cell.held(running):
            yield running
            # What the cell used is judged when all of it has ended.
            await asyncio.shield(running.end(grace=grace, signals=signals))
    finally:
        await asyncio.shield(running.end(grace=grace, signals=signals))


@contextlib.asynccontextmanager
async def adopted(
    argv: Sequence[str], process: asyncio.subprocess.Process, cell: Cell, *, grace: float = 5.0
) -> AsyncIterator[Running]:
    """Hold a process that a library has started, by a command line of the cell and in a session of its own.

    It ends with the block, as one of `start` does.
    """
    running = Running(tuple(argv), process, "", confined=True)
    async with _held(running, cell, grace, (signal.SIGTERM,)):
        yield running


@overload
async def run(argv: Sequence[Argument], *, cell: None = None, **options: Unpack[_Ran]) -> Completed: ...
@overload
async def run(argv: Sequence[Argument | Pushed], *, cell: Cell, **options: Unpack[_Ran]) -> Completed: ...
async def run(
    argv: Sequence[Argument | Pushed],
    *,
    cell: Cell | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Argument | None = None,
    stdin: bytes | None = None,
    timeout: float | None = None,
    check: bool = True,
    on_line: LineSink | None = None,
    on_error_line: LineSink | None = None,
    keep: int = KEPT,
    secrets: Sequence[str] = (),
    grace: float = 5.0,
    target: str | None = None,
    signals: Sequence[signal.Signals] = (signal.SIGTERM,),
) -> Completed:
    """Run a program to its end and return what it left.

    `cell` is as in `start`. `timeout` and `grace` (see `Running.end`) are in seconds; `keep` is how many bytes of each
    stream are kept.
    `on_line` and `on_error_line` get each line of stdout and stderr as it comes, without its newline and with secrets
    masked. The run is over when the program exits: a daemon that it left behind is ended with the group, even if it
    holds stdout open. A cancel ends the group as well.

    Raises `CommandFailed` for a status other than 0 when `check`, `CommandTimeout`, `CommandNotFound`, `LimitExceeded`
    for one that used more than its cell allows, or OSError when the kernel refuses.
    """
    pipe = asyncio.subprocess.PIPE
    began = time.monotonic()
    kept_out, kept_err = Bounded(keep), Bounded(keep)
    async with _start(
        argv,
        cell,
        env=env,
        cwd=cwd,
        stdin=asyncio.subprocess.DEVNULL if stdin is None else pipe,
        stdout=pipe,
        stderr=pipe,
        grace=grace,
        signals=signals,
    ) as running:
        process = running.process
        pumps = [
            asyncio.create_task(_pump(process.stdout, kept_out, _Lines(on_line, secrets))),
            asyncio.create_task(_pump(process.stderr, kept_err, _Lines(on_error_line, secrets))),
        ]
        if stdin is not None:
            pumps.append(asyncio.create_task(_feed(process.stdin, stdin)))
        timed_out = False
        try:
            async with asyncio.timeout(timeout):
                await running._reaped()
        except TimeoutError:
            timed_out = True
        finally:
            await asyncio.shield(running.end(grace=grace, signals=signals))
            # Every process that held the pipes is dead now; what is still buffered arrives at once.
            await asyncio.wait(pumps, timeout=grace)
            for pump in pumps:
                pump.cancel()
    out, err = mask(kept_out.text(), secrets), mask(kept_err.text(), secrets)
    shown = [mask(word, secrets) for word in running.argv]
    if timed_out and timeout is not None:
        raise CommandTimeout(shown, timeout, tail(err or out), target=target)
    status = process.returncode
    assert status is not None
    if running.exceeded is not None:
        raise LimitExceeded(shown, running.exceeded, target=target)
    if cell is not None:
        status = _status_inside(status)
        if (failed := _CELL_FAILED.search(err)) and status in {1, 127}:
            raise (
                CommandNotFound(shown[0]) if failed["program"] else TotoError(f"the cell: {tail(err)}", target=target)
            )
    if check and status != 0:
        raise CommandFailed(shown, status, tail(err) or tail(out), target=target)
    return Completed(
        tuple(shown),
        status,
        out,
        err,
        time.monotonic() - began,
        truncated=bool(kept_out.dropped or kept_err.dropped),
        memory=running.memory,
    )


async def attached(argv: Sequence[Argument], *, env: Mapping[str, str] | None = None) -> int:
    """Run a program that has this process's own terminal, or its standard input and output, to its end; its status.

    What is pressed there is the program's: a Ctrl-C does not end this process. Raises `CommandNotFound`.
    """
    words = [word if isinstance(word, str) else str(word) for word in argv]
    environment = without_secrets(os.environ) if env is None else dict(env)
    if (program := shutil.which(words[0], path=environment.get("PATH"))) is None:
        raise CommandNotFound(words[0])
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        started = await asyncio.create_subprocess_exec(
            *_dies_with_us(), program, *words[1:], env=environment, restore_signals=True
        )
        try:
            return await started.wait()
        finally:
            if started.returncode is None:
                started.terminate()
                await asyncio.shield(started.wait())
    finally:
        signal.signal(signal.SIGINT, before)


async def _pump(stream: asyncio.StreamReader | None, kept: Bounded, lines: _Lines) -> None:
    assert stream is not None
    while chunk := await stream.read(65_536):
        kept.add(chunk)
        lines.feed(chunk)
    lines.close()


async def _feed(stream: asyncio.StreamWriter | None, data: bytes) -> None:
    assert stream is not None
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        stream.write(data)
        await stream.drain()
        stream.close()
        await stream.wait_closed()


@cache
def _dies_with_us() -> tuple[str, ...]:
    setpriv = shutil.which("setpriv")
    return () if setpriv is None else (setpriv, "--pdeathsig", "KILL", "--")


def _status_inside(status: int) -> int:
    """The exit status of a program that a cell has reported as a shell does: 128 and the signal that ended it."""
    return 128 - status if 128 < status < 160 else status


def descendants(pid: int) -> list[int]:
    """A process and all that it and its children have started, as far as they live."""
    found = [pid]
    for each in found:
        with contextlib.suppress(OSError):  # (it has just ended; Path.glob would raise too)
            for task in Path(f"/proc/{each}/task").iterdir():
                with contextlib.suppress(OSError):
                    found.extend(map(int, (task / "children").read_text().split()))
    return found


def kill_tree(pid: int) -> None:
    """SIGKILL a process and all that it has started."""
    for each in descendants(pid):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(each, signal.SIGKILL)


def _signal_inside(pid: int, number: signal.Signals) -> None:
    """Signal what runs in a cell, not the programs that hold the cell: with them it would end at once."""
    for each in descendants(pid)[1:]:
        with contextlib.suppress(OSError):
            if Path(f"/proc/{each}/comm").read_text() != "bwrap\n":
                os.kill(each, number)


def _signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


async def _exited(pid: int) -> None:
    """Wait until a child has ended, where the kernel tells that (Linux 5.3)."""
    try:
        opened = os.pidfd_open(pid)
    except OSError:
        return
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(opened, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(opened)
        os.close(opened)


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    # A zombie answers too, until init reaps it: check the states.
    return any(state != "Z" and pgrp == str(group) for state, pgrp in map(_state_and_group, _pids()))


def owner() -> str:
    """This process, in a form that `lives` can check later: its PID and start time, since a PID can be used again."""
    return f"{os.getpid()}.{started(os.getpid())}"


def started(pid: int) -> str | None:
    """The start time of a process in clock ticks since boot, or None when there is no such process."""
    fields = _stat(pid)
    return None if not fields or fields[0] == "Z" else fields[19]


def lives(who: str) -> bool:
    """Whether the process that `owner` named is still there."""
    pid, _, ticks = who.partition(".")
    return pid.isdigit() and started(int(pid)) == ticks


def _pids() -> list[int]:
    return [int(entry.name) for entry in os.scandir("/proc") if entry.name.isdigit()]


def _younger(pid: int) -> list[int]:
    """The processes that were started after a given one of the last `_ONCE` seconds.

    The kernel gives process ids in order, and begins again at the highest one.
    """
    last = int(Path("/proc/loadavg").read_text().split()[-1])
    if pid <= last:
        return [each for each in _pids() if pid < each <= last]
    return [each for each in _pids() if pid < each or each <= last]


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on; empty when the process is gone."""
    try:
        opened = os.open(f"/proc/{pid}/stat", os.O_RDONLY)  # (for hundreds of processes: half the time of Path's)
    except OSError:
        return []
    try:
        return os.read(opened, 4096).decode(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []
    finally:
        os.close(opened)


def _state_and_group(pid: int) -> tuple[str, str]:
    fields = _stat(pid)
    return (fields[0], fields[2]) if fields else ("Z", "")


def _scan(pids: Iterable[int]) -> tuple[list[tuple[int, str]], bool]:
    """Those of some processes that have a cookie, with that cookie; and whether any of them is just being executed.

    A process that is being executed shows no environment for a moment, so the caller has to scan again.
    """
    found, starting = [], False
    needle = f"{COOKIE}=".encode()
    for pid in pids:
        with contextlib.suppress(OSError):
            environment = Path(f"/proc/{pid}/environ").read_bytes()
            if not environment:
                fields = _stat(pid)
                # It is no zombie and no kernel thread (those have no memory), and its environment is not set up yet.
                starting |= bool(fields) and fields[0] != "Z" and fields[20] != "0" and fields[48:49] == ["0"]
            for item in environment.split(b"\0"):
                if item.startswith(needle) and pid != os.getpid():
                    found.append((pid, item[len(needle) :].decode(errors="replace")))
    return found, starting


def _kill_all(doomed: Callable[[str], bool], since: int | None = None) -> Iterator[list[int]]:
    """SIGKILL every process whose cookie is `doomed`, in rounds until none is left; yields the PIDs of each round.

    With `since` only processes that were started after that one are looked at. (A process that forks during a round,
    or is just being executed, is found in the next.) The caller waits a moment between two rounds.
    """
    for _ in range(300):
        found, starting = _scan(_pids() if since is None else _younger(since))
        hit = [pid for pid, cookie in found if doomed(cookie)]
        for pid in hit:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        if not hit and not starting:
            break
        yield hit


@cache
def _pid_namespace() -> str:
    return str(Path("/proc/self/ns/pid").stat().st_ino)


def _orphaned(cookie: str) -> bool:
    """Whether the toto that started a process is dead; False if it ran in a different container: PIDs differ there."""
    owner, _, namespace = cookie.rpartition(".")[0].rpartition(".")
    return namespace == _pid_namespace() and not lives(owner)


def clean_up() -> list[int]:
    """Kill the processes that a dead toto left running; return their process ids.

    Processes of a toto in a different container are left alone: the next start there cleans them up.
    """
    killed: set[int] = set()
    for hit in _kill_all(_orphaned):
        killed.update(hit)
        time.sleep(0.003)
    return sorted(killed)
