"""A run that is cancelled cleans up to the end, whatever else comes."""

import asyncio
import os
import signal

import pytest
from prefect.exceptions import TerminationSignal

from tasks import cancelled_by_sigterm, together


async def cleans_up(seconds: float, log: list[str]) -> None:
    """Something that a cancel ends, and that needs a while for it, as terraform does."""
    try:
        await asyncio.sleep(600)
    finally:
        try:
            await asyncio.sleep(seconds)
            log.append("clean")
        except asyncio.CancelledError:
            log.append("interrupted twice")


async def test_what_runs_beside_something_that_has_ended_is_waited_for() -> None:
    log: list[str] = []
    work = asyncio.create_task(together([cleans_up(0, log), cleans_up(0.5, log)]))
    await asyncio.sleep(0.1)
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    assert log == ["clean", "clean"]


async def test_only_the_first_sigterm_cancels() -> None:
    log: list[str] = []

    async def stop() -> None:
        for _ in range(3):
            await asyncio.sleep(0.2)
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(TerminationSignal):
        async with cancelled_by_sigterm():
            stopping = asyncio.create_task(stop())
            await together([cleans_up(0, log), cleans_up(1, log)])
    await stopping
    assert log == ["clean", "clean"]
