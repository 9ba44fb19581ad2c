"""NFS for a machine of the lab: Debian's programs, and modules of the lab's own kernel, as one tar; made once.

The machine has no package manager's word of them, and no rpcbind: NFS 4 needs neither.
"""

import fcntl
import io
import lzma
import re
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Final

from tests.lab.debian import DebianMachine
from tests.lab.setup import _unpack, _versions, cache, setup

_PACKAGES: Final = (
    "nfs-kernel-server",
    "nfs-common",
    "libevent-core-2.1-7",
    "libnfsidmap1",
    "libwrap0",
    "libkeyutils1",
)
_PROGRAMS: Final = ("exportfs", "rpc.nfsd", "rpc.mountd", "mount.nfs", "mount.nfs4")
_MODULES: Final = ("nfsd", "nfsv4", "veth")
# There is no insmod on the machine either.
_LOAD: Final = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
for name in open("/nfs/order").read().split():
    if libc.syscall(313, os.open(f"/nfs/{name}.ko", os.O_RDONLY), b"", 0):
        raise SystemExit(f"{name}: {os.strerror(ctypes.get_errno())}")
"""


async def install(machine: DebianMachine) -> None:
    """Have the machine's kernel and programs speak NFS, as server and as client."""
    await machine.send(_made())
    await machine.check(
        f"python3 -c '{_LOAD}' && mkdir -p /etc/exports.d /var/lib/nfs/v4recovery && touch /etc/exports"
    )


def _made() -> Path:
    setup()
    (release,) = (each.name for each in (cache() / "roots/lab-kernel/lib/modules").iterdir())
    made = cache() / f"nfs-{release}.tar"
    with (cache() / "nfs.lock").open("w") as lock, tempfile.TemporaryDirectory(dir=cache()) as scratch:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            root = Path(scratch) / "root"
            _unpack(cache() / "debs", _versions(_PACKAGES), root)
            (kernel,) = (cache() / "debs").glob(f"linux-image-{release}_*.deb")
            subprocess.run(["dpkg-deb", "-x", kernel, root], check=True)
            _pack(root, Path(scratch) / "tar")
            (Path(scratch) / "tar").rename(made)
    return made


def _pack(root: Path, made: Path) -> None:
    found = {re.sub(r"\.ko.*", "", each.name).replace("-", "_"): each for each in root.rglob("*.ko*")}
    modules: dict[str, bytes] = {}

    def load(name: str) -> None:
        if name in modules or name not in found:
            return
        file = found[name]
        data = file.read_bytes() if file.suffix == ".ko" else lzma.decompress(file.read_bytes())
        needed = re.search(rb"\0depends=([^\0]*)\0", data)
        for other in needed[1].decode().split(",") if needed else []:
            load(other.replace("-", "_"))
        modules[name] = data

    for name in _MODULES:
        load(name)
    files = {f"nfs/{name}.ko": data for name, data in modules.items()} | {"nfs/order": "\n".join(modules).encode()}
    for folder in (root / "sbin", root / "usr/sbin"):
        files |= {f"usr/sbin/{each.name}": each.read_bytes() for each in folder.iterdir() if each.name in _PROGRAMS}
    for each in root.rglob("lib*.so.*"):
        files[f"usr/lib/x86_64-linux-gnu/{each.name}"] = each.read_bytes()
    with tarfile.open(made, "w") as tar:
        for name, data in files.items():
            about = tarfile.TarInfo(name)
            about.size, about.mode = len(data), 0o755
            tar.addfile(about, io.BytesIO(data))
