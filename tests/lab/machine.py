"""A "physical" machine of the lab: a VM with a disk that stays, an address of its own and a power switch.

The machine lives in a directory (disk, console log, QMP socket, known_hosts). It boots what its disk says is the boot
default, as a real one does, so a power cut between an activation and `switch` comes up in the old system.
QEMU dies with the process that started it, even when that is killed.
"""

import asyncio
import contextlib
import json
import os
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

from tests.lab import nix
from tests.lab.parts import Part
from tests.lab.setup import environment

SSH_PORT: Final = 2222
ACCELERATOR: Final = os.environ.get("TOTO_LAB_ACCEL", "tcg")
KERNEL: Final = "no_timer_check mitigations=off"  # (see `toto.rehearsal.sandbox`)


class MachineError(Exception):
    """The machine broke: it did not boot, answer or stop. A command that merely fails is no such error."""


class Answer(NamedTuple):
    """What a command on the machine left: exit status (255: ssh's own failure), output, errors."""

    status: int
    out: str
    err: str


class Machine:
    """An async context manager: started on entry, gone on exit; the disk stays in `directory`."""

    def __init__(
        self,
        name: str,
        directory: Path,
        key: Path,
        *,
        address: str = "127.0.1.1",
        ports: Sequence[int] = (8080,),
        configuration: str | None = None,
        memory: int = 384,
        user: str = "toto",
    ) -> None:
        """`key` is a private key file whose `.pub` lies beside it; `address` a loopback address of this machine's
        own; `ports` are reachable there under the same number, ssh under 2222. `configuration`, a nix expression,
        is what the machine runs at first; the default is `bootstrap.nix`."""
        self.name = name
        self.directory = directory
        self.key = key
        self.address = address
        self.ports = tuple(ports)
        self.memory = memory
        self.user = user
        self._configuration = configuration
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Self:
        try:
            await self.start()
            await self.wait_ssh()
        except BaseException:
            await self.power_cut()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.power_cut()

    # Power

    async def start(self) -> None:
        """Switches the machine on; returns at once. Its first system is built when it has none yet."""
        if self.running:
            return
        (self.directory / "tmp").mkdir(parents=True, exist_ok=True)
        argv, env = await self._program()
        self._qmp_socket.unlink(missing_ok=True)
        qmp = f"unix:{self._qmp_socket.name},server=on,wait=off"
        with self._console.open("ab") as console:
            # It runs in TMPDIR, so that a short relative socket path stays within sockaddr_un's limit.
            self._process = await asyncio.create_subprocess_exec(
                "setpriv",
                "--pdeathsig",
                "KILL",
                *argv,
                "-qmp",
                qmp,
                env=env,
                cwd=self.directory / "tmp",
                stdin=asyncio.subprocess.DEVNULL,
                stdout=console,
                stderr=console,
            )

    async def _program(self) -> tuple[Sequence[str], dict[str, str]]:
        """What runs its QEMU, and the environment of that; its disk is made when it has none yet."""
        vm = self.directory / "vm"
        if not vm.exists():
            await nix.build(self._configuration or nix.bootstrap(self.name, [self.public_key]), "vm", link=vm)
        (run,) = vm.glob("bin/run-*-vm")
        return [str(run)], environment() | {
            "NIX_DISK_IMAGE": str(self._disk),
            "TMPDIR": str(self.directory / "tmp"),
            "USE_TMPDIR": "1",
            "QEMU_NET_OPTS": self._forwards(),
            "QEMU_KERNEL_PARAMS": KERNEL,
            "QEMU_OPTS": f"-machine accel={ACCELERATOR} -m {self.memory}",
        }

    def _forwards(self) -> str:
        """The ports that lead to the machine, as options of QEMU's user network."""
        forwards = [(SSH_PORT, 22), *((port, port) for port in self.ports)]
        return ",".join(f"hostfwd=tcp:{self.address}:{host}-:{guest}" for host, guest in forwards)

    @property
    def public_key(self) -> str:
        """That of `key`: a line of authorized_keys."""
        return self.key.with_name(self.key.name + ".pub").read_text().strip()

    @property
    def parts(self) -> list[Part]:
        """Its QEMU, while it is switched on."""
        return [] if self._process is None else [Part(f"machine {self.name}", self._process.returncode, self._console)]

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def power_cut(self) -> None:
        """Pulls the plug. What the guest had not flushed is lost."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
        self._process = None
        self._qmp_socket.unlink(missing_ok=True)

    async def stop(self, deadline: float = 30) -> None:
        """An orderly power-off, or a power cut when that takes longer than `deadline` seconds."""
        if self._process is not None and self._process.returncode is None:
            await self.ssh("sudo", "poweroff", timeout=10)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), deadline)
        await self.power_cut()

    async def reboot(self, deadline: float = 90) -> None:
        """An orderly reboot; returns when the new boot answers ssh."""
        before = (await self.ssh("cat", "/proc/sys/kernel/random/boot_id")).out
        await self.ssh("sudo", "reboot", timeout=10)
        end = time.monotonic() + deadline
        while time.monotonic() < end:
            answer = await self.ssh("cat", "/proc/sys/kernel/random/boot_id", timeout=8)
            if answer.status == 0 and answer.out != before:
                return
            await asyncio.sleep(0.5)
        raise MachineError(f"{self.name} has not come back from its reboot within {deadline:g} s:\n{self._tail()}")

    # Ssh

    @property
    def ssh_options(self) -> list[str]:
        known_hosts = self.directory.absolute() / "known_hosts"
        return [
            "-F",
            "none",
            "-i",
            str(self.key.absolute()),
            "-o",
            "IdentitiesOnly=yes",
            "-o",
            "BatchMode=yes",
            "-o",
            "StrictHostKeyChecking=accept-new",
            "-o",
            f"UserKnownHostsFile={known_hosts}",
            "-o",
            "LogLevel=ERROR",
            "-o",
            "ConnectTimeout=20",
            "-p",
            str(SSH_PORT),
        ]

    async def ssh(self, *command: str, timeout: float = 60, user: str | None = None, login: bool = True) -> Answer:
        """Runs a command on the machine. One argument is a shell line, several are quoted as an argv.

        Without `login` by one that others of the last seconds have made, where it still works: on an emulated machine
        a login is 0.8 s of work."""
        line = command[0] if len(command) == 1 else shlex.join(command)
        # (A relative path: a socket's must be short.)
        options = (
            []
            if login
            else [
                "-o",
                "ControlMaster=auto",
                "-o",
                "ControlPath=login",
                "-o",
                "ControlPersist=20",
                "-o",
                "ServerAliveInterval=5",
            ]
        )
        process = await asyncio.create_subprocess_exec(
            "ssh",
            *self.ssh_options,
            *options,
            f"{user or self.user}@{self.address}",
            line,
            cwd=self.directory,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            out, err = await asyncio.wait_for(process.communicate(), timeout)
        except TimeoutError:
            if login:
                return Answer(255, "", f"no answer within {timeout:g} s")
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if not login and process.returncode not in range(255):
            return await self.ssh(*command, timeout=timeout, user=user)
        said, complained = (stream.decode(errors="replace").strip() for stream in (out, err))
        return Answer(process.returncode or 0, said, complained)

    async def check(self, *command: str, timeout: float = 60, login: bool = True) -> str:
        """The output of a command that must succeed."""
        answer = await self.ssh(*command, timeout=timeout, login=login)
        if answer.status != 0:
            raise MachineError(
                f"{self.name}: `{' '.join(command)}` exited with {answer.status}:\n{answer.out}\n{answer.err}"
            )
        return answer.out

    async def wait_ssh(self, deadline: float = 300) -> float:
        """Waits until the machine answers ssh; returns the seconds that took."""
        begin = time.monotonic()
        answer = Answer(255, "", "it does not listen")
        patience = 4.0
        while (waited := time.monotonic() - begin) < deadline:
            if not self.running:
                raise MachineError(f"{self.name} is not running:\n{self._tail()}")
            if await self._greets(patience):
                # On a busy machine a handshake with an emulated guest may take long.
                answer = await self.ssh("true", timeout=30)
                if answer.status == 0:
                    return waited
            patience = min(patience * 1.1, 15)
            await asyncio.sleep(0.3)
        raise MachineError(f"{self.name} has not answered ssh within {deadline:g} s ({answer.err}):\n{self._tail()}")

    async def _greets(self, patience: float) -> bool:
        """Whether its sshd says within `patience` seconds that it is there.

        QEMU's forward accepts long before the guest listens, and then asks the guest ever more seldom: several short
        tries find it sooner than a long one."""
        with contextlib.suppress(OSError, TimeoutError):
            reader, writer = await asyncio.open_connection(self.address, SSH_PORT)
            try:
                return bool(await asyncio.wait_for(reader.readline(), patience))
            finally:
                writer.close()
        return False

    async def copy(self, path: Path | str) -> None:
        """Copies a closure to the machine, as its ordinary user."""
        process = await asyncio.create_subprocess_exec(
            "nix",
            "copy",
            "--no-check-sigs",
            "--to",
            f"ssh://{self.user}@{self.address}",
            str(path),
            env=environment() | {"NIX_SSHOPTS": shlex.join(self.ssh_options)},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            _, err = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode:
            raise MachineError(f"{self.name} did not take {path}: {err.decode()}")

    # What it runs

    async def current_system(self) -> str:
        return await self.check("readlink", "-f", "/run/current-system", login=False)

    async def booted_system(self) -> str:
        return await self.check("readlink", "-f", "/run/booted-system", login=False)

    async def profile(self) -> str:
        return await self.check("readlink", "-f", "/nix/var/nix/profiles/system", login=False)

    async def switch(self, system: Path | str, action: str = "switch", timeout: float = 120) -> Answer:
        """What a deployment does after the copy: the profile (for switch and boot), then the activation."""
        if action in {"switch", "boot"}:
            await self.check("sudo", "nix-env", "-p", "/nix/var/nix/profiles/system", "--set", str(system))
        return await self.ssh("sudo", f"{system}/bin/switch-to-configuration", action, timeout=timeout)

    # Mishaps

    async def network(self, up: bool) -> None:
        """Plugs the network cable in, or pulls it."""
        await self._qmp("set_link", name="user.0", up=up)

    async def fill_disk(self, leave_bytes: int = 0) -> None:
        """Fills the disk but for that many bytes."""
        free = int(await self.check("df -k / | awk 'NR == 2 { print $4 }'"))
        size = free - leave_bytes // 1024
        await self.check("sudo", "sh", "-c", f"fallocate -l {size}k /filler && sync")

    async def free_disk(self) -> None:
        await self.check("sudo", "rm", "-f", "/filler")

    def console(self) -> str:
        """Everything the machine has printed on its serial line, over all its boots."""
        return self._console.read_text(errors="replace") if self._console.exists() else ""

    # Inside

    @property
    def _disk(self) -> Path:
        return (self.directory / "disk.qcow2").absolute()

    @property
    def _console(self) -> Path:
        return self.directory / "console.log"

    @property
    def _qmp_socket(self) -> Path:
        return self.directory / "tmp" / "qmp"

    def _tail(self) -> str:
        return "\n".join(self.console().splitlines()[-15:])

    async def _qmp(self, command: str, **arguments: Any) -> Any:
        """What QEMU returns to a command. Raises `MachineError` when it refuses."""
        # By way of a file descriptor: the path may be longer than a socket address can hold.
        directory = os.open(self._qmp_socket.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            reader, writer = await asyncio.open_unix_connection(f"/proc/self/fd/{directory}/{self._qmp_socket.name}")
        finally:
            os.close(directory)
        try:
            await reader.readline()  # the greeting
            for message in ({"execute": "qmp_capabilities"}, {"execute": command, "arguments": arguments}):
                writer.write(json.dumps(message).encode() + b"\n")
                await writer.drain()
                while "return" not in (reply := json.loads(await asyncio.wait_for(reader.readline(), 60))):
                    if "error" in reply:
                        raise MachineError(f"{self.name}: QEMU refuses {command}: {reply['error']['desc']}")
            return reply["return"]
        finally:
            writer.close()
