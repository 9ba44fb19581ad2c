"""What gathers on toto over the months, and is let go by age or size. No machine's way back is touched."""

import os
import time
from pathlib import Path
from typing import Final

from toto.base import paths
from toto.infra_repo import branch

DAYS: Final = 90
LARGEST_LOG: Final = 20_000_000  # bytes


def prune(home: Path, repos: list[Path], *, days: float = DAYS) -> int:
    """Remove what is older than `days` and nobody needs: cached results below `home` (Prefect's), reports of tests,
    refused pushes; shorten long logs. Returns how many files went."""
    before = time.time() - days * 86_400
    gone = _older(home / "results", "**/*", before)
    for repo in repos:
        gone += _older(paths.repo_state(repo) / "junit", "*.xml", before)
        gone += _older(repo / "toto" / "spool", "*.refused", before)
        gone += _older(repo, branch.CRASH_REPORTS, time.time() - 86_400)  # of a writer that was killed meanwhile
    for log in (home / "logs").glob("*.log"):
        _shorten(log)
    return gone


def _older(folder: Path, pattern: str, before: float) -> int:
    old = [path for path in folder.glob(pattern) if path.is_file() and path.lstat().st_mtime < before]
    for path in old:
        path.unlink(missing_ok=True)
    return len(old)


def _shorten(log: Path) -> None:
    """Keep the last quarter of a log that is too large. Its writers append, so they go on where it ends now."""
    if log.stat().st_size <= LARGEST_LOG:
        return
    with log.open("r+b") as file:
        file.seek(-LARGEST_LOG // 4, os.SEEK_END)
        file.readline()
        kept = file.read()
        file.seek(0)
        file.write(kept)
        file.truncate()
