"""Temporary folders that outlive a killed toto are removed by the next one."""

import os
import subprocess
import sys
from pathlib import Path

from toto.base import owned

OWNER = """
import sys, time
from pathlib import Path
from toto.base import owned
with owned.folder("what it is for", Path(sys.argv[1])) as folder:
    (folder / "locked").mkdir(mode=0)
    print(folder, flush=True)
    time.sleep(1000)
"""


def test_a_folder_is_private_and_gone_after_the_block(tmp_path: Path) -> None:
    with owned.folder("x", tmp_path) as folder:
        assert folder.stat().st_mode & 0o777 == 0o700
        assert owned.sweep(tmp_path) == []
        assert folder.exists()
    assert list(tmp_path.iterdir()) == []


def test_folders_are_removed_however_deep_they_are_nested(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("stays")
    with owned.folder("x", tmp_path) as folder:
        (folder / "0").mkdir()
        (folder / "link").symlink_to(tmp_path)
        opened = os.open(folder, os.O_RDONLY)
        for _ in range(3000):
            os.mkdir("deep", dir_fd=opened)
            inner = os.open("deep", os.O_RDONLY, dir_fd=opened)
            os.close(opened)
            opened = inner
        os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=opened))
        os.close(opened)
    assert [each.name for each in tmp_path.iterdir()] == ["secret"]


def test_what_a_killed_owner_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER, tmp_path], stdout=subprocess.PIPE, text=True)
    assert owner.stdout
    folder = Path(owner.stdout.readline().strip())
    others = [tmp_path / "toto-someones", tmp_path / "toto-1x.2-other", tmp_path / "other"]
    for each in others:
        each.mkdir()
    assert owned.sweep(tmp_path) == [], "the owner is alive"
    owner.kill()
    owner.wait()
    owner.stdout.close()
    assert owned.sweep(tmp_path) == [folder]
    assert sorted(tmp_path.iterdir()) == sorted(others)
