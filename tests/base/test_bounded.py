"""A text without end takes limited memory, and what is kept of it says how much is missing."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toto.base.bounded import Bounded, bounded

SEAM = re.compile(rb"\n?\[\xe2\x80\xa6 (\d+) bytes left out \xe2\x80\xa6\]\n")


@given(st.lists(st.binary(max_size=50)))
def test_what_fits_is_kept_as_it_is(chunks: list[bytes]) -> None:
    kept = Bounded(1 + 2 * sum(map(len, chunks)))
    for chunk in chunks:
        kept.add(chunk)
    assert kept.text() == b"".join(chunks).decode(errors="replace")


@given(st.lists(st.text("abc\n", max_size=60)), st.integers(8, 100))
def test_the_rest_is_a_beginning_and_an_end_and_all_bytes_are_accounted_for(texts: list[str], limit: int) -> None:
    kept, whole = Bounded(limit), "".join(texts).encode()
    for each in texts:
        kept.add(each.encode())
        assert len(kept.head) + len(kept.tail) <= 1.5 * limit
    text = kept.text().encode()
    if (seam := SEAM.search(text)) is None:
        assert text == whole
        return
    head, tail = text[: seam.start()], text[seam.end() :]
    for cut in (head, head + b"\n"):  # the text before the seam ended with its line, or without
        if len(cut) + int(seam[1]) + len(tail) == len(whole):
            assert whole.startswith(cut) and whole.endswith(tail)
            return
    raise AssertionError((whole, text))


@pytest.mark.parametrize("size", [1, 7, 1000, 100_000])
def test_lines_are_whole_at_the_seam(size: int) -> None:
    whole = b"".join(b"line %d\n" % number for number in range(20_000))
    kept = Bounded(4000)
    for place in range(0, len(whole), size):
        kept.add(whole[place : place + size])
    lines = kept.text().splitlines()
    assert (lines[0], lines[-1]) == ("line 0", "line 19999")
    assert sum(not re.fullmatch(r"line \d+", line) for line in lines) == 1
    assert len(kept.text()) < 4100


def test_one_endless_line_is_cut_anywhere() -> None:
    assert bounded(b"x" * 1000, 100) == "x" * 50 + "\n[… 900 bytes left out …]\n" + "x" * 50
