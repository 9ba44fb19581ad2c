"""Removes old files that pile up on toto over the months, by age or size. Nothing that a revert needs is removed."""

import os
import time
from pathlib import Path
from typing import Final

from toto.base import owned, paths
from toto.infra_repo import branch

DAYS: Final = 90
LARGEST_LOG: Final = 20_000_000  # bytes


def prune(home: Path, repos: list[Path], *, days: float = DAYS) -> int:
    """Remove files older than `days` that nobody needs, and shorten long logs; return how many files were removed.

    These are cached results in `home` (Prefect's), test reports and refused pushes.
    """
    before = time.time() - days * 86_400
    gone = _older(home / "results", "**/*", before)
    for repo in repos:
        gone += _older(paths.repo_state(repo) / "junit", "*.xml", before)
        owned.remove(paths.repo_state(repo) / "tree")  # where older versions exported commits, one at a time
        (paths.repo_state(repo) / "export.lock").unlink(missing_ok=True)
        gone += _older(repo / "toto" / "spool", "*.refused", before)
        gone += _older(repo, branch.CRASH_REPORTS, time.time() - 86_400)  # from writers that were killed
    for log in (home / "logs").glob("*.log"):
        _shorten(log)
    return gone


def _older(folder: Path, pattern: str, before: float) -> int:
    old = [path for path in folder.glob(pattern) if path.is_file() and path.lstat().st_mtime < before]
    for path in old:
        path.unlink(missing_ok=True)
    return len(old)


def _shorten(log: Path) -> None:
    """Keep the last quarter of a log that is too large. Its writers append, so they continue at the new end."""
    if log.stat().st_size <= LARGEST_LOG:
        return
    with log.open("r+b") as file:
        file.seek(-LARGEST_LOG // 4, os.SEEK_END)
        file.readline()
        kept = file.read()
        file.seek(0)
        file.write(kept)
        file.truncate()
