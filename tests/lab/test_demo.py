"""The demo, as `make demo` runs it: it asserts on the machines themselves, and says so by its exit status."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.lab


def test_the_pushes_end_as_told_and_nothing_is_left(tmp_path: Path) -> None:
    environment = os.environ | {"TOTO_STATE": str(tmp_path / "state"), "KEEP": ""}
    done = subprocess.run([sys.executable, "-m", "tests.lab.demo"], cwd=Path(__file__).parents[2], env=environment,
                          timeout=1500, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "✗" not in done.stdout
    assert list((tmp_path / "state").iterdir()) == []
    left = subprocess.run(["pgrep", "--full", str(tmp_path)], stdout=subprocess.PIPE, text=True, check=False)
    assert left.stdout == ""
