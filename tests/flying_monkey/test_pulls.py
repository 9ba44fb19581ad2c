"""A machine that pulls, where systemd, the nix daemon, the agent and its helper are real."""

import shlex
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Final

import pytest
import pytest_asyncio

from flying_monkey.desired import Desired, Phase, System
from flying_monkey.report import Report
from flying_monkey.signature import seal
from tests.api.conftest import ADDRESS, World, until
from tests.conftest import free_port
from tests.flying_monkey import access
from tests.flying_monkey.access import PLACE, PROFILE, Locked
from tests.lab.debian import DebianMachine
from tests.repos import git
from toto.api import certificate
from toto.api.run import running_api
from toto.base import process
from toto.infra_repo.manifest import SSH, Machine
from toto.machine import documents, keys, owners
from toto.nix import commands as nix
from toto.store import grants

pytestmark = [pytest.mark.minutes(3), pytest.mark.asyncio(loop_scope="module")]

TOTO: Final = "10.0.2.2"  # as the machine sees this one
_UNIT: Final = f"""[Unit]
Description=asks toto what this machine should be
[Service]
ExecStart={PLACE}/agent
Restart=always
RestartSec=1
KillMode=mixed
"""


class Pulls:
    """The machine, and toto's side of it."""

    def __init__(self, world: World, locked: Locked, key: Path) -> None:
        self.world, self.locked, self.machine, self.key = world, locked, locked.machine, key
        self.found = documents.Reports(world.repo, "web1", [" ".join(self.machine.host_key.split()[:2])])
        self.reports: list[Report] = []

    async def system(self, folder: Path, name: str) -> System:
        """A system in toto's store, like those of the machine's own."""
        file = folder / "system.nix"
        file.write_text(access.expression(name))
        drv = (await process.run(["nix-instantiate", file], env=nix.environment())).stdout.strip()
        path = await nix.build(drv, folder / "root", timeout=60, target="test")
        return System(path, await nix.nar_hash(path))

    def publish(self, system: System, phase: Phase) -> Desired:
        made = self.locked.document(system, phase)
        documents.publish(self.world.repo, "web1", seal(made.write(), self.locked.signer))
        return made

    async def report(self, wanted: Callable[[Report], bool], seconds: float = 120) -> Report:
        def read() -> bool:
            self.reports += self.found.read()
            return any(map(wanted, self.reports))

        try:
            await until(read, seconds)
        except TimeoutError:
            raise AssertionError(f"no such report among {self.reports}") from None
        return next(each for each in reversed(self.reports) if wanted(each))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pulls(tmp_path_factory: pytest.TempPathFactory, new_key: Callable[[str], Path]) -> AsyncIterator[Pulls]:
    folder, login, signer = tmp_path_factory.mktemp("pulls"), new_key("login"), new_key("signer")
    patch = pytest.MonkeyPatch()
    patch.setenv("TOTO_STATE", str(folder / "state"))
    git("init", "--quiet", "--bare", "infra.git", cwd=folder)
    world = World(folder, folder / "infra.git", free_port())
    made = certificate.own([ADDRESS, TOTO])
    files = Locked.files(
        login.with_suffix(".pub").read_text().strip(),
        signer,
        url=f"https://{TOTO}:{world.port}",
        ca="/etc/flying-monkey/ca.pem",
        metrics="/var/lib/flying-monkey.prom",
        metrics_port=9_101,
        writable_store=False,
        user="flying-monkey",
    )
    files |= {
        "/etc/flying-monkey/ca.pem": (made.ca.read_text(), 0o644),
        "/etc/systemd/system/flying-monkey.service": (_UNIT, 0o644),
        f"{PLACE}/agent": (access._MAIN % "agent", 0o755),
    }
    async with (
        DebianMachine("web1", folder / "machine", login, address="127.0.8.9", files=files) as machine,
        running_api(folder / "api.log", host=ADDRESS, port=world.port, names=[TOTO]),
    ):
        locked = Locked(machine, signer)
        await locked.prepare()
        key = await keys.make(world.repo, "cache", "signing")
        public = await keys.public_half(key)
        await machine.check(
            "useradd --system --groups nix-users flying-monkey;"
            "mkdir -p -m 700 /var/lib/flying-monkey;"
            f"sed -i 's|^trusted-public-keys = .*|& {public}|' /etc/nix/keys.conf;"
            "systemctl restart nix-daemon.socket nix-daemon.service; systemctl daemon-reload"
        )
        host_key = " ".join(machine.host_key.split()[:2])
        await owners.claim(world.repo, Machine(name="web1", address="10.0.0.1", ssh=SSH()), [host_key])
        yield Pulls(world, locked, key)
    patch.undo()


async def test_a_machine_pulls_tries_and_keeps_a_system(pulls: Pulls, tmp_path: Path) -> None:
    check = pulls.machine.check
    new = await pulls.system(tmp_path, "pulled")
    await grants.grant(pulls.world.repo, "web1", [new.path], pulls.key, timeout=60)
    await check("systemctl start flying-monkey")
    first = await pulls.report(lambda each: each.system == pulls.locked.good.path)
    assert first.serial == 0
    tried = pulls.publish(new, "try")
    report = await pulls.report(
        lambda each: each.serial == tried.serial and each.step == "tried" and each.state == "done 0"
    )
    assert (report.system, report.boots, report.error) == (new.path, pulls.locked.good.path, "")
    kept = pulls.publish(new, "keep")
    report = await pulls.report(lambda each: each.serial == kept.serial and each.boots == new.path)
    assert await check(f"readlink -f {PROFILE}") == new.path
    assert await pulls.locked.activations() == ["pulled test", "pulled switch"]
    log = await check("journalctl -u flying-monkey --no-pager -o cat")
    assert "asking https://10.0.2.2" in log and "Traceback" not in log, log


async def test_what_reads_the_network_has_no_rights_and_little_is_used(pulls: Pulls) -> None:
    check = pulls.machine.check
    agent = await check("systemctl show -p MainPID --value flying-monkey")
    # (One child after the other, each for one request.)
    look = f"""for child in $(cat /proc/{agent}/task/*/children); do
        [ $child = {agent} ] || grep -hE "^(Uid|Gid|Groups|CapEff)" /proc/$child/status 2>/dev/null; done"""
    user, group = (await check("id -u flying-monkey; id -g flying-monkey")).split()
    seen = (await check(f'until found=$({look}) && [ -n "$found" ]; do sleep 0.1; done; echo "$found"')).splitlines()
    words = [line.split() for line in seen[:4]]
    assert words == [["Uid:", *[user] * 4], ["Gid:", *[group] * 4], ["Groups:"], ["CapEff:", "0" * 16]]
    resident = int(await check(f"sed -n 's/^Rss: *\\([0-9]*\\) kB/\\1/p' /proc/{agent}/smaps_rollup"))
    assert resident < 25_000, "kB"
    scraped = await check(
        "python3 -c 'import urllib.request as u; print(u.urlopen(\"http://127.0.0.1:9101\").read().decode())'"
    )
    assert "flying_monkey_up 1" in (await check("cat /var/lib/flying-monkey.prom"))
    assert 'flying_monkey_serial{kind="current"} 2' in scraped
    print(f"resident {resident} kB")


async def test_only_what_is_signed_by_a_trusted_key_gets_into_the_store(pulls: Pulls, tmp_path: Path) -> None:
    """A cache whose files are signed by a key that the machine does not know, and a document that is genuine."""
    new = await pulls.system(tmp_path, "untrusted")
    stranger = await keys.make(pulls.world.repo, "stranger", "signing")
    await grants.grant(pulls.world.repo, "web1", [new.path], stranger, timeout=60)
    tried = pulls.publish(new, "try")
    report = await pulls.report(lambda each: each.serial == tried.serial and bool(each.error))
    assert "signature" in report.error, report
    assert await pulls.machine.check(f"test -e {shlex.quote(new.path)} || echo none") == "none"
    await grants.grant(pulls.world.repo, "web1", [new.path], pulls.key, timeout=60)
    again = pulls.publish(new, "try")
    await pulls.report(lambda each: each.serial == again.serial and each.state == "done 0")
