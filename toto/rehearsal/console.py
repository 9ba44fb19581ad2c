"""The console of a guest: it is saved, made readable, and searched for a crash."""

import contextlib
import logging
import re
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from toto.base import process
from toto.base.bounded import bounded
from toto.base.process import LineSink, Running

log = logging.getLogger(__name__)

LONGEST_CONSOLE: Final = 8_000_000  # bytes of the console that are kept: its beginning and its end


# Lines after which it makes no sense to wait longer.
_FATAL: Final = (
    "Kernel panic - not syncing",
    "An error occurred in stage 1 of the boot process",
    "You are in emergency mode",
    "Cannot open access to console, the root account is locked",
)


_CONTROL: Final = re.compile(r"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|\][^\a]*\a|[@-Z\\-_c78])|[\x00-\x08\x0b-\x1f\x7f]")


class Console:
    """Writes the serial output to a file of limited size and, line by line, to a sink; notes a crash in `fatal`."""

    def __init__(self, path: Path, sink: LineSink | None) -> None:
        self.path, self.sink = path, sink
        self.file = path.open("w+", encoding="utf-8", errors="replace")
        self.lines: deque[str] = deque(maxlen=200)
        self.fatal: str | None = None

    async def read(self, running: Running) -> None:
        stream = running.process.stdout
        assert stream is not None
        rest = b""
        while chunk := await stream.read(65_536):
            *lines, rest = (rest + chunk).split(b"\n")
            if len(rest) > process.LONGEST_LINE:
                lines, rest = [*lines, rest], b""
            self.take(lines)
        self.take([rest] if rest else [])

    def take(self, lines: Sequence[bytes]) -> None:
        for raw in lines:
            line = _CONTROL.sub("", raw.decode(errors="replace"))
            self.lines.append(line)
            if self.fatal is None and any(word in line for word in _FATAL):
                self.fatal = line.strip()
            with contextlib.suppress(OSError, ValueError):  # a full disk must not stop this: QEMU would block
                self.file.write(line + "\n")
            self.pass_on(line)
        with contextlib.suppress(OSError, ValueError):
            self.file.flush()
            if self.file.tell() > LONGEST_CONSOLE:
                self.shorten()

    def pass_on(self, line: str) -> None:
        try:
            if self.sink is not None:
                self.sink(line)
        except Exception:  # a sink that fails must not stop it either
            log.exception("from here on the console is only written to its file")
            self.sink = None

    def shorten(self) -> None:
        """Cut out the middle, so that the boot and the end remain."""
        text = bounded(self.path.read_bytes(), LONGEST_CONSOLE // 2)
        self.file.seek(0)
        self.file.truncate()
        self.file.write(text)
        self.file.flush()

    def tail(self, count: int = 30) -> str:
        return "\n".join(process.shorten(line) for line in list(self.lines)[-count:]).strip()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.file.close()
