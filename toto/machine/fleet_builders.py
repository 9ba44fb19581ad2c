"""Machines of the fleet that build for toto: `role: builder` in a manifest, and the server's settings approve it.

What the deployed manifests say of them is told to the nix daemon, which uses those that its settings name. None is
rolled out while it builds: `not_building`.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from toto.base.errors import TotoError
from toto.base.server_rules import Builder
from toto.git_host.host import infra_repos
from toto.git_host.shared import name_of
from toto.infra_repo import manifest
from toto.infra_repo.deployed import manifest_of
from toto.infra_repo.manifest import Builds, Machine
from toto.ledger.ledger import Ledger
from toto.ledger.target import HOST, Target
from toto.nix import builders, daemon
from toto.nix.quiet import quiet

log = logging.getLogger(__name__)

EVERY: Final = 10.0  # seconds between two looks


async def keep_told(repos: Path) -> None:
    """Tell the nix daemon, for ever, what the manifests say of builders."""
    wrong = ""
    while True:
        try:
            found = await asyncio.to_thread(described, infra_repos(repos))
            builders.tell(daemon.socket().parent.parent, found)
            wrong = ""
        except (TotoError, OSError) as error:
            if str(error) != wrong:
                log.warning("what the manifests say of builders is not known to the nix daemon: %s", error)
            wrong = str(error)
        await asyncio.sleep(EVERY)


def described(repos: Iterable[Path]) -> dict[str, Builder]:
    """What the manifests say of the builders that toto has rolled out, by `REPO/MACHINE`.

    One whose manifest has mistakes now has none: a push tells of them. Raises `TotoError` for a broken ledger.
    """
    found = {}
    for repo in repos:
        try:
            machines = [each for each in manifest_of(repo).machines.values() if each.role == "builder"]
        except manifest.ManifestError:
            continue
        if not machines:
            continue
        ledger = Ledger(repo).read()
        for machine in machines:
            if ledger.get(Target(HOST, machine.name)).good is not None:
                with contextlib.suppress(ValidationError):  # (of an address that ssh would not take)
                    found[f"{name_of(repo)}/{machine.name}"] = of_manifest(machine)
    return found


def of_manifest(machine: Machine) -> Builder:
    """What a manifest says of a builder. Raises `ValidationError`."""
    builds = machine.builds or Builds()
    return Builder(
        address=machine.address,
        port=machine.ssh.port,
        host_key=machine.ssh.host_key or "",
        systems=builds.systems or (machine.system,),
        jobs=builds.jobs,
        speed=builds.speed,
        features=builds.features,
    )


@contextlib.asynccontextmanager
async def not_building(machine: Machine, *, patience: float) -> AsyncIterator[None]:
    """Have toto build nothing on a machine, where it is a builder, for this block: see `quiet`."""
    try:
        home = daemon.socket().parent.parent
        names = builders.same_as(home, machine)
    except daemon.DaemonFailed:  # nobody builds
        names = []
    if not names:
        yield
        return
    async with quiet(home, names, patience=patience):
        yield
