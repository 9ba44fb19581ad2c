"""Prefect tasks: names, cache keys, retries, timeouts and concurrency around one verb of `toto` each."""

import asyncio
import logging
import signal
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any, Final, TypeVar, cast

from prefect.exceptions import TerminationSignal
from prefect.logging import get_run_logger
from prefect.logging.loggers import get_logger
from prefect.utilities import engine as prefect_engine

from toto.base.errors import TotoError

LINES: Final = 400  # of one step's output that reach the run's log; each is a row in Prefect's database


def sink(prefix: str = "", most: int = LINES) -> Callable[[str], None]:
    """A sink that writes a step's output to the run's log: its first `most` lines, then a word about the rest."""
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
    """What a step returns that has nothing to say: the next step names it in `wait_for`, which draws the edge."""


T = TypeVar("T")


async def together(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """What each coroutine returns, all run side by side. Raises the first error, when all have come to their end.

    (Bare `asyncio.gather` leaves the others at work when one is cancelled.)
    """
    results = await asyncio.gather(*work, return_exceptions=True)
    for each in results:
        if isinstance(each, BaseException):
            raise each
    return cast(list[T], results)


_listening: ContextVar[bool] = ContextVar("listening", default=False)
_blocks = 0  # how many blocks of `cancelled_by_sigterm` this process is in


def _on_sigterm(number: int, *_: object) -> None:
    """In place of Prefect's handler, which each subflow installs anew: in a block, asyncio's own is told as well."""
    if not _blocks:
        raise TerminationSignal(signal=number)


prefect_engine._prefect_sigterm_handler = _on_sigterm  # type: ignore[assignment]


@asynccontextmanager
async def cancelled_by_sigterm() -> AsyncIterator[None]:
    """Turn SIGTERM, by which Prefect's worker cancels a run, into a cancel of the calling asyncio task.

    Prefect's own handler raises in whatever code runs at that moment. When that is a callback of the event loop the
    signal is lost and a cancelled roll-out goes on; when it is the loop itself, the loop ends, and what the run would
    clean up meets a closed client. Does nothing within another such block (the outermost flow is what is cancelled),
    nor outside the main thread.
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
        terminated = True
        task.cancel()

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, terminate)
    token = _listening.set(True)
    _blocks += 1
    # Prefect's own handler (as we have it) from the start: by that its worker knows that a cancel is understood.
    signal.signal(signal.SIGTERM, prefect_engine._prefect_sigterm_handler)
    signal.siginterrupt(signal.SIGTERM, False)
    try:
        yield
    except asyncio.CancelledError:
        if not terminated:
            raise
        # All below has been cleaned up; from here on the engine goes by the signal, which is a cancel or a stop to it.
        task.uncancel()
        raise TerminationSignal(signal=signal.SIGTERM) from None
    finally:
        _blocks -= 1
        _listening.reset(token)
        asyncio.get_running_loop().remove_signal_handler(signal.SIGTERM)
        signal.signal(signal.SIGTERM, before)


class _Readable(logging.Filter):
    """Leaves in a run's log what a person reads there.

    No traceback of an error that the operator can read and act on, and no word of each step that just went well:
    the graph above the log shows those.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.exc_info, tuple) and isinstance(record.exc_info[1], TotoError):
            record.exc_info = None
            record.exc_text = None
        return not (record.levelno == logging.INFO and record.getMessage().startswith("Finished in state Completed"))


for _name in ("flow_runs", "task_runs"):
    get_logger(_name).addFilter(_Readable())
