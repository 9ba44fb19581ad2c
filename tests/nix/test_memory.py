"""What evaluations use of memory: remembered, and what it decides."""

from pathlib import Path

import pytest

from toto.base.errors import InputError
from toto.nix.memory import MB, Allowance, Evaluations, Remembered
from toto.nix.messages import OutOfMemory


@pytest.mark.parametrize("text", ["", "[", "[1]", '{"a": -1, "b": "x", "c": true, "d": 1e3, "e": 99999999999}', "1"])
def test_a_file_that_is_missing_or_broken_says_nothing(tmp_path: Path, text: str) -> None:
    file = tmp_path / "evaluations.json"
    assert Remembered.of(file).used == {}
    file.write_text(text)
    assert Remembered.of(file).used == {}


def test_hosts_that_have_gone_are_forgotten_by_a_run_that_sees_all(tmp_path: Path) -> None:
    remembered = Remembered(tmp_path / "evaluations.json", {"a": 1, "a#vm": 2, "b": 3})
    remembered.write()
    assert Remembered.of(remembered.file).used == {"a": 1, "a#vm": 2, "b": 3}
    remembered.write({"a"})
    assert Remembered.of(remembered.file).used == {"a": 1, "a#vm": 2}
    assert remembered.file.stat().st_mode & 0o077 == 0


async def test_one_that_uses_too_much_is_tried_again_alone_with_more_and_that_is_remembered(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("toto.nix.memory.memory_available", lambda: 8000)
    allowed: list[int] = []

    async def work(allowance: Allowance) -> str:
        allowed.append(allowance.most // MB)
        if allowance.most < 2600 * MB:
            raise OutOfMemory("its evaluation was ended: it used more than that", target="a")
        allowance.used = 2600 * MB - 1
        return "made"

    remembered = Remembered(tmp_path / "evaluations.json")
    assert await Evaluations(remembered, 1000, 16_000).run("a", work) == "made"
    assert allowed == [2000, 6000] and remembered.used == {"a": 2600}
    assert [each.getMessage() for each in caplog.records] == [
        "a: its evaluation used more than 2000 MB of memory; toto tries it again, alone and with 6000 MB"
    ]
    assert await Evaluations(remembered, 1000, 16_000).run("a", work) == "made"
    assert allowed[2:] == [5200], "twice what it used"


@pytest.mark.parametrize(
    ("most", "tries", "says"),
    [(1500, [2000, 3000], "although it was alone"), (500, [2000], "and there is no more on this machine")],
)
async def test_one_that_uses_all_there_is_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int, tries: list[int], says: str
) -> None:
    monkeypatch.setattr("toto.nix.memory.memory_available", lambda: 8000)
    allowed: list[int] = []

    async def work(allowance: Allowance) -> None:
        allowed.append(allowance.most // MB)
        raise OutOfMemory("its evaluation was ended: it used more than it may", target="a")

    with pytest.raises(InputError) as caught:
        await Evaluations(Remembered(tmp_path / "x"), 1000, most).run("a", work)
    assert allowed == tries
    assert str(caught.value) == (
        f"a: its evaluation was ended: it used more than it may, {says}\nnext: is there a recursion without end? "
        "otherwise toto's machine needs more memory, or its server.toml a higher most.nix.evaluate_memory"
    )
