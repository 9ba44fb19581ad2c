"""The command line as people use it."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.repos import git
from toto.ledger.ledger import REF


@pytest.mark.parametrize("words", [["--help"], ["repo", "sshd"], ["log"]])
def test_a_reader_that_has_had_enough_is_no_error(words: list[str], tmp_path: Path) -> None:
    git("init", "-q", "--bare", ".", cwd=tmp_path)
    empty = git("hash-object", "-t", "tree", "-w", "/dev/null", cwd=tmp_path).strip()
    commit = git("commit-tree", "-m", "good at\n" * 1000, empty, cwd=tmp_path).strip()
    git("update-ref", REF, commit, cwd=tmp_path)
    toto = subprocess.Popen(
        [sys.executable, "-m", "toto.cli", *words], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert toto.stdout is not None and toto.stderr is not None
    toto.stdout.close()
    with toto.stderr:
        assert toto.stderr.read() == b""
    assert toto.wait() in (0, 141)  # (as a shell says of a program that SIGPIPE has ended; argparse says 0)
