"""The tools that toto runs in cells (terraform, helm), and what the server lets their cells see, reach and use.

The server's own settings are environment variables of toto:

TOTO_CELL_ENDPOINTS  what on private networks or on this machine cells with an uplink reach, as host:port; by commas
TOTO_CELL_MEMORY     MB of memory that all of one cell may use
TOTO_CELL_DISK       MB that all of one cell may write to the disk
"""

import os
import shutil
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

from toto.base import process
from toto.base.errors import InputError
from toto.cell.cell import STORE
from toto.cell.limits import Limits
from toto.cell.namespace import Namespace, namespace
from toto.cell.relay import Endpoint, reach

TOOLS: Final = Path("/tools")  # in a cell: programs that are neither in /usr nor in the nix store
_CERTIFICATES: Final = ("NIX_SSL_CERT_FILE", "SSL_CERT_DIR", "SSL_CERT_FILE")
_SEEN: Final = tuple(map(Path, ("/usr", "/bin", "/sbin", "/etc/ssl/certs")))  # in every cell
_PROXIES: Final = tuple(name for each in ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY") for name in (each, each.lower()))


@dataclass(frozen=True)
class Tool:
    """A program in a cell: its path there; what its cell mounts read-only; the store paths and variables it needs."""

    program: str
    read: Mapping[Path, Path] = field(default_factory=dict)
    store: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)


async def tool(name: str) -> Tool:
    """A program of PATH, or by its path, with the certificates that it needs. Raises `CommandNotFound`."""
    if (found := shutil.which(name)) is None:
        raise process.CommandNotFound(name)
    read, env = _certificates()
    env |= {each: os.environ[each] for each in _PROXIES if "@" not in os.environ.get(each, "@")}
    real = Path(found).resolve()
    if real.is_relative_to(STORE):
        done = await process.run(["nix-store", "--query", "--requisites", real], timeout=60)
        return Tool(str(real), read, tuple(done.lines), env)
    if _in_every_cell(real):
        return Tool(str(real), read, (), env)
    place = TOOLS / real.name
    return Tool(str(place), read | {place: real}, (), env)


def limits() -> Limits:
    """What a tool's cell may use. Raises `InputError` for a setting that is no number."""
    usual = Limits()
    memory, disk = _megabytes("TOTO_CELL_MEMORY", usual.memory), _megabytes("TOTO_CELL_DISK", usual.disk)
    return Limits(memory=memory, disk=disk, file_size=min(disk, usual.file_size))


@asynccontextmanager
async def internet(endpoints: Iterable[Endpoint] = (), *, user: int | None = None) -> AsyncIterator[Namespace]:
    """A network for cells while the block lasts: the internet, `endpoints`, and what the server's settings name.

    Raises `InputError` for an endpoint whose name does not exist, `NamespaceFailed`.
    """
    named = [Endpoint.parse(text) for text in os.environ.get("TOTO_CELL_ENDPOINTS", "").split(",") if text.strip()]
    async with namespace(user) as made, reach(made, dict.fromkeys([*endpoints, *named])):
        await made.attach()
        yield made


def _certificates() -> tuple[dict[Path, Path], dict[str, str]]:
    """What a cell mounts for TLS, and the variables that name it."""
    env = {name: os.environ[name] for name in _CERTIFICATES if Path(os.environ.get(name, "")).is_absolute()}
    places = {Path(each) for each in env.values() if Path(each).exists() and not _in_every_cell(Path(each))}
    return {place: place.resolve() for place in places}, env


def _in_every_cell(path: Path) -> bool:
    return any(map(partial(Path.is_relative_to, path), _SEEN))


def _megabytes(name: str, usual: int) -> int:
    text = os.environ.get(name, "")
    if text and not text.isdecimal():
        raise InputError(f"{text!r} is no number of MB", target=name, hint="write a whole number, such as 4000")
    return int(text) * 1_000_000 if text else usual
