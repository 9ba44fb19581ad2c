"""The log of a run: short ones whole, of long ones the two ends, and no secret."""

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toto.jobs import log
from toto.jobs.log import LOG, Log


def chunks(data: bytes, size: int) -> Iterator[bytes]:
    yield from (data[at : at + size] for at in range(0, len(data), size))


def test_a_short_log_is_whole(tmp_path: Path) -> None:
    heard: list[bytes] = []
    with Log(tmp_path, 1000, heard=heard.append) as written:
        written.write(b"one\n")
        written.note("two")
    assert (tmp_path / LOG).read_bytes() == b"".join(heard) == b"one\n[toto] two\n"
    assert [each.name for each in tmp_path.iterdir()] == [LOG]


@pytest.mark.parametrize("size", [7, 100, 250, 5000])
def test_of_a_long_log_both_ends_are_kept(tmp_path: Path, size: int) -> None:
    data = b"".join(b"%09d\n" % number for number in range(1000))
    with Log(tmp_path, 1000) as written:
        for each in chunks(data, size):
            written.write(each)
    kept = (tmp_path / LOG).read_bytes()
    head, note, end = kept.partition(b"\n[toto] ")
    missing, _, end = end.partition(b" bytes are left out here\n")
    assert note and data.startswith(head) and data.endswith(end)
    assert len(head) == 500 and 250 <= len(end) <= 500
    assert len(head) + int(missing) + len(end) == len(data)


def test_what_is_heard_ends_at_the_middle(tmp_path: Path) -> None:
    heard: list[bytes] = []
    with Log(tmp_path, 1000, heard=heard.append) as written:
        for each in chunks(b"x" * 5000, 99):
            written.write(each)
    assert len(b"".join(heard)) == 500


def test_the_end_can_be_read_at_any_time(tmp_path: Path) -> None:
    assert log.tail(tmp_path, 100) == b""
    with Log(tmp_path, 1000) as written:
        for number in range(200):
            written.write(b"%09d\n" % number)
            told = b"".join(b"%09d\n" % each for each in range(number + 1))
            assert told.endswith(log.tail(tmp_path, 35)) and log.tail(tmp_path, 35).endswith(b"%09d\n" % number)
    assert log.tail(tmp_path, 35) == b"000000197\n000000198\n000000199\n"


@settings(max_examples=50, deadline=None)
@given(text=st.lists(st.sampled_from([b"a", b"ab", b"abcabd", b"abcab", b"\n", b"x"])), size=st.integers(1, 9))
def test_secrets_are_masked_wherever_the_output_is_cut(
    tmp_path_factory: pytest.TempPathFactory, text: list[bytes], size: int
) -> None:
    folder, data = tmp_path_factory.mktemp("log"), b"".join(text)
    with Log(folder, 1_000_000, ["abcabd", "", "ab"]) as written:
        for each in chunks(data, size):
            written.write(each)
    assert b"ab" not in (folder / LOG).read_bytes()
    assert (folder / LOG).read_bytes().count(b"x") == data.count(b"x")


def test_a_full_disk_is_no_error(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    written = Log(tmp_path, 1_000_000)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))  # (Python ignores SIGXFSZ)
    try:
        written.write(b"x" * 50_000)
        written.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert written.lost >= 40_000
    assert (tmp_path / LOG).stat().st_size == 10_000


@pytest.mark.parametrize("limit", [100, 1_000, 1_000_000])
def test_a_log_is_followed_while_it_is_written(tmp_path: Path, limit: int) -> None:
    text = [b"%06d\n" % number for number in range(1000)]
    heard = b""
    with log.Follower(tmp_path) as reading:
        assert list(reading.read()) == []
        with Log(tmp_path, limit) as written:
            for each in text:
                written.write(each)
                heard += b"".join(reading.read())
        heard += b"".join(reading.read())
    assert heard == b"".join(text)


def test_who_comes_late_reads_what_is_left_of_a_log(tmp_path: Path) -> None:
    with Log(tmp_path, 1000) as written, log.Follower(tmp_path) as reading:
        written.write(b"".join(b"%06d\n" % number for number in range(1000)))
        heard = b"".join(reading.read())
        assert heard.startswith(b"000000\n") and heard.endswith(b"000999\n") and len(heard) <= 1000
        written.write(b"more\n")
        assert b"".join(reading.read()) == b"more\n"
    with log.Follower(tmp_path) as reading:
        assert b"".join(reading.read()) == (tmp_path / LOG).read_bytes()
