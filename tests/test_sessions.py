"""However a session of pytest is ended, its fixtures end, and so do the processes that it began."""

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
AT_ONCE = ("-n", "2", "--dist", "loadgroup")


def until(folder: Path, suffix: str, files: int) -> list[Path]:
    deadline = time.monotonic() + 120
    while len(found := [each for each in folder.glob(f"*{suffix}") if suffix == ".ended" or each.read_text()]) < files:
        assert time.monotonic() < deadline, (folder / "log").read_text()
        time.sleep(0.05)
    return found


@pytest.mark.parametrize(("number", "more"), [
    (signal.SIGTERM, ()), (signal.SIGTERM, AT_ONCE), (signal.SIGINT, AT_ONCE), (signal.SIGKILL, AT_ONCE)])
def test_fixtures_end_whatever_ends_the_session(tmp_path: Path, number: signal.Signals, more: tuple[str, ...]) -> None:
    names = "ab" if more else "a"
    for name in names:
        (tmp_path / f"test_{name}.py").write_text(TEST)
    with (tmp_path / "log").open("wb") as log:
        session = subprocess.Popen([sys.executable, "-m", "pytest", "-p", "tests.sessions", *more], cwd=tmp_path,
                                   env=os.environ | {"PYTEST_ADDOPTS": ""}, stdout=log, stderr=log)
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
