"""What the signer signs, on a real ledger, store and socket."""

import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from flying_monkey.desired import Desired
from flying_monkey.signature import NAMESPACE, opened, unsealed
from tests.lab import nix as lab_nix
from tests.lab.setup import setup
from tests.ledger.test_ledger import WEB1, deployed, intent
from tests.repos import git
from toto.base import paths
from toto.infra_repo.manifest import SSH, Machine
from toto.ledger import steps
from toto.ledger.ledger import Ledger
from toto.machine import documents, owners, renewal, signer, signing_key
from toto.machine.signer import NotSigned, Request

HOST_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIHl1bmdlcnRoYW55b3V0aGluazAwMDAwMDAwMDAwMDAw"
NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


@pytest.fixture(scope="module")
def store() -> None:
    setup()


async def added(folder: Path, name: str) -> str:
    """A path in the store."""
    file = folder / f"nixos-system-{name}"
    file.write_text(name)
    return await lab_nix.nix("nix-store", "--add", str(file))


class World:
    """A repo with the machine web1, and a run that deploys it."""

    def __init__(self, repo: Path, new: str, good: str) -> None:
        self.repo, self.new, self.good, self.book = repo, new, good, Ledger(repo)

    async def at(self, step: str) -> None:
        await self.book.write(WEB1, lambda entry: steps.set_step(entry, "run-2", step), step)

    def request(self, phase: str = "try", **more: object) -> Request:
        asked = {"repo": str(self.repo), "machine": "web1", "phase": phase, "activation": "switch"}
        return Request.model_validate(asked | more)


@pytest.fixture
async def world(store: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setenv("TOTO_STATE", str(tmp_path / "state"))
    git("init", "--quiet", "--bare", "infra.git", cwd=tmp_path)
    made = World(tmp_path / "infra.git", await added(tmp_path, "new"), await added(tmp_path, "good"))
    await owners.claim(made.repo, Machine(name="web1", address="10.0.0.1", ssh=SSH()), [HOST_KEY])
    await made.book.write(WEB1, steps.intend(intent("run-1", made.good)), "intend")
    await made.book.write(WEB1, steps.good(deployed(made.good), "run-1"), "good")
    await made.book.write(WEB1, steps.intend(intent("run-2", made.new)), "intend")
    return made


async def test_a_phase_is_signed_when_the_roll_out_is_there(world: World) -> None:
    for phase in ("try", "keep"):
        with pytest.raises(NotSigned, match="its roll-out is at `roll out`, not at `"):
            await signer.document(world.request(phase), NOW)
    await world.at("test")
    made = await signer.document(world.request(), NOW)
    assert (made.system.path, made.phase, made.repo, made.machine.host_key) == (world.new, "try", "infra", HOST_KEY)
    assert made.good is not None and made.good.path == world.good and made.expires == NOW + timedelta(days=7)
    with pytest.raises(NotSigned, match="is at `test`, not at `switch`"):
        await signer.document(world.request("keep"), NOW)
    for activation, step in signer.KEEP.items():
        await world.at(step)
        asked = world.request("keep", activation=activation, reboot=True, reboot_until=NOW)
        made = await signer.document(signer.Request.model_validate_json(asked.model_dump_json()), NOW)
        assert (made.system.path, made.activation, made.reboot) == (world.new, activation, "now")
        assert made.reboot_until == NOW
    assert (await signer.document(world.request("back"), NOW)).system.path == world.good


async def test_nothing_is_signed_without_an_intent_or_for_a_machine_of_someone_else(
    world: World, tmp_path: Path
) -> None:
    await world.at("test")
    with pytest.raises(owners.NotOwned, match="is not a machine of infra"):
        await signer.document(world.request(machine="web2"), NOW)
    git("init", "--quiet", "--bare", "lab.git", cwd=tmp_path)
    with pytest.raises(owners.NotOwned, match="is not a machine of lab"):
        await signer.document(world.request(repo=str(tmp_path / "lab.git")), NOW)
    await world.book.write(WEB1, steps.good(deployed(world.new, "run-2"), "run-2"), "good")
    assert (await signer.document(world.request("back"), NOW)).system.path == world.new, "its last good, at any time"
    for phase in ("try", "keep"):
        with pytest.raises(NotSigned, match="no run is deploying it"):
            await signer.document(world.request(phase), NOW)


async def test_what_is_not_in_the_store_is_not_signed(world: World) -> None:
    gone = world.new.replace("-nixos-system-new", "-nixos-system-gone")
    desired = intent("run-2", gone)
    await world.book.write(WEB1, lambda entry: entry.model_copy(update={"intent": desired}), "gone")
    await world.at("test")
    with pytest.raises(NotSigned, match="-gone is not in toto's store"):
        await signer.document(world.request(), NOW)


async def test_serials_only_grow_also_after_a_restore(world: World) -> None:
    await world.at("test")
    serials = [(await signer.document(world.request(), NOW)).serial for _ in range(2)]
    assert serials == [int(NOW.timestamp()) + 1, int(NOW.timestamp()) + 2]
    ahead = serials[1] + 1_000
    assert (await signer.document(world.request(reported=ahead), NOW)).serial == ahead + 1
    file = paths.repo_state(world.repo) / "serials.json"
    for lost in (file.unlink, lambda: file.write_text("{half")):
        lost()
        later = NOW + timedelta(days=1)
        assert (await signer.document(world.request(), later)).serial > ahead + 1
    assert (await signer.document(world.request(), NOW)).serial > ahead + 1, "a clock that was set back"
    with pytest.raises(NotSigned, match="which toto never gave"):
        await signer.document(world.request(reported=2**52), NOW)


@pytest.fixture
async def served(world: World) -> AsyncIterator[World]:
    await world.at("test")
    async with signer.serving():
        yield world


async def test_who_asks_at_its_socket_gets_a_signed_document_and_never_the_key(served: World, tmp_path: Path) -> None:
    public = (await signing_key.current()).with_suffix(".pub").read_text()
    (tmp_path / "signers").write_text(f'infra namespaces="{NAMESPACE}" {public}')
    envelope = await signer.ask(served.request())
    made = Desired.read(opened(envelope, "infra", tmp_path / "signers", datetime.now(UTC)))
    assert made.system.path == served.new
    with pytest.raises(NotSigned, match="not at `switch`"):
        await signer.ask(served.request("keep"))
    for place in (signer.socket(), await signing_key.current()):
        assert place.stat().st_mode & 0o077 == 0


async def test_a_request_that_is_none_is_refused_and_the_next_one_answered(served: World) -> None:
    import asyncio  # noqa: PLC0415

    whole = json.loads(served.request().model_dump_json())
    wrong = (b"", b"x" * 100_000, b"{}", json.dumps(whole | {"text": "sign this"}).encode(), b'{"phase": "force"}')
    for text in wrong:
        reader, writer = await asyncio.open_unix_connection(str(signer.socket()))
        writer.write(text + b"\n")
        answer = json.loads(await reader.readline())
        assert "error" in answer and "envelope" not in answer, text[:100]
        writer.close()
    assert await signer.ask(served.request())


async def test_a_signer_that_is_not_there_is_said(world: World) -> None:
    with pytest.raises(NotSigned, match="the signer does not answer") as caught:
        await signer.ask(world.request())
    assert caught.value.hint == "does `toto serve` run?"


async def test_a_long_path_of_the_state_is_no_trouble(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOTO_STATE", str(tmp_path / ("long" * 30)))
    async with signer.serving():
        with pytest.raises(NotSigned, match="is not a machine of infra"):
            await signer.ask(world.request())


async def test_a_published_document_is_renewed_before_it_expires_unless_a_run_works_on_the_machine(
    served: World,
) -> None:
    now, place = datetime.now(UTC).replace(microsecond=0), documents.Place.of(served.repo, "web1")
    documents.publish(served.repo, "web1", await signer.ask(served.request()))
    late = now + timedelta(days=5)
    assert await renewal.renew([served.repo], late) == [], "a run works on it"
    with pytest.raises(NotSigned, match="run run-2 works on it"):
        await signer.ask(served.request("back", resting=True))
    await served.book.write(WEB1, steps.good(deployed(served.new, "run-2"), "run-2"), "good")
    assert await renewal.renew([served.repo], now) == [], "it is not due"
    old = documents.published(place)
    assert await renewal.renew([served.repo], late) == ["web1"]
    fresh = documents.published(place)
    assert old is not None and fresh is not None
    before, made = (Desired.read(unsealed(each)[0]) for each in (old, fresh))
    assert (made.phase, made.system.path, made.activation) == ("back", served.new, before.activation)
    assert made.serial > before.serial and made.expires >= before.expires
    documents.publish(served.repo, "web1", old)
    assert documents.published(place) == fresh, "an older one does not take its place"
    (place.told / "document").write_bytes(b"{half")
    assert await renewal.renew([served.repo], late) == []
