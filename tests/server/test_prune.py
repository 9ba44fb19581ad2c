"""What gathers over the months goes; what is young, and what is still written to, stays."""

import os
import time
from pathlib import Path

import pytest

from toto.base import paths, process
from toto.nix import commands as nix
from toto.server import prune


def test_what_is_old_goes_and_what_is_young_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOTO_STATE", str(tmp_path / "state"))
    repo, home = tmp_path / "infra.git", tmp_path / "prefect"
    state = paths.repo_state(repo)
    kept: list[Path] = []
    old: list[Path] = []
    for folder, name in (
        (home / "results", "toto-rehearsal-v1-x"),
        (state / "junit", "web1.smoke.xml"),
        (repo / "toto" / "spool", "1-abc.json.refused"),
    ):
        folder.mkdir(parents=True)
        for group, prefix in ((kept, "1"), (old, "2")):
            file = folder / f"{prefix}{name}"
            file.write_text("x")
            group.append(file)
    waiting = repo / "toto" / "spool" / "1-abc.json"
    root = state / "good" / "web1"
    root.parent.mkdir()
    for file in (waiting, root):
        file.write_text("x")
    for file in (*old, waiting, root):
        os.utime(file, (0, time.time() - 91 * 86_400))
    assert prune.prune(home, [repo]) == 3
    assert all(file.exists() for file in (*kept, waiting, root)) and not any(file.exists() for file in old)


def test_what_an_older_version_exported_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOTO_STATE", str(tmp_path / "state"))
    state = paths.repo_state(tmp_path / "infra.git")
    (state / "tree" / "hosts").mkdir(parents=True)
    (state / "tree" / "hosts" / "web1.nix").write_text("{ }")
    (state / "export.lock").touch()
    prune.prune(tmp_path, [tmp_path / "infra.git"])
    assert list(state.iterdir()) == []


def test_a_long_log_keeps_its_end_and_its_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prune, "LARGEST_LOG", 4000)
    monkeypatch.setenv("TOTO_STATE", str(tmp_path / "state"))
    (tmp_path / "logs").mkdir()
    log = tmp_path / "logs" / "worker.log"
    with log.open("ab", buffering=0) as writer:
        writer.write(b"".join(b"line %d\n" % number for number in range(1000)))
        prune.prune(tmp_path, [])
        writer.write(b"the next\n")
    lines = log.read_text().splitlines()
    assert log.stat().st_size < 1100
    assert lines[0].startswith("line ") and lines[-2:] == ["line 999", "the next"]


async def test_garbage_goes_until_there_is_room_and_what_is_needed_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a store of its own, and real nix."""
    env = {**nix.environment(), "NIX_REMOTE": f"local?root={tmp_path / 'store'}", "NIX_CONFIG": "build-users-group ="}
    monkeypatch.setattr(nix, "environment", lambda: env)
    added = []
    for name in ("needed", "garbage"):
        file = tmp_path / name
        file.write_text(name)
        added.append((await process.run(["nix-store", "--add", file], env=env)).stdout.strip())
    await nix.add_gc_root(added[0], tmp_path / "root")
    there = [tmp_path / "store" / path[1:] for path in added]
    assert await nix.make_room(0) > 0 and all(map(Path.exists, there)), "there is room"
    assert await nix.make_room(10**18) > 0
    assert [each.exists() for each in there] == [True, False]
