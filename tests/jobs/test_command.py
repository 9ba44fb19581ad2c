"""A job that is a line of its `.conf`: prefect-shell starts it, in a cell, and its traps are closed."""

import asyncio
import contextlib

import pytest

from tests.jobs.conftest import Make
from toto.jobs.history import State

SUCCESS, FAILED, ABORTED = State.SUCCESS, State.FAILED, State.ABORTED
QUIET = "NETWORK=none\n"
CASES = {
    "echo $JOB $A; pwd": (["a x y; $(id)", "/job/run"], SUCCESS),
    '"echo one; echo two >&2; echo three"': (["one", "two", "three"], SUCCESS),
    "false | cat": ([], FAILED),
    "false; echo still": ([], FAILED),
    "exit 7": ([], FAILED),
    "sleep 3000 & echo done": (["done"], SUCCESS),
    "kill -TERM $$": ([], ABORTED),
    "echo $HOME; [ -e /root ] || env | grep -c PREFECT || true": (["/tmp", "0"], SUCCESS),
}


@pytest.mark.parametrize("command", CASES)
async def test_a_command_is_run(make: Make, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "toto:canary")
    said, state = CASES[command]
    bench = make({"a.conf": f"{QUIET}COMMAND={command}\n", "a.after": "echo after $RESULT >$ARCHIVE/x"})
    async with asyncio.timeout(240):
        ended = await bench.run(A="x y; $(id)")
    assert (bench.said(ended), ended.state) == (said, state), bench.log(ended)
    assert (bench.history.archive(ended) / "x").read_text() == f"after {state}\n"
    assert not bench.history.work(ended).exists()


@pytest.mark.parametrize("abort", [True, False])
async def test_a_command_that_ignores_sigterm_is_killed(make: Make, abort: bool) -> None:
    timeout = "" if abort else "TIMEOUT=3\n"
    bench = make({"a.conf": f"{QUIET}{timeout}GRACE=1\nCOMMAND=trap '' TERM; echo ready; sleep 3000; echo no\n"})
    begun = bench.queue()
    async with asyncio.timeout(240):
        running = asyncio.create_task(bench.run(begun=begun))
        while abort and b"ready\n" not in bench.output:
            await asyncio.sleep(0.01)
        if abort:
            running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
    ended = bench.history.get("a", 1)
    assert (bench.said(ended)[0], ended.state) == ("ready", ABORTED), bench.log(ended)


async def test_a_loud_command_is_whole_in_its_log(make: Make) -> None:
    bench = make({"a.conf": f"{QUIET}COMMAND=seq 20000\n"})
    assert bench.said(await bench.run()) == [str(number) for number in range(1, 20_001)]
