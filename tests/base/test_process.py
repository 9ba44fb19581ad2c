"""Processes: whatever a program does, nothing of it outlives toto's call, hangs it, floods it or shows a secret."""

import asyncio
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from toto.base import process
from toto.base.process import CommandFailed, CommandNotFound, CommandTimeout, run, start


def sh(body: str) -> list[str]:
    return ["sh", "-c", body]


def gone(pid: int) -> bool:
    """Whether a process has ended. One that was just killed gets a moment to die."""
    for _ in range(100):
        if process.started(pid) is None:
            return True
        time.sleep(0.01)
    return False


async def pid_in(path: Path) -> int:
    for _ in range(200):
        if path.exists() and (text := path.read_text()).endswith("\n"):
            return int(text)
        await asyncio.sleep(0.02)
    raise AssertionError(f"nothing was written to {path}")


async def test_a_finished_command_leaves_its_output_and_status() -> None:
    done = await run(sh("echo out; echo err >&2; exit 3"), check=False)
    assert (done.status, done.stdout, done.stderr, done.lines) == (3, "out\n", "err\n", ["out"])
    assert not done.truncated and done.seconds >= 0


async def test_a_failed_command_is_reported_with_its_last_lines() -> None:
    with pytest.raises(CommandFailed) as caught:
        await run(sh("echo one; echo the disk is full >&2; exit 4"), target="web1")
    assert caught.value.status == 4
    assert str(caught.value).startswith("web1: `sh -c ")
    assert "exited with status 4:\nthe disk is full" in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


async def test_a_command_ended_by_a_signal_is_reported_with_its_name() -> None:
    with pytest.raises(CommandFailed, match="was ended by SIGSEGV and said nothing"):
        await run(sh("kill -SEGV $$"))


async def test_a_program_that_is_not_here_is_reported() -> None:
    with pytest.raises(CommandNotFound, match="no-such-program"):
        await run(["no-such-program"])
    with pytest.raises(CommandNotFound):
        await run(["sh"], env={"PATH": "/nowhere"})


async def test_a_timeout_ends_the_whole_group(tmp_path: Path) -> None:
    with pytest.raises(CommandTimeout, match="did not end within 1 s; its last lines:\nbusy"):
        await run(sh(f"echo busy; sleep 1000 & echo $! > {tmp_path}/pid; wait"), timeout=1)
    assert gone(await pid_in(tmp_path / "pid"))


async def test_a_program_that_ignores_sigterm_is_killed() -> None:
    with pytest.raises(CommandTimeout):
        await run(sh("trap '' TERM; while :; do sleep 0.1; done"), timeout=0.3, grace=0.5)


async def test_a_program_may_end_itself_in_its_grace(tmp_path: Path) -> None:
    with pytest.raises(CommandTimeout):
        await run(sh(f"trap 'echo bye > {tmp_path}/bye; exit' TERM; while :; do sleep 0.05; done"), timeout=0.5)
    assert (tmp_path / "bye").read_text() == "bye\n"


async def test_a_cancel_ends_the_whole_group(tmp_path: Path) -> None:
    task = asyncio.create_task(run(sh(f"sleep 60 & echo $! > {tmp_path}/pid; wait")))
    pid = await pid_in(tmp_path / "pid")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert gone(pid)


async def test_a_daemon_that_holds_stdout_hangs_nothing_and_is_ended(tmp_path: Path) -> None:
    done = await run(sh(f"sleep 1000 & echo $! > {tmp_path}/pid; echo done"), timeout=60)
    assert done.stdout == "done\n"
    assert gone(await pid_in(tmp_path / "pid"))


async def test_a_daemon_with_a_session_of_its_own_is_ended_too(tmp_path: Path) -> None:
    await run(
        sh(
            f"setsid sh -c 'echo $$ > {tmp_path}/pid; exec sleep 60' &\n"
            f"while [ ! -s {tmp_path}/pid ]; do sleep 0.02; done"
        )
    )
    assert gone(await pid_in(tmp_path / "pid"))


CONTAINER = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child", "--mount-proc"]


def test_daemons_are_ended_also_when_process_ids_begin_again(tmp_path: Path) -> None:
    """In a container of its own, in which the next process ids are the last that there are."""
    body = (
        "for each in 1 2 3 4 5 6; do setsid sh -c 'echo $$ >> $0; exec sleep 60' $0 & done\n"
        "while [ $(wc -l < $0) != 6 ]; do sleep 0.02; done"
    )
    program = (
        "import asyncio\nfrom pathlib import Path\nfrom toto.base import process\n"
        "ids = Path('/proc/sys/kernel')\n"
        "(ids / 'ns_last_pid').write_text(str(int((ids / 'pid_max').read_text()) - 6))\n"
        f"asyncio.run(process.run(['sh', '-c', {body!r}, '{tmp_path}/pids']))\n"
        f"pids = [int(each) for each in Path('{tmp_path}/pids').read_text().split()]\n"
        "assert min(pids) < 1000 < max(pids), pids\n"
        "from tests.base.test_process import gone\n"
        "assert all(map(gone, pids)), pids\n"
    )
    if subprocess.run([*CONTAINER, "true"], check=False, capture_output=True).returncode != 0:
        pytest.skip("this machine allows no container")
    (tmp_path / "pids").touch()
    done = subprocess.run([*CONTAINER, sys.executable, "-c", program], check=False, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")


async def test_what_a_command_may_have_left_is_looked_for_among_what_was_started_since() -> None:
    async with start(["sleep", "60"]) as older, start(["sleep", "60"]) as running, start(["sleep", "60"]) as younger:
        found = process._younger(running.pid)
        assert younger.pid in found
        assert not {older.pid, running.pid, os.getpid(), 1} & set(found)


async def test_a_long_grace_is_for_the_program_and_not_for_what_it_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "LEFT_BEHIND", 0.1)
    async with asyncio.timeout(100):
        await run(
            sh(
                f"(trap '' INT; echo > {tmp_path}/began; sleep 1000) &\n"
                f"while [ ! -e {tmp_path}/began ]; do sleep 0.02; done"
            ),
            signals=(signal.SIGINT, signal.SIGTERM),
            grace=1000,
        )


@pytest.mark.slow
async def test_output_is_kept_within_bounds_and_all_of_it_is_heard() -> None:
    heard = 0

    def hear(line: str) -> None:
        nonlocal heard
        heard += 1

    done = await run(sh("echo first; yes | head -n 2000000; echo last"), keep=10_000, on_line=hear)
    assert heard == 2_000_002
    assert done.truncated
    assert len(done.stdout) < 20_000
    assert done.stdout.startswith("first\n") and done.stdout.endswith("last\n") and "bytes left out" in done.stdout


async def test_lines_come_while_the_program_runs_without_their_ends(tmp_path: Path) -> None:
    came: list[str] = []

    def hear(line: str) -> None:
        came.append(line)
        (tmp_path / line).touch()

    await run(
        sh(f"printf 'a\\r\\nb\\n'; until [ -e {tmp_path}/b ]; do sleep 0.02; done; printf 'no end'; printf 'e\\n' >&2"),
        on_line=hear,
        on_error_line=came.append,
        timeout=60,
    )
    assert sorted(came) == ["a", "b", "e", "no end"]


async def test_a_line_without_end_comes_in_pieces() -> None:
    lengths: list[int] = []
    await run(sh("head -c 1000000 /dev/zero | tr '\\0' x"), on_line=lambda line: lengths.append(len(line)))
    assert sum(lengths) == 1_000_000
    assert max(lengths) <= process.LONGEST_LINE


async def test_secrets_are_masked_everywhere() -> None:
    lines: list[str] = []
    done = await run(
        sh("echo say hunter2; echo hunter2 >&2"),
        secrets=["hunter2", ""],
        on_line=lines.append,
        on_error_line=lines.append,
    )
    assert "hunter2" not in f"{done}{lines}"
    with pytest.raises(CommandFailed) as failed:
        await run(sh("echo hunter2 >&2; exit 1"), secrets=["hunter2"])
    with pytest.raises(CommandTimeout) as late:
        await run(sh("echo hunter2; sleep 9"), secrets=["hunter2"], timeout=0.3)
    assert "hunter2" not in f"{failed.value}{failed.value.argv}{late.value}{late.value.argv}"


async def test_bytes_that_are_no_text_are_replaced() -> None:
    assert (await run(sh("printf '\\377ok'"))).stdout == "\ufffdok"


async def test_a_big_stdin_is_fed_while_output_is_read() -> None:
    data = b"x" * 5_000_000
    done = await run(["cat"], stdin=data, keep=20_000_000)
    assert done.stdout == data.decode()


async def test_a_program_that_does_not_read_its_stdin_is_no_trouble() -> None:
    assert (await run(["true"], stdin=b"x" * 5_000_000)).status == 0


async def test_without_stdin_a_program_reads_nothing() -> None:
    assert (await run(["cat"], timeout=10)).stdout == ""


async def test_the_environment_is_the_one_given() -> None:
    done = await run(["env"], env={"PATH": os.environ["PATH"], "A": "b"})
    names = {line.partition("=")[0] for line in done.lines}
    assert {"A", "PATH", process.COOKIE} == names - {"PWD", "SHLVL", "_"}


async def test_what_is_started_ends_with_its_block() -> None:
    async with start(["sleep", "60"]) as running:
        assert running.status is None
        assert not gone(running.pid)
    assert running.status is not None
    assert gone(running.pid)


async def test_many_at_once_are_no_trouble() -> None:
    done = await asyncio.gather(*(run(sh(f"echo {n}")) for n in range(40)))
    assert [each.stdout for each in done] == [f"{n}\n" for n in range(40)]


def test_what_a_dead_toto_left_is_killed_and_the_living_are_spared(monkeypatch: pytest.MonkeyPatch) -> None:
    here = process._pid_namespace()
    orphan = subprocess.Popen(
        ["sleep", "60"], env={**os.environ, process.COOKIE: f"1.1.{here}.0"}, start_new_session=True
    )
    ours = subprocess.Popen(["sleep", "60"], env={**os.environ, process.COOKIE: f"{process.owner()}.{here}.0"})
    monkeypatch.setattr(process, "_pids", lambda: [orphan.pid, ours.pid])  # the only ones that may be ended
    try:
        deadline = time.monotonic() + 60
        killed: list[int] = []
        while orphan.pid not in killed and time.monotonic() < deadline:
            killed += process.clean_up()
        assert orphan.pid in killed
        assert orphan.wait(60) == -9
        assert ours.poll() is None
    finally:
        for each in (orphan, ours):
            each.kill()
            each.wait()


def children(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_toto_in_a_container_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if subprocess.run([*CONTAINER, "true"], check=False, capture_output=True).returncode != 0:
        pytest.skip("this machine allows no container")
    program = (
        "import asyncio\nfrom toto.base.process import run\n"
        f"asyncio.run(run(['sh', '-c', 'echo $$ > {tmp_path}/pid; exec sleep 60']))\n"
    )
    there = subprocess.Popen([*CONTAINER, sys.executable, "-c", program])
    try:
        assert asyncio.run(pid_in(tmp_path / "pid")) < 1000, "a number of the container's own"
        inner = [pid for child in children(there.pid) for pid in children(child)]
        assert process.COOKIE.encode() in Path(f"/proc/{inner[0]}/environ").read_bytes()
        monkeypatch.setattr(process, "_pids", lambda: inner)
        assert process.clean_up() == []
        assert there.poll() is None
    finally:
        there.kill()
        there.wait()


def test_the_death_of_toto_ends_its_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        "import asyncio\nfrom toto.base.process import run\n"
        f"asyncio.run(run(['sh', '-c', 'echo $$ > {tmp_path}/pid; exec sleep 60']))\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program])
    try:
        pid = asyncio.run(pid_in(tmp_path / "pid"))
    finally:
        parent.kill()
        parent.wait()
    deadline = time.monotonic() + 60
    while not gone(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    # Where there is no setpriv, the next start of toto ends it.
    monkeypatch.setattr(process, "_pids", lambda: [pid])
    assert gone(pid) or pid in process.clean_up()


def test_processes_that_end_just_then_are_no_trouble() -> None:
    churn = subprocess.Popen(["sh", "-c", "while :; do (true & true & wait); done"])
    try:
        for _ in range(2000):
            assert churn.pid in process.descendants(os.getpid())
    finally:
        churn.kill()
        churn.wait()


def test_a_process_is_identified_by_its_start_as_well() -> None:
    assert process.lives(process.owner())
    assert not process.lives(f"{os.getpid()}.1")
    assert not process.lives("nonsense")


async def test_a_program_that_is_attached_has_this_process_own_input_and_output() -> None:
    text = (
        "import asyncio; from toto.base import process; "
        "print(asyncio.run(process.attached(['sh', '-c', 'read word; echo got $word; exit 3'])))"
    )
    done = await process.run([sys.executable, "-c", text], stdin=b"it\n")
    assert done.lines == ["got it", "3"]
    with pytest.raises(process.CommandNotFound):
        await process.attached(["no-such-program"])
