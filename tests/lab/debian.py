"""A machine of the lab with real systemd: Debian with sshd, sudo and a nix daemon, for what needs these.

`image()` makes its disk once (90 s, 500 MB below the lab's cache; debootstrap needs root or sudo), and each machine
writes to a layer above it. The kernel is the lab's own. It answers ssh 15 to 30 s after it is switched on; then
`DebianMachine.snapshot` and `restore` bring it back to where it was in a few seconds, as often as wanted.
"""

import asyncio
import fcntl
import inspect
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, Self

import pytest

from tests.lab.machine import ACCELERATOR, KERNEL, Machine, MachineError
from tests.lab.setup import cache, setup

PACKAGES: Final = (
    *("systemd-sysv", "dbus", "udev", "openssh-server", "sudo", "iproute2", "python3"),
    *("nix-bin", "nix-setup-systemd", "libdbi-perl"),  # (debootstrap finds no virtual package by itself)
)
_SIZE: Final = "2G"
# What only costs time: timers, and a console to log in at.
_MASKED: Final = (
    *(
        "apt-daily.timer",
        "apt-daily-upgrade.timer",
        "dpkg-db-backup.timer",
        "e2scrub_all.timer",
        "e2scrub_reap.service",
    ),
    *("getty@tty1.service", "serial-getty@ttyS0.service", "fstrim.timer", "systemd-tmpfiles-clean.timer"),
    *("dev-hugepages.mount", "dev-mqueue.mount", "sys-kernel-debug.mount", "sys-kernel-tracing.mount"),
    *("modprobe@.service", "kmod-static-nodes.service", "systemd-logind.service", "systemd-pstore.service"),
    *("systemd-random-seed.service", "systemd-sysusers.service"),
    *("systemd-update-utmp.service", "systemd-update-utmp-runlevel.service"),
)
_NETWORK: Final = "[Match]\nType=ether\n\n[Network]\nAddress=10.0.2.15/24\nGateway=10.0.2.2\n"
# (The other key exchange, after quantum computers, is a fifth of a login on an emulated machine.)
_SSHD: Final = "PasswordAuthentication no\nUseDNS no\nKexAlgorithms curve25519-sha256\n"
# At `restore` its clock leaps to the present, which a watchdog takes for a service that hangs.
_SERVICES: Final = "[Service]\nWatchdogSec=0\n"
_INIT: Final = """#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mkdir -p /proc /sys /dev /root
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev 2>/dev/null
while read -r module; do insmod /modules/$module.ko || echo "cannot load $module"; done < /modules/load-order
tries=0
until [ -b /dev/vda ] || [ $tries -ge 100 ]; do tries=$((tries + 1)); sleep 0.1; done
mount -t ext4 -o noatime /dev/vda /root || { echo "cannot mount the disk"; sleep 60; }
[ ! -d /seed ] || cp -a /seed/. /root/
mount --move /proc /root/proc; mount --move /sys /root/sys; mount --move /dev /root/dev
exec switch_root /root /sbin/init
"""


class NoDebian(Exception):
    """The image cannot be made here; the message says what is missing."""


def image(more: Sequence[str] = ()) -> Path:
    """The disk that all of these machines begin with; made when this recipe has changed. Raises `NoDebian`.

    With `more` packages it is a disk of its own.
    """
    if os.geteuid() != 0 and shutil.which("sudo") is None:
        raise NoDebian("debootstrap makes a Debian as root, and this user is neither root nor has sudo")
    if missing := [each for each in ("debootstrap", "apt-get", "mkfs.ext4") if shutil.which(each) is None]:
        raise NoDebian(f"the program {missing[0]} is not on PATH")
    packages = (*PACKAGES, *more)
    key = repr((packages, _SIZE, _MASKED, _NETWORK, _SSHD, _SERVICES)) + inspect.getsource(_make)
    folder = cache() / ("debian-more" if more else "debian")
    made, recipe = folder / "disk.qcow2", folder / "recipe"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:  # two at once would make it twice
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (made.exists() and recipe.exists() and recipe.read_text() == key):
            recipe.unlink(missing_ok=True)
            _make(made, packages)
            recipe.write_text(key)
    return made


def _make(made: Path, packages: Sequence[str]) -> None:
    release, mirror = _origin()
    elevated = [] if os.geteuid() == 0 else ["sudo"]
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="toto-debian-") as name:
        scratch = Path(name)
        root, raw = scratch / "root", scratch / "raw"
        script = f"""
            set -eu
            debootstrap --variant=minbase --include={",".join(packages)} {release} "$1" {mirror} >"$1.log" 2>&1
            rm -rf "$1"/var/cache/apt/* "$1"/var/lib/apt/lists/* "$1"/etc/ssh/ssh_host_*
            mkdir -p "$1/root/.ssh"
            chmod 700 "$1/root/.ssh"
            : > "$1/etc/machine-id"
            for unit in {" ".join(_MASKED)}; do ln -sf /dev/null "$1/etc/systemd/system/$unit"; done
            ln -sf /lib/systemd/system/systemd-networkd.service "$1/etc/systemd/system/multi-user.target.wants/"
            printf '%s' "$3" > "$1/etc/systemd/network/10-lab.network"
            printf '%s' "$4" > "$1/etc/ssh/sshd_config.d/10-lab.conf"
            mkdir "$1/etc/systemd/system/service.d"
            printf '%s' "$5" > "$1/etc/systemd/system/service.d/10-lab.conf"
            sed -i /pam_systemd/d "$1/etc/pam.d/common-session"
            truncate -s {_SIZE} "$2"
            mkfs.ext4 -q -F -L debian -E lazy_itable_init=1,lazy_journal_init=1 -d "$1" "$2"
            chown {os.geteuid()}:{os.getegid()} "$2"
            rm -rf "$1"
        """
        # Whatever it mounts and starts goes with it.
        held = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        done = subprocess.run(
            [*elevated, *held, "sh", "-c", script, "sh", str(root), str(raw), _NETWORK, _SSHD, _SERVICES],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            log = scratch / "root.log"
            said = log.read_text(errors="replace").splitlines()[-5:] if log.exists() else []
            subprocess.run([*elevated, "rm", "-rf", "--one-file-system", str(root)], check=False)
            raise NoDebian("\n".join(["debootstrap failed:", *said, *done.stderr.splitlines()[-3:]]))
        fresh = made.with_suffix(f".{os.getpid()}")
        subprocess.run(["qemu-img", "convert", "-q", "-f", "raw", "-O", "qcow2", raw, fresh], check=True)
        fresh.replace(made)


def _origin() -> tuple[str, str]:
    """This machine's release of Debian and its mirror. Raises `NoDebian`."""
    asked = ["apt-get", "indextargets", "--format", "$(ORIGIN) $(LABEL) $(CODENAME) $(REPO_URI)"]
    targets = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    found = re.search(r"^Debian Debian ([a-z]+) (\S+)$", targets, re.M)
    if found is None:
        raise NoDebian("apt knows no mirror of Debian: run `apt-get update` as root, and try again")
    return found[1], found[2]


class DebianMachine(Machine):
    """A machine with real systemd. `files` are written to its disk at each boot, owned by root."""

    def __init__(
        self,
        name: str,
        directory: Path,
        key: Path,
        *,
        address: str,
        files: Mapping[str, tuple[str, int]] = {},
        packages: Sequence[str] = (),
        tree: Path | None = None,
        memory: int = 512,
        cores: int = 1,
    ) -> None:
        """`files` maps absolute paths to a text and permissions. The key's owner logs in as root.

        `packages` are Debian's, besides those of all; `tree` is the image of a file system, its second disk."""
        super().__init__(name, directory, key, address=address, ports=(), memory=memory, user="root")
        self._packages, self._tree, self._cores = packages, tree, cores
        self._resumed: tuple[str, ...] = ()
        self._files = {
            "/etc/hostname": (f"{name}\n", 0o644),
            "/etc/hosts": (f"127.0.0.1 localhost {name}\n", 0o644),
            "/root/.ssh/authorized_keys": (f"{self.public_key}\n", 0o600),
            **files,
        }

    async def __aenter__(self) -> Self:
        """Skips the test where there can be no such machine, and says why."""
        try:
            await asyncio.to_thread(image, self._packages)
        except NoDebian as error:
            pytest.skip(f"NO MACHINE WITH SYSTEMD: {error}")
        return await super().__aenter__()

    async def _program(self) -> tuple[Sequence[str], dict[str, str]]:
        base = await asyncio.to_thread(image, self._packages)
        await asyncio.to_thread(setup)
        if not self._disk.exists():
            backing = ["-b", str(base.absolute()), "-F", "qcow2"]
            subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *backing, self._disk], check=True)
        kernel = cache() / "roots" / "lab-kernel"
        initrd = self.directory / "initrd"
        await asyncio.to_thread(self._write_initrd, initrd, kernel)
        words = [
            *("qemu-system-x86_64", "-machine", f"accel={ACCELERATOR}", "-cpu", "max"),
            *("-global", "virtio-net-pci.romfile=", "-name", self.name, "-m", str(self.memory), "-nographic"),
            *("-smp", str(self._cores)),
            *("-net", "nic,netdev=user.0,model=virtio", "-netdev", f"user,id=user.0,{self._forwards()}"),
            *("-drive", f"file={self._disk},if=virtio,format=qcow2,cache=writeback,werror=report"),
            *(("-drive", f"file={self._tree},if=virtio,format=raw,readonly=on") if self._tree else ()),
            *("-device", "virtio-rng-pci", "-kernel", str(kernel / "vmlinuz"), "-initrd", str(initrd.absolute())),
            *("-append", f"console=ttyS0 quiet {KERNEL}", *self._resumed),
        ]
        return words, dict(os.environ)

    def _write_initrd(self, initrd: Path, kernel: Path) -> None:
        with tempfile.TemporaryDirectory() as name:
            tree = Path(name)
            (modules,) = (kernel / "lib/modules").iterdir()
            shutil.copytree(modules, tree / "modules")
            (tree / "bin").mkdir()
            shutil.copyfile(cache() / "roots/lab-base/bin/busybox", tree / "bin/busybox")
            (tree / "init").write_text(_INIT)
            for each in ("init", "bin/busybox"):
                (tree / each).chmod(0o755)
            for path, (text, mode) in (self._files | self._host_key()).items():
                file = tree / "seed" / path.lstrip("/")
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text)
                file.chmod(mode)
            names = subprocess.run(["find", "."], cwd=tree, capture_output=True, check=True).stdout
            pack = ["cpio", "--quiet", "--create", "--format=newc", "--owner=0:0"]
            with initrd.open("wb") as sink:
                subprocess.run(pack, cwd=tree, input=names, stdout=sink, check=True)

    def _host_key(self) -> dict[str, tuple[str, int]]:
        """The key by which it is known; the same for as long as the machine lives."""
        file = self.directory / "ssh_host_ed25519_key"
        if not file.exists():
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", file], check=True)
        return {
            f"/etc/ssh/{file.name}": (file.read_text(), 0o600),
            f"/etc/ssh/{file.name}.pub": (file.with_suffix(".pub").read_text(), 0o644),
        }

    async def check(self, *command: str, timeout: float = 300, login: bool = False) -> str:
        """As of each machine, and with time for what real systemd does on a busy, emulated one."""
        return await super().check(*command, timeout=timeout, login=login)

    async def send(self, tar: Path, to: str = "/") -> None:
        """Unpack a tar on the machine."""
        words = ["ssh", *self.ssh_options, f"root@{self.address}", f"mkdir -p {to} && tar --extract --directory {to}"]
        with tar.open("rb") as source:
            process = await asyncio.create_subprocess_exec(*words, cwd=self.directory, stdin=source)
            assert await asyncio.wait_for(process.wait(), 300) == 0

    @property
    def host_key(self) -> str:
        """Its ssh host key: type and base64."""
        return (self.directory / "ssh_host_ed25519_key.pub").read_text().strip()

    async def snapshot(self, name: str) -> None:
        """Remember how the machine is now: memory, disk and all."""
        await self._monitor(f"savevm {name}")

    async def restore(self, name: str) -> None:
        """Make it be again as it was at `snapshot`, but for its clock, which is right. Connections to it are lost.

        QEMU is started anew for that: in one that runs, the guest's clocks would leap by all that was since, and what
        waits by them is late for minutes.
        """
        self._forget_logins()
        await self.power_cut()
        self._resumed = ("-loadvm", name)
        await self.start()
        self._resumed = ()
        await self.wait_ssh()
        await self.check(f"date --set=@{time.time():.0f} > /dev/null")

    async def reset(self) -> None:
        """A power cut, and the power back at once: what it had not written to its disk is lost."""
        self._forget_logins()
        await self._monitor("system_reset")

    def _forget_logins(self) -> None:
        for shared in ("login", "toto"):
            (self.directory / shared).unlink(missing_ok=True)

    async def _monitor(self, line: str) -> None:
        if said := await self._qmp("human-monitor-command", **{"command-line": line}):
            raise MachineError(f"{self.name}: {line}: {said}")
