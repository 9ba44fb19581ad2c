"""Temporary folders that name the process that owns them, so that a later toto removes what a killed one left."""

import contextlib
import logging
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from toto.base import process

log = logging.getLogger(__name__)

_DEEPEST: Final = 200  # nested folders
_NAME: Final = re.compile(r"toto-(\d+\.\d+)-")


@contextlib.contextmanager
def folder(what: str, place: Path) -> Iterator[Path]:
    """A new folder in `place` that only this user may enter, removed at the end of the block. Raises OSError."""
    # The name has the owner in it from the start.
    made = Path(tempfile.mkdtemp(prefix=f"toto-{process.owner()}-{what[:40]}-", dir=place)).absolute()
    try:
        yield made
    finally:
        remove(made)


def sweep(place: Path) -> list[Path]:
    """Remove the folders in `place` whose owners are no longer alive; return their paths."""
    named = [(path, _NAME.match(path.name)) for path in place.glob("toto-*-*")]
    dead = [path for path, name in named if name is not None and not process.lives(name[1])]
    return [path for path in dead if remove(path)]


def remove(top: Path) -> bool:
    """Remove a folder, whatever is in it: folders that nobody may enter, or that are nested too deep for recursion.

    Nothing that runs may still write there. Links are removed, not followed. Whether it is gone.
    """
    try:
        opened = os.open(top, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            while _empty(opened):
                pass
        finally:
            os.close(opened)
        top.rmdir()
    except FileNotFoundError:
        return True
    except OSError as error:
        log.warning("%s could not be removed: %s", top, error.strerror)
        return False
    return True


def _empty(top: int) -> bool:
    """Empty an open folder, but move what is nested deep to its top; whether there was such. Raises OSError."""
    moved = False
    stack = [(top, "", _entries(top))]
    try:
        while stack:
            opened, name, entries = stack[-1]
            if not entries:
                stack.pop()
                if stack:
                    os.close(opened)
                    os.rmdir(name, dir_fd=stack[-1][0])
                continue
            each = entries.pop()
            if not stat.S_ISDIR(os.stat(each, dir_fd=opened, follow_symlinks=False).st_mode):
                os.unlink(each, dir_fd=opened)
            elif len(stack) > _DEEPEST:
                moved = True
                os.rename(each, f".{os.urandom(16).hex()}", src_dir_fd=opened, dst_dir_fd=top)
            else:
                os.chmod(each, 0o700, dir_fd=opened)
                inner = os.open(each, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=opened)
                stack.append((inner, each, _entries(inner)))
    finally:
        for opened, *_ in stack[1:]:
            os.close(opened)
    return moved


def _entries(opened: int) -> list[str]:
    with os.scandir(opened) as entries:
        return [each.name for each in entries]
