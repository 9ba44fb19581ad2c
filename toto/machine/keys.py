"""toto's own ssh keys: one for the machines, one for the sandboxes. Made when first needed, never shown."""

import tempfile
from pathlib import Path

from toto.base import paths, process
from toto.base.errors import InputError


async def private(name: str) -> Path:
    """The private key file of one of toto's own keys (`machines`, `sandbox`); it is made when missing."""
    folder = paths.state_home() / "keys"
    key = folder / name
    if key.exists():
        return key
    folder.mkdir(mode=0o700, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as directory:
        fresh = Path(directory, name)
        await process.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", f"toto {name}", "-f", fresh], timeout=60
        )
        # The process that links it first has made the key; the others use that one.
        try:
            key.hardlink_to(fresh)
        except FileExistsError:
            return key
        fresh.with_suffix(".pub").replace(key.with_suffix(".pub"))
    return key


async def public(name: str) -> str:
    """The public half of the key, as one line without its comment."""
    key = await private(name)
    done = await process.run(["ssh-keygen", "-y", "-f", key], timeout=60)
    return " ".join(done.stdout.split()[:2])


async def identity(name: str | None) -> Path:
    """The private key that the manifest's `ssh.identity` names: a path, or the name of one of toto's own keys.

    For None it is toto's key for the machines. Raises `InputError` when a named key is missing: toto does not make it.
    """
    if name is None:
        return await private("machines")
    path = Path(name).expanduser()
    if not path.is_absolute():
        path = paths.state_home() / "keys" / path.name
    if not path.is_file():
        raise InputError(f"there is no private key {path}", target="machines.yaml", hint="see ssh.identity")
    return path
