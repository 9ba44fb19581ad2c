"""Connecting to a machine or a sandbox with OpenSSH, by an ssh_config that is written for that one target.

A `connection` opens one master (a handshake takes an emulated guest a second) and runs commands through it. Programs
that use the same config file, such as test scripts, share the master; when the master is gone, every ssh makes its own
connection. ssh never asks for a password.
"""

import asyncio
import contextlib
import itertools
import re
import shlex
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from toto.base import files, owned, process
from toto.base.errors import InputError, TotoError
from toto.base.process import Argument, CommandFailed, CommandTimeout, Completed, LineSink, Running

SHORT: Final = Path("/tmp")  # noqa: S108  (for sockets whose path would be too long elsewhere)
LOST: Final = 255  # the exit status of ssh's own errors; a remote command may exit with it too
_LONGEST_SOCKET: Final = 80  # bytes; a socket's path may have 108, and ssh adds 17 to it for a temporary name
_HANDSHAKE: Final = 30.0  # seconds that the authentication may take after ConnectTimeout

_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_ADDRESS: Final = re.compile(r"[A-Za-z0-9_:][A-Za-z0-9._:%-]*")
_HOST_KEY: Final = re.compile(r"(?:ssh|ecdsa|sk)-[\w@.-]+ [A-Za-z0-9+/]+=*(?: [^\n\r]*)?")
_numbers = itertools.count()


class Unreachable(TotoError):
    """There is no connection to the machine, or it was lost; a later try may work. `words` is what ssh said."""

    def __init__(self, words: str, *, target: str | None = None, hint: str | None = None) -> None:
        super().__init__(f"ssh cannot connect to the machine: {words}", target=target, hint=hint)
        self.words = words


class AuthenticationFailed(Unreachable):
    """The machine answers and refuses the key; trying again does not help."""


class HostKeyChanged(Unreachable):
    """The host key is not the one that is known: it is a different machine, or it was installed anew."""


@dataclass(frozen=True)
class SshTarget:
    """A machine for ssh: configs and known_hosts have its `name`, and ssh connects to its `address`.

    `ip` is where that has been found to be, if it has been looked up; then ssh does not look it up again.
    The expected host key is `host_key` ("ssh-ed25519 AAAA…") if that is set, else the one that was seen first, which
    is kept in `known_hosts`. A `throwaway` machine (a sandbox) has a new key every time, so it is not checked.
    `connect_timeout` is in seconds. Raises `InputError` for values that an ssh_config cannot hold.
    """

    name: str
    address: str
    port: int = 22
    user: str = "root"
    identity: Path | None = None
    host_key: str | None = None
    known_hosts: Path | None = None
    throwaway: bool = False
    connect_timeout: int = 10
    ip: str | None = None

    def __post_init__(self) -> None:
        for what, value, form in (
            ("name", self.name, _NAME),
            ("address", self.address, _ADDRESS),
            ("address", self.ip, _ADDRESS),
            ("user", self.user, _NAME),
            ("host key", self.host_key, _HOST_KEY),
        ):
            if value is not None and not form.fullmatch(value):
                raise InputError(f"the {what} {value!r} cannot be used with ssh", target=self.name)
        if not 0 < self.port < 65536:
            raise InputError(f"{self.port} is not a TCP port", target=self.name)
        if not (self.throwaway or self.host_key or self.known_hosts):
            raise InputError(
                "it is not known which host key to expect", target=self.name, hint="give host_key or known_hosts"
            )

    def write_config(self, directory: Path, *, control: Path | None = None) -> Path:
        """Write the ssh_config of this target to `directory` (made when missing, mode 0700), and return its path.

        `ssh -F PATH NAME` then connects to it, through the master's socket `control` if there is one.
        """
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        options: dict[str, str] = {
            "HostName": (self.ip or self.address).replace("%", "%%"),
            "Port": str(self.port),
            "User": self.user,
            "BatchMode": "yes",
            "ConnectTimeout": str(self.connect_timeout),
            "ServerAliveInterval": "15",
            "ServerAliveCountMax": "3",
            "LogLevel": "ERROR",
            "RequestTTY": "no",
            "HostKeyAlias": self.name,
        }
        if self.identity is not None:
            options |= {"IdentityFile": _path(self.identity), "IdentitiesOnly": "yes", "IdentityAgent": "none"}
        if self.host_key is not None:
            pinned = files.write(directory / "known_hosts", f"{self.name} {self.host_key}\n")
            options |= {"StrictHostKeyChecking": "yes", "UserKnownHostsFile": _path(pinned)}
        elif self.known_hosts is not None:
            self.known_hosts.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            options |= {
                "StrictHostKeyChecking": "accept-new",
                "UserKnownHostsFile": _path(self.known_hosts),
                "HashKnownHosts": "no",
            }
        else:
            options |= {
                "StrictHostKeyChecking": "no",
                "UserKnownHostsFile": "/dev/null",
                "GlobalKnownHostsFile": "/dev/null",
            }
        if control is not None:
            options |= {"ControlMaster": "no", "ControlPath": _path(control)}
        lines = [f"Host {self.name}\n", *(f"  {key} {value}\n" for key, value in options.items())]
        return files.write(directory / "ssh_config", "".join(lines))


@dataclass
class Connection:
    """Runs commands on `target`. `config` is its ssh_config; `through` are words before ssh's own, see `connection`."""

    target: SshTarget
    config: Path
    control: Path | None = None
    master: Running | None = None
    through: Sequence[str] = ()

    def command(self, line: str, *options: Argument) -> list[Argument]:
        """The command line that runs `line` in the machine's shell, with more `options` of ssh's."""
        self._clean_up_dead_master()
        return [*self.through, "ssh", "-F", self.config, "-T", *options, self.target.name, "--", line]

    async def run(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes | None = None,
        timeout: float | None = None,
        check: bool = True,
        fresh: bool = False,
        on_line: LineSink | None = None,
        on_error_line: LineSink | None = None,
        secrets: Sequence[str] = (),
    ) -> Completed:
        """Run the command `argv` on the machine and return what it left.

        `timeout` is in seconds, and ends only the local side. `fresh` makes a new connection, which proves that the
        machine still accepts one. Raises `Unreachable` or one of its subclasses, `CommandTimeout`, and `CommandFailed`
        when `check`.
        """
        words = [process.mask(word, secrets) for word in argv]
        journal = self.config.with_name(f"log.{next(_numbers)}")
        # ssh writes its own messages to a file, so that they are not mixed up with the command's output.
        command = self.command(shlex.join(argv), "-E", journal, *(["-o", "ControlPath=none"] if fresh else []))
        try:
            done = await process.run(
                command,
                stdin=stdin,
                timeout=timeout,
                check=False,
                on_line=on_line,
                on_error_line=on_error_line,
                secrets=secrets,
                target=self.target.name,
            )
            said = _read(journal)
        except CommandTimeout as error:
            raise CommandTimeout(words, error.seconds, error.tail, target=self.target.name) from None
        finally:
            journal.unlink(missing_ok=True)
        if done.status == LOST and (said or await self._was_lost(done.stderr, fresh)):
            raise _explained(self.target, said or "the connection was lost")
        if check and done.status != 0:
            raise CommandFailed(
                words, done.status, process.tail(done.stderr) or process.tail(done.stdout), target=self.target.name
            )
        return done

    def _clean_up_dead_master(self) -> None:
        """Remove the socket of a dead master: every ssh would complain about it."""
        if self.control is not None and (self.master is None or self.master.status is not None):
            self.control.unlink(missing_ok=True)

    async def _was_lost(self, stderr: str, fresh: bool) -> bool:
        if re.search(r"^(Shared c|C)onnection to \S+ closed", stderr, re.M):
            return True
        if fresh or self.master is None:
            return False
        await asyncio.sleep(0.3)  # the connection is lost if the master exits too, which may take a moment
        return self.master.status is not None


def plain(target: SshTarget, directory: Path) -> Connection:
    """A `Connection` without a master: every command makes a new one. Its config is written to `directory`."""
    return Connection(target, target.write_config(directory))


@contextlib.asynccontextmanager
async def connection(target: SshTarget, directory: Path, through: Sequence[str] = ()) -> AsyncIterator[Connection]:
    """Connect to `target`; the master lives as long as the block. Its files are in `directory`.

    `through` are words that make ssh run elsewhere: in the network namespace of a sandbox.
    Raises `Unreachable`, `AuthenticationFailed` or `HostKeyChanged` when it cannot log in.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _socket(directory) as control:
        config = target.write_config(directory, control=control)
        journal = directory / "log.master"
        for stale in (control, journal):
            stale.unlink(missing_ok=True)
        async with process.start(
            [*through, "ssh", "-F", config, "-E", journal, "-M", "-N", "-T", target.name]
        ) as master:
            try:
                async with asyncio.timeout(target.connect_timeout + _HANDSHAKE):
                    while not control.exists():
                        if master.status is not None:
                            raise _explained(target, _read(journal) or f"ssh exited with status {master.status}")
                        await asyncio.sleep(0.02)
            except TimeoutError:
                raise Unreachable("the login did not finish in time", target=target.name) from None
            yield Connection(target, config, control, master, through)


@contextlib.contextmanager
def _socket(directory: Path) -> Iterator[Path]:
    """A path for the master's socket, short enough for the kernel."""
    wanted = directory.absolute() / "master"
    if len(bytes(wanted)) <= _LONGEST_SOCKET:
        yield wanted
        return
    with owned.folder("ssh", SHORT) as short:
        yield short / "master"


def _path(path: Path) -> str:
    """`path` as a value in an ssh_config: quoted, with its percent signs doubled."""
    text = str(path.absolute())
    if not text.isprintable() or '"' in text or "${" in text:
        raise InputError(f"an ssh_config cannot hold the path {text!r}", hint="choose a plainer path")
    return '"' + text.replace("\\", "\\\\").replace("%", "%%") + '"'


def _read(journal: Path) -> str:
    lines = journal.read_text(errors="replace").splitlines() if journal.exists() else []
    return "\n".join(line for line in lines if not line.startswith("Control socket connect"))


def _explained(target: SshTarget, words: str) -> Unreachable:
    if "Host key verification failed" in words or "IDENTIFICATION HAS CHANGED" in words:
        known = target.known_hosts
        hint = (
            f"make sure that {target.address} is the machine, then run `ssh-keygen -f {known} -R {target.name}`"
            if known
            else f"compare the host key of {target.address} with the one that is set for {target.name}"
        )
        return HostKeyChanged("its host key is not the known one", target=target.name, hint=hint)
    if "Permission denied" in words or "Too many authentication failures" in words:
        return AuthenticationFailed(
            process.tail(words, 3),
            target=target.name,
            hint=f"let the key {target.identity or 'of this user'} log in as {target.user}",
        )
    return Unreachable(
        process.tail(words, 3),
        target=target.name,
        hint=f"is {target.address} up, and does it listen on port {target.port}?",
    )
