"""The demo, as `make demo` runs it: it asserts on the machines themselves, and says so by its exit status."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.lab, pytest.mark.minutes(7), pytest.mark.xdist_group("127.0.1")]


def test_the_pushes_end_as_announced_and_nothing_is_left(tmp_path: Path) -> None:
    environment = os.environ | {"TOTO_STATE": str(tmp_path / "state"), "KEEP": ""}
    done = subprocess.run(
        [sys.executable, "-m", "tests.lab.demo"],
        cwd=Path(__file__).parents[2],
        env=environment,
        timeout=1500,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "✗" not in done.stdout
    assert list((tmp_path / "state").iterdir()) == []
    left = subprocess.run(["pgrep", "--full", str(tmp_path)], stdout=subprocess.PIPE, text=True, check=False)
    assert left.stdout == ""


def test_start_that_fails_shows_why_and_keeps_the_logs(tmp_path: Path) -> None:
    environment = os.environ | {
        "TOTO_STATE": str(tmp_path / "state"),
        "KEEP": "",
        "TOTO_DATABASE_URL": "sqlite+aiosqlite:////nowhere/x.db",
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.lab.demo", "--start-only"],
        cwd=Path(__file__).parents[2],
        env=environment,
        timeout=300,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout
    words = done.stdout.partition("The demo cannot go on: ")[2]
    assert words.startswith("toto serve ended with status 1; its last lines:"), done.stdout
    assert "unable to open database file" in words
    assert "Traceback" not in done.stdout.partition("The demo cannot go on")[0], done.stdout
    kept = Path(words.partition("The logs are in ")[2].split()[0])
    assert f"next: see {kept}/server/logs/server.log" in words  # where it is now
    assert "unable to open database file" in (kept / "server" / "logs" / "server.log").read_text()
    assert [each.name for each in (tmp_path / "state").iterdir()] == [kept.name]
