"""Prefect tasks: each adds a name, and cache key, retries, timeout or concurrency, to one operation of `toto`."""

import asyncio
import contextlib
import logging
import re
import signal
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any, Final, TypeVar, cast

from prefect.exceptions import MissingContextError, TerminationSignal
from prefect.logging import get_run_logger
from prefect.logging.loggers import get_logger
from prefect.utilities import engine as prefect_engine

from toto.base.errors import TotoError

LINES: Final = 400  # of one step's output in the run's log; each is a row in Prefect's database


def sink(prefix: str = "", most: int = LINES) -> Callable[[str], None]:
    """A function that writes lines to the run's log: the first `most`, then a note that the others are left out."""
    logger = get_run_logger()
    count = 0

    def write(line: str) -> None:
        nonlocal count
        count += 1
        if count <= most and line.strip():
            logger.info("%s%s", prefix, line)
        elif count == most + 1:
            logger.info("%s… further lines are left out here", prefix)

    return write


class Done:
    """The result of a step without a result: the next step has it in `wait_for`, which draws the edge in the graph."""


T = TypeVar("T")


async def together(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Run coroutines side by side and return their results. Raises the first error, after all of them have ended.

    (Plain `asyncio.gather` leaves the others running when one is cancelled.)
    """
    results = await asyncio.gather(*work, return_exceptions=True)
    for each in results:
        if isinstance(each, BaseException):
            raise each
    return cast(list[T], results)


_listening: ContextVar[bool] = ContextVar("listening", default=False)
_blocks = 0  # the number of blocks of `cancelled_by_sigterm` that this process is in


def _on_sigterm(number: int, *_: object) -> None:
    """Replaces Prefect's handler, which each subflow installs again. Inside a block, asyncio's own handler acts."""
    if not _blocks:
        raise TerminationSignal(signal=number)


prefect_engine._prefect_sigterm_handler = _on_sigterm  # type: ignore[assignment]


@asynccontextmanager
async def cancelled_by_sigterm() -> AsyncIterator[None]:
    """Turn SIGTERM, with which Prefect's worker cancels a run, into a cancel of the calling asyncio task.

    Prefect's own handler raises in whatever code runs at that moment. In a callback of the event loop the signal is
    lost, and a cancelled roll-out goes on; in the loop itself the loop ends, and the run cannot clean up, because its
    client is closed. Only the first signal counts. Nested blocks do nothing (the outermost flow is cancelled); neither
    do blocks outside the main thread.
    """
    task = asyncio.current_task()
    if task is None or _listening.get() or threading.current_thread() is not threading.main_thread():
        yield
        return
    global _blocks  # noqa: PLW0603
    before = signal.getsignal(signal.SIGTERM)
    terminated = False

    def terminate() -> None:
        nonlocal terminated
        if not terminated:  # a second one, as of a whole process group, would interrupt what is being cleaned up
            terminated = True
            task.cancel()

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, terminate)
    token = _listening.set(True)
    _blocks += 1
    # Install Prefect's handler (our version) from the start: its worker checks that to see whether a cancel works.
    signal.signal(signal.SIGTERM, prefect_engine._prefect_sigterm_handler)
    signal.siginterrupt(signal.SIGTERM, False)
    try:
        yield
    except asyncio.CancelledError:
        if not terminated:
            raise
        # Everything below has cleaned up. The engine takes the signal for a cancel or a stop.
        task.uncancel()
        raise TerminationSignal(signal=signal.SIGTERM) from None
    finally:
        _blocks -= 1
        _listening.reset(token)
        asyncio.get_running_loop().remove_signal_handler(signal.SIGTERM)
        signal.signal(signal.SIGTERM, before)


class _Readable(logging.Filter):
    """Keeps a run's log readable for people.

    It removes what Prefect says of itself as a run begins, the line for each step that succeeded, because the graph
    above the log shows those, and tracebacks of errors that an operator can understand without them. An error is there
    once in full, where a flow ends by it or reports it; its task has the first line.
    """

    _CHATTER = re.compile(
        r"(Beginning|Created) (sub)?flow run|View at |Finished in state Completed|Downloading flow code from storage|"
        r"PID \d+ triggered with \d+ commands|Successfully closed all open processes"
    )
    _ENDED = re.compile(r"(Finished in state \w+)\((.*)\)", re.DOTALL)

    def __init__(self) -> None:
        super().__init__()
        self._last = ""

    def filter(self, record: logging.LogRecord) -> bool:
        said = record.getMessage()
        if record.levelno == logging.INFO and self._CHATTER.match(said):
            return False
        of_a_task = record.name.endswith("task_runs")
        ended = self._ENDED.match(said)
        if ended and ("encountered an exception" in ended[2] or ended[2].startswith(repr(self._last))):
            record.msg, record.args = ended[1], ()  # (the error itself has just been logged)
            return not of_a_task
        if isinstance(record.exc_info, tuple) and isinstance(error := record.exc_info[1], TotoError):
            record.exc_info = record.exc_text = None
            record.msg, record.args = str(error), ()
            if of_a_task:
                record.msg = str(error).split("\n", 1)[0].removesuffix(":")
        self._last = record.getMessage()
        return True


class _ToRun(logging.Handler):
    """Passes on what the library warns of to the log of the run that is at work, if any."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(MissingContextError):
            get_run_logger().log(record.levelno, "%s", record.getMessage())


for _name in ("flow_runs", "task_runs"):
    get_logger(_name).addFilter(_Readable())
logging.getLogger("toto").addHandler(_ToRun(logging.WARNING))
