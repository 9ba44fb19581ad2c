"""toto's signing key, by which machines know what is toto's word, and the change to the next one.

    TOTO_STATE/signer/key             what the signer signs documents with
    TOTO_STATE/signer/next            what it will sign them with: machines list it beside the one that signs
    TOTO_STATE/signer/…-cert.pub      of either: a certificate, by which machines obey it that do not list it
    TOTO_STATE/signer/old             what it signed with before

A certificate is for the day on which a key is lost, or stolen: one whom the machines list as well, such as an
administrator's key that is kept offline, vouches for a new key of toto's, for some days (`ssh-keygen -s`).
"""

import fcntl
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import SSHCertificate, load_ssh_public_identity

from flying_monkey.signature import fingerprint, seal
from toto.base import files, paths, process
from toto.base.errors import InputError
from toto.git_host.shared import name_of
from toto.infra_repo import git, manifest
from toto.machine import condition, keys

_PATIENCE: Final = 60.0  # seconds for ssh-keygen
_NAMED: Final = 10  # machines in a message
_FOR_EVER: Final = 2**63  # seconds
_CERTIFICATE: Final = re.compile(  # as `ssh-keygen -L` shows one
    r"Public key: \S+ (?P<key>\S+)\n\s*Signing CA: \S+ (?P<by>\S+).*?Principals: *\n(?P<repos>.*?)Critical Options:",
    re.DOTALL,
)


async def current() -> Path:
    """The file of the key that signs; it is made when there is none."""
    return await _made(_folder() / "key")


def there() -> Path | None:
    """The file of the key that signs, if there is one."""
    file = paths.state_home() / "signer" / "key"
    return file if file.exists() else None


async def make_next() -> Path:
    """The file of the key that will sign; it is made when there is none."""
    if of_next() is None:  # what a switch that was killed has left is of a different key
        certificate(_folder() / "next").unlink(missing_ok=True)
    return await _made(_folder() / "next")


def of_next() -> Path | None:
    """The file of the key that will sign, if there is one."""
    file = _folder() / "next"
    return file if file.exists() else None


def certificate(key: Path) -> Path:
    """The file of a key's certificate; there may be none."""
    return key.with_name(f"{key.name}-cert.pub")


def sealed(text: bytes, repo: Path, machine: str) -> bytes:
    """An envelope for a machine: `text` and its signature, by a key that the machine lists or with its certificate."""
    key = _folder() / "key"
    with files.lock(_folder() / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        return seal(text, certificate(key) if certificate(key).exists() and not _lists(repo, machine, key) else key)


def _lists(repo: Path, machine: str, key: Path) -> bool:
    """Whether a machine says that it lists a key."""
    known = condition.read(repo, machine)
    if known is None or known.signers is None or not _pub(key).exists():
        return False
    return fingerprint(_pub(key).read_text()) in known.signers


def vouched_until(repo: Path, machine: str) -> float | None:
    """Until when a machine obeys toto by the certificate of the key that signs alone, in seconds since 1970.

    None for one that lists that key, that has not said what it lists, or for which there is no certificate.
    """
    key = _folder() / "key"
    if not certificate(key).exists():
        return None
    known = condition.read(repo, machine)
    if known is None or known.signers is None or _lists(repo, machine, key):
        return None
    return valid_until(certificate(key))


def valid_until(file: Path) -> float:
    """Until when a certificate is valid, in seconds since 1970. Raises `InputError` for what cannot be read."""
    try:
        found = load_ssh_public_identity(file.read_bytes())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InputError(f"cannot be read: {error}", target=str(file)) from None
    if not isinstance(found, SSHCertificate):
        raise InputError("is no certificate of an ssh key", target=str(file))
    return found.valid_before if found.valid_before < _FOR_EVER else math.inf


async def use_next() -> Path:
    """Sign by the next key from now on. The present one is kept as `old`, and its file returned."""
    key, fresh = await current(), await make_next()
    old = key.with_name("old")
    with files.lock(_folder() / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        old.unlink(missing_ok=True)
        old.hardlink_to(key)
        for each in (_pub(key), certificate(key)):  # (ssh-keygen takes no key beside the public half of another.)
            each.unlink(missing_ok=True)
        fresh.replace(key)
        for half in (_pub, certificate):
            if half(fresh).exists():
                half(fresh).replace(half(key))
    return old


@dataclass(frozen=True)
class Certificate:
    """A certificate: the fingerprints of the key and of who vouches for it, and the repos that it is for."""

    key: str
    by: str
    repos: tuple[str, ...]


async def read_certificate(file: Path) -> Certificate:
    """Raises `InputError` for what is none."""
    done = await process.run(["ssh-keygen", "-L", "-f", file], timeout=_PATIENCE, check=False)
    if (found := _CERTIFICATE.search(done.stdout)) is None:
        raise InputError("is no certificate of an ssh key", target=str(file))
    return Certificate(found["key"], found["by"], tuple(found["repos"].split()))


async def take_certificate(file: Path, repos: Iterable[Path]) -> Path:
    """Take over the certificate of the next key, or else of the present one; return that key. Raises `InputError`."""
    key, found = of_next() or await current(), await read_certificate(file)
    if found.key != fingerprint(await keys.public_half(key)):
        raise InputError(f"is not for toto's key {fingerprint(await keys.public_half(key))}", target=str(file))
    valid_until(file)
    if missing := [name_of(each) for each in repos if name_of(each) not in found.repos]:
        raise InputError(f"is not for {', '.join(missing)}", target=str(file), hint="sign it with -n and all of them")
    with files.lock(_folder() / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        files.write(certificate(key), file.read_text())
    return key


async def listed(repos: Iterable[Path]) -> Mapping[tuple[str, str], tuple[str, ...] | None]:
    """The fingerprints of the signers that each machine says it lists, by repo and name; None where that is not known.

    These are the machines of the deployed commits' manifests that do what documents say.
    """
    found = {}
    for repo in repos:
        done = await git.git(repo, "show", f"HEAD:{manifest.FILE}", check=False)
        machines = manifest.parse(done.stdout).machines.values() if done.status == 0 else ()
        for each in machines:
            if each.deployed and each.by_document:
                known = condition.read(repo, each.name)
                found[name_of(repo), each.name] = known.signers if known else None
    return found


async def require_all(key: Path, repos: Iterable[Path]) -> None:
    """Raise `InputError` with the machines that would not obey a key: neither list it nor who vouches for it."""
    counts = {fingerprint(await keys.public_half(key))}
    if certificate(key).exists():
        counts.add((await read_certificate(certificate(key))).by)
    lacking = [
        f"{name} of {repo}{'' if signers is not None else ' (not known)'}"
        for (repo, name), signers in (await listed(repos)).items()
        if not counts.intersection(signers or ())
    ]
    if lacking:
        more = f" and {len(lacking) - _NAMED} more" if len(lacking) > _NAMED else ""
        raise InputError(
            f"would obey nothing that the next key signs: {', '.join(lacking[:_NAMED])}{more}",
            hint="add it to their signers and push (drift/drift asks those that are not known); --force: use it anyway",
        )


def _folder() -> Path:
    return paths.private_folder(paths.state_home() / "signer")


def _pub(key: Path) -> Path:
    return key.with_name(f"{key.name}.pub")


async def _made(file: Path) -> Path:
    if not file.exists():
        fresh = file.with_name("new")
        for each in (fresh, _pub(fresh)):
            each.unlink(missing_ok=True)
        await process.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "toto", "-f", fresh], timeout=_PATIENCE)
        _pub(fresh).replace(_pub(file))
        fresh.replace(file)
    return file
