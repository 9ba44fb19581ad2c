"""What machines have fetched, as a web server in a cell has counted it."""

import asyncio
import logging
from pathlib import Path

import pytest

from toto.base import paths
from toto.machine import fetched
from toto.machine.documents import FETCHED, Place
from toto.machine.fetched import Counting, Fetched

WEB1 = Place("infra-1", "web1")


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOTO_STATE", str(tmp_path / "state"))


def test_counts_go_on_from_those_of_the_server_before() -> None:
    assert fetched.read(WEB1) is None
    for _ in range(2):
        counting = Counting()
        counting.note(WEB1, hits=1, sent=10)
        counting.note(WEB1, misses=1)
        counting.write()
    assert fetched.read(WEB1) == Fetched(hits=2, misses=2, sent=20)


@pytest.mark.parametrize(
    "text", ["", "[" * 900, "{" + " " * 2_000 + "}", '{"hits": -1}', '{"hits": 1e400}', '{"hits": "many"}', "\0"]
)
def test_what_is_no_count_is_none_and_counting_begins_anew(text: str) -> None:
    (paths.private_folder(WEB1.said) / FETCHED).write_text(text)
    assert fetched.read(WEB1) is None
    counting = Counting()
    counting.note(WEB1, hits=1)
    counting.write()
    assert fetched.read(WEB1) == Fetched(hits=1)


async def test_a_disk_that_takes_nothing_is_told_once_and_what_was_counted_is_written_later(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fetched, "EVERY", 0.01)
    WEB1.said.parent.mkdir(parents=True)
    WEB1.said.write_text("in the way")
    counting = Counting()
    counting.note(WEB1, hits=1)
    with caplog.at_level(logging.ERROR):
        keeping = asyncio.create_task(counting.keep())
        await asyncio.sleep(0.2)
        assert [each.message.partition(":")[0] for each in caplog.records] == [
            "what machines have fetched is not counted"
        ]
        WEB1.said.unlink()
        async with asyncio.timeout(120):
            while fetched.read(WEB1) is None:
                await asyncio.sleep(0.01)
    counting.note(WEB1, hits=1)
    keeping.cancel()
    await asyncio.gather(keeping, return_exceptions=True)
    assert fetched.read(WEB1) == Fetched(hits=2), "the last ones are written at the end"
