"""setup/env and setup/systemd: toto's environment where no shell of the operator's has set anything."""

import hashlib
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[1]
SAYS: Final = 'toto_preparing=1; . setup/env && echo "$TOTO_VENV" "$TOTO_PYTHON" "$XDG_CACHE_HOME"'


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


def started(cache: Path, home: Path, *, as_user: Sequence[str] = ()) -> "subprocess.CompletedProcess[str]":
    """What comes of a unit's command."""
    return subprocess.run(
        [*as_user, "sh", "-c", ". setup/env && exec toto serve"],
        env={"PATH": "/usr/bin:/bin", "HOME": str(home), "TOTO_CACHE": str(cache), "TOTO_STATE": str(home)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_unit_that_cannot_run_says_why(tmp_path: Path, elsewhere: Path) -> None:
    cache = tmp_path / "cache"
    nothing = started(cache, tmp_path)
    assert nothing.returncode == 78 and f"no environment for this checkout in {cache}" in nothing.stderr
    assert f"TOTO_CACHE={cache} setup/prepare" in nothing.stderr
    venv = prepared(cache, elsewhere)
    (venv / "bin/toto").write_text('#!/bin/sh\necho "$@"\n')
    (venv / "bin/toto").chmod(0o755)
    done = started(cache, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "serve\n", "")
    for link in venv.glob("bin/python*"):  # its Python is gone, or in a home that its user cannot enter
        link.unlink()
        link.symlink_to("/nowhere/python")
    gone = started(cache, tmp_path)
    assert gone.returncode == 78 and f"{venv} is of {elsewhere}, which is gone, or which " in gone.stderr
    assert "may not run: set PYTHON" in gone.stderr
    units = [(ROOT / f"setup/systemd/{name}.service").read_text() for name in ("toto", "toto-nix-daemon")]
    assert ["\nRestartPreventExitStatus=78\n" in each for each in units] == [True, True]


# In a mount namespace, whose /etc, /opt, /usr/local/bin and /var/lib are its own.
APART: Final = """
set -eu
mount -t tmpfs none "$1"
for each in etc opt usr/local/bin var/lib; do
    mkdir -p "$1/$each/up" "$1/$each/work"
    mount -t overlay -o "lowerdir=/$each,upperdir=$1/$each/up,workdir=$1/$each/work" overlay "/$each"
done
mkdir -p /opt/toto-9 /opt/toto-env/helm/4
cp -r --parents setup requirements.lock Makefile /opt/toto-9
install -m 755 /bin/true /opt/toto-env/helm/4/helm
cp setup/helm.lock /opt/toto-env/helm/lock
cp -r "$2" /opt/toto-env
chown -R root:root /opt/toto-9 /opt/toto-env
chmod -R go-w /opt/toto-9 /opt/toto-env
cd /opt/toto-9
"""


def installed(tmp_path: Path, venv: Path, script: str) -> "subprocess.CompletedProcess[str]":
    (tmp_path / "apart").mkdir(exist_ok=True)
    return subprocess.run(
        ["unshare", "--mount", "sh", "-c", APART + textwrap.dedent(script), "sh", tmp_path / "apart", venv],
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="only root installs units")
def test_make_install_has_units_that_the_user_toto_can_run(tmp_path: Path) -> None:
    venv = prepared(tmp_path / "cache", Path("/usr/bin/python3").resolve())
    (venv / "bin/toto").write_text('#!/bin/sh\necho "$(id -un) $PWD $TOTO_STATE $*"\n')
    (venv / "bin/toto").chmod(0o755)
    done = installed(
        tmp_path,
        venv,
        """
        make -s install 2>/dev/null && setup/install
        cd / && /usr/local/bin/toto password
        ls /etc/systemd/system/toto*.service; stat -c '%U %a' /var/lib/toto
        """,
    )
    assert "next: systemctl enable --now toto-nix-daemon toto" in done.stderr and "about to make" not in done.stderr
    assert done.stdout.splitlines() == [
        "toto / /var/lib/toto password",
        "/etc/systemd/system/toto-nix-daemon.service",
        "/etc/systemd/system/toto.service",
        "toto 700",
    ], done.stderr
    wrong = {
        "chown daemon /opt/toto-9/setup/env; setup/install": "/opt/toto-9/setup/env is not root's alone",
        "chmod o+w /opt/toto-env/helm/4/helm; setup/install": "/opt/toto-env/helm/4/helm is not root's alone",
        "ln -s toto-8 /opt/toto; setup/install": "if that is meant",
        "install -m 700 /usr/bin/python3 /opt/python; PYTHON=/opt/python setup/install": "cannot run /opt/python",
    }
    for script, words in wrong.items():
        refused = installed(tmp_path, venv, script)
        assert refused.returncode == 1 and words in refused.stderr, refused.stderr


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="THE UNITS ARE NOT VERIFIED: no systemd-analyze")
def test_systemd_knows_every_line_of_the_units() -> None:
    units = sorted((ROOT / "setup/systemd").glob("*.service"))
    assert [each.name for each in units] == ["toto-nix-daemon.service", "toto.service"]
    done = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_root_s_unit_runs_nothing_but_the_nix_daemon() -> None:
    lines = (ROOT / "setup/systemd/toto-nix-daemon.service").read_text().splitlines()
    assert [line for line in lines if line.startswith("Exec")] == [
        "ExecStart=/bin/sh -c '. setup/env && exec toto nix-daemon --group toto'",
        "ExecReload=/bin/kill -HUP $MAINPID",
    ]
    assert "User=toto" in (ROOT / "setup/systemd/toto.service").read_text().splitlines()
