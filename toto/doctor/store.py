"""The store that machines fetch from: what each finds in the cache, and what is exported by NFS."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from toto.base import paths
from toto.doctor.findings import Finding, Toto
from toto.doctor.fleet import deployed
from toto.git_host import host
from toto.git_host.shared import name_of
from toto.ledger.ledger import Ledger
from toto.ledger.target import HOST, Target
from toto.nix import cache as caches
from toto.store import grants
from toto.store.exports import TREES, Configuration

_SETTINGS: Final = Path("/etc/toto-store.json")  # root's, by nix/store.nix
_EXPORTS: Final = Path("/etc/exports.d/toto.exports")
_PORT: Final = 2049
_LISTENS: Final = "0A"  # as the kernel lists sockets


async def cache(toto: Toto) -> Sequence[Finding]:
    """Whether each machine that fetches finds its last good in the cache, whole. Raises `LedgerError`."""
    found, whole = [], 0
    for repo in host.infra_repos(toto.repos):
        fleet, ledger = deployed(repo), Ledger(repo).read()
        for name, machine in (fleet.machines if fleet else {}).items():
            good = getattr(ledger.get(Target(HOST, name)).good, "path", None)
            if not (machine.deployed and (machine.deploy == "pull" or machine.substitute) and good):
                continue
            if await asyncio.to_thread(caches.has, grants.of(paths.repo_folder(repo), name), good):
                whole += 1
                continue
            said = f"{name} of {name_of(repo)} does not find its last good there, or not all of it"
            mend = f"start reconcile/reconcile with `force` and {name} in `only`; see docs/store.md"
            found.append(Finding(f"cache for {name}", "warning", said, mend))
    return found or ([Finding("cache", "ok", f"has the last good of all {whole} machines that fetch")] if whole else [])


async def nfs(toto: Toto) -> Sequence[Finding]:
    """Whether an NFS server exports what is granted, where root has set one up for this toto."""
    if not _SETTINGS.exists():
        return []
    try:
        settings = Configuration.load(_SETTINGS)
    except (ValueError, LookupError, TypeError) as error:
        return [Finding("NFS", "missing", f"{_SETTINGS} has mistakes: {error}", "it is made by nix/store.nix")]
    if settings.granted != grants.granted():
        return []
    if not _listened(_PORT):
        return [Finding("NFS", "missing", f"nobody listens at port {_PORT}", "systemctl status nfs-server")]
    lines = _EXPORTS.read_text().splitlines() if _EXPORTS.exists() else []
    exported = {line.partition("(")[0] for line in lines if ",subtree_check," in line}
    found, whole = [], 0
    for machine in settings.machines:
        folder = settings.granted / machine.repo / machine.name
        wanted = {
            f"{each} {machine.address}" for each in (folder, *([TREES / machine.name] if machine.diskless else []))
        }
        if folder.is_dir() and not wanted <= exported:
            said = f"what {machine.name} is granted is not in {_EXPORTS} as it should be"
            mend = "systemctl start toto-store, and read why: journalctl -u toto-store"
            found.append(Finding(f"NFS for {machine.name}", "warning", said, mend))
        whole += folder.is_dir()
    return found or [Finding("NFS", "ok", f"exports what {whole} of {len(settings.machines)} machines are granted")]


def _listened(port: int) -> bool:
    """Whether a program, or the kernel, listens at a TCP port of this machine."""
    found = [line.split() for file in ("tcp", "tcp6") for line in Path("/proc/net", file).read_text().splitlines()[1:]]
    return any(int(local.rpartition(":")[2], 16) == port and state == _LISTENS for _, local, _, state, *_ in found)


CHECKS: Final = (cache, nfs)
