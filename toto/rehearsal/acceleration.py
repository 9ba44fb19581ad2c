"""Whether KVM works on this machine, probed once per boot."""

import contextlib
import logging
import os
import platform
import tempfile
from pathlib import Path
from typing import Final, Literal, TypeAlias

from toto.base import files, process
from toto.base.errors import InputError
from toto.base.process import CommandTimeout

log = logging.getLogger(__name__)

Acceleration: TypeAlias = Literal["kvm", "tcg"]
OVERRIDE: Final = "TOTO_ACCELERATION"


# A whole guest in a few bytes: it enters protected mode, counts down from 100 million, and writes to the debug port. A
# processor does that in 50 ms, TCG in 200. Some hypervisors offer a KVM that emulates every instruction: it opens and
# passes a smaller probe, but would take an hour to boot a guest. It does not finish this probe in time.
_COUNT_DOWN: Final = bytes.fromhex(
    "fa 8cc8 8ed8 660f01164000"  # cli; ds = cs; lgdt [0x40]
    "0f20c0 0c01 0f22c0"  # protected mode
    "66ea1b00ffff0800"  # jmp 8:0xffff001b, which is the next line
    "b900e1f505 49 75fd"  # ecx = 100000000; dec ecx; jnz
    "66baf400 b010 ee f4"
)  # out 0xf4, 0x10; hlt


_ROM: Final = {
    0x0000: _COUNT_DOWN,
    0x0030: bytes.fromhex("0000000000000000 ffff0000009bcf00"),  # descriptors: none, flat code
    0x0040: bytes.fromhex("0f00 3000ffff"),  # their size less one, their address
    0xFFF0: bytes.fromhex("e90d00"),  # where a processor begins: jmp to 0
}
_COUNTED: Final = (0x10 << 1) | 1  # QEMU's exit status for it, by isa-debug-exit


async def acceleration(state: Path) -> Acceleration:
    """Whether VMs on this machine run under "kvm" or "tcg": probed once per boot, and saved in the folder `state`.

    The environment variable TOTO_ACCELERATION overrides it. Raises `InputError` when that is neither.
    """
    match os.environ.get(OVERRIDE, ""):
        case "kvm" | "tcg" as chosen:
            return "kvm" if chosen == "kvm" else "tcg"
        case "":
            pass
        case other:
            raise InputError(f"{OVERRIDE} is {other!r}", hint="set it to kvm or tcg, or unset it")
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    remembered = state / "acceleration"
    with contextlib.suppress(OSError):
        match remembered.read_text().split():
            case [seen, "kvm" | "tcg" as chosen] if seen == boot:
                return "kvm" if chosen == "kvm" else "tcg"
    found: Acceleration = "kvm" if await _kvm_works() else "tcg"
    log.info("virtual machines run under %s", found)
    with contextlib.suppress(OSError):
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        files.write(remembered, f"{boot} {found}\n")
    return found


async def _kvm_works(seconds: float = 3.0, device: Path = Path("/dev/kvm")) -> bool:
    if not os.access(device, os.R_OK | os.W_OK):
        return False
    if platform.machine() != "x86_64":
        return True  # the guest is x86 code; no such slow KVM is known on other machines
    return await _counts_down("kvm", seconds)


async def _counts_down(accelerator: Acceleration, seconds: float) -> bool:
    rom = bytearray(65_536)
    for place, code in _ROM.items():
        rom[place : place + len(code)] = code
    with tempfile.TemporaryDirectory(prefix="toto-") as directory:
        path = Path(directory, "rom")
        path.write_bytes(rom)
        try:
            done = await process.run(
                [
                    "qemu-system-x86_64",
                    "-accel",
                    accelerator,
                    "-nodefaults",
                    "-display",
                    "none",
                    "-m",
                    "16",
                    "-bios",
                    path,
                    "-device",
                    "isa-debug-exit,iobase=0xf4,iosize=4",
                ],
                timeout=seconds,
                check=False,
            )
        except CommandTimeout:
            return False
        except process.CommandNotFound as error:
            log.warning("%s, so KVM cannot be probed", error.message)
            return False
    return done.status == _COUNTED
