"""What runs ask, and who answers: in a real repo."""

import asyncio
from pathlib import Path

import pytest

from tests.repos import InfraRepo, git
from toto.ledger import approvals
from toto.ledger.approvals import NothingAsked

RUN, OTHER = "5a0c0000-0000-4000-8000-000000000001", "5a0c0000-0000-4000-8000-000000000002"


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    made = InfraRepo(tmp_path)
    made.commit({"a": "1"})
    return made.bare


async def test_an_answer_is_recorded_once_with_who_and_what(repo: Path) -> None:
    assert approvals.read(repo, RUN) is None
    await approvals.ask(repo, RUN, {"terraform/dns": "+1"}, 3600)
    await approvals.ask(repo, OTHER, {"terraform/dns": "+2"}, 3600)
    asked = await approvals.answer(repo, RUN, approved=True, by="alice")
    assert asked == approvals.read(repo, RUN)
    assert asked.answer and (asked.answer.approved, asked.answer.by) == (True, "alice")
    with pytest.raises(NothingAsked, match="was approved by alice at"):
        await approvals.answer(repo, RUN, approved=False, by="bob")
    other = approvals.read(repo, OTHER)
    assert other and other.waits
    log = git("log", "--format=%s", approvals.REF, cwd=repo).splitlines()
    assert log == [f"{RUN} approved by alice", *(f"{run} asks to approve terraform/dns" for run in (OTHER, RUN))]


async def test_of_two_answers_at_once_one_counts(repo: Path) -> None:
    await approvals.ask(repo, RUN, {"terraform/dns": "+1"}, 3600)
    results = await asyncio.gather(
        *(approvals.answer(repo, RUN, approved=who == "alice", by=who) for who in ("alice", "bob", "carol")),
        return_exceptions=True,
    )
    assert sorted(type(each).__name__ for each in results) == ["Asked", "NothingAsked", "NothingAsked"]


async def test_an_answer_to_an_earlier_plan_does_not_count_for_a_new_one(repo: Path) -> None:
    await approvals.ask(repo, RUN, {"terraform/dns": "+1"}, 3600)
    await approvals.answer(repo, RUN, approved=True, by="alice")
    assert (await approvals.ask(repo, RUN, {"terraform/dns": "-9"}, 3600)).answer is None


async def test_who_does_not_wait_any_more_gets_no_answer(repo: Path) -> None:
    await approvals.withdraw(repo, RUN)
    await approvals.ask(repo, RUN, {"terraform/dns": "+1"}, -1)
    await approvals.ask(repo, OTHER, {"terraform/dns": "+1"}, 3600)
    await approvals.withdraw(repo, OTHER)
    for run in (RUN, OTHER):
        with pytest.raises(NothingAsked, match="does not any more"):
            await approvals.answer(repo, run, approved=True, by="alice")


@pytest.mark.parametrize("run", ["..", "../x", "", "a", f"{RUN}/..", f"{RUN}\n", RUN.upper(), "*"])
async def test_what_is_no_runs_id_leads_nowhere(repo: Path, run: str) -> None:
    with pytest.raises(NothingAsked, match="is not the id of a run"):
        await approvals.answer(repo, run, approved=True, by="eve")
