"""Roll-outs to a locked-down machine, and the move there and back: real systemd, sshd, sudo, nix and signer."""

import uuid
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Final, Literal

import pytest
import pytest_asyncio

from tests.flying_monkey.access import PLACE, Locked, expression
from tests.lab import nix as lab_nix
from tests.lab.debian import DebianMachine
from tests.lab.machine import SSH_PORT
from tests.lab.setup import setup
from tests.ledger.test_ledger import WEB1, deployed, intent
from tests.repos import git
from toto.infra_repo.manifest import SSH, Machine
from toto.ledger import steps
from toto.ledger.ledger import Ledger
from toto.machine import access, keys, owners, signer, signing_key
from toto.machine.access import Moving, OverSsh
from toto.machine.activation import ActivationFailed, LockedOut, MachineState, SudoActivator, WentBack
from toto.machine.locked import LockedActivator
from toto.machine.ssh import SshTarget
from toto.nix import commands as nix

pytestmark = [pytest.mark.lab, pytest.mark.minutes(4), pytest.mark.asyncio(loop_scope="module")]

ADDRESS: Final = "127.0.8.4"
_SSHD: Final = "/etc/ssh/sshd_config.d/20-toto.conf"
OPEN: Final = (
    "usermod -s /bin/bash toto; install -m 440 /root/open /etc/sudoers.d/toto; "
    f"sed -i /ForceCommand/d {_SSHD}; systemctl reload ssh"
)
CLOSED: Final = (
    f"usermod -s {PLACE}/gate toto; install -m 440 /root/closed /etc/sudoers.d/toto; "
    f"install -m 644 /root/sshd {_SSHD}; systemctl reload ssh"
)


class World:
    """toto with a repo, and the machine that it deploys."""

    def __init__(self, folder: Path, machine: DebianMachine) -> None:
        self.folder, self.machine, self.repo = folder, machine, folder / "infra.git"
        self.book, self.run = Ledger(self.repo), ""

    def listed(self, way: Literal["sudo", "locked"], activation: Literal["switch", "boot", "test"]) -> Machine:
        ssh = SSH(port=SSH_PORT, host_key=self.machine.host_key)
        return Machine(name="web1", address=ADDRESS, access=way, activation=activation, ssh=ssh)

    async def system(self, name: str, script: str = ":") -> str:
        """A system in toto's store."""
        return await lab_nix.nix("nix-build", "--no-out-link", "--expr", expression(name, script, uuid.uuid4().hex))

    async def connect(
        self, way: Literal["sudo", "locked"] = "locked", activation: Literal["switch", "boot", "test"] = "switch"
    ) -> AbstractAsyncContextManager[OverSsh]:
        self.run = f"run-{uuid.uuid4().hex[:8]}"
        listed = self.listed(way, activation)
        await owners.claim(self.repo, listed, [self.machine.host_key])
        target = SshTarget(
            name="web1",
            address=ADDRESS,
            port=SSH_PORT,
            user=listed.ssh.user,
            identity=await keys.of_machines(self.repo),
            host_key=self.machine.host_key,
        )
        return access.over_ssh(target, self.folder / self.run, listed, self.repo, self.run, 15)

    async def at(self, step: str) -> None:
        await self.book.write(WEB1, lambda entry: steps.set_step(entry, self.run, step), step)

    async def begin(self, activator: OverSsh, path: str) -> MachineState:
        """The roll-out up to its first activation."""
        await activator.prepare()
        signed = self.folder / self.run / "signed"
        await nix.sign(path, await keys.make(self.repo, keys.STORE, "signing"), signed)
        await activator.copy(path, signed=signed, timeout=300)
        before = await activator.facts()
        opened = intent(self.run, path).model_copy(update={"before": before})
        await self.book.write(WEB1, steps.intend(opened), "intend")
        return before

    async def roll_out(self, activator: OverSsh, path: str) -> None:
        """All of it, as the flow does."""
        before = await self.begin(activator, path)
        await self.at("test")
        await activator.activate("test", path, before, finish=120, confirm=240)
        assert (await activator.facts()).profile == before.profile, "the boot default is still the old one"
        await self.at("switch")
        await activator.activate("switch", path, before, finish=120, confirm=240)
        await self.book.write(WEB1, steps.good(deployed(path, self.run), self.run), "good")
        facts = await activator.facts()
        assert (facts.system, facts.profile) == (path, path)
        await activator.clean_up()

    async def revert(self, activator: OverSsh, to: MachineState) -> None:
        await activator.prepare()
        await activator.revert(to, finish=120, boot=True)

    async def activations(self) -> list[str]:
        return (await self.machine.check("cat /var/log/activations 2>/dev/null || true")).splitlines()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def booted(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    setup()
    folder = tmp_path_factory.mktemp("locked")
    git("init", "--quiet", "--bare", "infra.git", cwd=folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOTO_STATE", str(folder / "state"))
        login = await keys.of_machines(folder / "infra.git")
        closures = await keys.public_half(await keys.make(folder / "infra.git", keys.STORE, "signing"))
        files = Locked.files(await keys.public_half(login), await signing_key.current())
        files |= {
            "/root/open": ("toto ALL=(ALL) NOPASSWD: ALL\n", 0o600),
            "/root/closed": (files["/etc/sudoers.d/toto"][0], 0o600),
            "/root/sshd": (files[_SSHD][0], 0o600),
        }
        async with (
            DebianMachine("web1", folder / "web1", login, address=ADDRESS, files=files) as machine,
            signer.serving(),
        ):
            await Locked(machine, await signing_key.current()).prepare()
            trust = f'echo "extra-trusted-public-keys = {closures}" >> /etc/nix/nix.conf'
            await machine.check(f"{trust}; systemctl stop nix-daemon.service nix-daemon.socket")
            await machine.check("systemctl start nix-daemon.socket")
            await machine.snapshot("ready")
            yield World(folder, machine)


@pytest_asyncio.fixture(loop_scope="module")
async def world(booted: World) -> World:
    await booted.machine.restore("ready")
    if WEB1 in booted.book.read().entries:
        await booted.book.write(WEB1, lambda _: None, "gone")
    return booted


async def test_a_locked_machine_is_rolled_out_and_reverted(world: World) -> None:
    first, second = await world.system("first"), await world.system("second")
    async with await world.connect() as activator:
        assert isinstance(activator, LockedActivator)
        before = await activator.facts()
        await world.roll_out(activator, first)
    async with await world.connect() as activator:
        await world.begin(activator, second)
        await world.at("test")
        await activator.activate("test", second, before, finish=120, confirm=240)
    run = world.run
    async with await world.connect() as activator:
        world.run = run
        await world.revert(activator, MachineState(system=first, profile=first))
    assert await world.activations() == [
        *("first test", "first switch", "second test"),
        *("first test", "first switch"),  # the watchdog at once, and then for good
    ]


async def test_what_fails_goes_back_to_what_ran_before_toto_and_nothing_is_kept_without_the_signers_word(
    world: World,
) -> None:
    new = await world.system("new", "case $1 in switch) echo the disk is on fire >&2; exit 3;; esac")
    async with await world.connect() as activator:
        before = await world.begin(activator, new)
        with pytest.raises(signer.NotSigned, match="not at `test`"):
            await activator.activate("test", new, before, finish=120, confirm=240)
        await world.at("test")
        await activator.activate("test", new, before, finish=120, confirm=240)
        with pytest.raises(signer.NotSigned, match="not at `switch`"):
            await activator.activate("switch", new, before, finish=120, confirm=240)
        assert (await activator.facts()).profile == before.profile
        await world.at("switch")
        with pytest.raises(ActivationFailed, match=r"(?s)exited with status 3.*the disk is on fire"):
            await activator.activate("switch", new, before, finish=120, confirm=240)
        await world.revert(activator, before)
        assert await activator.facts() == before


async def test_a_system_that_shuts_toto_out_is_sent_back_over_the_old_connection(world: World) -> None:
    good = await world.system("good", "rm -f /etc/nologin; systemctl start ssh")
    async with await world.connect() as activator:
        await world.roll_out(activator, good)
    new = await world.system("new", "systemctl stop ssh")
    async with await world.connect() as activator:
        before = await world.begin(activator, new)
        await world.at("test")
        with pytest.raises((LockedOut, WentBack), match="reverted over the old one"):
            await activator.activate("test", new, before, finish=120, confirm=600)
        assert (await activator.facts(fresh=True)).system == good


@pytest.mark.parametrize("activation", ["boot", pytest.param("test", marks=pytest.mark.exhaustive)])
async def test_what_does_not_end_with_a_switch_is_kept_too(world: World, activation: Literal["boot", "test"]) -> None:
    new = await world.system("new")
    async with await world.connect(activation=activation) as activator:
        before = await world.begin(activator, new)
        await world.at(activation)
        await activator.activate(activation, new, before, finish=120, confirm=240)
        if activation == "test":
            await world.at("keep")
        await activator.keep(activation, new, finish=120)
        wanted = before.system if activation == "boot" else new, new if activation == "boot" else before.profile
        found = await activator.facts()
        assert (found.system, found.profile) == wanted


async def test_the_move_from_sudo_to_the_locked_user_and_back_is_one_roll_out_each(world: World) -> None:
    await world.machine.check(OPEN)
    await world.machine.wait_ssh()
    locked, opened = await world.system("locked", CLOSED), await world.system("opened", OPEN)
    async with await world.connect("locked") as activator:
        assert isinstance(activator, Moving) and isinstance(activator.old, SudoActivator)
        await world.roll_out(activator, locked)
        assert isinstance(activator.new, LockedActivator)
    async with await world.connect("locked") as activator:
        assert isinstance(activator, LockedActivator)
    async with await world.connect("sudo") as activator:
        assert isinstance(activator, Moving) and isinstance(activator.old, LockedActivator)
        await world.roll_out(activator, opened)
    async with await world.connect("sudo") as activator:
        assert isinstance(activator, SudoActivator)
        await activator.prepare()
        assert (await activator.facts()).system == opened


@pytest.mark.exhaustive
async def test_a_move_that_brings_no_way_in_goes_back(world: World) -> None:
    await world.machine.check(OPEN)
    await world.machine.wait_ssh()
    wrong = await world.system("wrong")
    async with await world.connect("locked") as activator:
        before = await world.begin(activator, wrong)
        await world.at("test")
        with pytest.raises(LockedOut, match=r"enable services\.flying-monkey"):
            await activator.activate("test", wrong, before, finish=120, confirm=240)
    async with await world.connect("sudo") as activator:
        await activator.prepare()
        assert (await activator.facts()).system == before.system
