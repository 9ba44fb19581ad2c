"""toto's own nix daemon: it has the store, and builds what was pushed, in a sandbox and as users of its own.

    toto nix-daemon --group toto

It runs as root in a network namespace with an uplink (`toto.cell.namespace`): a fixed-output build, which has the
network, reaches the internet, and neither this machine nor its neighbours. toto and the cells of evaluations are its
clients, by a socket in a folder that nobody else can enter.
"""

import argparse
import asyncio
import contextlib
import grp
import hashlib
import logging
import os
import shutil
import signal
import socket as sockets
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Final

from toto.base import files, paths, process
from toto.base.errors import InputError, TotoError
from toto.cell.namespace import namespace
from toto.nix import builders, quiet

log = logging.getLogger(__name__)

SOCKET: Final = "TOTO_NIX_SOCKET"  # of toto's environment: the socket of a daemon that runs already
GROUP: Final = "nixbld"  # as NixOS and Debian call it
MACHINES: Final = Path("/run/toto-nix")  # the folder of a daemon that a unit of root's runs, for a toto that is not
_SHARED: Final = "client"  # the folder with what a client needs; its parent keeps strangers out
_BUILDERS: Final = "builders"  # the folder with what nix knows of remote builders, which is root's
_UNIT: Final = "NOTIFY_SOCKET"  # the variable of what systemd has started, and waits for
_LONGEST: Final = 107  # bytes
_PATIENCE: Final = 300.0  # seconds until the daemon answers, on a machine that is slow and busy
_PAUSE: Final = 5.0  # seconds before a daemon that has ended is started again


class DaemonFailed(TotoError):
    """toto's nix daemon is not there."""


def socket() -> Path:
    """The socket of toto's nix daemon: $TOTO_NIX_SOCKET, else one of `toto serve`, else one of `toto nix-daemon`.

    nix.conf lies beside it. Raises `DaemonFailed` when there is none.
    """
    named = os.environ.get(SOCKET)
    places = [Path(named)] if named else [each / _SHARED / "socket" for each in (home(), MACHINES)]
    for path in places:
        if path.is_socket():
            return path
    raise DaemonFailed(
        f"toto's nix daemon does not run: there is no {' and no '.join(map(str, places))}",
        hint="`toto serve` runs it when it is root; else run `toto nix-daemon --group NAME` as root",
    )


def client(socket: Path) -> dict[str, str]:
    """The environment that makes nix a client of the daemon at `socket`, with its settings."""
    return {
        "NIX_REMOTE": "daemon",  # (a path in an address, `unix://…`, would have to be escaped for some versions of nix)
        "NIX_DAEMON_SOCKET_PATH": str(socket),
        "NIX_CONF_DIR": str(socket.parent),
        "NIX_USER_CONF_FILES": "/dev/null",
    }


def of_the_machine() -> bool:
    """Whether the machine has a nix daemon of its own, as NixOS has: what is in the store was built in its sandbox."""
    return Path("/etc/NIXOS").exists() or Path("/nix/var/nix/daemon-socket/socket").exists()


def home() -> Path:
    """The folder of the socket, nix.conf and the log of the daemon that `toto serve` runs: in toto's state.

    Where that is too long for the path of a socket (107 bytes), it is in /run.
    """
    folder = paths.state_home() / "nix"
    if len(os.fsencode(folder / _SHARED / "socket")) <= _LONGEST:
        return folder
    return Path("/run") / f"toto-nix-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:12]}"


def configuration() -> str:
    """The daemon's nix.conf: the machine's own (its substituters), and what keeps builds in.

    The logins of the machine's netrc-file are not used: nix hands that file to whatever build asks for it.
    Raises `InputError` when the machine has no build users or no static shell.
    """
    try:
        users = grp.getgrnam(GROUP).gr_mem
    except KeyError:
        users = []
    if not users:
        raise InputError(
            f"this machine has no group `{GROUP}` with users to build as",
            hint="run setup/prepare; on NixOS and with Debian's nix-setup-systemd they are there",
        )
    machines = os.environ.get("NIX_CONF_DIR", "/etc/nix")
    return f"""\
# Written by toto for its own nix daemon, and its clients. The machine's settings come first; those below prevail.
!include {machines}/nix.conf
build-users-group = {GROUP}
sandbox = true
sandbox-fallback = false
sandbox-paths = {_shell()}
netrc-file = {os.devnull}
allowed-users = *
trusted-users = root
require-sigs = true
allow-unsafe-native-code-during-evaluation = false
accept-flake-config = false
experimental-features = nix-command flakes
"""


def _shell() -> str:
    """What a build has as /bin/sh: a static busybox. (A nix from the store has one built in, and no way to name it.)"""
    busybox = shutil.which("busybox")
    if busybox is None:
        raise InputError(
            "busybox is not on PATH: it is the shell of builds",
            hint="on Debian: apt install busybox-static; on NixOS: nix/toto.nix brings it",
        )
    return f"/bin/sh={Path(busybox).resolve()}"


@contextlib.asynccontextmanager
async def running(home: Path, group: str | None = None) -> AsyncIterator[Path]:
    """Have toto's nix daemon run to the end of the block; it is started again when it dies. Yields its socket.

    The socket is below `home`, a folder that only root can enter, and who is in `group`. A daemon that another toto
    runs there is shared. Raises `DaemonFailed`, `InputError`.
    """
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    (home / _SHARED).mkdir(mode=0o755, exist_ok=True)
    (home / _SHARED).chmod(0o755)  # (for the cells of evaluations)
    files.write(home / _SHARED / "nix.conf", configuration() + builders.settings(home / _BUILDERS), 0o644)
    files.write(home / _SHARED / builders.PUBLIC, await builders.public_half(), 0o644)
    path, asked = home / _SHARED / "socket", home / quiet.ASKED
    asked.mkdir(mode=0o700, exist_ok=True)
    if group is not None:
        shutil.chown(asked, group=group)
        asked.chmod(0o770)
        shutil.chown(home, group=group)
        home.chmod(0o710)
    ready = asyncio.Event()
    keeping = asyncio.create_task(_keep(home, ready))
    try:
        deadline = time.monotonic() + _PATIENCE
        while not _answers(path):
            if keeping.done():
                await keeping
            if time.monotonic() > deadline:
                raise DaemonFailed(f"toto's nix daemon did not answer within {_PATIENCE:g} s", hint=_log(home))
            await asyncio.sleep(0.02)
        ready.set()
        yield path
    finally:
        keeping.cancel()
        await asyncio.wait((keeping,))
        if home.is_relative_to("/run") and not _answers(path):  # (else another toto runs it)
            _tidy_up(home, keep=asked if _UNIT in os.environ else None)


def _tidy_up(home: Path, *, keep: Path | None) -> None:
    """Remove `home`, or all in it but the folder to `keep`, which a unit of toto's has mounted."""
    if keep is None:
        shutil.rmtree(home, ignore_errors=True)
        return
    with contextlib.suppress(FileNotFoundError):
        for left in {*home.iterdir()} - {keep}:
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


def _log(home: Path) -> str:
    return f"see {home / 'daemon.log'}"


def _answers(path: Path) -> bool:
    with sockets.socket(sockets.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


async def _keep(home: Path, ready: asyncio.Event) -> None:
    """Run the daemon, and start it again when it ends; only one runs in a state, whoever began it.

    What fails before it was `ready` is raised; later it is logged, and tried again.
    """
    async with paths.alone(home / "lock"):
        while True:
            try:
                async with _once(home) as daemon:
                    while daemon.status is None:  # noqa: ASYNC110
                        await asyncio.sleep(0.5)
                log.error("toto's nix daemon ended with status %s and is started again: %s", daemon.status, _log(home))
            except (TotoError, OSError) as error:
                if not ready.is_set():
                    raise
                log.error("toto's nix daemon: %s", error)
            await asyncio.sleep(_PAUSE)


@contextlib.asynccontextmanager
async def _once(home: Path) -> AsyncIterator[process.Running]:
    listed, slots = builders.wanted(home), quiet.Slots(home)
    await builders.write(home / _BUILDERS, listed)
    slots.look(listed)
    environment = {
        "PATH": f"{home / _BUILDERS}:{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin",
        "LANG": "C.UTF-8",
        "HOME": "/root",
        "NIX_CONF_DIR": str(home / _SHARED),
        "NIX_USER_CONF_FILES": "/dev/null",
        "NIX_DAEMON_SOCKET_PATH": str(home / _SHARED / "socket"),
        **{name: os.environ[name] for name in ("NIX_SSL_CERT_FILE", "TMPDIR") if name in os.environ},
    }
    async with namespace() as network:
        await network.attach()
        resolver = Path("/etc/resolv.conf").resolve()
        words = [
            *network.inside,
            # (nix mounts, makes namespaces and changes users for each build.)
            *("bwrap", "--die-with-parent", "--cap-add", "ALL", "--dev-bind", "/", "/"),
            *(("--ro-bind", str(network.resolver), str(resolver)) if resolver.exists() else ()),
            *("--", "nix-daemon", "--daemon"),
        ]
        with (home / "daemon.log").open("ab") as sink:
            async with process.start(words, env=environment, stdout=sink.fileno(), stderr=sink.fileno()) as daemon:
                following = asyncio.create_task(builders.follow(home / _BUILDERS, listed, slots))
                try:
                    yield daemon
                finally:
                    following.cancel()
                    slots.close()


def _unless_read(stop: asyncio.Event) -> None:
    """Set `stop` at the end of standard input."""
    if not os.read(sys.stdin.fileno(), 4096):
        stop.set()


async def _when_idle(leave: asyncio.Event, stop: asyncio.Event) -> None:
    """Once asked to `leave`, set `stop` as soon as the daemon has no client."""
    await leave.wait()
    while len(_daemons(os.getpid())) > 1:  # noqa: ASYNC110 - it has a process of its own for each
        await asyncio.sleep(1)
    stop.set()


def _daemons(root: int) -> set[int]:
    """The processes below `root` that are nix daemons."""
    parents, named = {}, set()
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                name, _, rest = Path(entry.path, "stat").read_text().rpartition(")")
                parents[int(entry.name)] = int(rest.split()[1])
                if name.endswith("(nix-daemon"):
                    named.add(int(entry.name))
    found, more = {root}, {root}
    while more:
        more = {each for each, parent in parents.items() if parent in more} - found
        found |= more
    return found & named


def _tell_systemd() -> None:
    """Say that the daemon is ready, as sd_notify(3) does, where a unit of Type=notify asks for it."""
    address = os.environ.get(_UNIT)
    if address:
        with sockets.socket(sockets.AF_UNIX, sockets.SOCK_DGRAM) as notify:
            notify.sendto(b"READY=1", address.replace("@", "\0", 1) if address.startswith("@") else address)


def main(arguments: Sequence[str] | None = None) -> int:
    """`toto nix-daemon`: run the daemon in the foreground until SIGTERM or SIGINT; the exit status.

    SIGHUP ends it when it has no client: its unit then starts what is installed now.
    """
    parser = argparse.ArgumentParser("toto nix-daemon", description="Run toto's nix daemon, as root.")
    parser.add_argument("--home", type=Path, default=MACHINES, help="folder of its socket and log (%(default)s)")
    parser.add_argument("--group", required=True, help="the group of the user as whom toto runs")
    parser.add_argument("--lifeline", action="store_true", help="end when standard input does: with who started it")
    chosen = parser.parse_args(arguments)
    if os.geteuid() != 0:
        print("toto nix-daemon: it runs as root (`sudo toto nix-daemon --group NAME`)", file=sys.stderr)
        return 1
    os.environ.setdefault(paths.STATE, str(chosen.home))

    async def until_signalled() -> None:
        stop, leave = asyncio.Event(), asyncio.Event()
        for number, event in ((signal.SIGTERM, stop), (signal.SIGINT, stop), (signal.SIGHUP, leave)):
            asyncio.get_running_loop().add_signal_handler(number, event.set)
        if chosen.lifeline:
            asyncio.get_running_loop().add_reader(sys.stdin, _unless_read, stop)
        async with running(chosen.home, chosen.group) as path:
            print(f"toto: the nix daemon answers at {path}", flush=True)
            _tell_systemd()
            leaving = asyncio.create_task(_when_idle(leave, stop))
            await stop.wait()
            leaving.cancel()

    try:
        asyncio.run(until_signalled())
    except TotoError as error:
        print(f"toto nix-daemon: {error}", file=sys.stderr)
        return 1
    return 0
