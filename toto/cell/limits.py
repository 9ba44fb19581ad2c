"""Limits for all that runs in a cell: memory, processes, files, disk.

The kernel holds each process to its own limits (setrlimit), and the whole cell to memory and processes where toto may
make a control group (version 1 or 2). Where it may not, and for the disk, toto adds up what the cell uses a few times a
second, and ends it when it is too much.
"""

import asyncio
import contextlib
import os
import signal
import stat
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

from toto.base import process

if TYPE_CHECKING:
    from toto.base.process import Running

_DEEPEST: Final = 100  # nested folders
_BLOCK: Final = 4096
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")
_CGROUPS: Final = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Limits:
    """What a cell may use: bytes of memory, processes and threads, open files a process, bytes of one file, and bytes
    of all that it has written to its folders on the disk; and how many seconds toto lets pass between two looks."""

    memory: int = 4_000_000_000
    processes: int = 1024
    files: int = 4096
    file_size: int = 20_000_000_000
    disk: int = 20_000_000_000
    every: float = 0.25

    @property
    def prefix(self) -> list[str]:
        """The words that hold a command in a cell to the limits of a process; each child inherits them."""
        return [
            *("prlimit", f"--nproc={self.processes}", f"--nofile={self.files}", f"--fsize={self.file_size}"),
            *("--core=0", "--"),
        ]


@asynccontextmanager
async def limited(running: "Running", limits: Limits, folders: Sequence[Path]) -> AsyncIterator[None]:
    """Hold a process, and all that it starts, to the limits. `folders` are those that it may write to.

    What was exceeded is in `running.exceeded`; the process has been ended then.
    """
    group = await asyncio.to_thread(_Group.make, limits)
    watching = asyncio.create_task(_watch(running, limits, folders, group))
    try:
        yield
    finally:
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching
        if group is not None:
            if running.exceeded is None and group.out_of_memory():
                running.exceeded = f"{limits.memory / 1e6:.0f} MB of memory"
            group.remove()


async def _watch(running: "Running", limits: Limits, folders: Sequence[Path], group: "_Group | None") -> None:
    if group is not None:
        group.add(running.pid)
    took = 0.0
    while running.exceeded is None:
        await asyncio.sleep(max(limits.every, 4 * took))
        began = time.monotonic()
        try:
            running.exceeded = await asyncio.to_thread(_exceeded, running, limits, folders, group)
        except OSError:  # what is looked at is just ending
            continue
        took = time.monotonic() - began
    process.kill_tree(running.pid)


def _exceeded(running: "Running", limits: Limits, folders: Sequence[Path], group: "_Group | None") -> str | None:
    if group is not None:
        running.memory = max(running.memory, group.memory())
        if group.out_of_memory():
            return f"{limits.memory / 1e6:.0f} MB of memory"
    else:
        tree = process.descendants(running.pid)
        if len(tree) > limits.processes + 8:  # (bwrap's own)
            return f"{limits.processes} processes"
        used = sum(_resident(each) for each in tree)
        running.memory = max(running.memory, used)
        if used > limits.memory:
            return f"{limits.memory / 1e6:.0f} MB of memory"
    try:
        if sum(map(_used, folders)) > limits.disk:
            return f"{limits.disk / 1e6:.0f} MB of disk"
    except _TooDeep:
        return f"{_DEEPEST} nested folders"
    return None


def _resident(pid: int) -> int:
    """The bytes of memory that a process has for itself."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        _, resident, shared, *_ = Path(f"/proc/{pid}/statm").read_text().split()
        return (int(resident) - int(shared)) * _PAGE
    return 0


class _TooDeep(Exception):
    """Folders are nested deeper than any program needs."""


def _used(folder: Path) -> int:
    """The bytes of disk that a folder takes. Each entry counts as a block at least, for a disk has only so many.

    What vanishes meanwhile does not count, and links are not followed. Raises `_TooDeep`.
    """
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        return _used_in(opened, _DEEPEST)
    finally:
        os.close(opened)


def _used_in(opened: int, depth: int) -> int:
    if depth == 0:
        raise _TooDeep
    total = 0
    with os.scandir(opened) as entries:
        for each in entries:
            with contextlib.suppress(OSError):
                found = os.stat(each.name, dir_fd=opened, follow_symlinks=False)
                total += max(found.st_blocks * 512, _BLOCK)
                if stat.S_ISDIR(found.st_mode):
                    inner = os.open(each.name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=opened)
                    try:
                        total += _used_in(inner, depth - 1)
                    finally:
                        os.close(inner)
    return total


class _Group:
    """A control group for one cell: one folder (version 2), or one of each controller (version 1)."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = folders

    @classmethod
    def make(cls, limits: Limits) -> "_Group | None":
        """A new group with the limits, or None where toto may not make one."""
        parents = _parents()
        name = f"toto-{process.owner()}-{os.urandom(4).hex()}"
        group = cls([parent / name for parent in parents])
        try:
            for folder in group.folders:
                folder.mkdir()
            for file, value in (
                ("memory.max", limits.memory),
                ("memory.swap.max", 0),
                ("memory.limit_in_bytes", limits.memory),
                ("pids.max", limits.processes + 8),
            ):
                for folder in group.folders:
                    if (folder / file).exists():
                        (folder / file).write_text(str(value))
        except OSError:
            group.remove()
            return None
        return group if group.folders else None

    def add(self, pid: int) -> None:
        """Move a process, and what it has started so far, into the group."""
        seen: set[int] = set()
        while fresh := {pid, *process.descendants(pid)} - seen:
            for each in fresh:
                for folder in self.folders:
                    with contextlib.suppress(OSError):  # (it has just ended)
                        (folder / "cgroup.procs").write_text(str(each))
            seen |= fresh

    def out_of_memory(self) -> bool:
        """Whether the kernel has ended a process of the group because there was no memory left in it."""
        for folder in self.folders:
            for file in ("memory.events", "memory.oom_control"):
                with contextlib.suppress(OSError):
                    counts = dict(line.split() for line in (folder / file).read_text().splitlines())
                    if int(counts.get("oom_kill", 0)):
                        return True
        return False

    def memory(self) -> int:
        """The bytes of memory that the processes of the group have for themselves now."""
        for folder in self.folders:
            with contextlib.suppress(OSError, ValueError):
                found = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                return int(found.get("anon") or found.get("total_rss") or 0)
        return 0

    def remove(self) -> None:
        """Remove the group. Its processes have ended."""
        for folder in self.folders:
            with contextlib.suppress(OSError):
                for each in (folder / "cgroup.procs").read_text().split():
                    os.kill(int(each), signal.SIGKILL)
            for _ in range(50):
                try:
                    folder.rmdir()
                    break
                except FileNotFoundError:
                    break
                except OSError:
                    time.sleep(0.01)


@cache
def _parents() -> list[Path]:
    """The control groups in which toto may make one of its own for memory and processes; empty where it may not."""
    if (_CGROUPS / "cgroup.controllers").exists():
        here = _CGROUPS / _own_group().lstrip("/")
        for parent in (here, *here.parents):
            with contextlib.suppress(OSError):
                enabled = (parent / "cgroup.subtree_control").read_text().split()
                if {"memory", "pids"} <= set(enabled) and os.access(parent / "cgroup.procs", os.W_OK):
                    return [parent]
            if parent == _CGROUPS:
                break
        return []
    parents = [_CGROUPS / "memory", _CGROUPS / "pids"]
    return parents if all(os.access(each / "cgroup.procs", os.W_OK) for each in parents) else []


def _own_group() -> str:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        if line.startswith("0::"):
            return line.removeprefix("0::")
    return "/"


def clean_up() -> None:
    """Remove the control groups of cells whose toto is dead."""
    for parent in _parents():
        for folder in parent.glob("toto-*-*"):
            if not process.lives(folder.name.removeprefix("toto-").rpartition("-")[0]):
                _Group([folder]).remove()
