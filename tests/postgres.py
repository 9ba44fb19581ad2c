"""A PostgreSQL server of the tests' own, on a unix socket. It dies with the process that started it."""

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from toto.base import process

PREFIX = "toto-postgres."


class Postgres:
    """A cluster in a directory; `dsn` is how libpq and its like reach it, `url` is what Prefect takes."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.dsn = f"host={home} user=toto dbname=postgres sslmode=disable"
        self.url = f"postgresql+asyncpg://toto@/postgres?host={home}"
        self.server: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the server and wait until it answers."""
        with (self.home / "log").open("wb") as log:
            self.server = subprocess.Popen(
                [*_unprivileged(), "postgres", "-D", self.home / "data", "-k", self.home, "-h", "", "-F",
                 "-c", "dynamic_shared_memory_type=mmap"],
                cwd="/", stdout=log, stderr=log, env={"PATH": os.environ["PATH"]})
        deadline = time.monotonic() + 60
        while "ready to accept connections" not in (self.home / "log").read_text():
            assert self.server.poll() is None and time.monotonic() < deadline, (self.home / "log").read_text()
            time.sleep(0.02)

    def stop(self) -> None:
        """Stop it at once, as a crash would; its data stays."""
        assert self.server is not None
        self.server.send_signal(signal.SIGQUIT)
        try:
            self.server.wait(30)
        finally:
            self.server.kill()


@contextlib.contextmanager
def running() -> Iterator[Postgres]:
    """A server for as long as the block lasts. What a killed test session left of an earlier one is removed."""
    folder = Path(tempfile.gettempdir())  # not pytest's own, which nobody else may enter
    for left in folder.glob(f"{PREFIX}*"):
        if not process.lives(".".join(left.name.removeprefix(PREFIX).split(".")[:2])):
            shutil.rmtree(left, ignore_errors=True)
    home = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{process.owner()}.", dir=folder))
    if os.geteuid() == 0:
        nobody = pwd.getpwnam("nobody")
        os.chown(home, nobody.pw_uid, nobody.pw_gid)
    cluster = Postgres(home)
    try:
        subprocess.run([*_unprivileged(), "initdb", "--no-sync", "--auth=trust", "--username=toto", "--encoding=UTF8",
                        "--no-locale", "-D", home / "data"], cwd="/", env={"PATH": os.environ["PATH"]}, check=True,
                       stdout=subprocess.DEVNULL, timeout=120)
        cluster.start()
        yield cluster
    finally:
        if cluster.server is not None:
            cluster.stop()
        shutil.rmtree(home, ignore_errors=True)


def _unprivileged() -> list[str]:
    """PostgreSQL refuses to run as root. (The signal is set after the user: a change of user would forget it.)"""
    if os.geteuid() != 0:
        return ["setpriv", "--pdeathsig", "KILL", "--"]
    nobody = pwd.getpwnam("nobody")
    return ["setpriv", f"--reuid={nobody.pw_uid}", f"--regid={nobody.pw_gid}", "--clear-groups", "--pdeathsig", "KILL",
            "--"]
