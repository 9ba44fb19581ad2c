"""Holds the logs of every server, worker and hook that a test starts against `toto.server.logs`.

A test that kills or starves one on purpose says what may be logged then, with a reason:
`@pytest.mark.logs(r"Failed to …", reason="the server is killed")`.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from toto.server import logs

_read: dict[Path, int] = {}  # files, and folders of files, with the bytes of a file that have been read


def watch(place: Path) -> None:
    """Have a log, or each `*.log` of a folder, looked at after the test; it need not be there yet."""
    _read.setdefault(place, 0)


def faults(allowed: Iterable[str] = ()) -> Iterator[str]:
    """What is wrong in what has been logged since this was last asked, each with its file."""
    for place in list(_read):
        if place.is_dir():
            for file in place.glob("*.log"):
                watch(file)
    for file in list(_read):
        if file.is_file():
            data = file.read_bytes()
            begin = _read[file] if _read[file] <= len(data) else 0  # one that has shrunk was begun anew
            _read[file] = len(data)
            for fault in logs.faults(data[begin:].decode(errors="replace")):
                if not any(re.search(pattern, fault, re.S) for pattern in allowed):
                    yield f"{file}:\n{fault}"
