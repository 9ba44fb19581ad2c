"""Numbers that are given once, records of runs, and what is removed."""

import asyncio
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from toto.base import paths, process
from toto.base.errors import InputError
from toto.jobs.history import UNKNOWN, History, State

DAY = 86_400.0


@pytest.fixture
def history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> History:
    monkeypatch.setenv(paths.STATE, str(tmp_path / "state"))
    return History(tmp_path / "infra.git")


def ended(history: History, state: State = State.SUCCESS, job: str = "a") -> int:
    run = history.begin(history.queue(job), "default")
    return history.end(run, state).number


def test_numbers_are_a_job_s_own_and_never_given_twice(history: History) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(lambda _: history.queue("a").number, range(40))) == list(range(1, 41))
    assert history.queue("b").number == 1
    (history.home / "a" / "number").unlink()
    assert history.queue("a").number == 41
    assert (history.jobs(), [each.number for each in history.runs("a")][:2]) == (["a", "b"], [41, 40])


def test_what_was_removed_gives_its_number_to_nobody(history: History) -> None:
    for _ in range(3):
        ended(history)
    assert [each.number for each in history.prune("a", keep=1, seconds=DAY)] == [2, 1]
    assert history.queue("a").number == 4


def test_old_runs_are_removed_but_for_the_newest_and_what_runs(history: History) -> None:
    waiting = history.queue("a").number
    for _ in range(3):
        last = ended(history)
    assert {each.number for each in history.prune("a", keep=100, seconds=-1)} == {2, 3}
    assert [each.number for each in history.runs("a")] == [last, waiting]


def test_the_last_result_is_that_of_the_run_that_ended_last(history: History) -> None:
    assert history.last_result("a") == UNKNOWN
    first, second = (history.begin(history.queue("a"), "default") for _ in range(2))
    history.end(second, State.FAILED)
    history.end(first, State.SUCCESS)
    assert history.last_result("a") == "success"


def test_a_run_begins_once_and_ends_once(history: History) -> None:
    run = history.queue("a", reason="smoke", parent="b:3", parameters={"A": "1"})
    begun = history.begin(run, "arm")
    assert (begun.context, begun.reason, begun.parent, begun.label) == ("arm", "smoke", "b:3", "a:1")
    with pytest.raises(InputError, match="a:1 is running already"):
        history.begin(run, "arm")
    assert history.end(begun, State.ABORTED, "why").why == "why"
    assert history.end(begun, State.SUCCESS).state is State.ABORTED
    with pytest.raises(InputError, match="a:1 is aborted already"):
        history.begin(run, "arm")


@pytest.mark.parametrize("name", ["../x", "", "/etc", "a b", "a/../b"])
def test_no_name_leads_elsewhere(history: History, name: str) -> None:
    for ask in (
        history.queue,
        history.last_result,
        lambda job: history.get(job, 1),
        lambda job: list(history.runs(job)),
    ):
        with pytest.raises(InputError, match="there is no job"):
            ask(name)


def test_a_run_that_is_not_there(history: History) -> None:
    history.queue("a")
    with pytest.raises(InputError, match="there is no run 2 of a\nnext: its last number is 1"):
        history.get("a", 2)


DIES = """
import os, signal, sys
from pathlib import Path
from toto.jobs.history import History
history = History(Path(sys.argv[1]))
run = history.begin(history.queue("a"), "default")
history.work(run).mkdir(parents=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


async def test_a_run_whose_process_was_killed_is_aborted(history: History, tmp_path: Path) -> None:
    waiting, alive = history.queue("a"), history.begin(history.queue("a"), "default")
    async with asyncio.timeout(120):
        died = await process.run([sys.executable, "-c", DIES, tmp_path / "infra.git"], check=False)
    assert died.status == -9
    (dead,) = history.settle()
    assert (dead.number, dead.state, dead.why) == (3, State.ABORTED, "toto was killed while it ran")
    assert not history.work(dead).exists()
    assert history.settle() == []
    assert {history.get("a", each.number).state for each in (waiting, alive)} == {State.QUEUED, State.RUNNING}
    assert (history.last_result("a"), history.queue("a").number) == ("aborted", 4)
