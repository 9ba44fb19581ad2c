"""How roll-outs by document end: a real ledger, signer, gate, helper and engine; the machine is a bubble."""

import asyncio
import shlex
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import pytest
from prefect.logging import disable_run_logger

from flying_monkey.desired import System
from flying_monkey.machine import PROFILE
from tasks import roll_out
from tasks.reversal import Reversal
from tests.flying_monkey.bubble import Bubble
from tests.flying_monkey.conftest import HOST_KEY
from tests.ledger.test_ledger import WEB1, deployed, intent
from tests.repos import git
from toto.base import process
from toto.infra_repo.manifest import SSH, Machine, Manifest
from toto.infra_repo.settings import RollOut, Settings
from toto.infra_repo.window import Window
from toto.ledger import steps
from toto.ledger.ledger import Ledger
from toto.machine import activation, keys, locked, owners, signer, signing_key, ssh
from toto.machine.activation import ActivationFailed, Activator, MachineState
from toto.machine.by_document import NotBack
from toto.nix import commands as nix

pytestmark = pytest.mark.minutes(1)

Way: TypeAlias = Literal["sudo", "locked"]
SETTINGS: Final = Settings(roll_out=RollOut(activation_timeout=20.0, confirm_timeout=60.0))
# What makes the login shell of toto's user on the machine a plain one, or the gate.
SHELL: Final = {"sudo": "ln -sfn /var/lib/open /var/lib/shell", "locked": "ln -sfn /var/lib/gate /var/lib/shell"}


@dataclass
class InPlaceOfSsh(ssh.Connection):
    """Gives each command to the login shell of toto's user on the machine."""

    bubble: Bubble | None = None

    async def run(
        self, argv: Sequence[str], *, stdin: bytes | None = None, check: bool = True, **_: Any
    ) -> process.Completed:
        bubble = self.bubble
        assert bubble is not None
        (bubble.var / "stdin").write_bytes(stdin or b"")
        line = f"/var/lib/shell -c {shlex.quote(shlex.join(argv))} </var/lib/stdin"
        try:
            done = await asyncio.to_thread(bubble._ask, sh=line)
        except (AssertionError, ValueError, OSError):
            raise ssh.Unreachable("it is off", target=self.target.name) from None
        if check and done["status"] != 0:
            raise process.CommandFailed(argv, done["status"], done["err"], target=self.target.name)
        return process.Completed(tuple(argv), done["status"], done["out"], done["err"], 0)


class World:
    """toto with a repo, and the machine web1, whose last good is `good`."""

    def __init__(self, folder: Path, bubble: Bubble) -> None:
        self.folder, self.bubble, self.repo = folder, bubble, folder / "infra.git"
        self.book = Ledger(self.repo)
        self.good = self.new = bubble.good

    async def system(self, name: str, script: str = "") -> System:
        file = self.folder / f"nixos-system-{name}"
        file.write_text(name)
        path = (await process.run(["nix-store", "--add", file], env=nix.environment())).stdout.strip()
        return self.bubble.system(name, script, System(path, await nix.nar_hash(path)))

    async def begin(self, way: Way) -> System:
        """The machine runs and boots a system of a way in, which is its last good."""
        self.good = await self.system("first", SHELL[way])
        self.bubble.profile.unlink()
        self.bubble.profile.symlink_to(self.good.path)
        self.bubble.boot()
        self.bubble.sh(SHELL[way])
        await self.book.write(WEB1, steps.intend(intent("run-1", self.good.path)), "intend")
        await self.book.write(WEB1, steps.good(deployed(self.good.path), "run-1"), "good")
        return self.good

    def machine(self, way: Way, ends: Literal["switch", "boot", "test"] = "switch", **more: Any) -> Machine:
        login = SSH(host_key=HOST_KEY, identity=keys.MACHINES)
        return Machine(name="web1", address="192.0.2.1", access=way, activation=ends, ssh=login, **more)

    @asynccontextmanager
    async def deploying(self, machine: Machine, new: System) -> AsyncIterator[tuple[Activator, MachineState]]:
        """A roll-out, up to its intent."""
        async with roll_out.connect(machine, self.repo, "run-2", SETTINGS) as activator:
            await activator.prepare()
            before = await activator.facts()
            opened = intent("run-2", new.path).model_copy(update={"before": before})
            await self.book.write(WEB1, steps.intend(opened), "intend")
            yield activator, before

    async def at(self, step: str) -> None:
        await self.book.write(WEB1, lambda entry: steps.set_step(entry, "run-2", step), step)

    async def revert(self, machine: Machine) -> None:
        """As the flow does; the machine is whole afterwards."""
        manifest = Manifest(machines={"web1": machine})
        with disable_run_logger():
            await roll_out.revert(Reversal(self.repo, "run-2", WEB1, manifest, SETTINGS, "a test failed", time.time()))
        entry = self.book.read().get(WEB1)
        assert entry.intent is None and entry.reverted is not None
        status = await asyncio.to_thread(self.bubble.ended)
        assert (status["step"], status["system"], status["boots"]) == ("finished", self.good.path, self.good.path)
        left = [each.parent for each in self.bubble.run.glob("toto/*/begun") if not (each.parent / "decided").exists()]
        paths = [(each / "path").read_text().strip() for each in left]
        assert self.new.path not in paths, "nothing is left that would act by itself"


@pytest.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    monkeypatch.setenv("TOTO_STATE", str(tmp_path / "state"))
    git("init", "--quiet", "--bare", "infra.git", cwd=tmp_path)
    bubble = Bubble(tmp_path.resolve() / "machine", await signing_key.current(), helper="/etc/flying-monkey/helper")
    bubble.program(bubble.etc / "flying-monkey/helper", bubble.agent("helper"))
    bubble.program(bubble.var / "gate", bubble.agent("gate"))
    bubble.program(bubble.var / "open", 'export PATH; exec /bin/sh "$@"')
    made = World(tmp_path, bubble)

    @asynccontextmanager
    async def connection(target: ssh.SshTarget, directory: Path) -> AsyncIterator[ssh.Connection]:
        yield InPlaceOfSsh(target, directory, bubble=bubble)

    async def copy(connection: ssh.Connection, path: str, **_: object) -> None:
        assert (bubble.root / path[1:]).is_dir(), "it is there already"

    monkeypatch.setattr(ssh, "connection", connection)
    monkeypatch.setattr(activation, "copy", copy)
    await owners.claim(made.repo, made.machine("locked"), [HOST_KEY])
    async with signer.serving():
        yield made
    bubble.power_cut()


@pytest.mark.parametrize(("old", "new"), [("sudo", "locked"), ("locked", "sudo")])
async def test_a_move_whose_tests_fail_is_reverted(world: World, old: Way, new: Way) -> None:
    """The way in changes while the machine goes back."""
    await world.begin(old)
    world.new = await world.system("second", SHELL[new])
    machine = world.machine(new)
    async with world.deploying(machine, world.new) as (activator, before):
        await world.at("test")
        await activator.activate("test", world.new.path, before, finish=20, confirm=60)
        assert (await activator.facts()).system == world.new.path
    await world.revert(machine)
    assert (world.bubble.var / "shell").readlink().name == {"sudo": "open", "locked": "gate"}[old]


# The machine's agent, which would go back by itself, is away then.
FAILING: Final = """
echo "UNIT loaded failed" > /var/lib/broken
for each in /proc/[0-9]*; do
    ! tr '\\0' ' ' 2>/dev/null < $each/cmdline | grep -qE 'flying_monkey[.](update|helper)' || kill -KILL ${each#/proc/}
done
trap 'exit 4' EXIT"""


@pytest.mark.parametrize(("unit", "before"), [("new.service", ""), ("old.service", "old.service loaded failed\n")])
async def test_units_that_fail_in_a_move_to_sudo_are_judged_as_in_any_activation_by_sudo(
    world: World, unit: str, before: str
) -> None:
    await world.begin("locked")
    (world.bubble.var / "broken").write_text(before)
    world.new = await world.system("second", SHELL["sudo"] + FAILING.replace("UNIT", unit))
    machine = world.machine("sudo")
    async with world.deploying(machine, world.new) as (activator, was):
        await world.at("test")
        if before:
            await activator.activate("test", world.new.path, was, finish=20, confirm=60)
        else:
            with pytest.raises(ActivationFailed, match=r"(?s)exited with status 4.*new\.service"):
                await activator.activate("test", world.new.path, was, finish=20, confirm=60)
    await world.revert(machine)


@pytest.mark.parametrize("status", [0, 3])
async def test_how_a_move_to_documents_ended_is_known_though_its_connection_was_lost(
    world: World, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    await world.begin("sudo")
    world.new = await world.system(
        "second", f"{SHELL['locked']}\nsleep 3; echo the end of it; trap 'exit {status}' EXIT"
    )
    machine, run = world.machine("locked"), InPlaceOfSsh.run

    async def lost(self: InPlaceOfSsh, argv: Sequence[str], **more: Any) -> process.Completed:
        if "begin" not in argv:
            return await run(self, argv, **more)
        # All but its last word, by which the connection would wait for the end.
        await run(self, argv[:-1], **more)
        raise ssh.Unreachable("it broke", target="web1")

    async with world.deploying(machine, world.new) as (activator, before):
        await world.at("test")
        monkeypatch.setattr(InPlaceOfSsh, "run", lost)
        if status == 0:
            await activator.activate("test", world.new.path, before, finish=20, confirm=60)
        else:
            with pytest.raises(ActivationFailed, match=r"(?s)`test` exited with status 3.*the end of it"):
                await activator.activate("test", world.new.path, before, finish=20, confirm=60)
    await world.revert(machine)


@pytest.mark.parametrize("ends", ["boot", "test"])
async def test_what_does_not_end_with_a_switch_is_reverted_by_document(
    world: World, ends: Literal["boot", "test"]
) -> None:
    """What the roll-out did not touch is left alone."""
    await world.begin("locked")
    world.new = await world.system("second")
    machine = world.machine("locked", ends)
    async with world.deploying(machine, world.new) as (activator, before):
        await world.at(ends)
        await activator.activate(ends, world.new.path, before, finish=20, confirm=60)
        if ends == "boot":  # it is kept at once; a `test` waits for all of toto's tests
            await activator.keep(ends, world.new.path, finish=20)
        found = await activator.facts()
        wanted = (world.good.path, world.new.path) if ends == "boot" else (world.new.path, world.good.path)
        assert (found.system, found.profile) == wanted
    count = len(world.bubble.events())
    await world.revert(machine)
    done = {each for each in world.bubble.events()[count:] if each.startswith(("first", "second"))}
    assert done == {f"first {ends}", f"first {ends} done"}


async def test_what_was_changed_by_hand_is_undone_by_a_roll_out_of_the_same(world: World) -> None:
    good, mine = await world.begin("locked"), await world.system("mine")
    machine = world.machine("locked", drift="mend")
    for by_hand in ("", f"for each in /run/current-system {PROFILE}; do ln -sfn {mine.path} $each; done"):
        world.bubble.sh(by_hand or ":")
        async with world.deploying(machine, good) as (activator, before):
            noted = await activator.condition()
            assert noted is not None and bool(noted.drift) is bool(by_hand)
            for verb in ("test", "switch"):
                await world.at(verb)
                await activator.activate(verb, good.path, before, finish=20, confirm=60)
            noted, found = await activator.condition(), await activator.facts(fresh=True)
            assert noted is not None and noted.drift == () and (found.system, found.profile) == (good.path, good.path)
        await world.book.write(WEB1, steps.good(deployed(good.path), "run-2"), "good")


@pytest.mark.parametrize("returns", [True, False])
async def test_what_runs_is_rolled_out_once_more_to_reboot(
    world: World, monkeypatch: pytest.MonkeyPatch, returns: bool
) -> None:
    """In its window, a machine whose reboot was put off gets it; one that does not come back is told as such."""
    if not returns:
        monkeypatch.setattr(locked, "_HOOKS", 1.0)
    good, bubble = await world.begin("locked"), world.bubble
    (bubble.root / good.path[1:] / "kernel").symlink_to("/nix/store/fresh")
    bubble.sh(f"ln -sfn {bubble.system('before').path} /run/booted-system")
    bubble.hook("prepare.d/drain", ":")
    bubble.hook("checks.d/web", "echo 1..1; echo ok 1")
    machine = world.machine("locked", reboot="window", window=Window.parse("00:00-24:00"))
    async with world.deploying(machine, good) as (activator, before):
        noted = await activator.condition()
        assert noted is not None and noted.reboot_needed
        await world.at("test")
        await activator.activate("test", good.path, before, finish=20, confirm=60)
        await world.at("switch")
        bubble.stop_at("reboot")
        keeping = asyncio.create_task(
            activator.activate("switch", good.path, before, finish=20 if returns else 1, confirm=60)
        )
        await asyncio.to_thread(bubble.reached, "reboot")
        bubble.power_cut()
        if not returns:
            with pytest.raises(NotBack, match="has not come back from its reboot within 4 s"):
                await keeping
            return
        bubble.boot()
        bubble.resume()
        await keeping
        noted = await activator.condition()
        assert noted is not None and not noted.reboot_needed
    assert [each for each in bubble.events() if each.startswith(("drain", "reboot", "web"))] == [
        *("drain try", "web try", "reboot", "web reboot")
    ]
