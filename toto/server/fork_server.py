"""Makes flow runs begin at once: a server process imports everything that they need, and is forked for each run.

A new Python needs 1.5 to 2 s on a small machine to import what a flow run needs. So `serve` imports Prefect and
toto's flows once. Prefect's worker starts `run` for each flow run, which asks the server for a fork. The fork gets
the caller's environment, folder and standard streams, and becomes `toto.server.engine`. The caller stays, passes
signals on and ends with the fork's exit status, so the worker takes it for the run. Caller and fork end together, and
both end with the server. Only a fork that was told to end by SIGTERM may outlive its caller, which Prefect's worker
kills after half a minute: terraform needs longer to save its state. Without a server the caller becomes the engine
itself, which is slow.

(The idea is that of Android's zygote, and of multiprocessing's forkserver, which only forks for its own program.)

`python -I -S toto/server/fork_server.py run` must start fast, so the top of this module only imports what every Python
loads anyway.
"""

import contextlib
import gc
import importlib
import os
import pathlib
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Final, NoReturn

# What every run needs; Prefect imports some of it only when a run comes to it.
_PRELOADED: Final = (
    *("prefect.main", "prefect.flow_engine", "prefect.task_engine", "prefect.deployments.steps", "fastapi"),
    *("anyio._backends._asyncio", "toto.server.engine"),
)
NAME: Final = "fork.sock"  # in Prefect's home, which only its owner may enter
PATIENCE: Final = 15.0  # seconds that a caller waits for its fork
ENDING: Final = 150.0  # seconds that a fork may take to end once its caller has passed SIGTERM on
PASSED_ON: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def _address() -> tuple[str, int]:
    """The socket's path through a folder's descriptor (a path may have 107 bytes only), and that descriptor.

    The caller closes the descriptor.
    """
    folder = os.open(os.environ["PREFECT_HOME"], os.O_RDONLY | os.O_DIRECTORY)
    return f"/proc/self/fd/{folder}/{NAME}", folder


# The caller


def run() -> NoReturn:
    """Run a flow run in a fork of the server, and end as the fork ends."""
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path, folder = _address()
        try:
            server.connect(path)
        finally:
            os.close(folder)
        server.settimeout(PATIENCE)  # for a server that hangs; a fork that comes too late ends with this connection
        # From here on signals wait until there is a fork to pass them on to.
        signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
        request = b"\0".join([os.getcwdb(), *(key + b"=" + value for key, value in os.environb.items())])  # noqa: PTH109
        socket.send_fds(server, [len(request).to_bytes(4, "big")], [0, 1, 2])
        server.sendall(request)
        answer = server.makefile("r")
        pid = int(answer.readline())
        server.settimeout(None)
    except (OSError, KeyError, ValueError):
        server.close()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
        engine = os.path.join(os.path.dirname(os.path.abspath(__file__)), "engine.py")  # noqa: PTH100, PTH118, PTH120
        os.execv(sys.executable, [sys.executable, engine, sys.argv[2]])  # noqa: S606
    for number in PASSED_ON:
        signal.signal(number, lambda number, _: _pass_on(pid, number, server))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    status = answer.readline()
    if not status:  # the server has died: nobody would see the end of the run, so it must not go on
        _pass_on(pid, signal.SIGKILL)
        os._exit(128 + signal.SIGKILL)
    code = int(status)
    if code < 0:
        with contextlib.suppress(OSError):  # (SIGKILL has no handler)
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _pass_on(pid: int, number: int, server: socket.socket | None = None) -> None:
    with contextlib.suppress(ProcessLookupError):  # (it has just ended)
        os.kill(pid, number)
    if server is not None and number == signal.SIGTERM:
        with contextlib.suppress(OSError):
            server.send(b"\n")  # so that the server knows


# The server


class _Forked(Exception):
    """Raised in a fork, with request and streams, to leave the server's code and take the caller's place."""


def serve(modules: list[str]) -> None:
    """Import `modules`, then fork for each caller, until SIGTERM. Returns only in the forks, in the caller's place."""
    for module in (*_PRELOADED, *modules):
        importlib.import_module(module)
    if threading.active_count() > 1:  # a fork has only one thread, and locks that others held would stay locked
        sys.exit(f"toto: flow runs will begin slowly: an import has started {threading.enumerate()}")
    gc.collect()
    gc.freeze()  # so that no collection in a fork touches, and thereby copies, memory that all of them share
    callers: dict[int, socket.socket] = {}
    until: dict[int, float] = {}  # by when a fork that was told to end must have ended
    doomed: set[int] = set()  # those of them whose callers have gone
    try:
        with _listening() as listener, _children() as ended, selectors.PollSelector() as selector:
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
            selector.register(listener, selectors.EVENT_READ)
            selector.register(ended, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select(_wait(doomed, until)):
                    if key.fileobj is listener:
                        caller = _accepted(listener)
                        if caller and (pid := _fork_for(caller)):
                            callers[pid] = caller
                            selector.register(caller, selectors.EVENT_READ, pid)
                    elif key.fileobj is not ended:
                        ends = _says_that_it_ends(callers[key.data])
                        until.setdefault(key.data, time.monotonic() + ENDING if ends else 0)
                        if not ends:  # a caller has gone: end its run too
                            selector.unregister(key.fileobj)
                            doomed.add(key.data)
                _kill_those_due(doomed, until)
                for pid, status in _ends(ended):
                    doomed.discard(pid)
                    until.pop(pid, None)
                    if caller := callers.pop(pid, None):
                        with contextlib.suppress(KeyError):
                            selector.unregister(caller)
                        _say(caller, status)
                        caller.close()
    except _Forked as fork:
        for caller in callers.values():
            caller.close()
        _take_the_place(*fork.args)


@contextlib.contextmanager
def _listening() -> Iterator[socket.socket]:
    path, folder = _address()
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)  # noqa: PTH107
            listener.bind(path)
            listener.listen(64)
            yield listener
    finally:
        os.close(folder)


@contextlib.contextmanager
def _children() -> Iterator[socket.socket]:
    """A socket that becomes readable when a child has ended."""
    here, there = socket.socketpair()
    with here, there:
        here.setblocking(False)
        there.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(there.fileno(), warn_on_full_buffer=False)
        yield here


def _ends(ended: socket.socket) -> Iterator[tuple[int, int]]:
    """The children that have ended, with their exit statuses."""
    with contextlib.suppress(BlockingIOError):
        ended.recv(4096)
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            yield found[0], os.waitstatus_to_exitcode(found[1])


def _accepted(listener: socket.socket) -> socket.socket | None:
    try:
        return listener.accept()[0]
    except OSError:  # the caller has gone, or too many files are open just now
        time.sleep(0.1)
        return None


def _fork_for(caller: socket.socket) -> int | None:
    """The process id of the fork; None when it could not be made. Raises `_Forked` in the fork."""
    caller.settimeout(5)
    streams: list[int] = []
    try:
        head, streams, _, _ = socket.recv_fds(caller, 4, 3)
        request = bytearray()
        while len(request) < int.from_bytes(head, "big"):
            if not (more := caller.recv(65_536)):
                raise ConnectionError
            request += more
        # Signals to the fork wait until the server's handlers are gone.
        signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
        if (pid := os.fork()) == 0:
            # The fork itself reports its id, so a caller that gets none knows that there is no fork.
            if not _say(caller, os.getpid()):
                os._exit(1)
            caller.close()
            raise _Forked(bytes(request), streams)
    except OSError:  # the caller has gone, or there is no memory for one more process
        caller.close()
        pid = None
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    for stream in streams:
        os.close(stream)
    return pid


def _wait(doomed: set[int], until: dict[int, float]) -> float | None:
    """Seconds until the next fork is due to be killed; None when there is none."""
    return max(0, min(until[pid] for pid in doomed) - time.monotonic()) if doomed else None


def _kill_those_due(doomed: set[int], until: dict[int, float]) -> None:
    for pid in [each for each in doomed if until[each] <= time.monotonic()]:
        doomed.discard(pid)
        os.kill(pid, signal.SIGKILL)  # (our child keeps its number until we wait for it)


def _says_that_it_ends(caller: socket.socket) -> bool:
    """Whether a caller has passed SIGTERM on; else it has gone."""
    try:
        return bool(caller.recv(64))
    except OSError:
        return False


def _say(caller: socket.socket, number: int) -> bool:
    """Send a number to the caller; whether the caller was still there."""
    try:
        caller.sendall(b"%d\n" % number)
    except OSError:
        return False
    return True


def _take_the_place(request: bytes, streams: list[int]) -> None:
    """In the fork: take over environment, folder and standard streams of the caller."""
    from prefect.context import refresh_global_settings_context  # noqa: PLC0415

    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    for standard, stream in enumerate(streams):
        os.dup2(stream, standard)
        os.close(stream)
    folder, *variables = request.split(b"\0")
    os.environb.clear()
    for each in variables:
        key, _, value = each.partition(b"=")
        os.environb[key] = value
    os.chdir(folder)
    refresh_global_settings_context()


if __name__ == "__main__":
    if sys.argv[1] == "run":
        run()
    else:
        root = os.getcwd()  # noqa: PTH109
        serve(sys.argv[2:])
        importlib.import_module("toto.server.engine").main(pathlib.Path(root))
