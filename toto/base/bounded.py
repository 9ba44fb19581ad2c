"""Text of any length in bounded memory: its beginning and its end."""

from dataclasses import dataclass, field


@dataclass
class Bounded:
    """A text cut to about `limit` bytes: its beginning and its end, and between them how much is missing.

    `dropped` is how many bytes have been thrown away.
    """

    limit: int
    head: bytearray = field(default_factory=bytearray)
    tail: bytearray = field(default_factory=bytearray)
    dropped: int = 0

    def add(self, chunk: bytes) -> None:
        """Add to the end. (The tail may grow beyond its half, and is cut only now and then: that keeps this cheap.)"""
        room = self.limit // 2 - len(self.head)
        if room > 0:
            self.head += chunk[:room]
            chunk = chunk[room:]
        self.tail += chunk
        if (over := len(self.tail) - self.limit // 2) > self.limit // 4:
            del self.tail[:over]
            self.dropped += over

    def text(self) -> str:
        """The text that is kept; it is cut at the ends of lines, unless they are long."""
        if not self.dropped:
            return (self.head + self.tail).decode(errors="replace")
        head, tail, short = self.head, self.tail[-(self.limit // 2) :], self.limit // 8
        end, begin = head.rfind(b"\n") + 1, tail.find(b"\n") + 1
        head = head[:end] if len(head) - end < short else head
        tail = tail[begin:] if begin < short else tail
        dropped = self.dropped + len(self.head) - len(head) + len(self.tail) - len(tail)
        seam = "" if head.endswith(b"\n") else "\n"
        return f"{head.decode(errors='replace')}{seam}[… {dropped} bytes left out …]\n{tail.decode(errors='replace')}"


def bounded(data: bytes, limit: int) -> str:
    """`data` as text, cut to about `limit` bytes: its middle is left out."""
    kept = Bounded(limit)
    kept.add(data)
    return kept.text()
