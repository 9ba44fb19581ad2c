"""What toto keeps for its fleet: who may push, the keys, the contact of machines, the last backup."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from toto.base import paths
from toto.base.errors import TotoError
from toto.doctor.findings import Finding, Toto
from toto.git_host import access, host
from toto.git_host.shared import name_of
from toto.infra_repo.deployed import manifest_of
from toto.infra_repo.manifest import Manifest
from toto.machine import condition, keys, signing_key
from toto.metrics.fleet import BACKED_UP
from toto.server.environment import block_key

_DAY: Final = 86_400.0
_SILENT: Final = _DAY  # seconds without a word of a machine that asks by itself
_CREDENTIAL: Final = Path("/run/credentials/toto.service/toto-blocks")  # of the unit of nix/toto.nix and setup/systemd
_OLD: Final = 2 * _DAY  # seconds since the last backup


async def git_host(toto: Toto) -> Sequence[Finding]:
    """Whether there are rules that say who may push, and repositories. Raises `AccessError`."""
    repos = host.infra_repos(toto.repos)
    found = []
    if access.path_of(toto.repos, access.ADMIN).exists():
        rules = await access.in_force(toto.repos)
        found.append(Finding("git host", "ok", f"{len(rules.users)} users, {len(repos)} repositories"))
    else:
        mend = "toto repo admin NAME KEY.pub, see docs/git-host.md"
        found.append(Finding("git host", "warning", "nobody may push but who has a login here", mend))
    if not repos:
        found.append(Finding("repositories", "warning", f"none in {toto.repos}", "toto repo create infra"))
    return found


async def block_keys(toto: Toto) -> Sequence[Finding]:
    """Whether the key of the blocks' secrets is there, once a server has run."""
    if block_key() is not None or _CREDENTIAL.is_file():
        return [Finding("key of the blocks", "ok", "there")]
    if not toto.home.exists():
        return []
    mend = "give `toto serve` the credential toto-blocks again, or restore a backup; without it a new one is made"
    return [Finding("key of the blocks", "warning", "not here: what is in the blocks cannot be read", mend)]


async def keys_of_repos(toto: Toto) -> Sequence[Finding]:
    """Whether each repository has the keys that its machines know, and toto the one that signs documents."""
    found = []
    for repo in host.infra_repos(toto.repos):
        name, fleet = name_of(repo), deployed(repo)
        if fleet is None:
            continue
        wanted = {keys.MACHINES: "logs in to its machines"} if any(m.deployed for m in fleet.machines.values()) else {}
        if any(machine.by_document for machine in fleet.machines.values()):
            wanted[keys.STORE] = "signs what its machines fetch"
            if signing_key.there() is None:
                found.append(
                    Finding("signing key", "missing", "none: no document can be signed", "toto machine signer")
                )
        for key, what in wanted.items():
            if not keys.there(repo, key):
                use = "signing" if key == keys.STORE else "ssh"
                mend = f"toto key {name} {key} --new {use}, or restore a backup: machines know the old one"
                found.append(Finding(f"key {key} of {name}", "missing", f"not here: it {what}", mend))
    return found or [Finding("keys", "ok", "all that the repositories need are there")]


def deployed(repo: Path) -> Manifest | None:
    """The manifest that is deployed; None when it has mistakes, of which a push tells."""
    try:
        return manifest_of(repo)
    except TotoError:
        return None


async def contact(toto: Toto) -> Sequence[Finding]:
    """When machines that ask by themselves did so last."""
    silent, heard = [], 0
    for repo in host.infra_repos(toto.repos):
        fleet = deployed(repo)
        for name, machine in (fleet.machines if fleet else {}).items():
            if not (machine.deployed and machine.deploy == "pull"):
                continue
            if (last := condition.heard(repo, name, condition.read(repo, name))) > time.time() - _SILENT:
                heard += 1
                continue
            when = f"{(time.time() - last) / _DAY:.0f} days ago" if last else "never"
            mend = f"on {name}: systemctl status flying-monkey; can it reach toto's server for machines?"
            silent.append(Finding(f"flying-monkey on {name}", "warning", f"last heard of: {when}", mend))
    return silent or ([Finding("flying-monkeys", "ok", f"all {heard} asked within a day")] if heard else [])


async def backup(toto: Toto) -> Sequence[Finding]:
    """How old the last backup is."""
    mend = "toto backup FILE, best every day: services.toto.backup.enable on NixOS"
    file = paths.state_home() / BACKED_UP
    if not file.exists():
        return [Finding("backup", "warning", "there was none yet", mend)]
    age = time.time() - file.stat().st_mtime
    said = f"the last one is {age / 3600:.0f} hours old"
    return [Finding("backup", "warning" if age > _OLD else "ok", said, mend if age > _OLD else "")]


CHECKS: Final = (git_host, block_keys, keys_of_repos, contact, backup)
