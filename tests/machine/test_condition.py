"""What toto knows of machines without asking them: real reports with real signatures, and what `toto status` says."""

import os
import re
import time
from pathlib import Path

import pytest

from flying_monkey import proof, signature
from tests.api.conftest import Asking, World
from tests.ledger.test_ledger import WEB1, deployed, intent
from tests.repos import git
from tests.test_cli import items, said
from toto.ledger import steps
from toto.ledger.ledger import Ledger
from toto.machine import condition, documents
from toto.machine.condition import Condition


@pytest.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """toto with web1; no server runs."""
    monkeypatch.setenv("TOTO_STATE", str(tmp_path / "state"))
    git("init", "--quiet", "--bare", "infra.git", cwd=tmp_path)
    made = World(tmp_path, tmp_path / "infra.git", 0)
    await made.claim("web1", 1)
    return made


def reported(world: World, said_by: Asking, number: int, **details: object) -> None:
    report = said_by.report(machine="web1", number=number, details=details)
    documents.take(world.place(), "infra", "web1", signature.seal(report.write(), said_by.key, proof.REPORT))


async def test_the_newest_report_of_the_machines_own_counts_and_is_verified_once(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    web1, stranger = world.machines["web1"], Asking("stranger", tmp_path / "stranger")
    assert condition.read(world.repo, "web1") is None
    reported(world, web1, 1, reboot_needed=False)
    reported(world, web1, 2, reboot_needed=True, drift="it runs /nix/store/x, and not /nix/store/y")
    reported(world, stranger, 3, reboot_needed=False)
    found = condition.read(world.repo, "web1")
    assert found is not None and (found.report, found.reboot_needed) == (2, True)
    assert found.drift == ("it runs /nix/store/x, and not /nix/store/y",)
    (world.place().said / "reports" / f"{3:016d}.json").unlink()
    monkeypatch.setattr(documents, "verified", None)
    assert condition.read(world.repo, "web1") == found
    condition.note(world.repo, "web1", Condition(at=5, report=2))
    assert condition.read(world.repo, "web1") == Condition(at=5, report=2), "a roll-out or a check was later"
    condition.note(world.repo, "web1", None)
    condition.note(world.repo, "web1", None)


@pytest.mark.parametrize(
    "words",
    [{}, {"drift": ["x"], "reboot_needed": "yes"}, {"drift": {"a": 1}, "reboot_needed": 1}, {"drift": "", "x": None}],
)
def test_what_a_machine_says_otherwise_is_nothing(words: dict[str, object]) -> None:
    assert Condition.of(words, at=1) == Condition(at=1)


def test_what_a_machine_says_is_short_and_obeyed_by_no_terminal() -> None:
    (line,) = Condition.of({"drift": "\x1b[2J\n" + "x" * 10_000}).drift
    assert line.startswith("?[2J?x") and len(line) == 300


async def test_status_shows_drift_a_reboot_that_is_needed_and_the_last_contact(world: World) -> None:
    book = Ledger(world.repo)
    await book.write(WEB1, steps.intend(intent("run-1")), "intend")
    await book.write(WEB1, steps.good(deployed("/nix/store/new"), "run-1"), "good")

    def known(field: str) -> object:
        (found,) = items(world.folder, "status", "--repo", str(world.repo))
        return found[field]

    assert (known("heard"), known("notes")) == (None, []), "nothing was heard of it"
    now = time.time()
    documents.note_contact(world.place())
    os.utime(world.place().said / "contact", (now, now))
    contact = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(now))
    condition.note(world.repo, "web1", Condition(at=now - 60, drift=("it runs /nix/store/hand",), reboot_needed=True))
    assert known("heard") == contact
    assert known("notes") == ["drifted: it runs /nix/store/hand", "reboot needed"]
    assert "reboot needed" in said(world.folder, "status", "--repo", str(world.repo))[1]
    narrow = said(world.folder, "status", "--repo", str(world.repo), COLUMNS="80")[1]
    assert all(len(line) <= 80 for line in narrow.splitlines()) and not re.search("[^\n -~…]", narrow)
