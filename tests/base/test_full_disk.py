"""A full disk: it is reported before anything is touched, and a ledger that cannot be written stays as it was.

The tests use a real, tiny file system in a mount namespace of their own.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.repos import InfraRepo
from toto.base import paths
from toto.base.errors import TotoError

PROGRAM = """
import asyncio, os, sys
from pathlib import Path
from tests.ledger.test_ledger import WEB1, deployed, intent
from tests.repos import git
from toto.base import paths
from toto.base.errors import TotoError
from toto.ledger import steps
from toto.ledger.ledger import Ledger

async def main(repo):
    book = Ledger(repo)
    await book.write(WEB1, steps.intend(intent("run-1")), "intent")
    before = book.read()
    filler = repo.parent / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(b"x" * 4096):
                pass
        except OSError as error:
            assert error.errno == 28
    try:
        await book.write(WEB1, steps.good(deployed("/nix/store/new"), "run-1"), "good")
    except TotoError as error:
        print("error:", error)
    else:
        raise AssertionError("there was no room, and it was written")
    assert book.read() == before
    try:
        paths.require_room(repo)
    except TotoError as error:
        print("error:", error)
    filler.unlink()
    assert book.read() == before
    left = [*repo.glob("fast_import_crash_*"), *repo.rglob("*.lock")]  # (`git gc` removes a tmp_pack)
    assert not left, f"nothing half done is left: {left}"
    await book.write(WEB1, steps.good(deployed("/nix/store/new"), "run-1"), "good")
    git("fsck", "--strict", "--no-dangling", cwd=repo)
    print("whole")

asyncio.run(main(Path(sys.argv[1])))
"""


@pytest.fixture
def tiny(tmp_path: Path) -> tuple[list[str], Path]:
    """A command that runs other commands with the folder as a file system of 2 MB; and the folder."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = f'mount -t tmpfs -o size=2m,mode=700 none {folder} && cp -a {tmp_path}/infra.git {folder} && exec "$@"'
    InfraRepo(tmp_path)
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh"]
    if shutil.which("unshare") is None or subprocess.run([*command, "true"], check=False).returncode != 0:
        pytest.skip("NOT TESTED: a full disk: this machine allows no mount namespace")
    return command, folder


def test_a_ledger_on_a_full_disk_is_what_it_was(tiny: tuple[list[str], Path]) -> None:
    command, folder = tiny
    done = subprocess.run(
        [*command, sys.executable, "-c", PROGRAM, folder / "infra.git"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    errors = [line for line in done.stdout.splitlines() if line.startswith("error:")]
    assert "host/web1: the ledger could not be written" in errors[0]
    assert "is there room on the disk (`df -h " in done.stdout
    assert "0 MB are free where the ledger is" in errors[1]
    assert done.stdout.endswith("whole\n")


def test_a_roll_out_needs_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths.require_room(tmp_path)
    monkeypatch.setattr(paths, "LEAST_FREE", 1 << 60)
    with pytest.raises(TotoError, match=r"(?s)only \d+ MB are free where the ledger is.*nothing is rolled out.*df -h"):
        paths.require_room(tmp_path)
