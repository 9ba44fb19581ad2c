"""The sandbox: QEMU with the VM of one host, first without and then with internet.

It is a network namespace. QEMU runs in a cell in it, and so do the test scripts: they reach the guest on the
namespace's loopback. Without internet the namespace has no uplink at all, so nothing in it has a way out, whatever the
guest, its QEMU or a script does. With internet the uplink is attached; private networks and this machine stay closed.

It starts NixOS's `run-NAME-vm`, and sets it up by environment variables. The VM has two network cards. The management
card connects to nothing, and accepts connections only through forwarded ports of the loopback. The link of the card
`inet` is down before the guest's first instruction; QMP switches it in the running VM, so that the guest sees its
internet come. `toto.rehearsal.run` runs the tests.
"""

import asyncio
import contextlib
import itertools
import logging
import os
import re
import time
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from toto.base import owned, process
from toto.base.errors import InputError
from toto.base.process import CommandTimeout, LineSink, Pushed, Running
from toto.cell.cell import STORE, Cell
from toto.cell.limits import Limits
from toto.cell.namespace import Namespace, namespace
from toto.machine import ssh
from toto.machine.ssh import AuthenticationFailed, Connection, SshTarget, Unreachable
from toto.nix import commands as nix
from toto.rehearsal.acceleration import Acceleration, acceleration
from toto.rehearsal.console import Console
from toto.rehearsal.errors import BootTimeout, SandboxError, SandboxFailed
from toto.rehearsal.qmp import Qmp

log = logging.getLogger(__name__)
T = TypeVar("T")


SSH: Final = 22
INET_MAC: Final = "52:54:00:12:34:57"

# TEST-NET-1 (RFC 5737): no host uses it, so it clashes with no address of the host. ipv6=off: QEMU sends router
# advertisements even on a restricted network.
_MANAGEMENT: Final = "restrict=on,ipv6=off,net=192.0.2.0/24"
_INET: Final = f"-netdev user,id=inet -device virtio-net-pci,netdev=inet,id=inet0,mac={INET_MAC},romfile="
_CARDS: Final = {"user.0": "restrict=on", "inet": "restrict=off"}

_DISK: Final = Path("/vm")  # the folder of the VM's disk, in its cell
_MEMORY: Final = 16_384  # MB for a guest of which nothing else is said
_DISKS: Final = 32_768  # MB for its disks
_MB: Final = 1_048_576
_SPARE: Final = 8_000_000_000  # bytes on the disk for what NixOS's script makes besides, such as an image of the store
_OVERHEAD: Final = 3_000_000_000  # bytes for QEMU itself: TCG translates into up to 1 GB, and page tables
_SECCOMP: Final = "-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"

_NOTICED: Final = 0.6  # seconds until it is known that a limit has ended QEMU
_REFUSALS: Final = 5  # refused logins, a second apart: a machine that still boots may refuse one


# Prints whether the inet card has a carrier (1, 0, or "down" when the host does not use the card), and whether
# there is a default route. The management card never adds one.
_INSPECT: Final = f"""
carrier=none route=no
for card in /sys/class/net/*; do
  [ -e "$card/device" ] && read -r mac < "$card/address" && [ "$mac" = {INET_MAC} ] || continue
  read -r carrier 2>/dev/null < "$card/carrier" || carrier=down
done
while read -r _ to _; do [ "$to" = 00000000 ] && route=yes; done < /proc/net/route
echo "$carrier $route"
"""


@dataclass
class Sandbox:
    """A VM that answers SSH. `console_log` is the file with its serial output, which is removed with the sandbox.

    `network` is the namespace that QEMU runs in; `forwards` has the ports of its loopback by the guest's ports.
    """

    host: str
    network: Namespace
    ssh: SshTarget
    connection: Connection
    console_log: Path
    forwards: Mapping[int, int]
    _vm: "_Vm"

    def port(self, guest: int) -> int:
        """The port of the loopback that is forwarded to the guest's port. Raises `SandboxError` if there is none."""
        try:
            return self.forwards[guest]
        except KeyError:
            raise SandboxError(
                f"port {guest} is not forwarded", target=self.host, hint="add it to the ports of the machine"
            ) from None

    async def set_internet(self, up: bool, *, patience: float = 60.0, address_patience: float = 20.0) -> bool:
        """Attach or take away the uplink, set the link of the inet card, wait until the guest sees it; is it online?

        It is online when it has a default route, within `address_patience` seconds. A host that does not configure the
        card is not online. Raises `SandboxError` when the guest does not see the change within `patience` seconds,
        and what `Connection.run` raises.
        """
        if up:
            await self.network.attach()
        await self._vm.link(up)
        if not up:
            await self.network.detach()
        began = time.monotonic()
        seen: float | None = None
        while True:
            try:
                done = await self.connection.run(["sh", "-c", _INSPECT], timeout=patience)
                carrier, route = done.stdout.split()
            except (Unreachable, CommandTimeout) as error:
                # A host may reconfigure its network when a link changes.
                carrier, route = f"unknown ({error.message})", "no"
            now = time.monotonic()
            if not up and carrier != "1" and not carrier.startswith("unknown"):
                return False
            if up and carrier in ("1", "down", "none"):
                seen = seen or now
                if route == "yes":
                    return True
                if now - seen > address_patience:
                    log.info(
                        "%s: the internet is on, but the host gets no address from it (carrier %s)", self.host, carrier
                    )
                    return False
            elif now - began > patience:
                raise SandboxError(
                    f"the guest does not see its internet go {'up' if up else 'down'} (carrier {carrier})",
                    target=self.host,
                    console=self._vm.console.tail(),
                )
            await asyncio.sleep(0.3)

    async def alive(self) -> bool:
        """Whether the guest runs: QEMU has not ended, and the guest has neither crashed nor paused."""
        return await self._vm.alive()


@contextlib.asynccontextmanager
async def sandbox(
    vm: Path,
    *,
    host: str,
    state: Path,
    key: Path,
    ports: Sequence[int] = (),
    memory: int | None = None,
    cores: int | None = None,
    most_memory: int = _MEMORY,
    most_disk: int = _DISKS,
    boot_timeout: float = 300.0,
    on_console: LineSink | None = None,
) -> AsyncIterator[Sandbox]:
    """Boot the host's VM without internet, yield it when it answers SSH, and end it with the block.

    `vm` is the store path of `system.build.vm`, `key` the private key whose public half is in it, and `ports` the
    guest's ports to forward besides SSH. `memory` (MB) and `cores` override the host's own; `most_memory` and
    `most_disk` (MB) are what the guest and its disks may use, whatever it says. `boot_timeout` is in seconds;
    `on_console` gets each line of the console. All files are in a new directory under `state`. Raises
    `BootTimeout`, `SandboxFailed`, and `InputError` for a `vm` without a script to run.
    """
    accelerated = await acceleration(state)
    script = _script(vm, host)
    if "," in str(state.absolute()):
        raise InputError(f"QEMU cannot keep a disk in {state}", target=host, hint="choose a path without a comma")
    with contextlib.ExitStack() as folders:
        try:
            state.mkdir(mode=0o700, parents=True, exist_ok=True)
            directory = folders.enter_context(owned.folder(host, state))
        except OSError as error:
            raise SandboxFailed(f"the folder for the sandbox cannot be made: {error}", target=host) from error
        disk = directory / "vm"
        disk.mkdir(mode=0o700)
        async with namespace() as network:
            cell = await _cell(vm, disk, network, accelerated, memory or most_memory, most_disk)
            pipe = asyncio.subprocess.PIPE
            async with process.start(
                [Pushed(script)],
                cell=cell,
                env=_environment(ports, accelerated, memory, cores),
                cwd=_DISK,
                stdout=pipe,
                stderr=asyncio.subprocess.STDOUT,
            ) as running:
                console = Console(directory / "console.log", on_console)
                reading = asyncio.create_task(console.read(running))
                machine = _Vm(host, directory, network, running, console, reading)
                try:
                    async with contextlib.AsyncExitStack() as stack:
                        yield await machine.boot(stack, key, [SSH, *ports], boot_timeout)
                finally:
                    machine.close()


def clean_up(state: Path) -> list[Path]:
    """End the sandboxes under `state` whose owner is no longer alive; return the removed directories."""
    process.clean_up()
    return owned.sweep(state)


# --- starting --------------------------------------------------------------------------------------------------------


def _script(vm: Path, host: str) -> Path:
    match sorted(vm.glob("bin/run-*-vm")):
        case [script]:
            return script
        case found:
            raise InputError(
                f"{vm} has {len(found)} scripts bin/run-*-vm where one is expected",
                target=host,
                hint="build the host's system.build.vm",
            )


async def _cell(vm: Path, disk: Path, network: Namespace, accelerated: Acceleration, memory: int, disks: int) -> Cell:
    """QEMU's cell: the closure of the host's VM, the folder of its disk, and /dev/kvm where that is used."""
    room = _SPARE + disks * _MB
    stored = vm.is_relative_to(STORE)
    kvm = Path("/dev/kvm")
    cell = Cell(
        read={} if stored else {vm: vm},
        write={_DISK: disk},
        store=await nix.closure(str(vm)) if stored else (),
        network=network,
        user=network.user,
        devices=[kvm] if accelerated == "kvm" else (),
        groups=[kvm.stat().st_gid] if accelerated == "kvm" and os.geteuid() == 0 else (),
        limits=Limits(memory=_OVERHEAD + memory * _MB, disk=room, file_size=room),
    )
    cell.give()
    return cell


def _environment(
    ports: Sequence[int], accelerated: Acceleration, memory: int | None, cores: int | None
) -> dict[str, str]:
    """The environment of NixOS's script, without what every cell has."""
    # Port 0: the kernel chooses a free one, so no other program can take it first.
    forwards = ",".join(f"hostfwd=tcp:127.0.0.1:0-:{port}" for port in dict.fromkeys([SSH, *ports]))
    # The script does not quote QEMU_OPTS, so its paths are relative to the directory in which QEMU runs.
    options = ["-S", "-qmp unix:qmp.sock,server=on,wait=off", _SECCOMP, _INET]
    if accelerated == "tcg":
        options.append("-machine accel=tcg")  # the later of two -machine options wins
    if memory is not None:
        options.append(f"-m {memory}")
    if cores is not None:
        options.append(f"-smp {cores}")
    return {
        "NIX_DISK_IMAGE": str(_DISK / "disk.qcow2"),
        "NIX_EFI_VARS": str(_DISK / "efi-vars.fd"),
        "NIX_SWTPM_DIR": str(_DISK / "swtpm"),
        "TMPDIR": str(_DISK),
        "USE_TMPDIR": "1",
        "QEMU_NET_OPTS": f"{_MANAGEMENT},{forwards}",
        "QEMU_OPTS": " ".join(options),
        # On a busy machine an emulated timer can be late enough for the kernel to give up ("IO-APIC + timer doesn't
        # work"). The kernel skips this check under KVM; under TCG it needs the parameter. What keeps real processors
        # from telling secrets costs an emulated one, which cannot tell any, a tenth of its time.
        "QEMU_KERNEL_PARAMS": "no_timer_check mitigations=off" if accelerated == "tcg" else "",
    }


@dataclass
class _Vm:
    """A running QEMU: its process, console and QMP connection."""

    host: str
    directory: Path
    network: Namespace
    running: Running
    console: "Console"
    reading: asyncio.Task[None]
    qmp: "Qmp | None" = None
    login: Unreachable | None = None

    async def boot(self, stack: contextlib.AsyncExitStack, key: Path, ports: Sequence[int], seconds: float) -> Sandbox:
        try:
            async with asyncio.timeout(seconds):
                return await self.or_trouble(self._boot(stack, key, ports))
        except TimeoutError:
            why = f"{self.login.words}" if self.login else "it never spoke SSH"
            raise BootTimeout(
                f"the VM was not ready within {seconds:g} s: {why}",
                target=self.host,
                hint="read its console; give it more memory, or a longer boot_timeout",
                console=self.console.tail(),
            ) from None

    async def _boot(self, stack: contextlib.AsyncExitStack, key: Path, ports: Sequence[int]) -> Sandbox:
        self.qmp = await Qmp.connect(self.directory / "vm")
        await self.link(False)
        self._check_cards(await self.qmp.human("info network"))
        forwards = _forwards(await self.qmp.human("info usernet"))
        if missing := [port for port in ports if port not in forwards]:
            raise SandboxFailed(f"QEMU did not forward port {missing[0]}", target=self.host)
        await self.qmp.execute("cont")
        target = SshTarget(self.host, "127.0.0.1", forwards[SSH], identity=key, throwaway=True)
        for tries in itertools.count(1):
            await _speaks_ssh(self.network, target.port)
            try:
                connection = await stack.enter_async_context(
                    ssh.connection(target, self.directory / "ssh", self.network.inside)
                )
                return Sandbox(self.host, self.network, target, connection, self.console.path, forwards, self)
            except AuthenticationFailed as error:
                if tries >= _REFUSALS:
                    raise SandboxFailed(
                        f"the VM does not let toto's key in: {error.words}",
                        target=self.host,
                        hint="check the settings of root's login: services.openssh, security.pam",
                        console=self.console.tail(),
                    ) from None
                self.login = error
            except Unreachable as error:
                self.login = error
            await asyncio.sleep(1)
        raise AssertionError("unreachable")

    async def or_trouble(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`. Raises `SandboxFailed` when QEMU ends or the guest crashes first."""
        doing, watching = asyncio.create_task(work), asyncio.create_task(self._trouble())
        try:
            await asyncio.wait([doing, watching], return_when=asyncio.FIRST_COMPLETED)
            failed = doing.exception() if doing.done() and not doing.cancelled() else None
            if isinstance(failed, OSError) or type(failed) is SandboxError:  # QEMU has ended under a connection
                await asyncio.wait([watching], timeout=5)
            if watching.done():
                raise watching.result()
            return await doing
        finally:
            for task in (doing, watching):
                task.cancel()
            await asyncio.gather(doing, watching, return_exceptions=True)

    async def _trouble(self) -> SandboxFailed:
        while self.running.status is None and self.console.fatal is None:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        await asyncio.wait([self.reading], timeout=1)  # for its last lines
        if self.running.status not in (None, 0) and self.running.exceeded is None:
            await asyncio.sleep(_NOTICED)
        if self.console.fatal is not None:
            why, hint = f"the VM crashed: {self.console.fatal}", "read its console"
        elif self.running.exceeded is not None:
            why = f"the VM was ended: it used more than {self.running.exceeded}"
            hint = "raise virtualisation.memorySize or diskSize of the host, up to what the server allows"
        elif self.running.status == 0:
            why, hint = "the VM switched itself off", "read its console"
        else:
            why = f"QEMU ended with status {self.running.status}"
            hint = "is there room on the disk and in memory, and a QEMU for the host's system?"
        return SandboxFailed(why, target=self.host, hint=hint, console=self.console.tail())

    def _check_cards(self, network: str) -> None:
        """Refuse cards that toto did not add: a host can add one by virtualisation.qemu, and it would be a way out."""
        cards = dict(re.findall(r"^ \\ (\S+): (.*)$", network, re.M))
        right = set(cards) == set(_CARDS) and all(_CARDS[name] in cards[name] for name in cards)
        if not right or network.count("type=nic") != len(_CARDS):
            raise SandboxFailed(
                f"the VM's network is not the one that toto controls:\n{network.strip()}",
                target=self.host,
                hint="remove the network cards from virtualisation.qemu in virtualisation.vmVariant",
            )

    async def link(self, up: bool) -> None:
        assert self.qmp is not None
        await self.qmp.execute("set_link", name="inet0", up=up)

    async def alive(self) -> bool:
        if self.qmp is None or self.running.status is not None or self.console.fatal is not None:
            return False
        try:
            async with asyncio.timeout(10):
                status = await self.qmp.execute("query-status")
        except (SandboxError, TimeoutError):
            return False
        return bool(status["running"])

    def close(self) -> None:
        if self.qmp is not None:
            self.qmp.close()
        self.reading.cancel()
        self.console.close()


def _forwards(usernet: str) -> dict[int, int]:
    """{guest port: port of the loopback} from QEMU's `info usernet`."""
    rows = re.findall(r"^\s*TCP\[HOST_FORWARD\]\s+\d+\s+127\.0\.0\.1\s+(\d+)\s+\S+\s+(\d+)\s", usernet, re.M)
    return {int(guest): int(ours) for ours, guest in rows}


async def _speaks_ssh(network: Namespace, port: int) -> None:
    """Wait for SSH's greeting. The forwarded port accepts long before the guest listens, so each try is limited."""
    while True:
        with contextlib.suppress(TimeoutError, OSError):
            async with asyncio.timeout(5):
                reader, writer = await network.connect(port)
                try:
                    if (await reader.read(4)).startswith(b"SSH-"):
                        return
                finally:
                    writer.close()
        await asyncio.sleep(0.2)
