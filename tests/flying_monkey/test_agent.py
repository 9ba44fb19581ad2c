"""A real agent asks a real server over TLS: documents, closures and reports. Only the helper is a stand-in."""

import asyncio
import json
import re
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from flying_monkey.desired import Deadlines, Desired, Machine, System
from flying_monkey.report import Report
from flying_monkey.signature import seal
from tests.api.conftest import ADDRESS, Asking, World, served, state, until, world
from tests.conftest import free_port
from tests.flying_monkey.pulling import Pulling
from toto.api import certificate
from toto.api.run import running_api
from toto.base import process
from toto.machine import documents, keys
from toto.nix import commands as nix
from toto.store import grants

__all__ = ["served", "state", "world"]  # fixtures
pytestmark = [pytest.mark.minutes(1), pytest.mark.asyncio(loop_scope="module")]


class Toto:
    """toto's side for the machine web1: signs, grants, publishes, and reads what is reported."""

    def __init__(self, world: World, signer: Path, cache_key: Path, folder: Path) -> None:
        self.world, self.signer, self.cache_key, self.folder = world, signer, cache_key, folder
        self.serial = int(time.time())
        web1 = world.machines["web1"]
        self.found = documents.Reports(world.repo, "web1", [web1.host_key])
        self.reports: list[Report] = []

    async def system(self, name: str) -> System:
        """A path in toto's store."""
        file = self.folder / f"nixos-system-{name}"
        file.write_text(name)
        added = await process.run(["nix-store", "--add", file], env=nix.environment())
        path = added.stdout.strip()
        return System(path, await nix.nar_hash(path))

    def document(self, system: System, phase: Any = "try", **more: Any) -> Desired:
        self.serial += 1
        now = datetime.now(UTC).replace(microsecond=0)
        machine = Machine("web1", self.world.machines["web1"].host_key)
        made = Desired("infra", machine, self.serial, now, now + timedelta(days=7), phase, "switch", system)
        return replace(made, **more)

    async def publish(self, document: Desired, *, grant: bool = True) -> None:
        if grant:
            await grants.grant(self.world.repo, "web1", [document.system.path], self.cache_key, timeout=60)
        documents.publish(self.world.repo, "web1", seal(document.write(), self.signer))

    def read(self) -> list[Report]:
        self.reports += self.found.read()
        return self.reports

    async def report(self, wanted: Callable[[Report], bool], seconds: float = 120) -> Report:
        await until(lambda: any(map(wanted, self.read())), seconds)
        return next(each for each in reversed(self.reports) if wanted(each))


@pytest.fixture(scope="module")
def signer(new_key: Callable[[str], Path]) -> Path:
    return new_key("signer")


@pytest_asyncio.fixture(loop_scope="module")
async def toto(world: World, signer: Path, tmp_path: Path) -> Toto:
    return Toto(world, signer, await keys.make(world.repo, "cache", "signing"), tmp_path)


@pytest_asyncio.fixture(loop_scope="module")
async def web1(world: World, toto: Toto, tmp_path: Path) -> Pulling:
    trusted = await keys.public_half(toto.cache_key)
    return Pulling(tmp_path / "web1", "web1", world.machines["web1"].keys, world.url, world.ca, toto.signer, trusted)


def fetched(web1: Pulling, system: System) -> bool:
    return Path(f"{web1.folder}/root{system.path}").exists()


async def test_a_system_is_fetched_tried_and_kept_and_each_step_is_reported(toto: Toto, web1: Pulling) -> None:
    new = await toto.system("new")
    async with web1.running():
        first = await toto.report(lambda each: each.system == web1.system)
        assert first.serial == 0 and first.step == "finished"
        tried = toto.document(new)
        await toto.publish(tried)
        report = await toto.report(lambda each: each.serial == tried.serial and each.step != "fetched")
        assert (report.step, report.state, report.system, report.boots) == ("tried", "done 0", new.path, web1.system)
        assert fetched(web1, new)
        await toto.publish(toto.document(new, "keep"))
        report = await toto.report(lambda each: each.serial == toto.serial and each.step == "finished")
        assert (report.step, report.boots, report.phase) == ("finished", new.path, "keep")
        word = documents.ask(toto.world.repo, "web1")
        assert (await toto.report(lambda each: each.asked == word)).system == new.path
    assert web1.activations() == [f"try {new.path}", f"keep {new.path}"]
    numbers = [each.number for each in toto.reports]
    assert numbers == sorted(set(numbers))
    measured = (web1.folder / "metrics.prom").read_text()
    assert f'kind="running",path="{new.path}"' in measured and "flying_monkey_reports_waiting 0" in measured


async def test_a_change_reaches_an_idle_agent_at_once(toto: Toto, web1: Pulling) -> None:
    new = await toto.system("quick")
    async with web1.running(wait=(900, 901)):
        await toto.report(lambda each: True)
        await asyncio.sleep(1)
        document = toto.document(new)
        await grants.grant(toto.world.repo, "web1", [new.path], toto.cache_key, timeout=60)
        await toto.publish(document, grant=False)
        await until(lambda: fetched(web1, new))  # and not at the next poll


async def test_what_nobody_keeps_goes_back_and_is_reported(toto: Toto, web1: Pulling) -> None:
    new = await toto.system("dropped")
    async with web1.running():
        await toto.publish(toto.document(new, deadlines=Deadlines(confirm=2)))
        report = await toto.report(lambda each: each.state == "back 0", 30)
        assert (report.serial, report.system, report.log) == (toto.serial, web1.system, "the stand-in's log")


async def test_what_is_not_genuine_or_not_for_this_machine_is_not_even_fetched(
    toto: Toto, web1: Pulling, new_key: Callable[[str], Path]
) -> None:
    new, repo = await toto.system("forged"), toto.world.repo
    forged = toto.document(new)
    await grants.grant(repo, "web1", [new.path], toto.cache_key, timeout=60)
    other = replace(forged, machine=replace(forged.machine, name="web2"))
    expired = replace(forged, issued=forged.issued - timedelta(days=9), expires=forged.issued - timedelta(days=2))
    envelopes = [
        (seal(forged.write(), new_key("stranger")), "no key that may sign for infra has signed it"),
        (b"{}", "it is not a signed document"),
        (seal(other.write(), toto.signer), "for the machine web2"),
        (seal(expired.write(), toto.signer), "it expired"),
        (b"\0" * 150_000, "it is not a signed document"),
        (seal(replace(forged, repo="other").write(), toto.signer), "of the repo other"),
        (seal(b"{}", toto.signer), "version is missing"),
    ]
    async with web1.running():
        await toto.report(lambda each: True)
        for envelope, _ in envelopes:
            before = len(toto.read())
            fresh = toto.world.place().told / "fresh"
            fresh.parent.mkdir(parents=True, exist_ok=True)
            fresh.write_bytes(envelope)
            fresh.replace(fresh.with_name("document"))  # as a server hands it out that was taken over
            documents.ask(repo, "web1")
            await until(lambda before=before: any(each.error for each in toto.read()[before:]))
        assert web1.activations() == [] and not fetched(web1, new)
        await toto.publish(forged, grant=False)
        await toto.report(lambda each: each.serial == forged.serial and not each.error)
    assert fetched(web1, new)
    said = [each.error for each in toto.reports if each.error]
    for (_, words), error in zip(envelopes, said, strict=True):
        assert re.search(words, error), (words, error)


async def test_what_cannot_be_obeyed_is_reported_by_its_serial(toto: Toto, web1: Pulling) -> None:
    full, ungranted = await toto.system("full"), await toto.system("ungranted")
    web1.behave(full="refused")
    async with web1.running():
        await toto.publish(toto.document(full))
        report = await toto.report(lambda each: bool(each.error))
        assert next(each.step for each in toto.reports if each.serial == toto.serial) == "fetched"
        assert (report.serial, report.error, report.kind) == (toto.serial, "the disk is full", "NotReady")
        await toto.publish(toto.document(ungranted), grant=False)
        report = await toto.report(lambda each: each.serial == toto.serial)
        assert "toto does not offer" in report.error and report.system == web1.system


async def test_what_the_machine_was_not_ready_for_is_begun_once_more(toto: Toto, web1: Pulling) -> None:
    late = await toto.system("late")
    web1.behave(late="refused")
    async with web1.running():
        await toto.publish(toto.document(late))
        await toto.report(lambda each: each.error == "the disk is full")
        web1.behave()
        await toto.report(lambda each: each.serial == toto.serial and each.step == "tried" and not each.error)
    assert web1.activations() == [f"try {late.path}"]


async def test_what_there_is_no_room_for_is_not_fetched_before_there_is(toto: Toto, web1: Pulling) -> None:
    large = await toto.system("large")
    (web1.folder / "free").write_text("1000000")
    async with web1.running():
        await toto.publish(toto.document(large))
        report = await toto.report(lambda each: each.kind == "NotReady")
        assert "MB more, and of /nix/store 1 MB are free, of which 268 stay so" in report.error
        assert not fetched(web1, large) and web1.activations() == []
        (web1.folder / "free").unlink()
        await toto.report(lambda each: each.serial == toto.serial and each.step == "tried" and not each.error)
    assert fetched(web1, large)


async def test_an_agent_that_is_killed_goes_on_where_it_was(toto: Toto, web1: Pulling) -> None:
    new = await toto.system("killed")
    async with web1.running():
        await toto.publish(toto.document(new))
        await toto.report(lambda each: each.serial == toto.serial and each.step == "tried")
    async with web1.running():
        await toto.publish(toto.document(new, "keep"))
        await toto.report(lambda each: each.serial == toto.serial and each.step == "finished")
    assert web1.activations() == [f"try {new.path}", f"keep {new.path}"], "and nothing is obeyed twice"


async def test_toto_away_and_back(world: World, toto: Toto, web1: Pulling) -> None:
    """What happens meanwhile is reported later; a server that starts anew is asked anew."""
    port = free_port()
    web1.configure(url=f"https://{ADDRESS}:{port}")
    new = await toto.system("away")
    async with web1.running():
        async with running_api(world.folder / "second.log", host=ADDRESS, port=port):
            await toto.publish(toto.document(new))
            await toto.report(lambda each: each.serial == toto.serial and each.step == "tried")
        is_ = json.loads((web1.folder / "is.json").read_text())
        (web1.folder / "is.json").write_text(json.dumps(is_ | {"drift": "somebody was here"}))
        await until(lambda: any((web1.folder / "memory" / "reports").glob("*.json")))
        assert "ConnectionRefusedError" in web1.log()
        async with running_api(world.folder / "second.log", host=ADDRESS, port=port):
            report = await toto.report(lambda each: each.details.get("drift") == "somebody was here")
            assert report.serial == toto.serial
            await until(lambda: "toto answers again" in web1.log())


async def test_a_machine_that_toto_does_not_know_is_told_so(toto: Toto, web1: Pulling, tmp_path: Path) -> None:
    web1.configure(host_keys=str(Asking("web1", tmp_path / "other").keys))
    async with web1.running():
        await until(lambda: "not signed by the host key of web1" in web1.log())
    assert toto.read() == []


async def test_a_server_that_is_not_totos_is_not_believed(toto: Toto, web1: Pulling, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOTO_STATE", str(tmp_path / "else"))
        web1.configure(ca=str(certificate.own([ADDRESS]).ca))
    async with web1.running():
        await until(lambda: "CERTIFICATE_VERIFY_FAILED" in web1.log())
