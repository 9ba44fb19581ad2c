"""The log of a run: a file that holds all of a short output, and the beginning and the end of a long one.

While a run goes on, the end of a long log is in two files beside it, each of up to a quarter of the limit; `Log.close`
joins them to it.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Final, Self

LOG: Final = "log"
_ENDS: Final = ("log.older", "log.newer")
_MASK: Final = b"******"
_CHUNK: Final = 1 << 20


class Log:
    """Writes a run's log into `folder`, at most about `limit` bytes of it, with `secrets` masked.

    `heard` gets each piece that is written, up to the middle of a long log. A full disk stops no run: it loses output,
    and `lost` is how many bytes of it.
    """

    def __init__(
        self, folder: Path, limit: int, secrets: Sequence[str] = (), heard: Callable[[bytes], None] | None = None
    ) -> None:
        self._folder, self._quarter, self._heard = folder, max(1, limit // 4), heard
        self._secrets = sorted((each.encode(errors="surrogateescape") for each in secrets if each), key=len)[::-1]
        self._held = b""  # what may be the beginning of a secret
        self._room, self._dropped, self.lost = limit // 2, 0, 0
        self._older, self._newer = (folder / name for name in _ENDS)
        self._file = _opened(folder / LOG)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def note(self, line: str) -> None:
        """Write a line of toto's own."""
        self.write(f"[toto] {line}\n".encode(errors="replace"))

    def write(self, chunk: bytes) -> None:
        """Write a piece of the output."""
        chunk = self._masked(chunk) if self._secrets else chunk
        while chunk:
            if not self._room:
                self._rotate()
            piece, chunk = chunk[: self._room], chunk[self._room :]
            self._room -= len(piece)
            self._put(piece)
            if self._heard is not None:
                self._heard(piece)

    def close(self) -> None:
        """Write what is held back, and join the end to the beginning."""
        held, self._held, self._secrets = self._held, b"", []
        self.write(held)
        os.close(self._file)
        self._file = _opened(self._folder / LOG)
        if missing := self._dropped + self.lost:
            self._put(b"\n[toto] %d bytes are left out here\n" % missing)
        for end in filter(Path.exists, (self._older, self._newer)):
            with end.open("rb") as source:
                while chunk := source.read(_CHUNK):
                    self._put(chunk)
            end.unlink()
        os.close(self._file)

    def _rotate(self) -> None:
        """Go on in a new file for the end; the older one of the two that are there is dropped."""
        self._heard = None
        if self._newer.exists():
            if self._older.exists():
                self._dropped += self._older.stat().st_size
            self._newer.replace(self._older)
        os.close(self._file)
        self._file = _opened(self._newer)
        self._room = self._quarter

    def _put(self, piece: bytes) -> None:
        try:
            while piece:
                piece = piece[os.write(self._file, piece) :]
        except OSError:
            self.lost += len(piece)

    def _masked(self, chunk: bytes) -> bytes:
        text = self._held + chunk
        for each in self._secrets:
            text = text.replace(each, _MASK)
        # The rest of a secret may be in the next piece.
        held = range(min(len(self._secrets[0]) - 1, len(text)), 0, -1)
        cut = next((n for n in held if any(each.startswith(text[-n:]) for each in self._secrets)), 0)
        self._held = text[len(text) - cut :]
        return text[: len(text) - cut]


def _opened(file: Path) -> int:
    return os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)


def tail(folder: Path, size: int) -> bytes:
    """The last `size` bytes of a run's log, from the beginning of a line; nothing when there is no log."""
    found = b""
    for file in (folder / _ENDS[1], folder / _ENDS[0], folder / LOG):
        if len(found) < size and file.exists():
            with file.open("rb") as source:
                source.seek(max(0, file.stat().st_size - (size - len(found))))
                found = source.read(size - len(found)) + found
    return found.partition(b"\n")[2] if len(found) >= size else found


class Follower:
    """Reads a run's log while it is written: each call of `read` returns what is new.

    Of a long log, whose end is in different files until it is closed, it reads those too; pieces of one that is
    written faster than it is read are left out.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._open, self._beginning = folder, dict[int, BinaryIO](), True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._open.values():
            file.close()

    def read(self) -> Iterator[bytes]:
        """What was written since the last call."""
        # (A file stays open as long as it is there: nothing new gets its inode meanwhile.)
        first, *ends = map(self._opened, (LOG, *_ENDS))
        if first is not None and self._beginning:
            size = os.fstat(first.fileno()).st_size
            ended = any(ends)  # then the end is joined to it later, and read there before
            self._beginning = not ended
            yield from _rest(first, size if ended else None)
        for file in filter(None, ends):
            yield from _rest(file)
        there = {os.fstat(file.fileno()).st_ino for file in (first, *ends) if file is not None}
        for inode in self._open.keys() - there:
            with self._open.pop(inode) as file:
                yield from _rest(file) if not self._beginning else ()

    def _opened(self, name: str) -> BinaryIO | None:
        try:
            file = (self._folder / name).open("rb")
        except OSError:
            return None
        inode = os.fstat(file.fileno()).st_ino
        if inode in self._open:
            file.close()
        return self._open.setdefault(inode, file)


def _rest(file: BinaryIO, to: int | None = None) -> Iterator[bytes]:
    while chunk := file.read(_CHUNK if to is None else min(_CHUNK, max(0, to - file.tell()))):
        yield chunk
