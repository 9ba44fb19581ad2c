"""The demo's start as a different user of a machine on which root has run it before: nothing is in its way."""

import contextlib
import grp
import os
import pwd
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import postgres
from tests.lab import setup
from toto.nix import daemon
from toto.server.deployments import ROOT

pytestmark = [pytest.mark.lab, pytest.mark.minutes(3), pytest.mark.xdist_group("127.0.1")]
USER = "nobody"

# In a mount namespace of its own: where they lie below root's home, the programs and the checkout, at their own paths,
# in a home that can be entered. Arguments: a folder, paths, --.
MOUNTS = """
set -eu
stage=$1; shift
mount -t tmpfs -o mode=755 stage "$stage"
number=0
for path; do
    [ "$path" != -- ] || break
    number=$((number + 1)); mkdir "$stage/$number"; mount --bind "$path" "$stage/$number"
done
mount -t tmpfs -o mode=755 home "$HOME"
number=0
while [ "$1" != -- ]; do
    number=$((number + 1)); mkdir -p "$1"; mount --bind "$stage/$number" "$1"; shift
done
shift
exec "$@"
"""


@contextlib.contextmanager
def nix_daemon(home: Path, group: str) -> Iterator[None]:
    """`toto nix-daemon` as a unit of root's would run it."""
    argv = [sys.executable, "-m", "toto.cli", "nix-daemon", "--lifeline", "--home", str(home), "--group", group]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as running:
        assert running.stdin is not None and running.stdout is not None
        assert b"answers" in running.stdout.readline()
        yield
        running.stdin.close()
        assert running.wait(30) == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")
def test_demo_starts_for_a_second_user_of_the_machine(tmp_path_factory: pytest.TempPathFactory) -> None:
    setup.setup()  # root has been here, and left what it leaves
    user = pwd.getpwnam(USER)
    nix = Path(f"/run/toto-nix-{USER}-{os.getpid()}")
    Path("/tmp/runner_storage").mkdir(mode=0o700, exist_ok=True)  # as Prefect's own worker makes it, for one user
    folder = Path(
        subprocess.run(
            ["mktemp", "-d", "/var/tmp/toto-second.XXXXXX"], stdout=subprocess.PIPE, text=True, check=True
        ).stdout.strip()
    )
    try:
        for name in ("home", "stage", "home/lab"):
            (folder / name).mkdir()
        # What apt downloaded may be taken over; it is read only.
        subprocess.run(["cp", "-r", setup.cache() / "debs", folder / "home" / "lab" / "debs"], check=True)
        for each in (folder, *folder.rglob("*")):
            os.chown(each, user.pw_uid, user.pw_gid)
        seen = {Path(sys.prefix), Path(sys.base_prefix), ROOT, Path(os.environ["TOTO_HELM4"]).parents[1]}
        environment = {
            "HOME": str(folder / "home"),
            "USER": USER,
            "LOGNAME": USER,
            "PATH": os.environ["PATH"],
            "LANG": "C.UTF-8",
            "PYTHONPATH": str(ROOT),
            "TOTO_LAB_CACHE": str(folder / "home" / "lab"),
            "TOTO_STATE": str(folder / "home" / "state"),
            "DO_NOT_TRACK": "1",
            daemon.SOCKET: str(nix / "client" / "socket"),
        }
        argv = [
            "unshare",
            "--mount",
            "--propagation",
            "private",
            "sh",
            "-c",
            MOUNTS,
            "sh",
            folder / "stage",
            *sorted(seen),
            "--",
            "setpriv",
            f"--reuid={user.pw_uid}",
            f"--regid={user.pw_gid}",
            "--clear-groups",
            "env",
            "-i",
            *(f"{name}={value}" for name, value in environment.items()),
            sys.executable,
            "-m",
            "tests.lab.demo",
            "--start-only",
        ]
        with nix_daemon(nix, grp.getgrgid(user.pw_gid).gr_name):
            done = subprocess.run(
                [str(each) for each in argv],
                cwd="/",
                env=os.environ | {"HOME": str(Path.home())},
                timeout=600,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
            )
        assert not nix.exists()
        assert done.returncode == 0, done.stdout
        assert "no error, no traceback" in done.stdout, done.stdout
        left = [
            entry.path
            for place in ("/tmp", "/var/tmp", "/run/lock", "/dev/shm")
            for entry in os.scandir(place)
            if entry.stat(follow_symlinks=False).st_uid == user.pw_uid
            and entry.path != str(folder)
            and not entry.name.startswith(postgres.PREFIX)
        ]  # of other tests, which run as root beside this one
        assert left == [], "names in places that all users share"
    finally:
        subprocess.run(["rm", "-rf", folder], check=True)
