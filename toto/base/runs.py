"""The folder of a run: what it writes, its GC roots, who owns it, and what a dead run left in it."""

import contextlib
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

from toto.base import files, paths, process


def run_directory(repo: Path, run: str) -> Path:
    """What one run writes: its tree, its roots, its sandboxes. Removed when the run is over."""
    return paths.repo_state(repo) / "runs" / run


def last_good_root(repo: Path, host: str) -> Path:
    """The GC root of what a host runs by its ledger entry, and is gone back to."""
    return paths.repo_state(repo) / "good" / host


def previous_root(repo: Path, host: str) -> Path:
    """The GC root of what a host ran before that, to which a revert of the same run goes back."""
    return paths.repo_state(repo) / "previous" / host


def claim(repo: Path, run: str) -> Path:
    """Make a run's directory and say whose it is, so that a later toto can tell when its run has died."""
    directory = run_directory(repo, run)
    if not directory.exists():
        # Named only once it says whose it is: without an owner it would be taken for a dead run's.
        fresh = directory.parent.with_name("runs.new") / run
        fresh.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.parent.mkdir(mode=0o700, exist_ok=True)
        files.write(fresh / "owner", process.owner())
        fresh.replace(directory)
    files.write(directory / "owner", process.owner())  # (a sweep that read half of it would take the run for dead)
    return directory


def sweep(repo: Path) -> list[Path]:
    """Remove the directories of runs whose process is no longer alive; returns them."""
    dead = []
    for directory in paths.repo_state(repo).glob("runs/*"):
        with contextlib.suppress(FileNotFoundError):  # another sweep was first
            if not process.lives((directory / "owner").read_text()):
                shutil.rmtree(directory, ignore_errors=True)
                dead.append(directory)
    return dead


@contextlib.asynccontextmanager
async def claimed(repo: Path, run: str) -> AsyncIterator[Path]:
    """A run's directory for as long as the outermost such block of the run lasts."""
    mine = not run_directory(repo, run).exists()
    directory = claim(repo, run)
    try:
        yield directory
    finally:
        if mine:
            shutil.rmtree(directory, ignore_errors=True)
