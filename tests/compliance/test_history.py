"""What is kept of compliance checks, on real repos."""

import asyncio
import json
from pathlib import Path

from tests.repos import InfraRepo, git
from toto.compliance import history
from toto.compliance.results import Control, Outcome, failure_lines
from toto.infra_repo import branch


def control(name: str, outcome: Outcome = Outcome.PASSED, impact: float = 0.5) -> Control:
    return Control(check="inspec/base", id=name, outcome=outcome, impact=impact, message="because\nof this")


async def test_a_check_is_recorded_and_what_is_different_is_told(tmp_path: Path) -> None:
    repo = InfraRepo(tmp_path).bare
    assert history.read(repo) == history.Known()
    bad, broken = control("a", Outcome.FAILED, 0.9), control("b", Outcome.ERROR)
    assert await history.record(repo, "web.1", [control("a"), control("b")], "c" * 40, "run-1") == ""
    assert await history.record(repo, "web.1", [bad, control("b")], "c" * 40, "run-2") == "1 fails since"
    assert await history.record(repo, "web.1", [control("a"), broken], "d" * 40, "run-3") == (
        "1 fails since, 1 is mended"
    )
    known = history.read(repo)
    its = known.machines["web.1"]
    assert its.controls == (control("a"), broken)
    assert [(each.run, each.worst) for each in its.trend] == [("run-1", 0), ("run-2", 0.9), ("run-3", 0.5)]
    assert its.trend[1].controls == {Outcome.FAILED: 1, Outcome.PASSED: 1}
    assert git("log", "--format=%s", history.REF, cwd=repo).splitlines() == [
        "web.1: 1 error, 1 passed",
        "web.1: 1 failed, 1 passed",
        "web.1: 2 passed",
    ]
    assert history.read(repo, known) is known


async def test_many_at_once_are_all_recorded_and_who_is_gone_is_forgotten(tmp_path: Path) -> None:
    repo = InfraRepo(tmp_path).bare
    names = [f"web{number}" for number in range(6)]
    await asyncio.gather(*(history.record(repo, name, [control("a")], "c" * 40, "run") for name in names))
    assert set(history.read(repo).machines) == set(names)
    await history.forget_all_but(repo, ["web2", "another"])
    assert set(history.read(repo).machines) == {"web2"}


async def test_a_file_that_cannot_be_read_hides_no_other_and_begins_anew(tmp_path: Path) -> None:
    repo = InfraRepo(tmp_path).bare
    for name in ("web1", "web2"):
        await history.record(repo, name, [control("a")], "c" * 40, "run")
    path = "host/web1.json"
    await branch.change(repo, history.REF, [path], lambda _: {path: "{"}, "damaged")
    assert set(history.read(repo).machines) == {"web2"}
    await history.record(repo, "web1", [control("a", Outcome.FAILED)], "c" * 40, "run")
    assert len(history.read(repo).machines["web1"].trend) == 1


async def test_the_trend_has_an_end(tmp_path: Path) -> None:
    repo = InfraRepo(tmp_path).bare
    await history.record(repo, "web1", [control("a")], "c" * 40, "run")
    path = "host/web1.json"
    one = json.loads(git("show", f"{history.REF}:{path}", cwd=repo))
    many = {**one, "trend": one["trend"] * history.KEPT}
    await branch.change(repo, history.REF, [path], lambda _: {path: json.dumps(many)}, "many")
    await history.record(repo, "web1", [control("a")], "d" * 40, "run")
    trend = history.read(repo).machines["web1"].trend
    assert len(trend) == history.KEPT and trend[-1].commit == "d" * 40


def test_what_failed_is_told_worst_first_and_within_bounds() -> None:
    lines = failure_lines([control(f"c{number}", Outcome.FAILED, number / 100) for number in range(100)])
    assert lines[:3] == ["not ok inspec/base: c99, impact 1.0", "    because", "    of this"]
    assert len(lines) == 40 and lines[-1] == "… and 261 more lines"
