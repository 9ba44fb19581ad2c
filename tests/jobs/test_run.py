"""Runs that are loud, stubborn or hostile, and runs whose toto dies. (`test_contract` has what a job may rely on.)"""

import asyncio
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
import yaml

from tests.jobs.conftest import Make
from toto.base import process
from toto.cell.limits import Limits
from toto.jobs.folder import Job
from toto.jobs.history import State
from toto.jobs.run import Given, run


async def test_nothing_is_left_but_record_log_and_archive(make: Make) -> None:
    bench = make({"a.run": "echo kept >$ARCHIVE/file; mkdir -p x/y; chmod 0 x; echo x >/tmp/x; echo x >$WORKSPACE/x"})
    ended = await bench.run()
    assert ended.state is State.SUCCESS
    assert sorted(each.name for each in bench.history.folder(ended).iterdir()) == ["archive", "log", "run.json"]
    assert (bench.history.archive(ended) / "file").read_text() == "kept\n"
    assert not list(bench.history.work(ended).parent.iterdir())
    assert bench.history.get("a", 1) == ended
    assert ended.started >= ended.queued > 0 and ended.seconds >= 0


async def test_a_job_cannot_write_into_the_commit_or_toto_s_files(make: Make) -> None:
    bench = make(
        {"a.run": "for each in /infra/jobs/a.run /toto/in_cell.py /x /infra/x; do echo >>$each && exit 1; done; :"}
    )
    assert (await bench.run()).state is State.SUCCESS


async def test_a_job_has_no_variable_of_toto_s_and_toto_s_programs_none_of_the_job_s(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "toto:canary")
    monkeypatch.setenv("SSH_AUTH_SOCK", "/canary")
    # A library of the job's own in the programs that make the cell, which are toto's user's, would be a way out.
    bench = make(
        {"a.env": "LD_PRELOAD=/job/workspace/evil.so\nMARK=1", "a.run": "env; tr '\\0' '\\n' </proc/1/environ"}
    )
    ended = await bench.run()
    said = bench.said(ended)
    assert "canary" not in bench.log(ended)
    assert said.count("MARK=1") == 1  # the script's; process 1 is the cell's own
    assert said.count("LD_PRELOAD=/job/workspace/evil.so") == 1


async def test_a_job_without_a_network_reaches_nothing(make: Make) -> None:
    bench = make({"a.run": "grep -o '[a-z0-9]*:' /proc/net/dev"})
    assert bench.said(await bench.run()) == ["lo:"]


async def test_secrets_are_given_and_masked(make: Make) -> None:
    bench = make({"a.run": "echo token: $TOKEN; printf '%.4s' $TOKEN; sleep 0.1; echo ${TOKEN#????}; echo $A"})
    jobs = bench.jobs
    given = Given(bench.tree, secrets={"TOKEN": "s3cret-word"})
    begun = bench.queue(TOKEN="mine", A="b")
    ended = await run(jobs, jobs.job("a"), begun, bench.history, given)
    assert bench.said(ended) == ["token: ******", "******", "b"]


async def test_twenty_thousand_lines_are_all_there(make: Make) -> None:
    bench = make({"a.run": "seq 20000"})
    assert bench.said(await bench.run()) == [str(number) for number in range(1, 20_001)]


def memory(field: str) -> int:
    """What this process has of memory, in MB."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) // 1000


async def test_a_huge_log_fills_neither_memory_nor_the_disk(make: Make) -> None:
    size = 1_000_000_000 if os.environ.get("TOTO_CUTS") else 300_000_000
    bench = make(
        {"a.conf": "NETWORK=none\nLOG_LIMIT=1", "a.run": f"echo first; head -c {size} /dev/zero; echo; echo last"}
    )
    Path("/proc/self/clear_refs").write_text("5")  # the most that it had counts from here
    before = memory("VmRSS")
    ended = await bench.run()
    assert memory("VmHWM") - before < 50
    assert 500_000 < bench.history.log(ended).stat().st_size < 1_100_000
    said = bench.said(ended)
    assert (said[0], said[-1]) == ("first", "last")
    assert sum(map(len, bench.output)) == 500_000


@pytest.mark.parametrize(
    ("text", "mode", "why"),
    [
        ("#!/bin/sh\n", 0o644, "Permission denied; make it executable (chmod +x)"),
        ("#!/none\n", 0o755, "its interpreter is not in its cell"),
        ("#!/bin/sh\r\necho\r\n", 0o755, "its first line ends like a DOS file's"),
        ("# no interpreter\n", 0o755, "Exec format error; begin it with"),
    ],
)
async def test_a_script_that_cannot_be_run_says_why(make: Make, text: str, mode: int, why: str) -> None:
    bench = make({"a.run": text})
    (bench.tree / "jobs/a.run").chmod(mode)
    ended = await bench.run()
    assert (ended.state, ended.why) == (State.FAILED, "jobs/a.run exited with status 126")
    assert why in bench.log(ended)


async def test_two_runs_of_a_job_at_once_share_the_workspace_alone(make: Make) -> None:
    script = "touch $WORKSPACE/$RUN; until [ -e $WORKSPACE/1 ] && [ -e $WORKSPACE/2 ]; do sleep 0.05; done; ls"
    bench = make({"a.run": f"touch mine-$RUN; {script}"})
    async with asyncio.timeout(120):
        first, second = await asyncio.gather(bench.run(), bench.run())
    assert (bench.said(first), bench.said(second)) == (["mine-1"], ["mine-2"])


async def test_a_cell_s_limit_fails_the_run_and_after_still_runs(make: Make) -> None:
    bench = make({"a.run": "head -c 30000000 /dev/zero >file; sleep 3000", "a.after": "echo $RESULT"})
    jobs = bench.jobs
    given = Given(bench.tree, limits=Limits(disk=10_000_000))
    async with asyncio.timeout(120):
        ended = await run(jobs, jobs.job("a"), bench.queue(), bench.history, given)
    assert ended.state is State.FAILED
    assert ended.why == "jobs/a.run used more than 10 MB of disk and was ended"


async def test_a_run_that_toto_cannot_begin_has_failed(make: Make) -> None:
    bench = make({"a.run": "echo run"})
    begun = bench.queue()
    bench.history.archive(begun).mkdir(parents=True)  # nobody makes it but the run itself
    ended = await run(bench.jobs, Job("a"), begun, bench.history, Given(bench.tree))
    assert (ended.state, bench.said(ended)) == (State.FAILED, [])
    assert "File exists" in ended.why


EXAMPLE = Path(__file__).parents[2] / "examples/infra"


@pytest.mark.parametrize(
    ("job", "given", "state", "said"),
    [
        ("disk-space", {"LIMIT": "100"}, State.SUCCESS, r"web1: \d+ %\nweb2: \d+ %"),
        ("disk-space", {"LIMIT": "-1"}, State.FAILED, r"web1: \d+ %\nweb2: \d+ %"),
        ("failed-units", {}, State.SUCCESS, "web1: df\nweb2: df"),
    ],
)
async def test_the_jobs_of_the_example_run(
    make: Make, job: str, given: dict[str, str], state: State, said: str
) -> None:
    # In the place of toto's `on-host` (tests/flows has that one): here, and not by ssh.
    on_host = '#!/bin/sh\nshift\n[ "$1" = systemctl ] && exec echo df\nexec "$@"\n'
    bench = make(
        {"a.run": "", "scripts/on-host": on_host, "scripts/df": '#!/bin/sh\necho x; echo "/dev/x 1 1 1 7% /"\n'}
    )
    for file in (EXAMPLE / "jobs").iterdir():
        shutil.copy(file, bench.tree / "jobs")
    ended = await bench.run(job, bench.queue(job, **given))
    assert (ended.state, bool(re.fullmatch(said, "\n".join(bench.said(ended))))) == (state, True), bench.log(ended)
    assert (bench.history.archive(ended) / job).stat().st_size > 10
    machines = yaml.safe_load((EXAMPLE / "machines.yaml").read_text())["machines"]
    assert {*bench.jobs.job(job).conf.machines} <= {each["name"] for each in machines}


DIES = """
import asyncio, os, signal, sys
from pathlib import Path
from tests.jobs.conftest import Bench
from toto.jobs.history import History

def heard(chunk):
    if b"now" in chunk:
        os.kill(os.getpid(), signal.SIGKILL)

class Output(list):
    append = staticmethod(heard)

asyncio.run(Bench(Path(sys.argv[1]), History(Path(sys.argv[2])), Output()).run())
"""


@pytest.mark.parametrize("at", ["a.before", "a.run", "a.after"])
async def test_when_toto_is_killed_its_scripts_end_and_none_runs_again(make: Make, tmp_path: Path, at: str) -> None:
    files = {each: f"echo {each} >>$WORKSPACE/x" for each in ("a.before", "a.run", "a.after")}
    # (The word that toto dies of comes last; a process that outlived toto would be found by its command line.)
    files[at] += f"; echo now; sleep 3000.{os.getpid()}; echo again >>$WORKSPACE/x"
    bench = make(files)
    async with asyncio.timeout(120):
        died = await process.run([sys.executable, "-c", DIES, bench.tree, tmp_path / "infra.git"], check=False)
        assert died.status == -signal.SIGKILL
        while sleeping():
            await asyncio.sleep(0.05)
    (dead,) = bench.history.settle()
    assert (dead.state, dead.number) == (State.ABORTED, 1)
    assert not bench.history.work(dead).exists()
    ran = (bench.history.workspace("a") / "x").read_text().split()
    assert ran == list(files)[: list(files).index(at) + 1]
    bench.write({each: "" for each in ("a.before", "a.after")} | {"a.run": "echo $LAST_RESULT"})
    ended = await bench.run()
    assert (ended.number, bench.said(ended)) == (2, ["aborted"])


def sleeping() -> bool:
    word = f"3000.{os.getpid()}".encode()
    found = [each for each in Path("/proc").glob("[0-9]*/cmdline") if each.parent.name != str(os.getpid())]
    return any(_read(each).startswith(b"sleep") and word in _read(each) for each in found)


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:
        return b""
