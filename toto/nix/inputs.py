"""The private inputs of a flake: git repositories that are read by ssh, with a key of the infra repo's own.

flake.lock is pushed, and so are the addresses in it. Each is fetched in a cell in which git and ssh run, and nothing
that is pushed: it has that one key, the host keys that the administrator trusts, and the internet as every cell has it.
What comes is added to the store if it has the hash of flake.lock; an evaluation, which sees no key, finds it there.

All other inputs are fetched by nix (`toto.nix.commands`).
"""

import asyncio
import base64
import binascii
import json
import os
import re
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from toto.base import files, owned, process
from toto.base.errors import InputError
from toto.base.model import shown
from toto.cell.cell import Cell
from toto.cell.folders import read_regular
from toto.cell.limits import Limits
from toto.cell.namespace import ALLOWED, Namespace, namespace
from toto.nix import commands as nix
from toto.nix import daemon

LOCK: Final = "flake.lock"
_LARGEST: Final = 4_000_000  # bytes of flake.lock
_MOST: Final = 100  # inputs by ssh
_ADDRESS: Final = re.compile(
    r"ssh://([A-Za-z0-9_][A-Za-z0-9_.-]{0,31}@)?(?P<host>[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?)"
    r"(:(?P<port>[1-9][0-9]{0,4}))?/[A-Za-z0-9_.~+@/-]{1,500}"
)
_REVISION: Final = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")
# What says which files the revision has, besides; what it does not name (submodules, lfs) is not fetched.
_KNOWN: Final = frozenset(
    {"type", "url", "rev", "narHash", "ref", "lastModified", "revCount", "shallow", "allRefs", "name"}
)
_PLACE: Final = Path("/inputs")  # in the cell: what ssh needs
_WORK: Final = Path("/work")  # in the cell: what is fetched
_DAEMON: Final = Path("/daemon")
_SSH: Final = (
    *("BatchMode=yes", "PreferredAuthentications=publickey", "IdentitiesOnly=yes", "IdentityAgent=none"),
    *("StrictHostKeyChecking=yes", "GlobalKnownHostsFile=none", "UpdateHostKeys=no", "ConnectTimeout=30"),
    *("ProxyCommand=none", "PermitLocalCommand=no", "ClearAllForwardings=yes", "ServerAliveInterval=30"),
)


class InputsFailed(InputError):
    """A private input of a flake could not be fetched."""


@dataclass(frozen=True)
class Private:
    """An input that is read by ssh: its name in the lock file, its address, its revision, the store path of its files.

    `lock` is the lock file's path in the tree.
    """

    name: str
    url: str
    revision: str
    path: str
    lock: str = LOCK

    @property
    def host(self) -> tuple[str, int]:
        """The host and the port of its address."""
        found = _ADDRESS.fullmatch(self.url)
        assert found is not None
        return found["host"], int(found["port"] or 22)


async def lacking(tree: Path, folder: str = ".") -> list[Private]:
    """The inputs by ssh that the flake.lock in a folder of the tree names and the store does not have.

    Raises `InputError` for one that toto does not fetch.
    """
    if not (tree / folder / "flake.nix").is_file():
        return []
    lock = f"{folder}/{LOCK}".removeprefix("./")
    found = [(name, locked, _digest(lock, name, locked)) for name, locked in _by_ssh(tree, lock)]
    made = [
        Private(name, locked["url"], locked["rev"], await nix.fixed_path(digest, locked.get("name", "source")), lock)
        for name, locked, digest in found
    ]
    return [each for each in made if not await nix.valid(each.path)]


async def fetch(inputs: Sequence[Private], key: Path, known_hosts: Path, *, timeout: float) -> None:
    """Have private inputs in the store. `key` is read by ssh alone, and only hosts in `known_hosts` are asked.

    Raises `InputsFailed`, also when it takes longer than `timeout` seconds.
    """
    try:
        async with asyncio.timeout(timeout), namespace() as network:
            await network.attach()
            for each in inputs:
                with owned.folder("inputs", Path(tempfile.gettempdir())) as folder:
                    await _fetch(each, folder, key, known_hosts, network)
    except TimeoutError:
        raise InputsFailed(
            f"its {len(inputs)} inputs by ssh could not be fetched within {timeout:g} s",
            target=inputs[0].lock,
            hint="raise nix.evaluate_timeout in toto.toml",
        ) from None


async def _fetch(private: Private, folder: Path, key: Path, known_hosts: Path, network: Namespace) -> None:
    place, work, socket = folder / "place", folder / "work", daemon.socket()
    place.mkdir(mode=0o755)
    work.mkdir(mode=0o700)
    _give(place / "key", key.read_bytes(), network.user)
    _give(place / "known_hosts", known_hosts.read_bytes() if known_hosts.is_file() else b"", network.user)
    online = Cell(
        read={_PLACE: place},
        write={_WORK: work},
        store=True,
        limits=Limits(memory=2_000_000_000, disk=8_000_000_000, file_size=8_000_000_000),
        network=network,
        user=network.user,
    )
    online.give()
    offline = replace(online, read={_DAEMON: socket.parent}, network=None)
    ssh = [nix.program("ssh"), "-F", "none", "-i", str(_PLACE / "key")]
    options = (*_SSH, f"UserKnownHostsFile={_PLACE / 'known_hosts'}")
    env = daemon.client(_DAEMON / socket.name) | {
        "GIT_SSH_COMMAND": shlex.join([*ssh, *(word for option in options for word in ("-o", option))]),
        "GIT_SSH_VARIANT": "ssh",
        "GIT_ALLOW_PROTOCOL": "ssh",
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_TERMINAL_PROMPT": "0",
    }
    repo, source = str(_WORK / "repo"), str(_WORK / "files" / Path(private.path).name[33:])

    async def run(*words: str, cell: Cell = offline, check: bool = True) -> process.Completed:
        return await process.run(
            [nix.program(words[0]), *words[1:]], cell=cell, env=env, check=check, target=private.lock
        )

    async def fetch(*refs: str, check: bool) -> process.Completed:
        words = ["git", "-C", repo, "fetch", "--no-tags", "--no-recurse-submodules", *refs]
        return await run(*words, cell=online, check=check)

    try:
        await run("git", "init", "--quiet", "--bare", repo)
        if (await fetch("--depth=1", "--", private.url, private.revision, check=False)).status != 0:
            # A server that gives only what has a name.
            await fetch("--", private.url, "+refs/heads/*:refs/heads/*", "+refs/tags/*:refs/tags/*", check=True)
        await run("git", "-C", repo, "archive", "--format=tar", f"--output={_WORK}/tar", private.revision)
        await run("mkdir", "-p", source)
        await run("tar", "-x", "--no-same-owner", "-C", source, "-f", f"{_WORK}/tar")
        await run("nix-store", "--add-fixed", "--recursive", "sha256", source)
    except process.CommandFailed as error:
        raise _failed(private, error.tail, known_hosts) from None
    except process.LimitExceeded as error:
        raise InputsFailed(f"the input {private.name} used more than {error.exceeded}", target=private.lock) from None
    if not await nix.valid(private.path):
        raise InputsFailed(
            f"the input {private.name} ({private.url}) is not what {private.lock} says: its narHash is a different one",
            target=private.lock,
            hint=f"run `nix flake update {private.name}` and push again",
        )


def _failed(private: Private, said: str, known_hosts: Path) -> InputsFailed:
    host, port = private.host
    hint = "is the address right, and is that revision still there?"
    if "Host key verification failed" in said:
        hint = (
            f"on toto: ssh-keyscan -p {port} {host} >> {known_hosts}, and compare what it says with the host's own "
            "fingerprint"
        )
    elif "Permission denied" in said:
        hint = "let the repository's key `inputs` read there (on toto: `toto key REPO inputs` prints it)"
    elif re.search(r"Connection refused|timed out|unreachable|No route", said):
        hint = f"is it up? toto reaches no private network and none of its own addresses, unless {ALLOWED} names it"
    return InputsFailed(
        f"the input {private.name} could not be fetched from {private.url}:\n{process.tail(said, 8)}",
        target=private.lock,
        hint=hint,
    )


def _give(file: Path, data: bytes, user: int | None) -> None:
    files.write_bytes(file, data, 0o400)
    if user is not None:
        os.chown(file, user, user)


def _by_ssh(tree: Path, lock: str) -> list[tuple[str, Mapping[str, Any]]]:
    """The names and locked references of the inputs by ssh. Raises `InputError` for one that is not plain."""
    if not (tree / lock).exists():
        return []
    data = read_regular(tree, *lock.split("/"), most=_LARGEST)
    if data is None:
        raise InputError(f"is no file of at most {_LARGEST:,} bytes", target=lock, hint="lock the flake again")
    try:
        nodes = json.loads(data)["nodes"].items()
        locked = [(str(name), node["locked"]) for name, node in nodes if isinstance(node.get("locked"), dict)]
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return []  # (nix says what is wrong with it)
    found = [
        (shown(name), each)
        for name, each in locked
        if each.get("type") == "git" and str(each.get("url", "")).lower().startswith(("ssh:", "git+ssh:"))
    ]
    if len(found) > _MOST:
        raise InputError(f"has more than {_MOST} inputs by ssh", target=lock)
    for name, each in found:
        if wrong := _wrong(each):
            raise InputError(f"toto does not fetch the input {name}: {wrong}", target=lock, hint="change its url")
    return found


def _wrong(locked: Mapping[str, Any]) -> str | None:
    """Why an input by ssh is not fetched."""
    if more := sorted(
        key for key, value in locked.items() if key not in _KNOWN and value is not False and not key.startswith("__")
    ):
        return f"it asks for {more[0]!r}"
    if not _ADDRESS.fullmatch(str(locked["url"])):
        return "its address should be like ssh://git@git.example.org:22/owner/repo"
    if not _REVISION.fullmatch(str(locked.get("rev"))):
        return "it has no revision"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9+._?=-]{0,100}", str(locked.get("name", "source"))):
        return "its name is none of a store path"
    return None


def _digest(lock: str, name: str, locked: Mapping[str, Any]) -> str:
    """The hash of an input's files, in hexadecimal."""
    try:
        algorithm, _, text = str(locked.get("narHash")).partition("-")
        digest = base64.b64decode(text, validate=True)
        if algorithm == "sha256" and len(digest) == 32:
            return digest.hex()
    except binascii.Error:
        pass
    raise InputError(f"the input {name} has no narHash", target=lock, hint="run `nix flake lock` and push again")
