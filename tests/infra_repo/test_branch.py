"""Writing to toto's own branches on real git: each change is one commit, and no change is lost."""

import asyncio
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.repos import InfraRepo, git
from toto.infra_repo import branch

REF = "refs/toto/test"


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    return InfraRepo(tmp_path).bare


def commits(repo: Path) -> list[str]:
    return git("log", "--format=%s", REF, cwd=repo).splitlines()


async def test_several_files_change_in_one_commit(repo: Path) -> None:
    await branch.change(repo, REF, ["a", "b/ü 1"], lambda old: {"a": "1\n", "b/ü 1": "ü"}, "first")
    seen: dict[str, str] = {}

    def second(old: Mapping[str, str]) -> dict[str, str | None]:
        seen.update(old)
        return {"a": None, "b/ü 1": "ü", "c": "3"}

    await branch.change(repo, REF, ["a", "b/ü 1", "c"], second, "second")
    assert seen == {"a": "1\n", "b/ü 1": "ü"}
    assert git("-c", "core.quotePath=false", "ls-tree", "-r", "--name-only", REF, cwd=repo).splitlines() == [
        "b/ü 1",
        "c",
    ]
    assert commits(repo) == ["second", "first"]


async def test_no_change_makes_no_commit_and_an_error_writes_nothing(repo: Path) -> None:
    await branch.change(repo, REF, ["a"], lambda old: {"a": "1"}, "first")
    await branch.change(repo, REF, ["a", "b"], lambda old: {**old, "b": None}, "the same")
    with pytest.raises(ZeroDivisionError):
        await branch.change(repo, REF, ["a"], lambda old: {"a": str(1 // 0)}, "never")
    assert commits(repo) == ["first"]


async def test_the_second_writer_decides_again(repo: Path) -> None:
    def one_more(old: Mapping[str, str]) -> dict[str, str]:
        return {"count": str(int(old.get("count", "0")) + 1)}

    await asyncio.gather(*(branch.change(repo, REF, ["count"], one_more, str(number)) for number in range(8)))
    assert git("show", f"{REF}:count", cwd=repo).strip() == "8"
    assert len(commits(repo)) == 8


async def test_what_git_refuses_is_reported_at_once_and_leaves_nothing(repo: Path) -> None:
    with pytest.raises(branch.NotWritten, match=r"(?s)refs/toto/test could not be written: fatal: .*df -h") as caught:
        await branch.change(repo, REF, ["a"], lambda old: {"a\nnonsense": "1"}, "no path")
    assert "crash report" not in caught.value.why
    assert not list(repo.glob(branch.CRASH_REPORTS))
    assert not (repo / REF).exists()
