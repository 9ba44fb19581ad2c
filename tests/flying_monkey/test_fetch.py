"""How a copy from toto's cache ends that may not go on. (A real agent fetches in test_agent.py and test_pulls.py.)"""

import os
import time
from pathlib import Path

import pytest

from flying_monkey import fetch, machine
from flying_monkey.machine import NotReady


@pytest.mark.parametrize(
    ("free", "seconds", "says"),
    [
        ((2 * fetch.ROOM, 0), 600, "the disk of /nix/store is almost full"),
        ((2 * fetch.ROOM,), 1, "the closure was not fetched in time"),
    ],
)
def test_a_copy_is_ended_when_the_room_or_its_time_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: tuple[int, ...], seconds: float, says: str
) -> None:
    """With all that it has started. What is free is told by a stand-in."""
    left = list(free)
    monkeypatch.setattr(machine, "free", lambda: left.pop(0) if len(left) > 1 else left[0])
    copies = ["sh", "-c", f"sleep 600 & echo $! > {tmp_path}/copying; wait"]
    with pytest.raises(NotReady, match=says):
        fetch._copy(copies, dict(os.environ), None, time.monotonic() + seconds)
    stat = Path("/proc", (tmp_path / "copying").read_text().strip(), "stat")
    assert not stat.exists() or ") Z " in stat.read_text()


def test_a_copy_that_fails_says_the_error_and_nothing_that_a_terminal_obeys() -> None:
    copies = ["sh", "-c", "printf 'copying\\nerror: \\033[31mno signature\\nbye\\n' >&2; exit 1"]
    with pytest.raises(NotReady, match=r"^toto's cache: error: .*no signature$") as failed:
        fetch._copy(copies, dict(os.environ), None, time.monotonic() + 600)
    assert "\033" not in str(failed.value)
