"""This machine: toto's state, its disks, cells and KVM."""

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from toto.base import paths, process, server_rules
from toto.base.resources import at_once
from toto.cell.cell import Cell
from toto.cell.namespace import namespace
from toto.doctor.findings import Finding, Toto
from toto.rehearsal.acceleration import acceleration

_LITTLE: Final = 5_000_000_000  # bytes that are free: less than that is soon used up
_SANDBOX: Final = 2048  # MB


async def state(toto: Toto) -> Sequence[Finding]:
    """Whose toto's state is, and who else may enter it."""
    about = toto.state.stat()
    if about.st_uid != os.geteuid():
        mend = f"run it as that user: sudo -u '#{about.st_uid}' TOTO_STATE={toto.state} toto doctor"
        return [Finding("state", "missing", f"{toto.state} is of the user {about.st_uid}", mend)]
    if about.st_mode & 0o077:
        said = f"{toto.state} is open to others (mode {about.st_mode & 0o777:o})"
        return [Finding("state", "missing", said, f"chmod 700 {toto.state}")]
    if not os.access(toto.state, os.W_OK):
        said = f"{toto.state} cannot be written"
        return [Finding("state", "missing", said, "is its disk mounted read-only? see `mount`")]
    return [Finding("state", "ok", str(toto.state))]


async def rules(toto: Toto) -> Sequence[Finding]:
    """Whether the server's settings can be read. Raises `InputError` with their mistakes."""
    server_rules.load()
    there = (toto.state / server_rules.FILE).exists()
    return [Finding(server_rules.FILE, "ok", "without mistakes" if there else "none: the defaults count")]


async def disks(toto: Toto) -> Sequence[Finding]:
    """How much room is left where toto writes."""
    found = []
    for name, place in (("disk of the state", toto.state), ("disk of the store", Path("/nix/store"))):
        if place.exists():
            free = shutil.disk_usage(place).free
            said, mend = f"{free / 1e9:.1f} GB are free at {place}", ""
            if free < _LITTLE:
                mend = "start prune/prune, which collects garbage; see `df -h` and `du -xhd1`"
            found.append(
                Finding(name, "ok" if not mend else "missing" if free < paths.LEAST_FREE else "warning", said, mend)
            )
    return found


async def cells(toto: Toto) -> Sequence[Finding]:
    """Whether a program runs in a cell, and whether the network of one can be made. Raises `TotoError`."""
    hint = "may this user make user namespaces? sysctl kernel.unprivileged_userns_clone=1; see docs/security.md"
    cell = Cell()
    try:
        await process.run(["true"], cell=cell, timeout=30)
    except (process.CommandFailed, process.CommandTimeout) as error:
        return [Finding("cells", "missing", f"none can be made: {error.message}", hint)]
    async with namespace() as network:
        await network.attach()
    return [Finding("cells", "ok", "a program runs in one, and one has an uplink")]


async def kvm(toto: Toto) -> Sequence[Finding]:
    """Whether sandboxes run under KVM, as the probe of this boot found."""
    with tempfile.TemporaryDirectory(prefix="toto-") as folder:
        found = await acceleration(Path(folder))
    if found == "kvm":
        return [Finding("KVM", "ok", "sandboxes run under it")]
    device = Path("/dev/kvm")
    if not device.exists():
        said, mend = "there is no /dev/kvm", "modprobe kvm_intel or kvm_amd, or enable virtualisation in the firmware"
    elif not os.access(device, os.R_OK | os.W_OK):
        said, mend = "toto may not open /dev/kvm", "usermod -aG kvm USER, and start toto again"
    else:
        said, mend = "no guest runs with /dev/kvm", "run toto on hardware, or where KVM works in a guest"
    return [Finding("KVM", "warning", f"{said}: sandboxes are emulated, ten times slower", mend)]


async def memory(toto: Toto) -> Sequence[Finding]:
    """How many sandboxes this machine has room for."""
    return [Finding("memory", "ok", f"room for {at_once(_SANDBOX)} sandboxes of {_SANDBOX} MB at once")]


CHECKS: Final = (state, rules, disks, memory, cells, kvm)
