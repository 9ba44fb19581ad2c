"""One run of a phase's test scripts, in a sandbox or on the machine itself: what they are given, and what came of it.

`toto.rehearsal.run` runs them.
"""

import os
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from toto.base import files, owned
from toto.base.model import Model
from toto.cell import relay as relays
from toto.cell.cell import INFRA, Cell, python, search_path
from toto.cell.namespace import Namespace, namespace
from toto.infra_repo.manifest import Machine
from toto.machine import login_shell
from toto.machine.activation import Activator
from toto.machine.ssh import Connection
from toto.rehearsal import on_host
from toto.rehearsal.on_host import PLACE
from toto.rehearsal.results import PhaseResult
from toto.rehearsal.suite import Phase


@dataclass(frozen=True)
class Endpoint:
    """How toto reaches a machine for its tests: `connection`, its address, and the ports that scripts may use.

    A sandbox has a `network`, where its `ports` are on the loopback, by the guest's; scripts get its ssh `key`. Of a
    real machine scripts get no key. They reach it at its own address, and there only the ports. `command` makes what
    the machine's login shell gets for `on-host`.
    """

    connection: Connection | None
    ports: Mapping[int, int]
    network: Namespace | None = None
    key: Path | None = None
    command: on_host.Command = login_shell.line
    address: str | None = None  # (no "": Prefect takes one for the same object as in a task's result)
    ip: str | None = None

    @classmethod
    def of(cls, machine: Machine, activator: Activator) -> Self:
        """How test scripts connect to a machine itself: its ports are not mapped."""
        ports = {port: port for port in machine.ports}
        address, ip = machine.address, activator.ip or None
        return cls(activator.connection, ports, command=activator.command, address=address, ip=ip)

    @property
    def place(self) -> tuple[str, str]:
        """The address of a real machine, and where that was found to be."""
        if self.connection is None:
            assert self.address is not None
            return self.address, self.ip or self.address
        target = self.connection.target
        return target.address, target.ip or target.address


@dataclass(frozen=True)
class Bench:
    """Where the scripts of one phase run: their cell, and their environment."""

    cell: Cell
    env: Mapping[str, str]


@asynccontextmanager
async def bench(endpoint: Endpoint, host: str, phase: Phase, tree: Path, scratch: Path) -> AsyncIterator[Bench]:
    """The cell for the scripts of a phase, in which `on-host` and the machine's ports lead to `endpoint`.

    `tree` is the exported commit; toto's own files for it are in a new folder in `scratch`. Raises
    `NamespaceFailed`, `InputError`, OSError.
    """
    with owned.folder(phase, scratch) as folder:
        folder.chmod(0o755)  # in a folder that only toto may enter
        async with AsyncExitStack() as stack:
            if (network := endpoint.network) is None:
                network = await stack.enter_async_context(namespace())
                address, place = endpoint.place
                ports = set(endpoint.ports.values())
                if ":" in place:  # cells have no IPv6: the ports are on their loopback
                    leads = {("127.0.0.1", port): (place, port) for port in ports}
                    address = "127.0.0.1"
                    await stack.enter_async_context(relays.relay(network, leads))
                else:
                    if place != address:
                        network.name({address: place})
                    await stack.enter_async_context(
                        relays.reach(network, {relays.Endpoint(place, port) for port in ports})
                    )
            else:
                address = "127.0.0.1"
            interpreter, mounts = python()
            await stack.enter_async_context(
                on_host.serving(folder, endpoint.connection, interpreter, network.user, endpoint.command)
            )
            env = {
                "PATH": f"{PLACE}/bin:{search_path()}",
                "TOTO_HOST": host,
                "TOTO_PHASE": str(phase),
                "TOTO_ADDRESS": address,
                **{f"TOTO_PORT_{port}": str(where) for port, where in endpoint.ports.items()},
            }
            if endpoint.key is not None and endpoint.connection is not None:
                _give(endpoint.key, folder / "key", network.user)
                replace(endpoint.connection.target, identity=PLACE / "key").write_config(folder)
                (folder / "ssh_config").chmod(0o644)
                env["TOTO_SSH_CONFIG"] = str(PLACE / "ssh_config")
            cell = Cell(read={INFRA: tree, PLACE: folder, **mounts}, network=network, user=network.user)
            yield Bench(cell, env)


def _give(key: Path, copy: Path, user: int | None) -> None:
    """Copy a key for a cell's user: ssh takes one only from its owner."""
    files.write_bytes(copy, key.read_bytes(), 0o400)
    if user is not None:
        os.chown(copy, user, user)


class PhasePassed(Model):
    """A phase passed: how many tests it had, and how many seconds they took."""

    tests: int
    seconds: float

    @classmethod
    def of(cls, result: PhaseResult) -> Self:
        """The summary of a phase that passed."""
        return cls(tests=sum(len(each.report.tests) for each in result.results), seconds=result.seconds)
