"""The folder of a run: its files, its GC roots, its owner; and cleaning up after runs that died."""

import contextlib
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

from toto.base import files, paths, process


def run_directory(repo: Path, run: str) -> Path:
    """The folder for what one run writes: its tree, GC roots and sandboxes. It is removed when the run is over."""
    return paths.repo_state(repo) / "runs" / run


def last_good_root(repo: Path, host: str) -> Path:
    """The GC root of a host's last good: what it runs by its ledger entry, and what it is reverted to."""
    return paths.repo_state(repo) / "good" / host


def previous_root(repo: Path, host: str) -> Path:
    """The GC root of what a host ran before its last good: the run that made the last good reverts to this."""
    return paths.repo_state(repo) / "previous" / host


def claim(repo: Path, run: str) -> Path:
    """Make a run's directory and write down its owner, by which a later toto sees whether the run has died."""
    directory = run_directory(repo, run)
    if not directory.exists():
        # It gets its name only when its owner is in it: without one it would count as a dead run's.
        fresh = directory.parent.with_name("runs.new") / run
        fresh.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.parent.mkdir(mode=0o700, exist_ok=True)
        files.write(fresh / "owner", process.owner())
        fresh.replace(directory)
    files.write(directory / "owner", process.owner())  # (written whole: `clean_up` may read it now)
    return directory


def clean_up(repo: Path) -> list[Path]:
    """Remove the directories of runs whose process is no longer alive; return their paths."""
    dead = []
    for directory in paths.repo_state(repo).glob("runs/*"):
        with contextlib.suppress(FileNotFoundError):  # a different process removed it
            if not process.lives((directory / "owner").read_text()):
                shutil.rmtree(directory, ignore_errors=True)
                dead.append(directory)
    return dead


@contextlib.asynccontextmanager
async def claimed(repo: Path, run: str) -> AsyncIterator[Path]:
    """A run's directory. It is removed at the end of the run's outermost block."""
    outermost = not run_directory(repo, run).exists()
    directory = claim(repo, run)
    try:
        yield directory
    finally:
        if outermost:
            shutil.rmtree(directory, ignore_errors=True)
