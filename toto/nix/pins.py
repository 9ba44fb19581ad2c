"""The sources that npins or niv have pinned: archives at an address, with the hash of what is in them.

`npins/sources.json` and `nix/sources.json` are pushed, and so are the addresses in them. They are fetched before
anything is evaluated, in a cell with the internet in which nix runs and nothing that is pushed. An evaluation has no
network: it finds in the store what the hash names, for `<nixpkgs>` as for the pins that a host reads itself.
"""

import asyncio
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from flying_monkey.nix_hash import sha256
from toto.base import process
from toto.base.errors import InputError
from toto.base.model import shown
from toto.cell.cell import Cell
from toto.cell.folders import read_regular
from toto.cell.limits import Limits
from toto.cell.namespace import Namespace, namespace
from toto.nix import commands as nix
from toto.nix import daemon
from toto.nix.messages import is_of_the_network

log = logging.getLogger(__name__)

FILES: Final[Mapping[str, str]] = {"npins": "npins/sources.json", "niv": "nix/sources.json"}
_NIXPKGS: Final = "nixpkgs"  # the pin, where the setting names none
_LARGEST: Final = 1_000_000  # bytes of a file
_MOST: Final = 100  # pins
_OLDEST: Final = 3  # version of npins' file: before, pins had no hash
_ARCHIVES: Final = frozenset(
    {"Git", "GitRelease", "Channel", "Tarball", "Url", "MutableUrl", "tarball", "builtin-tarball"}
)
_URL: Final = re.compile(r"https?://[!-~]{1,2000}")
_DAEMON: Final = Path("/daemon")
_FETCH: Final = '{ url, sha256 }: builtins.fetchTarball { inherit url sha256; name = "source"; }'


class PinsFailed(InputError):
    """What npins or niv have pinned could not be fetched."""


@dataclass(frozen=True)
class Pin:
    """An archive that is pinned: its name, its address, the hash of its files in hexadecimal, their store path."""

    name: str
    url: str
    digest: str
    path: str


def names(setting: str) -> tuple[str, str] | None:
    """The tool and the pin that `nix.nixpkgs` names, as in `npins#nixos-24.11`; None when it names no pin."""
    tool, _, pin = setting.partition("#")
    return (tool, pin or _NIXPKGS) if tool in FILES else None


async def fetch(tree: Path, tool: str, name: str, *, timeout: float) -> str:
    """The store path of the pin `name`. It and the other archives that the tree's file pins are in the store then.

    One that cannot be fetched and is not `name` is a warning: perhaps no host reads it. Raises `InputError`, and
    `PinsFailed` also when it takes longer than `timeout` seconds.
    """
    file = FILES[tool]
    archives, wrong = await _read(tree, tool, file)
    if name not in archives:
        has = ", ".join(map(shown, sorted({*archives, *wrong})[:20])) or "none"
        raise InputError(
            wrong.get(name) or f"has no pin {shown(name)}; it has {has}",
            target=file,
            hint=f"pin it with {tool}, or name a different one: nix.nixpkgs = '{tool}#PIN'",
        )
    lacking = [each for each in archives.values() if not await nix.valid(each.path)]
    try:
        async with asyncio.timeout(timeout):
            await _fetch_all(sorted(lacking, key=lambda each: each.name != name), file, tool, name)
    except TimeoutError:
        raise PinsFailed(
            f"its {len(lacking)} pins could not be fetched within {timeout:g} s",
            target=file,
            hint="raise nix.evaluate_timeout in toto.toml",
        ) from None
    return archives[name].path


async def _fetch_all(lacking: Sequence[Pin], file: str, tool: str, name: str) -> None:
    if not lacking:
        return
    async with namespace() as network:
        await network.attach()
        for each in lacking:
            try:
                await _fetch(each, file, tool, network)
            except PinsFailed as error:
                if each.name == name:
                    raise
                log.warning("%s", error)


async def _fetch(pin: Pin, file: str, tool: str, network: Namespace) -> None:
    socket = daemon.socket()
    cell = Cell(
        read={_DAEMON: socket.parent},
        store=True,
        scratch=4_000_000_000,  # (nix unpacks it there)
        limits=Limits(memory=6_000_000_000, file_size=4_000_000_000),
        network=network,
        user=network.user,
    )
    words = [nix.program("nix-instantiate"), "--eval", "--read-write-mode", "--expr", _FETCH]
    words += ["--argstr", "url", pin.url, "--argstr", "sha256", pin.digest]
    try:
        await process.run(words, cell=cell, env=daemon.client(_DAEMON / socket.name) | {"NO_COLOR": "1"}, target=file)
    except process.CommandFailed as error:
        said = "\n".join(error.tail[max(0, error.tail.rfind("error:")) :].splitlines()[:4])
        hint = f"is the address right? run `{tool} update` for it and push again"
        if is_of_the_network(said):
            hint = "is the address right, and the other server up? start the run again when it answers"
        raise PinsFailed(
            f"the pin {shown(pin.name)} could not be fetched from {pin.url}:\n{said}", target=file, hint=hint
        ) from None
    except process.LimitExceeded as error:
        raise PinsFailed(f"the pin {shown(pin.name)} used more than {error.exceeded}", target=file) from None
    if not await nix.valid(pin.path):
        raise PinsFailed(f"the pin {shown(pin.name)} ({pin.url}) is not what its hash says", target=file)


async def _read(tree: Path, tool: str, file: str) -> tuple[dict[str, Pin], dict[str, str]]:
    """The archives that a file pins, by name, and why each other pin is none. Raises `InputError`."""
    data = read_regular(tree, *file.split("/"), most=_LARGEST)
    if data is None:
        raise InputError(
            f"nix.nixpkgs: there is no {file} (or it is a link, or larger than {_LARGEST:,} bytes)", target="toto.toml"
        )
    try:
        found = json.loads(data)
        if tool == "npins" and not (isinstance(found["version"], int) and found["version"] >= _OLDEST):
            raise InputError(f"is of version {shown(found['version'])}", target=file, hint="run `npins upgrade`")
        pins = [(str(name), each) for name, each in (found["pins"] if tool == "npins" else found).items()]
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError):
        raise InputError(f"is not as {tool} writes it", target=file, hint=f"run {tool} again") from None
    if len(pins) > _MOST:
        raise InputError(f"has more than {_MOST} pins", target=file)
    archives: dict[str, Pin] = {}
    wrong: dict[str, str] = {}
    for name, each in pins:
        try:
            url, digest = _archive(each)
        except ValueError as error:
            wrong[name] = f"toto does not fetch the pin {shown(name)}: {error}"
        else:
            archives[name] = Pin(name, url, digest, await nix.fixed_path(digest, "source"))
    return archives, wrong


def _archive(pin: Any) -> tuple[str, str]:
    """The address of a pinned archive, and its hash in hexadecimal. Raises ValueError with the reason against it."""
    if not isinstance(pin, dict):
        raise ValueError("it is no mapping")
    kind = pin.get("type", "tarball")
    url = pin.get("locked_url") or pin.get("url")
    if not isinstance(kind, str) or kind not in _ARCHIVES or pin.get("submodules") or pin.get("unpack") is False:
        raise ValueError(f"it is no archive but {shown(kind)}{' with submodules' if pin.get('submodules') else ''}")
    if url is None:
        raise ValueError("it is a git repository; pin the archive of one, such as GitHub's, or a channel")
    if not (isinstance(url, str) and _URL.fullmatch(url)):
        raise ValueError(f"its address should be like https://example.org/archive.tar.gz, not {shown(url)}")
    text = pin.get("hash") or pin.get("sha256")
    digest = sha256(text) if isinstance(text, str) else None
    if digest is None:
        raise ValueError("it has no sha256 hash, and without one nobody knows what comes")
    return url, digest.hex()
