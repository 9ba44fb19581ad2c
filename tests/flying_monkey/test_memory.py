"""What a machine obeys, once, and in order."""

import resource
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from flying_monkey.desired import Desired, Machine
from flying_monkey.memory import Lost, Memory, Refused
from tests.flying_monkey.conftest import HOST_KEY, ISSUED, system

KEYS = [HOST_KEY]


def accept(memory: Memory, document: Desired, now: datetime = ISSUED) -> Memory:
    return memory.accept(document, "infra", "web1", KEYS, now)


def test_documents_are_obeyed_in_order_and_once(document: Desired) -> None:
    first = accept(Memory(), document)
    assert first == replace(first, serial=7, step="accepted", issued=int(ISSUED.timestamp()))
    begun = replace(first, step="tried")
    assert accept(begun, document) == begun, "the same one again: nothing begins anew"
    second = accept(begun, replace(document, serial=9, phase="keep"))
    for old in (document, replace(document, serial=8), replace(document, serial=9)):
        with pytest.raises(Refused, match="this machine has had 9"):
            accept(second, old)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"repo": "other"}, "it is of the repo other; this machine obeys infra"),
        ({"machine": Machine("web2", HOST_KEY)}, "it is for the machine web2"),
        ({"machine": Machine("web1", HOST_KEY.replace("Hl", "Hm"))}, "has a different host key"),
    ],
)
def test_a_document_for_someone_else_is_refused(document: Desired, changes: dict[str, object], words: str) -> None:
    with pytest.raises(Refused, match=words):
        accept(Memory(), replace(document, **changes))  # type: ignore[arg-type]


def test_an_expired_document_begins_nothing_and_one_that_was_begun_goes_on(document: Desired) -> None:
    late = document.expires
    with pytest.raises(Refused, match="it expired at 2026-03-08 12:00:00 UTC"):
        accept(Memory(), document, late)
    begun = accept(Memory(), document, late - timedelta(seconds=1))
    assert accept(begun, document, late) == begun


def test_a_clock_in_the_past_does_not_make_an_expired_document_valid(document: Desired) -> None:
    memory = accept(
        Memory(), replace(document, issued=ISSUED + timedelta(days=30), expires=ISSUED + timedelta(days=60))
    )
    now = memory.now(clock=0, built=0)
    assert now == ISSUED + timedelta(days=30)
    with pytest.raises(Refused, match="expired"):
        accept(memory, replace(document, serial=8), now)
    assert Memory().now(clock=0, built=86_400.5) == datetime(1970, 1, 2, tzinfo=UTC)
    assert memory.now(clock=4e9, built=0).year == 2096


def test_it_is_kept_on_the_disk_in_one_step(document: Desired, tmp_path: Path) -> None:
    file = tmp_path / "memory.json"
    assert Memory.load(file) == Memory()
    memory = accept(Memory(), replace(document, system=system("c")))
    memory.save(file)
    assert Memory.load(file) == memory and file.stat().st_mode & 0o777 == 0o600
    (tmp_path / ".memory.json.new").write_text("{half")  # a power cut while the next one was written
    assert Memory.load(file) == memory
    replace(memory, step="tried").save(file)
    assert Memory.load(file).step == "tried" and [each.name for each in tmp_path.iterdir()] == ["memory.json"]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"serial": "7"}', '{"serial": true}', '{"step": "x"}', '{"other": 1}', '{"digest": 1}']
)
def test_a_memory_that_cannot_be_understood_stops_everything(tmp_path: Path, text: str) -> None:
    """It must not pass for that of a new machine, which would obey every old document."""
    file = tmp_path / "memory.json"
    file.write_text(text)
    with pytest.raises(Lost, match=r"memory\.json"):
        Memory.load(file)


def test_a_full_disk_leaves_the_old_memory(document: Desired, tmp_path: Path) -> None:
    file = tmp_path / "memory.json"
    memory = accept(Memory(), document)
    memory.save(file)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(Lost, match="File too large"):
            replace(memory, step="kept").save(file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert Memory.load(file) == memory
