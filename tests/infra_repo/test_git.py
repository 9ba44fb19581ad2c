"""Reading and exporting an infra repo."""

import asyncio
import os
import subprocess
import time
from pathlib import Path

import pytest

from tests.repos import InfraRepo, git
from toto.base import paths
from toto.base.errors import InputError
from toto.infra_repo import git as toto_git


@pytest.fixture
def repo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> InfraRepo:
    monkeypatch.setenv("TOTO_STATE", str(tmp_path / "toto"))
    return InfraRepo(tmp_path / "repo")


async def export(repo: Path, commit: str, folder: Path) -> Path:
    await toto_git.checkout(repo, commit, folder / "tree")
    return folder / "tree"


async def test_an_export_has_the_files_and_no_git(repo: InfraRepo, tmp_path: Path) -> None:
    commit = repo.commit({"hosts/web 1 ü.nix": "{ }\n", "tests/a": "#!/bin/sh\n", "empty": ""})
    tree = await export(repo.bare, commit, tmp_path)
    assert (tree / "hosts/web 1 ü.nix").read_text() == "{ }\n"
    assert os.access(tree / "tests/a", os.X_OK)
    assert not (tree / ".git").exists()


async def test_an_export_has_the_files_of_its_commit_alone(repo: InfraRepo, tmp_path: Path) -> None:
    first, second = repo.commit({"a": "1"}), repo.commit({"a": None, "b": "2"})
    await export(repo.bare, first, tmp_path)
    assert [path.name for path in (await export(repo.bare, second, tmp_path)).iterdir()] == ["b"]


async def test_the_revision_never_reaches_the_tree(repo: InfraRepo, tmp_path: Path) -> None:
    commit = repo.commit({".gitattributes": "version export-subst\n", "version": "$Format:%H$\n"})
    tree = await export(repo.bare, commit, tmp_path)
    assert commit not in (tree / "version").read_text()


@pytest.mark.parametrize("target", ["/etc/passwd", "../../outside", "folder/../../../x"])
async def test_a_link_out_of_the_tree_is_refused_by_name(repo: InfraRepo, tmp_path: Path, target: str) -> None:
    (repo.work / "hosts").mkdir()
    (repo.work / "hosts" / "web1.nix").symlink_to(target)
    commit = repo.commit({})
    with pytest.raises(InputError, match=r"hosts/web1\.nix: is a link that leads out"):
        await export(repo.bare, commit, tmp_path)


async def test_a_link_into_the_store_is_left_out(repo: InfraRepo, tmp_path: Path) -> None:
    """What it names may be built after this look at it, and be a link to any file of this machine."""
    outside = tmp_path / "secret"
    outside.write_text("secret")
    there = next(each for each in Path("/nix/store").iterdir() if each.is_dir())
    missing = "/nix/store/00000000000000000000000000000000-built-later"
    for name, target in (("result", there), ("later", missing), ("by/way", "../later"), ("further", f"{missing}/x")):
        (repo.work / name).parent.mkdir(exist_ok=True)
        (repo.work / name).symlink_to(target)
    commit = repo.commit({"a": "1"})
    tree = await export(repo.bare, commit, tmp_path)
    assert [each.name for each in tree.rglob("*") if not each.is_dir()] == ["a"]
    (repo.work / "up").symlink_to(f"{missing}/../../../{outside}")
    commit = repo.commit({})
    with pytest.raises(InputError, match="up: is a link that leads out"):
        await export(repo.bare, commit, tmp_path)


def stored(repo: Path, stream: str) -> str:
    """A commit that git fast-import makes of a stream; its hash."""
    head = "blob\nmark :1\ndata 1\nx\ncommit refs/heads/stored\ncommitter a <a@b> 0 +0000\ndata 1\nm\n"
    subprocess.run(["git", "fast-import", "--quiet"], input=f"{head}{stream}\n".encode(), cwd=repo, check=True)
    return git("rev-parse", "refs/heads/stored", cwd=repo)


async def test_a_commit_that_is_too_much_for_this_machine_is_refused_before_it_is_written(
    repo: InfraRepo, tmp_path: Path
) -> None:
    fine = repo.commit({"a": "1"})
    deep = stored(repo.bare, f"M 100644 :1 {'a/' * 1900}a")
    many = git("hash-object", "-w", "a", cwd=repo.work)
    git("push", "origin", "HEAD:refs/heads/x", cwd=repo.work)
    for _ in range(10):  # 10 in each of 10, and so on: 10,000,000,000 files
        kind = "blob" if _ == 0 else "tree"
        lines = "".join(f"{'100644' if _ == 0 else '040000'} {kind} {many}\t{number}\n" for number in range(10))
        many = subprocess.run(
            ["git", "mktree"], input=lines, cwd=repo.bare, check=True, capture_output=True, text=True
        ).stdout.strip()
    many = git("-c", "user.name=a", "-c", "user.email=a@b", "commit-tree", "-m", "many", many, cwd=repo.bare)
    (paths.state_home() / "server.toml").parent.mkdir(parents=True, exist_ok=True)
    (paths.state_home() / "server.toml").write_text("[push]\nunpacked = 1000000\n")
    large = repo.commit({name: "x" * 400_000 for name in "bcd"})
    for commit, why in ((deep, "nested more than 64"), (many, "more than 100000 files"), (large, "1000000 bytes")):
        with pytest.raises(InputError, match=why):
            await toto_git.checkout(repo.bare, commit, tmp_path / "tree")
        await toto_git.checkout(repo.bare, fine, tmp_path / "tree")
        assert [each.name for each in (tmp_path / "tree").iterdir()] == ["a"]


async def test_no_filter_of_this_machines_user_runs(
    repo: InfraRepo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".gitconfig").write_text(f'[filter "lfs"]\nsmudge = touch {tmp_path}/ran; cat\n')
    commit = repo.commit({".gitattributes": "* filter=lfs\n", "a": "1"})
    await toto_git.checkout(repo.bare, commit, tmp_path / "tree")
    assert (tmp_path / "tree/a").read_text() == "1" and not (tmp_path / "ran").exists()


async def test_a_link_within_the_tree_is_fine(repo: InfraRepo, tmp_path: Path) -> None:
    (repo.work / "b").symlink_to("a")
    commit = repo.commit({"a": "1"})
    tree = await export(repo.bare, commit, tmp_path)
    assert (tree / "b").read_text() == "1"


async def test_a_hooks_environment_does_not_change_the_repo(
    repo: InfraRepo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = repo.commit({"a": "1"})
    other = InfraRepo(tmp_path / "other")
    monkeypatch.setenv("GIT_DIR", str(other.bare))
    monkeypatch.setenv("GIT_INDEX_FILE", str(tmp_path / "nowhere"))
    monkeypatch.setenv("GIT_QUARANTINE_PATH", str(tmp_path))
    assert toto_git.resolve(repo.bare, "main") == commit
    tree = await export(repo.bare, commit, tmp_path)
    assert (tree / "a").read_text() == "1"


@pytest.mark.parametrize("revision", ["nope", "", "--output=/tmp/x", "main\nmain", "f" * 40])
def test_what_names_no_commit_is_refused_in_plain_words(repo: InfraRepo, revision: str) -> None:
    repo.commit({"a": "1"})
    with pytest.raises(toto_git.NoSuchCommit):
        toto_git.resolve(repo.bare, revision)


def test_what_is_no_repo_is_refused_in_plain_words(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a git repository"):
        toto_git.resolve(tmp_path, "main")


def test_a_branch_comes_before_a_tag_of_its_name_and_nothing_is_taken_for_head(repo: InfraRepo) -> None:
    first, second = repo.commit({"a": "1"}), repo.commit({"a": "2"})
    for ref in ("tags/main", "heads/HEAD", "tags/HEAD", f"heads/{second[:8]}", f"heads/{second}", "tags/v1"):
        git("update-ref", f"refs/{ref}", first, cwd=repo.bare)
    for revision in ("main", "HEAD", second, "refs/heads/main"):
        assert toto_git.resolve(repo.bare, revision) == second
    for revision in ("v1", "main~1", "HEAD~1", "refs/tags/main", first[:8]):
        assert toto_git.resolve(repo.bare, revision) == first


async def test_whatever_the_branch_points_to_now_supersedes(repo: InfraRepo) -> None:
    first, second = repo.commit({"a": "1"}), repo.commit({"a": "2"})
    assert await toto_git.superseded_by(repo.bare, first) == second
    assert await toto_git.superseded_by(repo.bare, second) is None
    git("update-ref", "refs/heads/main", first, cwd=repo.bare)  # a force push removed the second
    assert await toto_git.superseded_by(repo.bare, second) == first
    git("update-ref", "refs/toto/wanted", second, cwd=repo.bare)  # by the hook: `first` is only planned
    assert await toto_git.superseded_by(repo.bare, second) is None
    assert await toto_git.superseded_by(repo.bare, first) == second


async def test_the_lock_of_a_dead_git_is_removed_and_that_of_a_living_one_waited_for(repo: InfraRepo) -> None:
    first, second = repo.commit({"a": "1"}), repo.commit({"a": "2"})
    await toto_git.mark(repo.bare, "toto/last-good", first)
    lock = repo.bare / "refs/tags/toto/last-good.lock"
    lock.touch()
    os.utime(lock, (0, time.time() - 60))
    await toto_git.mark(repo.bare, "toto/last-good", second)
    assert toto_git.resolve(repo.bare, "toto/last-good") == second
    lock.touch()
    moving = asyncio.create_task(toto_git.mark(repo.bare, "toto/last-good", first))
    await asyncio.sleep(0.5)
    assert not moving.done()
    lock.unlink()
    await moving
    assert toto_git.resolve(repo.bare, "toto/last-good") == first
