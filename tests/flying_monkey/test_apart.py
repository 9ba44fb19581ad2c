"""What is done apart has no rights, no files, and no time but its own."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from flying_monkey import apart
from flying_monkey.apart import Failed

is_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


def test_what_it_returns_comes_back() -> None:
    assert apart.run(lambda: b"x" * 100_000, None, longest=10, most=100_000) == b"x" * 100_000
    assert apart.run(lambda: b"", None, longest=10, most=1) == b""


@is_root
def test_it_is_nobody_and_cannot_become_root_again() -> None:
    def who() -> bytes:
        with pytest.raises(PermissionError):
            os.setresuid(0, 0, 0)
        with pytest.raises(PermissionError):
            Path("/etc/shadow").read_bytes()
        return f"{os.getresuid()} {os.getresgid()} {os.getgroups()}".encode()

    nobody = apart.user("nobody")
    assert nobody is not None
    ids = ((nobody.uid,) * 3, (nobody.gid,) * 3)
    assert apart.run(who, nobody, longest=10, most=200).decode() == f"{ids[0]} {ids[1]} []"


@is_root
def test_root_is_nobody_to_work_as() -> None:
    for name in ("root", "no-such-user"):
        with pytest.raises(Failed, match=name):
            apart.user(name)


def test_it_has_no_file_of_its_parents(tmp_path: Path) -> None:
    with (tmp_path / "secret").open("w"):
        found = apart.run(lambda: " ".join(os.listdir("/proc/self/fd")).encode(), None, longest=10, most=200)  # noqa: PTH208
    assert set(found.split()) <= {b"0", b"1", b"2", b"3", b"4"}, "the pipe, /dev/null, and the folder that is listed"


@pytest.mark.parametrize(
    ("work", "words"),
    [
        (lambda: b"x" * 101, "more than 100 bytes"),
        (lambda: os._exit(3), "without a word"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "without a word"),
        (lambda: int("\x1b[31mred"), r"ValueError: invalid literal for int\(\) with base 10: '.x1b\[31mred'"),
        (lambda: Path("/missing").read_bytes(), "FileNotFoundError"),
    ],
)
def test_what_goes_wrong_is_one_plain_line(work: object, words: str) -> None:
    with pytest.raises(Failed, match=words) as caught:
        apart.run(work, None, longest=10, most=100)  # type: ignore[arg-type]
    assert str(caught.value).isprintable()


def test_it_ends_in_time_with_what_it_started(tmp_path: Path) -> None:
    def hang() -> bytes:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with subprocess.Popen(["sleep", "300"]) as slept:
            os.write(3, b"+")
            (tmp_path / "pid").write_text(str(slept.pid))
            slept.wait()
        return b""

    began = time.monotonic()
    with pytest.raises(Failed, match="in time"):
        apart.run(hang, None, longest=1, most=100)
    assert time.monotonic() - began < 5
    pid = int((tmp_path / "pid").read_text())
    while time.monotonic() - began < 5 and _runs(pid):
        time.sleep(0.05)
    assert not _runs(pid)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
