"""Roll-outs on a machine that pulls: a real ledger, signer, server and agent; the helper is a stand-in."""

import asyncio
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio
from prefect.logging import disable_run_logger

from flying_monkey import proof, signature
from flying_monkey.desired import Desired
from flying_monkey.report import Report
from tasks import accept
from tests.api.conftest import World, served, state, until, world
from tests.flying_monkey.pulling import Pulling
from tests.ledger.test_ledger import WEB1, deployed, intent
from tests.repos import git
from toto.base import process
from toto.infra_repo.manifest import SSH, Machine
from toto.ledger import steps
from toto.ledger.ledger import Ledger
from toto.machine import condition, documents, keys, pulled, signer, signing_key
from toto.machine.activation import ActivationFailed, MachineState, NotWhatItShouldBe, WentBack
from toto.machine.pulled import PullActivator
from toto.machine.signer import NotSigned
from toto.machine.ssh import Unreachable
from toto.nix import commands as nix
from toto.plan.host import DeployedHost

__all__ = ["served", "state", "world"]  # fixtures
pytestmark = [pytest.mark.minutes(1), pytest.mark.asyncio(loop_scope="module")]


@dataclass
class Run:
    """A run that deploys `new` to web1, whose last good is `good`."""

    world: World
    web1: Pulling
    activator: PullActivator
    new: str
    good: str

    async def at(self, step: str) -> None:
        await Ledger(self.world.repo).write(WEB1, lambda entry: steps.set_step(entry, "run-2", step), step)

    @property
    def before(self) -> MachineState:
        return MachineState(system=self.good, profile=self.good)

    async def try_it(self, confirm: float = 120) -> None:
        await self.at(signer.TRY["switch"])
        await self.activator.activate("test", self.new, self.before, finish=60, confirm=confirm)

    def is_(self) -> str:
        return (self.web1.folder / "is.json").read_text()


async def added(folder: Path, name: str) -> str:
    """A path in toto's store."""
    file = folder / f"nixos-system-{name}"
    file.write_text(f"{name} {folder}")
    return (await process.run(["nix-store", "--add", file], env=nix.environment())).stdout.strip()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def signing(state: Path) -> AsyncIterator[Path]:
    """The signer, which runs for this module; its key."""
    async with signer.serving():
        yield await signing_key.current()


@pytest_asyncio.fixture(loop_scope="module")
async def run(world: World, signing: Path, tmp_path: Path) -> AsyncIterator[Run]:
    new, good = await added(tmp_path, "new"), await added(tmp_path, "good")
    book = Ledger(world.repo)
    await book.write(WEB1, steps.intend(intent("run-1", good)), "intend")
    await book.write(WEB1, steps.good(deployed(good), "run-1"), "good")
    await book.write(WEB1, steps.intend(intent("run-2", new)), "intend")
    key = await keys.make(world.repo, "cache", "signing")
    web1 = Pulling(
        tmp_path / "web1",
        "web1",
        world.machines["web1"].keys,
        world.url,
        world.ca,
        signing,
        await keys.public_half(key),
        system=good,
    )
    host_key = (world.machines["web1"].keys / "ssh_host_ed25519_key.pub").read_text().strip()
    listed = Machine(name="web1", address="192.0.2.1", deploy="pull", ssh=SSH(host_key=host_key))
    activator = PullActivator(listed, world.repo, "run-2", key, patience=15)
    yield Run(world, web1, activator, new, good)
    await book.write(WEB1, steps.good(deployed(good, "run-2"), "run-2"), "over")


async def test_a_roll_out_is_tried_and_kept(run: Run) -> None:
    async with run.web1.running():
        assert await run.activator.facts() == run.before
        await run.activator.copy(run.new, timeout=60)
        await run.try_it()
        assert await run.activator.facts(fresh=True) == MachineState(system=run.new, profile=run.good)
        with pytest.raises(NotSigned):
            await run.activator.keep("switch", run.new, finish=60)
        await run.at(signer.KEEP["switch"])
        await run.activator.activate("switch", run.new, run.before, finish=60, confirm=0)
        await run.activator.check(run.new, profile=True)
        await run.activator.clean_up()
    assert run.web1.activations() == [f"try {run.new}", f"keep {run.new}"]


async def test_when_a_run_is_over_a_machine_that_asks_finds_its_last_good(run: Run) -> None:
    async with run.web1.running():
        await run.activator.copy(run.new, timeout=60)
        await run.try_it()
        await run.at(signer.KEEP["switch"])
        await run.activator.activate("switch", run.new, run.before, finish=60, confirm=0)
        await Ledger(run.world.repo).write(WEB1, steps.good(deployed(run.new, "run-2"), "run-2"), "good")
        await run.activator.clean_up()
        published = documents.published(run.world.place())
        assert published is not None
        made = Desired.read(signature.unsealed(published)[0])
        assert (made.phase, made.system.path) == ("back", run.new)
        async with asyncio.timeout(120):
            while run.web1.activations()[-1] != f"back {run.new}":
                await asyncio.sleep(0.2)
    await Ledger(run.world.repo).write(WEB1, steps.intend(intent("run-2", run.good)), "intend")


async def test_a_roll_out_that_fails_its_tests_is_reverted(run: Run) -> None:
    async with run.web1.running():
        await run.activator.copy(run.new, timeout=60)
        await run.try_it()
        await run.activator.revert(run.before, finish=60, boot=True)
        assert await run.activator.facts(fresh=True) == run.before
    assert run.web1.activations() == [f"try {run.new}", f"back {run.good}"]


@pytest.mark.parametrize(
    ("ends", "error", "words"),
    [
        ("done 1", ActivationFailed, "exited with status 1:\nthe stand-in's log"),
        ("back 0", WentBack, "went back by itself"),
        ("refused", ActivationFailed, "the disk is full"),
    ],
)
async def test_what_goes_wrong_on_the_machine_is_told(run: Run, ends: str, error: type[Exception], words: str) -> None:
    run.web1.behave(new=ends)
    async with run.web1.running():
        await run.activator.copy(run.new, timeout=60)
        with pytest.raises(error, match=words):
            await run.try_it()


async def test_what_is_not_granted_cannot_be_fetched(run: Run) -> None:
    async with run.web1.running():
        with pytest.raises(ActivationFailed, match="toto does not offer"):
            await run.try_it()


async def test_a_machine_that_does_not_ask_is_unreachable_and_goes_back_when_it_returns(run: Run) -> None:
    run.activator.patience = 1
    with pytest.raises(Unreachable, match="does not ask what it should be: it has never asked"):
        await run.activator.facts()
    await run.activator.copy(run.new, timeout=60)
    async with run.web1.running():
        await until(lambda: documents.numbers(run.world.place()))
    with pytest.raises(Unreachable, match="it asked last"):
        await run.try_it()
    with pytest.raises(Unreachable):
        await run.activator.revert(run.before, finish=60, boot=True)
    async with run.web1.running():
        run.activator.patience = 15
        await until(run.web1.activations)
        await run.activator.check(run.good, profile=True, fresh=True)
    assert run.web1.activations() == [f"back {run.good}"], "what was to be tried meanwhile is not"


async def test_a_report_that_is_not_the_machines_is_not_believed(run: Run) -> None:
    """Whoever takes the web server over can write reports: toto asks for the machine's signature."""
    run.activator.patience = 4
    web1, web2 = run.world.machines["web1"], run.world.machines["web2"]
    await run.at(signer.TRY["switch"])
    trying = asyncio.create_task(run.activator.activate("test", run.new, run.before, finish=60, confirm=120))
    await until(lambda: documents.published(run.world.place()))
    envelope = documents.published(run.world.place())
    assert envelope is not None
    serial = Desired.read(signature.unsealed(envelope)[0]).serial
    good = {"serial": serial, "system": run.new, "boots": run.good}
    old = web1.report(serial=serial - 1, state="done 0", number=1)
    forged = {
        2: signature.seal(web1.report(**good, number=2).write(), web2.key, proof.REPORT),
        3: signature.seal(web1.report(**good, number=3).write(), web1.key, proof.ASK),
        4: signature.seal(web1.report(**good, number=5).write(), web1.key, proof.REPORT),
        6: signature.seal(web2.report(**good, number=6).write(), web1.key, proof.REPORT),
        7: web1.sealed(old),
        8: b"{}",
    }
    reports = run.world.place().said / "reports"
    reports.mkdir(parents=True)
    for number, each in forged.items():
        (reports / f"{number:016d}.json").write_bytes(each)
    with pytest.raises(Unreachable, match="does not ask"):
        await trying


async def test_a_machine_that_does_not_list_totos_signer_says_so_and_holds_nothing_up(run: Run, tmp_path: Path) -> None:
    stranger = tmp_path / "stranger"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", stranger], check=True)
    cache = await keys.public_half(run.activator.key)
    host_keys = run.world.machines["web1"].keys
    deaf = Pulling(tmp_path / "deaf", "web1", host_keys, run.world.url, run.world.ca, stranger, cache, system=run.good)
    await run.activator.copy(run.new, timeout=60)
    async with deaf.running(), asyncio.timeout(60):
        with pytest.raises(ActivationFailed, match="signers must name toto's signer"):
            await run.try_it()


async def test_a_machine_that_asks_and_never_answers_ends_the_wait(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one does whose reports a web server withholds that was taken over."""
    monkeypatch.setattr(pulled, "_FETCH", 1)
    monkeypatch.setattr(pulled, "_STEP", 1)
    run.activator.patience = 10_000
    await run.at(signer.TRY["switch"])
    with pytest.raises(Unreachable, match="has said nothing of what it is told, for 3 s"):
        await run.activator.activate("test", run.new, run.before, finish=2, confirm=120)


async def test_serials_follow_what_the_machine_has_had(run: Run) -> None:
    """After toto is restored from an old backup, and with a clock that is behind."""
    web1 = run.world.machines["web1"]
    ahead = 2_000_000_000
    report = Report.read(web1.report(serial=ahead).write())
    documents.take(run.world.place(), "infra", "web1", web1.sealed(report))
    run.activator.patience = 1
    with pytest.raises(Unreachable):
        await run.try_it()
    envelope = documents.published(run.world.place())
    assert envelope is not None and f'"serial":{ahead + 1}' in signature.unsealed(envelope)[0].decode()


async def test_what_runs_by_hand_is_seen(run: Run) -> None:
    async with run.web1.running():
        assert await run.activator.facts() == run.before
        (run.web1.folder / "is.json").write_text(run.is_().replace(run.good, run.new))
        with pytest.raises(NotWhatItShouldBe, match=f"runs {run.new}, not {run.good}"):
            await run.activator.check(run.good, fresh=True)
        noted = await run.activator.condition()
        condition.note(run.world.repo, "web1", noted)
        assert condition.read(run.world.repo, "web1") == noted and noted.report > 0


async def test_what_a_machine_runs_is_accepted(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a dead run was trying is over by then; what somebody did by hand is not undone."""
    book, repo, by_hand = Ledger(run.world.repo), run.world.repo, await added(tmp_path, "by-hand")
    git("clone", "--quiet", repo, tmp_path / "work", cwd=tmp_path)
    machine = run.activator.machine
    text = f"machines: [{{ name: web1, address: {machine.address}, deploy: pull, ssh: {{ host_key: '%s' }} }}]\n"
    (tmp_path / "work/machines.yaml").write_text(text % machine.ssh.host_key)
    git("add", "machines.yaml", cwd=tmp_path / "work")
    git("commit", "--quiet", "--message", "a machine", cwd=tmp_path / "work")
    git("push", "--quiet", "origin", "HEAD", cwd=tmp_path / "work")
    for each in ("manifest_of", "dead_intents"):  # without Prefect
        monkeypatch.setattr(accept, each, getattr(accept, each).fn)

    async def accepted(by: str) -> str:
        with disable_run_logger():
            return await accept.accept.fn(repo, by, WEB1, accept.host, why="it is well", by="op")

    def told() -> Desired:
        envelope = documents.published(run.world.place())
        assert envelope is not None
        return Desired.read(signature.unsealed(envelope)[0])

    async with run.web1.running():
        await run.activator.copy(run.new, timeout=60)
        await run.try_it(confirm=3)
        assert await accepted("run-2") == f"it runs {run.good}, that of cccccccc"
        entry = book.read().get(WEB1)
        assert entry.intent is None and entry.accepted is not None
        assert (told().phase, told().system.path, told().resting) == ("back", run.good, True)
        await until(lambda: run.web1.activations()[-1] == f"back {run.good}")

        (run.web1.folder / "is.json").write_text(run.is_().replace(run.good, by_hand))
        assert await accepted("run-3") == f"it runs {by_hand}"
        good = DeployedHost.of(book.read().get(WEB1).good)
        assert good is not None and (good.path, good.identity) == (by_hand, accept.ACCEPTED + by_hand)
        assert (told().phase, told().system.path, told().resting) == ("back", by_hand, True)
        await until(lambda: run.web1.activations()[-1] == f"back {by_hand}")
    assert run.web1.activations() == [f"try {run.new}", f"back {run.good}", f"back {by_hand}"]
    await book.write(WEB1, steps.intend(intent("run-2", run.good)), "intend")


async def test_its_error_says_what_it_says() -> None:
    assert "ssh" not in str(pulled.NotHeardFrom("does not ask", target="web1"))
