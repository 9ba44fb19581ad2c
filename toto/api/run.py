"""Starts the web server that machines ask, as a process of its own in a cell: for `toto serve`.

Strangers talk to it, so it is kept like what is pushed (`toto.cell`). It sees Python, its own code, what machines are
told and granted and its TLS, and writes what they say; it has no network but the socket that it is given, so it
reaches neither toto's other processes nor anything else.
"""

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Final

import uvicorn

import flying_monkey
import toto
from toto.api import certificate
from toto.base import files, paths, process
from toto.base.errors import TotoError
from toto.cell import folders
from toto.cell.cell import STORE, Cell, python
from toto.cell.limits import Limits
from toto.machine import documents, owners
from toto.store import grants

PORT: Final = 4201
_STATE: Final = Path("/state")  # in the cell
_CODE: Final = Path("/opt/toto")
_PATIENCE: Final = 60.0  # seconds until it serves
_BACKLOG: Final = 1_024
_LIMITS: Final = Limits(memory=1_000_000_000, processes=256, files=16_384, disk=2_000_000_000, every=20)


class ApiFailed(TotoError):
    """The web server that machines ask did not start."""


@contextlib.asynccontextmanager
async def running_api(
    log_file: Path, *, host: str = "127.0.0.1", port: int = PORT, names: Sequence[str] = ()
) -> AsyncIterator[process.Running]:
    """Serve machines, from the moment the server answers to the end of the block.

    `names` are those by which machines reach it, for its certificate. Raises `ApiFailed`.
    """
    cell, env = await _cell([*names, host])
    words, _ = python()
    log_file.parent.mkdir(parents=True, exist_ok=True)
    ready, told = os.pipe()
    try:
        with _listening(host, port) as listener, log_file.open("ab") as sink:
            argv = ["env", *words, "-m", "toto.api", str(listener.fileno()), str(told)]
            out, passed = sink.fileno(), [listener.fileno(), told]
            async with process.start(argv, cell=cell, env=env, stdout=out, stderr=out, pass_fds=passed) as running:
                listener.close()
                os.close(told)
                told = -1
                try:
                    serves = await asyncio.wait_for(asyncio.to_thread(os.read, ready, 1), _PATIENCE)
                except TimeoutError:
                    serves = b""
                if not serves:
                    raise ApiFailed(
                        f"the server for machines did not start (status {running.status}):\n"
                        f"{process.tail(log_file.read_text(errors='replace'))}",
                        hint=f"see {log_file}",
                    )
                files.write(_listens(), f"{host} {port}\n")
                yield running
                _listens().unlink(missing_ok=True)
    finally:
        os.close(ready)
        if told >= 0:
            os.close(told)


def listens() -> tuple[str, int] | None:
    """Address and port of the web server that machines ask; None when none has been started, or it has been stopped."""
    try:
        host, port = _listens().read_text().split()
    except FileNotFoundError:
        return None
    return host, int(port)


def _listens() -> Path:
    return paths.state_home() / "api" / "listens"


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise ApiFailed(f"{host}, port {port}, cannot be listened to: {error.strerror or error}") from None


async def _cell(names: Sequence[str]) -> tuple[Cell, dict[str, str]]:
    """The server's cell and environment; its files are made, and are its user's."""
    owners.make_known(owners.read())
    user = folders.shared(documents.said())
    await asyncio.to_thread(documents.tidy)
    tls = certificate.own(names).key.parent
    folders.own(tls, user)
    _, read = python()
    read = {
        **read,
        _STATE / "api/told": documents.told(),
        _STATE / "store/granted": grants.prepare(),
        _STATE / "api/tls": tls,
    }
    store: list[str] = []
    own, packages = _CODE / "own", _CODE / "packages"
    places = {own / each.__name__: _folder(each) for each in (toto, flying_monkey)} | {
        packages: _folder(uvicorn).parent
    }
    searched = [str(own), str(packages)]
    for place, code in places.items():
        if code.is_relative_to(STORE):
            done = await process.run(["nix-store", "--query", "--requisites", Path(*code.parts[:4])], timeout=60)
            store += done.lines
            searched.append(str(code if place == packages else code.parent))
        else:
            read[place] = code
    cell = Cell(read=read, write={_STATE / "api/said": documents.said()}, store=store, limits=_LIMITS, user=user)
    return cell, {"TOTO_STATE": str(_STATE), "PYTHONPATH": os.pathsep.join(searched)}


def _folder(package: ModuleType) -> Path:
    """Where a package's code is."""
    assert package.__file__ is not None
    return Path(package.__file__).parent.resolve()
