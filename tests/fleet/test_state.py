"""The state of a target: one word for the page of the fleet, for Prometheus, and for `toto status`."""

from pathlib import Path

from tests.fleet.conftest import WEB1, WEB2
from tests.ledger.test_ledger import deployed, intent, note
from tests.repos import InfraRepo
from tests.test_cli import said
from toto.fleet.state import described
from toto.ledger import steps
from toto.ledger.ledger import Entry, Ledger

AT_WORK = intent("run-1")
GONE = AT_WORK.model_copy(update={"owner": f"{AT_WORK.owner.rpartition('/')[0]}/1.0"})


def test_who_changes_a_target_is_looked_for() -> None:
    def state(entry: Entry) -> tuple[str, str]:
        word, _, _, mood = described(entry)
        return word, mood

    assert state(Entry(intent=AT_WORK, reverted=note())) == ("being changed", "busy")
    assert state(Entry(intent=GONE, good=deployed("/nix/store/old"))) == ("half done", "bad")
    elsewhere = AT_WORK.model_copy(update={"owner": "elsewhere/0/1.0"})
    assert state(Entry(intent=elsewhere)) == ("being changed", "busy"), "nobody knows here"
    assert state(Entry()) == ("not deployed", "none")
    assert state(Entry(rehearsed=AT_WORK.desired)) == ("rehearsed only", "good")


async def test_the_command_has_the_same_words(tmp_path: Path) -> None:
    book = Ledger(InfraRepo(tmp_path).bare)
    await book.write(WEB1, steps.intend(GONE), "web1: intent")
    await book.write(WEB2, lambda _: Entry(reverted=note()), "web2: reverted")
    status, text = said(tmp_path, "status", "--repo", str(book.repo))
    assert status == 0
    for target, entry in book.read().entries.items():
        word, why, _, _ = described(entry)
        (line,) = [line for line in text.splitlines() if line.startswith(target.label)]
        assert word in line and line.endswith(why)
    assert "run run-1: roll out" in text and "a test failed" in text
