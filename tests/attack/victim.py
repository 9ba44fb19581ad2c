"""What an attack must not reach: toto's keys, other repositories, the ledger, access rules, services of this machine.

Every secret has the word `CANARY` in it. What reaches one shows the word somewhere: in a log, an artifact, a file, a
store path. Services note who connects. Files are as they were, or the attack has changed them.
"""

import asyncio
import contextlib
import hashlib
import os
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.repos import InfraRepo

CANARY: Final = "canary-7f3a91c0"


@dataclass
class Victim:
    """A toto with secrets, and services on this machine's loopback. `callers` has who has reached one.

    `within` are the files and folders of its home that are to stay as they are.
    """

    home: Path
    within: tuple[str, ...] = (".",)
    tcp: int = 0
    udp: int = 0
    callers: list[str] = field(default_factory=list)
    _before: dict[str, str] = field(default_factory=dict)

    @property
    def state(self) -> Path:
        return self.home / "state"

    @property
    def environment(self) -> dict[str, str]:
        """What an attack is told, as one who knows the machine would know: where everything is."""
        return {
            "VICTIM": str(self.home),
            "VICTIM_TCP": str(self.tcp),
            "VICTIM_UDP": str(self.udp),
            "VICTIM_PID": str(os.getpid()),
        }

    def remember(self) -> None:
        """Note how all files are."""
        self._before = self._files()

    def harm(self, *texts: str) -> list[str]:
        """What has been reached since `remember`, in words, given the texts that the attack has left."""
        found = [f"reached the {each}" for each in self.callers]
        found += [f"the secret is in {text[:300]!r}" for text in texts if CANARY in text]
        now = self._files()
        found += [f"{name} was changed" for name in self._before if now.get(name) != self._before[name]]
        found += [f"{name} is new" for name in now if name not in self._before]
        return found

    def _files(self) -> dict[str, str]:
        files = {}
        kept = [self.home / each for each in self.within]
        for path in sorted({*kept, *(path for each in kept for path in each.rglob("*"))}):
            if path.is_file() and not path.is_symlink():
                files[str(path.relative_to(self.home))] = hashlib.sha256(path.read_bytes()).hexdigest()
        return files


@contextlib.asynccontextmanager
async def victim(home: Path) -> AsyncIterator[Victim]:
    """A victim below `home`, whose services listen while the block runs."""
    there = Victim(home)
    for name in ("keys/machines", "keys/sandbox", "server/auth", "server/prefect.db", "repos/other/terraform/state"):
        file = there.state / name
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file.write_text(f"{CANARY} {name}\n")
        file.chmod(0o600)
    for name in ("other", "toto-admin"):
        repo = InfraRepo(home / f"{name}-work")
        repo.commit({"access.toml": f"# {CANARY}\n", "hosts/secret.nix": f'"{CANARY}"'})
    (home / "ledger.json").write_text(CANARY)
    async with serving(there):
        yield there


@contextlib.asynccontextmanager
async def serving(there: Victim) -> AsyncIterator[None]:
    """The victim's services listen while the block runs."""

    async def called(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there.callers.append("service on 127.0.0.1")
        writer.write(CANARY.encode())
        writer.close()

    async def unix(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there.callers.append("unix socket of the machine")
        writer.close()

    class Packets(asyncio.DatagramProtocol):
        def datagram_received(self, data: bytes, addr: object) -> None:
            there.callers.append("UDP service on 127.0.0.1")

    abstract = socket.socket(socket.AF_UNIX)
    abstract.bind(f"\0toto-victim-{os.getpid()}")
    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(Packets, ("127.0.0.1", 0))
    there.udp = transport.get_extra_info("sockname")[1]
    os.symlink(there.home, short := Path(f"/tmp/victim-{os.getpid()}"))  # noqa: PTH211  (a socket's path is short)
    try:
        async with (
            await asyncio.start_server(called, "0.0.0.0", 0) as server,
            await asyncio.start_unix_server(unix, short / "agent.sock"),
            await asyncio.start_unix_server(unix, sock=abstract),
        ):
            there.tcp = server.sockets[0].getsockname()[1]
            yield
    finally:
        transport.close()
        short.unlink()
