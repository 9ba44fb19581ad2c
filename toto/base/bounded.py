"""Text of any length in bounded memory: its beginning and its end."""

from dataclasses import dataclass, field


@dataclass
class Bounded:
    """What is added to it, within about `limit` bytes: the first half and the last half, with a word in between.

    `dropped` is how many bytes are gone for good.
    """

    limit: int
    head: bytearray = field(default_factory=bytearray)
    tail: bytearray = field(default_factory=bytearray)
    dropped: int = 0

    def add(self, chunk: bytes) -> None:
        """Add to the end. (The tail grows beyond its half and is cut now and then, so that this is cheap.)"""
        room = self.limit // 2 - len(self.head)
        if room > 0:
            self.head += chunk[:room]
            chunk = chunk[room:]
        self.tail += chunk
        if (over := len(self.tail) - self.limit // 2) > self.limit // 4:
            del self.tail[:over]
            self.dropped += over

    def text(self) -> str:
        """What is kept, as text; where something is missing it begins and ends with whole lines, if they are short."""
        if not self.dropped:
            return (self.head + self.tail).decode(errors="replace")
        head, tail, short = self.head, self.tail[-(self.limit // 2):], self.limit // 8
        end, begin = head.rfind(b"\n") + 1, tail.find(b"\n") + 1
        head = head[:end] if len(head) - end < short else head
        tail = tail[begin:] if begin < short else tail
        dropped = self.dropped + len(self.head) - len(head) + len(self.tail) - len(tail)
        seam = "" if head.endswith(b"\n") else "\n"
        return f"{head.decode(errors='replace')}{seam}[… {dropped} bytes left out …]\n{tail.decode(errors='replace')}"


def bounded(data: bytes, limit: int) -> str:
    """A text within about `limit` bytes, its middle left out."""
    kept = Bounded(limit)
    kept.add(data)
    return kept.text()
