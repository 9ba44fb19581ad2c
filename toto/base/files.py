"""Writing a small file in one step: for secrets, and for files that a different process may read at any moment.

This module imports very little, because every login to the git host loads it.
"""

import os
from pathlib import Path
from typing import TextIO


def write(file: Path, text: str, mode: int = 0o600) -> Path:
    """Replace `file` with one that holds `text`, in one step, and return its path.

    The file has the permissions `mode` from the start, whatever the umask; by default only its owner can read it. A
    reader finds either the old text or the new one. A symbolic link is replaced, not followed. Raises OSError.
    """
    return write_bytes(file, text.encode(), mode)


def write_bytes(file: Path, data: bytes, mode: int = 0o600) -> Path:
    """The same with `data` as it is."""
    fresh = file.with_name(f".{file.name}.{os.getpid()}.{os.urandom(4).hex()}")
    try:
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as sink:
            os.fchmod(sink.fileno(), mode)
            sink.write(data)
        fresh.replace(file)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    return file


def lock(file: Path) -> TextIO:
    """Open a file to lock it (`fcntl.flock`): only its owner may, for whoever can lock it could hold up the others."""
    return os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600), "w")
