"""Infra repos with any number of lab hosts, and their bare evaluation, which toto is compared with."""

import asyncio
import contextlib
import os
import shutil
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.lab import nix_daemon, setup
from tests.lab.fleet import EXAMPLE, Fleet
from toto.base import resources, runs
from toto.infra_repo import git
from toto.infra_repo.settings import Settings
from toto.ledger.ledger import Ledger
from toto.ledger.steps import verified
from toto.nix import hosts
from toto.plan import make as plan
from toto.plan import order
from toto.plan.kinds import kind_of

BRANCH: Final = "bench"  # not the deployed branch, so its push starts nothing


@dataclass(frozen=True)
class Known:
    """A fleet whose commit is in the bare repo, and the files of that commit, for bare nix."""

    fleet: Fleet
    commit: str
    tree: Path

    @property
    def files(self) -> list[Path]:
        return [self.tree / host.file for host in hosts.in_files(self.tree, (), unlisted=True)]

    async def plan(self, run: str) -> order.Plan:
        """Do what `detect` does, without Prefect, and remove what it wrote."""
        async with runs.claimed(self.fleet.repo, run):
            return await plan.make(self.fleet.repo, self.commit, run)

    async def make_good(self) -> None:
        """Write every host into the ledger as deployed, so that nothing is due."""
        for change in (await self.plan("bench-good")).changes.changes:
            deployed = kind_of(change.target).deployed(change.desired, commit=self.commit, run="bench", at=git.now())
            await Ledger(self.fleet.repo).write(
                change.target, verified(deployed), f"{change.label}: good at {self.commit[:8]}"
            )


def example(folder: Path, count: int) -> Path:
    """The example's modules with `count` hosts and machines."""
    shutil.copytree(EXAMPLE, folder, ignore=lambda at, _: ["hosts", "tests"] if Path(at) == EXAMPLE else [])
    (folder / "hosts").mkdir()
    machines = ["machines:"]
    for number in range(1, count + 1):
        name = f"host{number}"
        (folder / "hosts" / f"{name}.nix").write_text(
            f'{{ imports = [ ../modules/common.nix ../modules/web.nix ]; networking.hostName = "{name}"; }}\n'
        )
        machines.append(f"  - {{ name: {name}, address: 192.0.2.{number}, ports: [8080] }}")
    (folder / "machines.yaml").write_text("\n".join(machines) + "\n")
    return folder


@contextlib.asynccontextmanager
async def known(folder: Path, count: int) -> AsyncIterator[Known]:
    """A fleet of `count` hosts without running machines. This process's environment is set for it."""
    async with nix_daemon.running(folder / "nix"):
        await asyncio.to_thread(setup.setup)
        fleet = Fleet(folder)
        await fleet.prepare(example(folder / "example", count))
        commit = fleet.commit("the fleet")
        fleet.git("push", "--quiet", str(fleet.repo), f"HEAD:refs/heads/{BRANCH}")
        before = dict(os.environ)
        os.environ.update(fleet.environment)
        try:
            yield Known(fleet, commit, fleet.work)
        finally:
            os.environ.clear()
            os.environ.update(before)


async def bare(files: Sequence[Path], at_once: int) -> None:
    """Run `nix-instantiate` for every host, as one types it by hand, `at_once` side by side."""
    room = asyncio.Semaphore(at_once)

    async def one(file: Path) -> None:
        async with room:
            nix = await asyncio.create_subprocess_exec(
                "nix-instantiate",
                "<nixpkgs/nixos>",
                "-A",
                "config.system.build.toplevel",
                "--arg",
                "configuration",
                str(file),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.DEVNULL,
            )
            if await nix.wait() != 0:
                raise RuntimeError(f"nix-instantiate of {file} failed")

    await asyncio.gather(*map(one, files))


def side_by_side() -> int:
    """How many hosts toto evaluates side by side on this machine."""
    return resources.at_once(Settings().nix.evaluate_memory)
