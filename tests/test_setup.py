"""setup/env and setup/systemd: toto's environment where no shell of the operator's has set anything."""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[1]
SAYS: Final = '. setup/env && echo "$TOTO_VENV" "$TOTO_PYTHON" "$XDG_CACHE_HOME"'


def said(cache: Path, *, home: Path, as_user: Sequence[str] = (), **env: str) -> list[str]:
    """The environment, Python and cache that setup/env finds, as in a systemd unit: PATH has the machine's programs."""
    done = subprocess.run(
        [*as_user, "sh", "-euc", SAYS],
        env={"PATH": "/usr/bin:/bin", "HOME": str(home), "TOTO_CACHE": str(cache), **env},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


def prepared(cache: Path, python: Path) -> Path:
    """An environment such as setup/prepare makes, for a Python."""
    version = subprocess.run([python, "-c", "import platform; print(platform.python_version())"], capture_output=True,
                             text=True, check=True).stdout.strip()  # fmt: skip
    named = (ROOT / "requirements.lock").read_text() + f"{python} {version}\n"
    venv = cache / f"venv-{hashlib.sha256(named.encode()).hexdigest()[:12]}"
    subprocess.run([python, "-m", "venv", "--without-pip", venv], check=True)
    (venv / ".complete").touch()
    return venv


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A Python that is on no PATH, as pyenv's is in a unit."""
    base = Path(os.path.realpath(getattr(sys, "_base_executable", sys.executable)))
    if not base.is_relative_to("/usr"):
        return base
    copy = tmp_path / "python" / "bin" / base.name
    copy.parent.mkdir(parents=True)
    shutil.copy(base, copy)
    return copy


def test_the_environment_that_was_prepared_is_found_though_its_python_is_not_on_path(
    tmp_path: Path, elsewhere: Path
) -> None:
    cache = tmp_path / "cache"
    missing, *_ = said(cache, home=tmp_path)
    venv = prepared(cache, elsewhere)
    assert str(venv) != missing
    assert said(cache, home=tmp_path)[:2] == [str(venv), str(elsewhere)]
    # One of a different lock file does not count, and neither does one that was not finished.
    (venv / ".complete").unlink()
    assert said(cache, home=tmp_path)[0] == missing
    (venv / ".complete").touch()
    venv.rename(cache / "venv-0123456789ab")
    assert said(cache, home=tmp_path)[0] == missing


def test_a_python_that_is_asked_for_is_used(tmp_path: Path, elsewhere: Path) -> None:
    cache = tmp_path / "cache"
    missing, *_ = said(cache, home=tmp_path)
    prepared(cache, elsewhere)
    assert said(cache, home=tmp_path, PYTHON="/usr/bin/python3")[0] == missing


def test_a_server_whose_environment_is_root_s_has_its_caches_in_its_state(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    assert said(cache, home=tmp_path)[2] == f"{cache}/xdg"
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--"] if os.geteuid() == 0 else []
    assert said(Path("/usr"), home=tmp_path, as_user=nobody, TOTO_STATE="/srv/toto")[2] == "/srv/toto/cache"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="THE UNITS ARE NOT VERIFIED: no systemd-analyze")
def test_systemd_knows_every_line_of_the_units() -> None:
    units = sorted((ROOT / "setup/systemd").glob("*.service"))
    assert [each.name for each in units] == ["toto-nix-daemon.service", "toto.service"]
    done = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_root_s_unit_runs_nothing_but_the_nix_daemon() -> None:
    lines = (ROOT / "setup/systemd/toto-nix-daemon.service").read_text().splitlines()
    assert [line for line in lines if line.startswith("Exec")] == [
        "ExecStart=/bin/sh -c '. setup/env && exec toto nix-daemon --group toto'"
    ]
    assert "User=toto" in (ROOT / "setup/systemd/toto.service").read_text().splitlines()
