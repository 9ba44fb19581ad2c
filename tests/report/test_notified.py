"""A venue is notified of a failure once, again when it changes, and when it is over; on real git."""

import asyncio
import os
from dataclasses import replace
from pathlib import Path

import pytest

from tests.report.test_message import COMMIT, LINK, message
from tests.report.test_report import report
from tests.repos import InfraRepo, git
from toto.base.errors import TotoError
from toto.infra_repo.git import GitError
from toto.report import notified
from toto.report.message import Message
from toto.report.notified import Known
from toto.report.report import Reverted


def run(
    *,
    fails: str = "",
    why: str = "not ok 1 - welcome",
    ends: dict[str, str] | None = None,
    plan: tuple[str, ...] = ("a", "b"),
) -> Message:
    """A run of a and b in which one fails its roll-out and both are reverted, or that ends like that."""
    of = report(*plan)
    of.outcome |= ends or {}
    if fails:
        of.failure(fails, "roll-out", TotoError(f"smoke tests failed: s\n  {why}"))
        of.reverted = [Reverted(name, "/nix/store/x") for name in plan]
    return message(of)


def partly(fails: str) -> Message:
    """A run of a and b in which one fails its rehearsal, and the other is deployed all the same."""
    of = report("a", "b")
    of.failure(fails, "rehearsal", TotoError("no"))
    of.outcome |= {name: "deployed" for name in ("a", "b") if name != fails}
    return message(of)


DONE = {"a": "deployed", "b": "deployed"}


def heard(*runs: Message) -> list[str | None]:
    """What a venue that listens to all hears of runs, one after the other."""
    known: dict[str, Known] = {}
    states: list[str | None] = []
    for each in runs:
        news = notified.news(each, known)
        if news is not None:
            known = notified.after(news, known)
        states.append(news.state if news else None)
    return states


NOTHING = message(report())


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        ([run(fails="b"), run(fails="b"), run(fails="b")], ["failed", None, None]),
        ([run(fails="b"), run(fails="b", why="not ok 2 - other"), run(fails="b")], ["failed", "failed", "failed"]),
        ([run(fails="b"), run(fails="a"), run(fails="b")], ["failed", "failed", None]),
        ([run(fails="b"), run(ends=DONE), run(ends=DONE), run(fails="b")], ["failed", "recovered", "done", "failed"]),
        ([run(fails="b"), NOTHING, NOTHING], ["failed", "recovered", None]),  # a push went back to what is deployed
        ([NOTHING], [None]),
        (
            [
                run(ends={"a": "deployed", "b": "unreachable"}),
                run(ends={"b": "unreachable"}, plan=("b",)),
                run(ends={"b": "deployed"}, plan=("b",)),
            ],
            ["partial", None, "recovered"],
        ),
        # policy `partial`: the others go on, and the failure is no news
        ([partly("b"), partly("b")], ["failed", None]),
        # a rehearsal alone repairs nothing
        ([run(fails="b"), run()], ["failed", None]),
    ],
)
def test_a_venue_hears_what_is_news(runs: list[Message], expected: list[str | None]) -> None:
    assert heard(*runs) == expected


def test_what_recovered_is_named_with_the_time_since_when() -> None:
    known = notified.after(run(fails="b"), {})
    known = {"b": replace_since(known["b"])}
    news = notified.news(run(ends=DONE), known)
    assert news is not None
    assert news.title == "[infra] b fine again"
    assert "b had failed since 2026-01-02 03:04 UTC" in news.text()
    again = notified.after(run(fails="b", why="not ok 9 - other"), known)
    assert again["b"].since == "2026-01-02T03:04:05Z"


def replace_since(known: Known) -> Known:
    return known.model_copy(update={"since": "2026-01-02T03:04:05Z"})


def test_what_a_run_did_not_check_has_not_recovered() -> None:
    known = notified.after(run(fails="b"), {})
    only_a = report("a")
    only_a.changes = only_a.changes.model_copy(update={"whole": False})
    only_a.outcome["a"] = "deployed"
    news = notified.news(message(only_a), known)
    assert news is not None and not news.recovered
    assert notified.after(news, known) == known


def test_a_machines_venue_hears_of_its_machine_alone() -> None:
    assert notified.news(run(fails="b").about({"a"}), {}) is None
    news = notified.news(run(fails="b").about({"b"}), {})
    assert news is not None and news.title == "[infra] b: roll-out failed"
    mixed = replace(run(ends={"a": "deployed", "b": "unreachable"})).about({"a"})
    news = notified.news(mixed, {})
    assert news is not None and (news.state, news.title) == ("done", "[infra] a deployed")


def test_what_could_not_be_reverted_is_always_news() -> None:
    of = report("a")
    of.failure("a", "roll-out", TotoError("no"))
    of.reverted = [Reverted("a", error="no")]
    assert heard(message(of), message(of)) == ["failed", "failed"]


@pytest.fixture
def repo(tmp_path: Path) -> InfraRepo:
    return InfraRepo(tmp_path)


async def test_what_each_venue_was_notified_of_is_remembered(repo: InfraRepo) -> None:
    assert await notified.read(repo.bare) == {}
    slack, mail = notified.after(run(fails="a"), {}), notified.after(run(fails="b"), {})
    await notified.remember(repo.bare, {"slack": slack})
    await notified.remember(repo.bare, {"mail": mail})
    assert await notified.read(repo.bare) == {"slack": slack, "mail": mail}
    await notified.remember(repo.bare, {"slack": {}})
    assert await notified.read(repo.bare) == {"mail": mail}


async def test_remembering_what_is_known_makes_no_commit(repo: InfraRepo) -> None:
    known = notified.after(run(fails="a"), {})
    await notified.remember(repo.bare, {"slack": known})
    await notified.remember(repo.bare, {"slack": known, "mail": {}})
    assert git("rev-list", "--count", notified.REF, cwd=repo.bare) == "1"


async def test_many_writers_lose_nothing(repo: InfraRepo) -> None:
    commit = repo.commit({"a": "1"})
    known = notified.after(run(fails="a"), {})
    await asyncio.gather(
        *(notified.remember(repo.bare, {f"venue{number}": known}) for number in range(8)),
        *(notified.note(repo.bare, commit, run(fails="a", why=f"not ok {number}")) for number in range(4)),
        *(notified.note(repo.bare, repo.commit({"a": str(number)}), NOTHING) for number in range(4)),
    )
    assert len(await notified.read(repo.bare)) == 8
    assert len(git("notes", "--ref=toto", "list", cwd=repo.bare).splitlines()) == 5


@pytest.mark.parametrize("broken", ["{", "[]", '{"a": 1}', "\0"])
async def test_a_memory_that_cannot_be_read_is_none(repo: InfraRepo, broken: str) -> None:
    (repo.work / "reconcile.json").write_text(broken)
    git("add", "reconcile.json", cwd=repo.work)
    git("commit", "-qm", "x", cwd=repo.work)
    git("push", "-q", "origin", f"HEAD:{notified.REF}", cwd=repo.work)
    assert await notified.read(repo.bare) == {}
    await notified.remember(repo.bare, {"slack": notified.after(run(fails="a"), {})})
    assert "slack" in await notified.read(repo.bare)


async def test_a_commit_carries_its_results_as_notes(repo: InfraRepo) -> None:
    commit = repo.commit({"a": "1"})
    for each in (run(fails="a"), run(fails="a"), run(ends=DONE), run(ends=DONE)):
        await notified.note(repo.bare, commit, each)
    first, second = git("notes", "--ref=toto", "show", commit, cwd=repo.bare).splitlines()
    assert " failed: a: roll-out failed: smoke tests failed: s; a, b reverted <http://toto" in first
    assert " done: a, b deployed <http://toto" in second
    assert "a, b deployed" in git("log", "-1", "--notes=toto", cwd=repo.bare)


async def test_notes_of_people_stay(repo: InfraRepo) -> None:
    commits = [repo.commit({"a": str(number)}) for number in range(3)]
    git("notes", "--ref=toto", "add", "-m", "by hand", commits[0], cwd=repo.bare)
    for commit in commits:
        await notified.note(repo.bare, commit, NOTHING)
    assert git("notes", "--ref=toto", "show", commits[0], cwd=repo.bare).splitlines()[0] == "by hand"


async def test_a_repo_that_cannot_be_written_is_an_error(repo: InfraRepo) -> None:
    with pytest.raises(GitError, match="refs/notes/toto could not be written"):
        await notified.note(repo.bare, "1" * 40, NOTHING)


async def test_the_lock_of_a_git_that_was_killed_is_broken(repo: InfraRepo) -> None:
    commit = repo.commit({"a": "1"})
    lock = repo.bare / "refs/notes/toto.lock"
    lock.parent.mkdir()
    lock.touch()
    os.utime(lock, (1, 1))
    await notified.note(repo.bare, commit, NOTHING)
    assert "nothing to do" in git("notes", "--ref=toto", "show", commit, cwd=repo.bare)


def test_the_link_of_a_message_is_the_runs() -> None:
    assert (NOTHING.link, NOTHING.commit) == (LINK, COMMIT)
