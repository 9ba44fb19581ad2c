"""Folders that cells write to: they belong to a cell's user, and toto reads them as a stranger's.

What a cell has written may be anything: a link to a file of toto's, a pipe that nobody writes to, a file without end.
"""

import contextlib
import fcntl
import itertools
import os
import shutil
import stat
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from toto.base import files
from toto.cell.cell import fresh_user

_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def user_of(folder: Path) -> int | None:
    """The cells' user whose a folder is that `shared` made; None unless toto is root."""
    return folder.lstat().st_uid if os.geteuid() == 0 else None


def shared(folder: Path) -> int | None:
    """Make a folder that one cells' user has for good, when it is missing; return that user. None unless root."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if (user := fresh_user()) is None:
        return None
    with files.lock(folder.with_name(f"{folder.name}.user")) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.lstat().st_uid == os.geteuid():
            own(folder, user)
        return folder.lstat().st_uid


def own(folder: Path, user: int | None, group: int | None = None) -> None:
    """Make a folder and all that is in it a user's, such as a cell's, without following a link; the folder itself last.

    `group` is the user's, by default the one with the same number. Nothing when `user` is None.
    """
    if user is None:
        return
    group = user if group is None else group
    for _, folders, names, opened in os.fwalk(folder, topdown=False):
        for name in (*folders, *names):
            with contextlib.suppress(FileNotFoundError):
                os.chown(name, user, group, dir_fd=opened, follow_symlinks=False)
    os.chown(folder, user, group, follow_symlinks=False)


def read_regular(folder: Path, *names: str, most: int) -> bytes | None:
    """What is in the file that `names` lead to, from a folder that is toto's, one name a step; no link is followed.

    None when it is not there, is no regular file, or has more than `most` bytes.
    """
    try:
        with _opened(folder, names, _FILE) as file:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                return None
            with open(file, "rb", closefd=False) as source:
                data = source.read(most + 1)
    except OSError:
        return None
    return data if len(data) <= most else None


def listed(folder: Path, *names: str, most: int) -> list[str]:
    """The names in the folder that `names` lead to in the same way, `most` of them; none when it is not there."""
    try:
        with _opened(folder, names, _FOLDER) as place, os.scandir(place) as found:
            return [each.name for each in itertools.islice(found, most)]
    except OSError:
        return []


def modified(folder: Path, *names: str) -> float:
    """When what `names` lead to in the same way was changed last, in seconds since 1970; 0 when it is not there.

    Whoever has written it may have set that: it is not in the future.
    """
    try:
        with _opened(folder, names, _FILE) as file:
            return max(0.0, min(os.fstat(file).st_mtime, time.time()))
    except OSError:
        return 0


def remove(folder: Path, *names: str) -> None:
    """Remove what `names` lead to in the same way, with all that is in it, as far as that can be removed."""
    *folders, last = names
    with contextlib.suppress(OSError), _opened(folder, folders, _FOLDER) as place:
        with contextlib.suppress(IsADirectoryError):
            os.unlink(last, dir_fd=place)  # (a link, or a file; `rmtree` would wait at a pipe for who writes to it)
            return
        shutil.rmtree(last, ignore_errors=True, dir_fd=place)


@contextlib.contextmanager
def _opened(folder: Path, names: Sequence[str], flags: int) -> Iterator[int]:
    """What `names` lead to from `folder`, opened with `flags`. Raises OSError."""
    *folders, last = names
    opened: list[int] = []
    try:
        opened.append(os.open(folder, _FOLDER))
        for name in folders:
            opened.append(os.open(name, _FOLDER, dir_fd=opened[-1]))
        opened.append(os.open(last, flags, dir_fd=opened[-1]))
        yield opened[-1]
    finally:
        for each in opened:
            os.close(each)
