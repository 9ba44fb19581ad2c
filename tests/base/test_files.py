"""Files are written whole or not at all, with the permissions that were asked for."""

import os
import stat
import threading
from pathlib import Path

import pytest

from toto.base import files


@pytest.fixture(params=[0o000, 0o022, 0o077, 0o777])
def umask(request: pytest.FixtureRequest, tmp_path: Path) -> object:  # (the folder is made before)
    before = os.umask(request.param)
    yield
    os.umask(before)


@pytest.mark.usefixtures("umask")
@pytest.mark.parametrize("mode", [0o600, 0o755])
def test_its_mode_is_what_was_asked_for(tmp_path: Path, mode: int) -> None:
    file = files.write(tmp_path / "file", "ü\n", mode)
    assert (file.read_text(), stat.S_IMODE(file.stat().st_mode)) == ("ü\n", mode)
    assert stat.S_IMODE(files.write(file, "again").stat().st_mode) == 0o600


def test_a_link_is_replaced_and_its_target_stays(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("old")
    (tmp_path / "file").symlink_to(other)
    files.write(tmp_path / "file", "secret")
    assert other.read_text() == "old" and not (tmp_path / "file").is_symlink()


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        files.write(tmp_path / "folder", "x")
    with pytest.raises(UnicodeEncodeError):
        files.write(tmp_path / "file", "half a character: \ud800")
    assert [each.name for each in tmp_path.iterdir()] == ["folder"]


def test_a_reader_finds_one_text_or_the_other(tmp_path: Path) -> None:
    texts = {letter * 100_000 for letter in "abcd"}
    files.write(tmp_path / "file", "a" * 100_000)

    def writer(text: str) -> None:
        for _ in range(20):
            files.write(tmp_path / "file", text)

    writers = [threading.Thread(target=writer, args=(text,)) for text in texts]
    for each in writers:
        each.start()
    while any(each.is_alive() for each in writers):
        assert (tmp_path / "file").read_text() in texts
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
