"""The roll-out of a machine that builds for toto, `role: builder`, with a real nix daemon and a real build on it."""

import asyncio
import logging
from pathlib import Path

import pytest
from prefect.logging import disable_run_logger

from flows import host
from tasks.record import record_unreachable
from tests.conftest import free_port
from tests.machine.test_ssh import needs_sshd
from tests.nix import test_builders
from tests.nix.test_builders import WHO, as_root, builder, building, built, text
from tests.repos import InfraRepo
from toto.base import files
from toto.git_host import host as git_host
from toto.infra_repo.deployed import manifest_of
from toto.infra_repo.settings import RollOut, Settings
from toto.ledger.ledger import Ledger
from toto.ledger.target import Target
from toto.machine import fleet_builders
from toto.nix import builders
from toto.plan.changes import Action, Change, Why
from toto.plan.host import DeployedHost, DesiredHost, HostOrder
from toto.plan.verdict import Verdict
from toto.rehearsal.results import Rehearsal

# (Slots are of the whole machine, by name: no other test has a builder of this one.)
MILL = Target("host", "mill")
place, home = test_builders.place, test_builders.home  # fixtures


async def order(one: test_builders.Builder, place: Path) -> HostOrder:
    """A roll-out to mill, which toto has deployed once, and at which no sshd answers any more."""
    repo, repos = InfraRepo(place / "infra"), git_host.default_repos()
    login = f"ssh: {{port: {free_port()}, host_key: {one.server.host_key}}}"
    commit = repo.commit(
        {"machines.yaml": f"machines:\n- {{name: mill, address: 127.0.0.1, role: builder, {login}}}\n"}
    )
    repos.mkdir(parents=True)
    bare = repo.bare.rename(repos / "infra.git")
    good = DeployedHost(identity="drv", path="/nix/store/x", commit=commit, run="r", at="2026-01-01T00:00:00Z")
    await Ledger(bare).write(MILL, lambda entry: entry.model_copy(update={"good": good}), "good")
    wanted = DesiredHost(target=MILL, file="hosts/mill.nix", identity="y", path="/nix/store/y", tests="")
    change = Change(desired=wanted, why=Why.CHANGED, action=Action.DEPLOY, last=good)
    settings = Settings(roll_out=RollOut(connect_timeout=2))
    machine = manifest_of(bare).machines["mill"]
    return HostOrder(repo=bare, run="run-2", commit=commit, change=change, settings=settings, machine=machine)


@needs_sshd
@as_root
async def test_a_builder_is_rolled_out_when_its_builds_have_ended_and_no_sooner(
    place: Path, home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(host, "record_unreachable", record_unreachable.fn)  # (there is no Prefect here)
    (more := place / "more").mkdir()
    async with builder(place, "one") as one:
        own, target = place / "one/nix.conf", one.server.target
        files.write(own, own.read_text().replace("/who=", f"/more={more} /who="), 0o644)
        mill = await order(one, place)
        approved = f'[fleet_builders."infra/mill"]\nhost_key = "{one.server.host_key}"\nuser = "{target.user}"\n'
        async with building(monkeypatch, home, approved), asyncio.timeout(180):
            (described,) = fleet_builders.described([mill.repo]).values()
            builders.tell(home, {"infra/mill": described.model_copy(update={"port": target.port})})
            while text(await built(place, WHO)) != "one":
                await asyncio.sleep(0.2)
            began = asyncio.Event()
            slow = f"{WHO} echo at work; while [ ! -e /more/go ]; do sleep 0.2; done"
            at_work = asyncio.create_task(
                built(place, slow, on_line=lambda line: began.set() if line == "at work" else None)
            )
            await began.wait()
            with disable_run_logger(), caplog.at_level(logging.WARNING):
                verdict: Verdict[Rehearsal] = Verdict.waived(mill, by="me", why="a test")
                roll_out = asyncio.create_task(host.roll_out.fn(mill, verdict))
                while "waiting until nothing is built on infra.mill" not in caplog.text:
                    await asyncio.sleep(0.2)
                while text(await built(place, WHO)) != "here":  # (a slot that was free is taken at once)
                    await asyncio.sleep(0.2)
                assert not roll_out.done() and Ledger(mill.repo).read().get(MILL).unreachable is None
                (more / "go").touch()
                assert text(await at_work) == "one", "what it builds ends first"
                assert await roll_out == "unreachable", "then it is its turn"
            assert Ledger(mill.repo).read().get(MILL).unreachable is not None
            while text(await built(place, WHO)) != "one":
                await asyncio.sleep(0.2)
