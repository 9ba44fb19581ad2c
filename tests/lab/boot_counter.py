"""Tries systemd-boot's boot counting with a real loader and firmware: a kernel that panics is tried twice, then not.

    python -m tests.lab.boot_counter

It is what NixOS sets up with `boot.loader.systemd-boot.bootCounting.enable`, and what brings a machine back whose new
generation does not even come up. Not a part of `make test`: it needs Debian's packages ovmf, systemd-boot-efi, mtools
and dosfstools, and takes some minutes.
"""

import asyncio
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from tests.lab.machine import ACCELERATOR, KERNEL
from tests.lab.setup import cache, setup

LOADER: Final = Path("/usr/lib/systemd/boot/efi/systemd-bootx64.efi")
FIRMWARE: Final = Path("/usr/share/OVMF")
TRIES: Final = 2
_MINUTES: Final = 15
# What is booted. The new generation ends as a kernel does whose root is not there; the old one says so and is done.
_INIT: Final = """#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox grep -o 'generation=[a-z]*' /proc/cmdline
case $(/bin/busybox cat /proc/cmdline) in
  *generation=new*) /bin/busybox sleep 1; exit 1 ;;
esac
/bin/busybox poweroff -f
"""


def disk(folder: Path) -> Path:
    """A disk with systemd-boot, a new generation with a counter, and an old one that was blessed."""
    kernel, tree, made = cache() / "roots/lab-kernel/vmlinuz", folder / "tree", folder / "esp.img"
    (tree / "bin").mkdir(parents=True)
    (tree / "proc").mkdir()
    (tree / "bin/busybox").write_bytes((cache() / "roots/lab-base/bin/busybox").read_bytes())
    (tree / "init").write_text(_INIT)
    for each in ("init", "bin/busybox"):
        (tree / each).chmod(0o755)
    initrd = folder / "initrd"
    names = subprocess.run(["find", "."], cwd=tree, capture_output=True, check=True).stdout
    with initrd.open("wb") as sink:
        pack = ["cpio", "--quiet", "--create", "--format=newc", "--owner=0:0"]
        subprocess.run(pack, cwd=tree, input=names, stdout=sink, check=True)
    (folder / "loader.conf").write_text("timeout 0\n")
    for name in ("old", "new"):
        (folder / f"{name}.conf").write_text(
            f"title {name}\nsort-key nixos\nversion {2 if name == 'new' else 1}\nlinux /vmlinuz\ninitrd /initrd\n"
            f"options console=ttyS0 quiet panic=1 {KERNEL} generation={name}\n"
        )
    subprocess.run(["truncate", "-s", "96M", made], check=True)
    subprocess.run(["mkfs.vfat", "-F", "32", made], check=True, capture_output=True)
    for each in ("EFI", "EFI/BOOT", "loader", "loader/entries"):
        subprocess.run(["mmd", "-i", made, f"::/{each}"], check=True)
    for source, place in (
        (LOADER, "EFI/BOOT/BOOTX64.EFI"),
        (kernel, "vmlinuz"),
        (initrd, "initrd"),
        (folder / "loader.conf", "loader/loader.conf"),
        (folder / "old.conf", "loader/entries/old.conf"),
        (folder / "new.conf", f"loader/entries/new+{TRIES}.conf"),
    ):
        subprocess.run(["mcopy", "-i", made, source, f"::/{place}"], check=True)
    return made


async def boots(folder: Path, made: Path) -> list[str]:
    """The generations that the machine boots, one after the other, until it switches itself off."""
    variables = folder / "vars.fd"
    variables.write_bytes((FIRMWARE / "OVMF_VARS_4M.fd").read_bytes())
    argv = [
        *("qemu-system-x86_64", "-machine", f"q35,accel={ACCELERATOR}", "-cpu", "max", "-m", "512", "-nographic"),
        *("-drive", f"if=pflash,format=raw,readonly=on,file={FIRMWARE / 'OVMF_CODE_4M.fd'}"),
        *("-drive", f"if=pflash,format=raw,file={variables}", "-net", "none"),
        *("-drive", f"file={made},if=virtio,format=raw"),
    ]
    running = await asyncio.create_subprocess_exec(
        *argv, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE
    )
    seen: list[str] = []
    try:
        async with asyncio.timeout(60 * _MINUTES):
            assert running.stdout is not None
            async for line in running.stdout:
                if found := re.search(rb"generation=(new|old)\r?$", line):
                    seen.append(found[1].decode())
                    print(f"booted: {seen[-1]}; entries: {', '.join(entries(made))}", flush=True)
            await running.wait()
    finally:
        if running.returncode is None:
            running.kill()
            await running.wait()
    return seen


def entries(made: Path) -> list[str]:
    """The names of the loader's entries: a counter is in the name."""
    done = subprocess.run(["mdir", "-b", "-i", made, "::/loader/entries"], capture_output=True, text=True, check=True)
    return sorted(each.rpartition("/")[2] for each in done.stdout.split())


async def main() -> int:
    """The exit status: 0 when the old generation came back after as many tries as the counter said."""
    await asyncio.to_thread(setup)
    with tempfile.TemporaryDirectory(prefix="toto-boot-") as name:
        folder = Path(name)
        made = disk(folder)
        seen, left = await boots(folder, made), entries(made)
    print(f"it booted {' then '.join(seen)}; entries now: {', '.join(left)}")
    return 0 if seen == ["new"] * TRIES + ["old"] and f"new+0-{TRIES}.conf" in left else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
