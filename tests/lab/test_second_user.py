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

from tests import postgres, second_user
from tests.lab import setup
from toto.nix import daemon

pytestmark = [pytest.mark.lab, pytest.mark.minutes(3), pytest.mark.xdist_group("127.0.1")]


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
    user = pwd.getpwnam(second_user.USER)
    nix = Path(f"/run/toto-nix-{second_user.USER}-{os.getpid()}")
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
        environment = {
            "HOME": str(folder / "home"),
            "USER": second_user.USER,
            "LOGNAME": second_user.USER,
            "TOTO_LAB_CACHE": str(folder / "home" / "lab"),
            "TOTO_STATE": str(folder / "home" / "state"),
            daemon.SOCKET: str(nix / "client" / "socket"),
        }
        command = [*second_user.AS_USER, sys.executable, "-m", "tests.lab.demo", "--start-only"]
        with nix_daemon(nix, grp.getgrgid(user.pw_gid).gr_name):
            done = second_user.run(command, folder / "stage", environment=environment, timeout=600)
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
