"""toto's ssh keys: one of each infra repo for its machines, and toto's own for the sandboxes.

They are made when first needed, and their private halves are never shown. A repo may have more keys, by names that
`ssh.identity` in its manifest uses. No repo can name a key of a different one.
"""

import contextlib
import tempfile
from collections.abc import Sequence
from pathlib import Path

from toto.base import files, paths, process
from toto.base.errors import InputError
from toto.git_host import shared
from toto.infra_repo.fields import check_key_name
from toto.ledger.ledger import Ledger

MACHINES = "machines"


async def private(name: str) -> Path:
    """The private key file of one of toto's own keys (`sandbox`); it is made when missing."""
    return await _made(paths.state_home() / "keys" / name, f"toto {name}")


async def public(name: str) -> str:
    """The public half of one of toto's own keys, as one line without its comment."""
    return await public_half(await private(name))


async def of_machines(repo: Path) -> Path:
    """The private key by which toto logs in to the machines of an infra repo; it is made when missing.

    Version 0.1.0 had one key for all machines. A repo that has deployed machines by it keeps it, and so does the only
    repo that there is: a fresh key would lock toto out of them.
    """
    key = _folder(repo) / MACHINES
    if not key.exists() and inherits(repo):
        old = old_key()
        for half in (old.with_suffix(".pub"), old):  # the private half last: it says that the key is there
            with contextlib.suppress(FileExistsError, FileNotFoundError):
                (key.parent / half.name).hardlink_to(half)
    return await _made(key, f"toto {shared.name_of(repo)}")


def old_key() -> Path:
    """The one key that version 0.1.0 had for all machines."""
    return paths.state_home() / "keys" / MACHINES


def inherits(repo: Path) -> bool:
    """Whether a repo's machines know the old key."""
    if not old_key().is_file():
        return False
    return shared.is_only_one(repo) or any(target.kind == "host" for target in Ledger(repo).read().entries)


def with_the_old_key(repos: Sequence[Path]) -> list[str]:
    """A line when several repos have version 0.1.0's key for the machines: by that each could deploy the others'."""
    names = [
        shared.name_of(repo) for repo in repos if inherits(repo) and _same(paths.repo_state(repo) / "keys" / MACHINES)
    ]
    if len(names) < 2:
        return []
    return [
        f"{' and '.join(names)} log in to their machines by the same key, of version 0.1.0\n"
        "next: make a new one for all but one of them (ssh-keygen -t ed25519 -N '' -f FILE), deploy its public half "
        f"to their machines, then: toto key {names[-1]} --import FILE"
    ]


def _same(key: Path) -> bool:
    """Whether a key is the old one, or will be, when it is first needed."""
    return not key.exists() or key.read_bytes() == old_key().read_bytes()


async def identity(repo: Path, name: str | None) -> Path:
    """The private key of an infra repo that the manifest's `ssh.identity` names; its key for the machines for None.

    Raises `InputError` when a named key is missing: toto does not make it.
    """
    if name is None or name == MACHINES:
        return await of_machines(repo)
    key = _folder(repo) / check_key_name(name)
    if not key.is_file():
        raise InputError(
            f"this repository has no key {name}, which ssh.identity names",
            target="machines.yaml",
            hint=f"on toto: toto key {shared.name_of(repo)} {name} --import FILE",
        )
    return key


async def import_key(repo: Path, name: str, file: Path) -> Path:
    """Copy a private key to an infra repo's keys, under a name; return its path. Raises `InputError`."""
    try:
        key = _folder(repo) / check_key_name(name)
        text = file.expanduser().read_text()
    except (ValueError, OSError) as error:
        raise InputError(str(error), target=str(file)) from None
    if "PRIVATE KEY-----" not in text:
        raise InputError("is not a private ssh key", target=str(file))
    return files.write(key, text)


async def public_half(key: Path) -> str:
    """The public half of a private key, as one line without its comment. Raises `CommandFailed`."""
    done = await process.run(["ssh-keygen", "-y", "-P", "", "-f", key], timeout=60)
    return " ".join(done.stdout.split()[:2])


def _folder(repo: Path) -> Path:
    folder = paths.repo_state(repo) / "keys"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


async def _made(key: Path, comment: str) -> Path:
    """The private key `key`, which is made when missing."""
    if key.exists():
        return key
    key.parent.mkdir(mode=0o700, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=key.parent) as directory:
        fresh = Path(directory, key.name)
        await process.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", fresh], timeout=60)
        # The process that links it first has made the key; the others use that one.
        try:
            key.hardlink_to(fresh)
        except FileExistsError:
            return key
        fresh.with_suffix(".pub").replace(key.with_suffix(".pub"))
    return key
