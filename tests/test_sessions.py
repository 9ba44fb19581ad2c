"""Tests are divided between processes by what they share; and whatever ends a session ends its fixtures."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from toto.base import process

pytestmark = pytest.mark.slow

TEST = """
import os, pathlib, pytest, time
here = pathlib.Path(__file__)

@pytest.fixture(scope="session")
def dear():
    here.with_suffix(".begun").write_text(f"{os.getpid()}\\n")
    yield
    time.sleep(1)
    here.with_suffix(".ended").touch()

def test_that_lasts(dear):
    time.sleep(1000)
"""
AT_ONCE = ("-n", "2", "--dist", "loadgroup", "--no-loadscope-reorder")


def test_what_shares_something_shares_a_process_and_the_longest_begin_first(tmp_path: Path) -> None:
    for name, marks in {
        "a": "minutes(1)",
        "b": "minutes(3), pytest.mark.xdist_group('x')",
        "c": "xdist_group('x')",
        "d": "minutes(2)",
    }.items():
        (tmp_path / f"test_{name}.py").write_text(
            f"import os, pytest, time\nfrom pathlib import Path\npytestmark = [pytest.mark.{marks}]\n"
            "@pytest.mark.parametrize('number', range(3))\ndef test(number):\n"
            "    with Path(__file__).with_name(f'{os.getpid()}.ran').open('a') as ran:\n"
            f"        ran.write('{name}')\n    time.sleep(0.2)\n"
        )
    subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "tests.sessions", *AT_ONCE],
        cwd=tmp_path,
        check=True,
        env=os.environ | {"PYTEST_ADDOPTS": ""},
    )
    assert sorted(each.read_text() for each in tmp_path.glob("*.ran")) == ["bbbccc", "dddaaa"]


def until(folder: Path, suffix: str, files: int) -> list[Path]:
    deadline = time.monotonic() + 120
    while len(found := [each for each in folder.glob(f"*{suffix}") if suffix == ".ended" or each.read_text()]) < files:
        assert time.monotonic() < deadline, (folder / "log").read_text()
        time.sleep(0.05)
    return found


@pytest.mark.parametrize(
    ("number", "more"),
    [(signal.SIGTERM, ()), (signal.SIGTERM, AT_ONCE), (signal.SIGINT, AT_ONCE), (signal.SIGKILL, AT_ONCE)],
)
def test_fixtures_end_whatever_ends_the_session(tmp_path: Path, number: signal.Signals, more: tuple[str, ...]) -> None:
    names = "ab" if more else "a"
    for name in names:
        (tmp_path / f"test_{name}.py").write_text(TEST)
    with (tmp_path / "log").open("wb") as log:
        session = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-p", "tests.sessions", *more],
            cwd=tmp_path,
            env=os.environ | {"PYTEST_ADDOPTS": ""},
            stdout=log,
            stderr=log,
        )
    try:
        pids = [int(each.read_text()) for each in until(tmp_path, ".begun", len(names))]
        session.send_signal(number)
        until(tmp_path, ".ended", len(names))
        session.wait(120)
        deadline = time.monotonic() + 60
        while left := [pid for pid in pids if process.started(pid) is not None]:
            assert time.monotonic() < deadline, left
            time.sleep(0.05)
    finally:
        session.kill()
        session.wait()
