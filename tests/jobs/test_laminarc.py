"""`laminarc` in a job's cell: its exit statuses, and what its door does not do. (tests/flows has real runs by it.)"""

import asyncio
import json
from pathlib import Path

import pytest

from tests.jobs.conftest import Make
from toto.base import paths
from toto.jobs import door
from toto.jobs.door import Door
from toto.jobs.folder import Job, Jobs
from toto.jobs.history import History, State


async def test_a_variable_that_is_set_is_there_for_the_scripts_that_follow(make: Make) -> None:
    bench = make(
        {
            "a.before": "laminarc set 'A=x y' B=2 && laminarc set A=z=1; echo ${A-none}",
            "a.run": "echo $A ${B-none}",
            "a.after": "laminarc set JOB=b || echo $? $JOB",
        }
    )
    ended = await bench.run()
    assert bench.said(ended) == ["none", "z=1 none", "laminarc: a:1: 'JOB' cannot be set", "2 a"], bench.log(ended)


async def test_jobs_and_runs_are_shown(make: Make) -> None:
    bench = make({"a.run": "laminarc show-jobs; laminarc show-running; laminarc show-queued", "b.run": ""})
    begun = bench.queue()
    bench.queue("b")
    ended = await bench.run(begun=begun)
    assert bench.said(ended) == ["a", "b", "a:1", "b:1"]


STATUSES = {
    "": 1,
    "--help": 0,
    "what": 1,
    "queue": 1,
    "run --next": 1,
    "set": 1,
    "set A": 1,
    "abort a": 1,
    "abort a x": 1,
    "abort a 77": 2,
    "abort ../a 1": 2,
    "queue nothing": 2,
    "start ../a": 2,
    "run nothing": 3,
    "show-jobs more": 1,
}


async def test_the_exit_statuses_are_laminars(make: Make) -> None:
    script = "".join(f"laminarc {words} >&- 2>&-; echo $?\n" for words in STATUSES)
    bench = make({"a.run": script})
    ended = await bench.run()
    assert dict(zip(STATUSES, map(int, bench.said(ended)), strict=True)) == STATUSES


async def test_a_job_cannot_fill_toto_by_its_door(make: Make) -> None:
    bench = make(
        {
            "a.run": "for each in $(seq 250); do laminarc set V$each=1 2>>said || break; done; echo $each; cat said\n"
            "laminarc set BIG=$(head -c 100000 /dev/zero | tr '\\0' x); echo $?"
        }
    )
    ended = await bench.run()
    limit = "laminarc: a:1: at most 200 variables, and 64 KiB of them"
    assert bench.said(ended) == ["201", limit, limit, "2"]


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (b"", "no question"),
        (b"x\n", "no question"),
        (b"[]\n", "no question"),
        (b'{"do": 1}\n', "no question"),
        (b'{"do": "abort", "job": "a", "number": []}\n', "no question"),
        (b'{"do": "queue", "job": "a", "parameters": 7, "reason": "", "next": 0}\n', "no question"),
        (b"[" * 100_000 + b"\n", "no question"),
        (b"x" * 300_000, "more than 256 KiB"),
    ],
)
async def test_a_strange_question_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: bytes, why: str
) -> None:
    monkeypatch.setenv(paths.STATE, str(tmp_path / "state"))
    history = History(tmp_path / "infra.git")
    deep = tmp_path / ("long" * 40)
    deep.mkdir()
    run = history.queue("a")
    async with asyncio.timeout(60), door.opened(deep, Door(Jobs({"a": Job("a")}), run, history)):
        monkeypatch.chdir(deep)
        reader, writer = await asyncio.open_unix_connection(door.NAME)
        writer.write(sent)
        writer.write_eof()
        assert why in json.loads(await reader.read())["error"]
        writer.close()
    assert history.get("a", 1).state is State.QUEUED
