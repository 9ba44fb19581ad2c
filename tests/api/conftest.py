"""A server for machines, with TLS, and machines with real ssh host keys that ask it."""

import asyncio
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
import pytest_asyncio

from flying_monkey import proof, signature
from flying_monkey.report import Report
from tests.conftest import free_port
from tests.repos import git
from toto.api import certificate
from toto.api.run import running_api
from toto.infra_repo.manifest import SSH, Machine
from toto.machine import documents, owners
from toto.store import grants

ADDRESS: Final = "127.0.0.1"


@dataclass
class Asking:
    """A machine: its name, and its ssh host key in `keys`, as the manifest has it if it is `known`."""

    name: str
    keys: Path
    known: bool = True
    number: int = field(default=0)

    def __post_init__(self) -> None:
        self.keys.mkdir(parents=True)
        words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(self.key)]
        subprocess.run(words, check=True)

    @property
    def key(self) -> Path:
        return self.keys / "ssh_host_ed25519_key"

    @property
    def host_key(self) -> str:
        return " ".join(self.key.with_suffix(".pub").read_text().split()[:2])

    def proof(self, challenge: str, **other: str) -> dict[str, str]:
        """What this machine answers to a challenge; `other` is what it says of itself instead of the truth."""
        says = {"repo": "infra", "machine": self.name} | other
        text = proof.text(says["repo"], says["machine"], challenge)
        return {**says, "challenge": challenge, "signature": signature.sign(text, self.key, proof.ASK)}

    def report(self, **more: Any) -> Report:
        self.number += 1
        made: dict[str, Any] = {
            "repo": "infra",
            "machine": self.name,
            "serial": 7,
            "phase": "try",
            "step": "tried",
            "state": "done 0",
            "system": "",
            "boots": "",
            "at": 1,
            "number": self.number,
        }
        return Report(**made | more)

    def sealed(self, report: Report) -> bytes:
        return signature.seal(report.write(), self.key, proof.REPORT)


@dataclass
class World:
    """toto's side: a repo `infra` with the machines web1 and web2, and the server at `url`."""

    folder: Path
    repo: Path
    port: int
    machines: dict[str, Asking] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"https://{ADDRESS}:{self.port}"

    @property
    def ca(self) -> Path:
        return certificate.own([ADDRESS]).ca

    def place(self, name: str = "web1") -> documents.Place:
        return documents.Place.of(self.repo, name)

    def client(self, address: str | None = None) -> httpx.AsyncClient:
        """A client that trusts toto's authority, and nothing else; at `address` of this machine's, if that is given."""
        trusted = ssl.create_default_context(cafile=str(self.ca))
        transport = httpx.AsyncHTTPTransport(verify=trusted, local_address=address)
        return httpx.AsyncClient(base_url=self.url, transport=transport, timeout=30)

    async def challenge(self, client: httpx.AsyncClient) -> str:
        return str((await client.post("/challenge")).json()["challenge"])

    async def token(self, client: httpx.AsyncClient, name: str = "web1") -> dict[str, str]:
        """The headers of a machine that has proven itself."""
        said = await client.post("/session", json=self.machines[name].proof(await self.challenge(client)))
        assert said.status_code == 200, said.text
        return {"Authorization": f"Bearer {said.json()['token']}"}

    async def claim(self, name: str, number: int) -> None:
        machine = Asking(name, self.folder / "machines" / name)
        self.machines[name] = machine
        await owners.claim(self.repo, Machine(name=name, address=f"10.0.0.{number}", ssh=SSH()), [machine.host_key])


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with toto's state, for this module."""
    folder = tmp_path_factory.mktemp("api")
    patch = pytest.MonkeyPatch()
    patch.setenv("TOTO_STATE", str(folder / "state"))
    yield folder
    patch.undo()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(state: Path) -> AsyncIterator[World]:
    """The server, once for a module."""
    git("init", "--quiet", "--bare", "infra.git", cwd=state)
    made = World(state, state / "infra.git", free_port())
    await made.claim("web1", 1)
    await made.claim("web2", 2)
    async with running_api(state / "api.log", host=ADDRESS, port=made.port):
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def world(served: World) -> World:
    """The same, with nothing published or reported."""
    for name in served.machines:
        place = served.place(name)
        for each in (place.told, place.said, grants.of(place.folder, name)):
            shutil.rmtree(each, ignore_errors=True)
    return served


async def until(what: Any, seconds: float = 120) -> None:
    """Wait until `what()` is true."""
    async with asyncio.timeout(seconds):
        while not what():
            await asyncio.sleep(0.05)
