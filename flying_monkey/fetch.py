"""Fetches a closure from toto's cache into this machine's store, with as few rights as that takes.

Where there is a nix daemon, what reads the network is a `nix copy` of an unprivileged user: the daemon takes from it
only what is signed by a key that the machine trusts.
"""

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from flying_monkey import apart, machine
from flying_monkey.apart import Failed, User
from flying_monkey.exchange import Server
from flying_monkey.machine import STORE, NotReady

ROOM: Final = 256 * 2**20  # bytes that stay free in the store
_DAEMON: Final = Path("/nix/var/nix/daemon-socket/socket")
_ROOT: Final = Path("/nix/var/nix/gcroots/flying-monkey-fetched")
_LOOKS: Final = 600.0  # seconds to ask for the sizes
_MOST: Final = 64 * 2**20  # bytes of what nix says of a closure
_TAIL: Final = 2_000  # bytes
_NEW: Final = ("--extra-experimental-features", "nix-command")


@dataclass(frozen=True)
class Fetcher:
    """How a closure is fetched: from `server`, with the word by which it knows this machine.

    `store` is nix's name of a store other than this machine's own.
    """

    server: Server
    store: str = ""

    def fetch(self, path: str, token: str, *, longest: float) -> None:
        """Have `path` with all that it refers to in the store, within `longest` seconds.

        What has been fetched before stays, and is not fetched again. Raises `NotReady`.
        """
        if not self.store and _here(path):
            return
        deadline = time.monotonic() + longest
        if not self.store:
            with contextlib.suppress(OSError):
                machine.keep(path, _ROOT)  # from the moment that it is there
        with self._prepared(token) as (words, environment, who):
            try:
                room = int(
                    apart.run(
                        lambda: _missing(path, self._from, words, environment),
                        who,
                        longest=min(longest, _LOOKS),
                        most=40,
                    )
                )
            except (Failed, ValueError) as error:
                raise NotReady(f"toto does not offer {path}: {error}") from None
            free = machine.free()
            if room + ROOM > free:
                raise NotReady(
                    f"{path} needs {room / 1e6:.0f} MB more, and of {STORE} {free / 1e6:.0f} MB are free, "
                    f"of which {ROOM / 1e6:.0f} stay so"
                )
            to = ("--to", self.store) if self.store else ()
            argv = ["nix", *_NEW, "copy", "--from", self._from, *to, *words, path]
            _copy(argv, environment, who, deadline)

    @property
    def _from(self) -> str:
        return f"{self.server.url}/cache"

    @contextlib.contextmanager
    def _prepared(self, token: str) -> Iterator[tuple[list[str], dict[str, str], User | None]]:
        """nix's options and environment, and who runs it. The token is in a file that only that user reads."""
        daemon = _DAEMON.is_socket() and not self.store
        who = self.server.who if daemon else None
        folder = Path(tempfile.mkdtemp(prefix="flying-monkey-"))
        try:
            netrc = folder / "netrc"
            _write(netrc, f"machine {self.server.host} login toto password {token}\n")
            environment = machine.environment() | {
                "NIX_REMOTE": "daemon" if daemon else "",
                "HOME": str(folder),
                "XDG_CACHE_HOME": str(folder),
                "NIX_USER_CONF_FILES": "/dev/null",
            }
            if self.server.authorities is not None:
                _write(folder / "ca.pem", self.server.authorities)
                environment["NIX_SSL_CERT_FILE"] = str(folder / "ca.pem")
            if who is not None:
                for each in (*folder.iterdir(), folder):
                    os.chown(each, who.uid, who.gid)
            options = {
                "netrc-file": str(netrc),
                "narinfo-cache-negative-ttl": "0",
                "narinfo-cache-positive-ttl": "0",
                "connect-timeout": "15",
                "download-attempts": "3",
            }
            yield [word for pair in options.items() for word in ("--option", *pair)], environment, who
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _write(file: Path, text: str) -> None:
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as sink:
        sink.write(text)


def _here(path: str) -> bool:
    try:
        machine.run("nix-store", "--check-validity", path)
    except NotReady:
        return False
    return True


def _missing(path: str, source: str, words: list[str], environment: dict[str, str]) -> bytes:
    """How many bytes of a closure are not in the store yet, by what the cache says. Runs apart."""
    os.environ.clear()
    os.environ.update(environment)
    argv = ["nix", *_NEW, "path-info", "--json", "--recursive", "--store", source, *words, path]
    with (
        tempfile.TemporaryFile(dir=environment["HOME"]) as said,
        subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=said) as asked,
    ):
        assert asked.stdout is not None
        text = asked.stdout.read(_MOST)
        asked.stdout.close()
        if asked.wait() != 0:
            said.seek(0)
            raise Failed(_last(said.read(_MOST)) or f"nix exited with status {asked.returncode}")
    found: Any = json.loads(text)
    known = found.items() if isinstance(found, dict) else ((each["path"], each) for each in found)
    sizes = (int(info["narSize"]) for name, info in known if not (STORE / Path(name).name).exists())
    return str(sum(sizes)).encode()


def _copy(argv: list[str], environment: dict[str, str], who: User | None, deadline: float) -> None:
    """Run a copy, and end it when its time is over or the disk is almost full. Raises `NotReady`."""
    rights: dict[str, Any] = {} if who is None else {"user": who.uid, "group": who.gid, "extra_groups": who.groups}
    copying = subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment,
        cwd="/",
        start_new_session=True,
        **rights,
    )
    assert copying.stderr is not None
    said = b""
    waiting = select.poll()
    waiting.register(copying.stderr, select.POLLIN | select.POLLHUP)
    problem = ""
    try:
        while not problem:
            if waiting.poll(1_000):
                chunk = os.read(copying.stderr.fileno(), 65_536)
                if not chunk:
                    break
                said = (said + chunk)[-_TAIL:]
            if machine.free() < ROOM // 2:
                problem = f"the disk of {STORE} is almost full"
            elif time.monotonic() > deadline:
                problem = "the closure was not fetched in time"
    finally:
        if problem or copying.poll() is None:
            _end(copying, problem)
        copying.stderr.close()
    if problem or copying.returncode != 0:
        raise NotReady(problem or f"toto's cache: {_last(said) or f'nix exited with status {copying.returncode}'}")


def _end(copying: "subprocess.Popen[bytes]", problem: str) -> None:
    """Wait for a copy that has said all it had to say; one with a `problem` is killed."""
    if not problem:
        with contextlib.suppress(subprocess.TimeoutExpired):
            copying.wait(30)
            return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(copying.pid, signal.SIGKILL)
    copying.wait()


def _last(said: bytes) -> str:
    lines = [line for line in said.decode(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.strip().startswith("error")] or lines
    return apart.plain(errors[-1]) if errors else ""
