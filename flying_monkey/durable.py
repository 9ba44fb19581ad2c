"""Writes a small file so that a power cut leaves the old one or the new one."""

import os
from pathlib import Path


def write(file: Path, data: bytes, mode: int = 0o600) -> None:
    """Replace `file` by one with `data`; when this returns, it is on the disk. Raises OSError."""
    fresh = file.with_name(f".{file.name}.new")
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, mode), "wb") as sink:
        os.fchmod(sink.fileno(), mode)
        sink.write(data)
        sink.flush()
        os.fsync(sink.fileno())
    fresh.replace(file)
    sync(file.parent)


def sync(folder: Path) -> None:
    """Have what was made, renamed or removed in a folder on the disk. Raises OSError."""
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
