"""The command line as people use it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.repos import git
from toto.cli import verbs
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


def said(folder: Path, *words: str, **environment: str) -> tuple[int, str]:
    """The exit status and all that the command prints, in a folder."""
    done = subprocess.run(
        [sys.executable, "-m", "toto.cli", *words],
        cwd=folder,
        env={**os.environ, "TOTO_STATE": str(folder / "state"), "COLUMNS": "", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=60,
    )
    return done.returncode, done.stdout


def test_outside_an_infra_repo_it_takes_the_only_one_or_asks_which(tmp_path: Path) -> None:
    repos = tmp_path / "state/server/repos"
    assert said(tmp_path, "status") == (2, "toto: this directory is no infra repo\nnext: say which: --repo PATH\n")
    git("init", "-q", "--bare", str(repos / "infra.git"), cwd=tmp_path)
    for verb in ("status", "log"):
        assert said(tmp_path, verb) == (0, "nothing was deployed from here yet\n")
    assert said(tmp_path, "key", "infar") == (2, "toto: there is no repository infar\nnext: did you mean infra?\n")
    git("init", "-q", "--bare", str(repos / "web.git"), cwd=tmp_path)
    status, text = said(tmp_path, "log")
    assert status == 2 and f"next: say which: --repo with one of {repos}/infra.git, {repos}/web.git\n" in text


def test_a_slip_in_a_verb_is_told(tmp_path: Path) -> None:
    assert said(tmp_path, "statsu") == (2, "toto: there is no 'statsu': did you mean status?\n")
    assert said(tmp_path, "xyzzy") == (2, "toto: there is no 'xyzzy': `toto --help` lists what there is\n")
    status, text = said(tmp_path)
    assert status == 0 and text.startswith("Usage: toto [OPTIONS] VERB …")
    assert said(tmp_path, "repo") == said(tmp_path, "repo", "--help")
    assert said(tmp_path, "repo", "xyzzy")[1] == (
        "toto repo: there is no 'xyzzy': `toto repo --help` lists what there is\n"
    )
    assert said(tmp_path, "approve") == (2, "toto approve: missing argument 'RUN'\n")


@pytest.mark.parametrize("verb", [verb for verb, (module, _) in verbs.VERBS.items() if module])
def test_a_verb_says_of_itself_what_the_list_says(verb: str) -> None:
    command = verbs.load(verb)
    assert command.help.partition("\n")[0].rstrip(".").casefold() == verbs.VERBS[verb][1].rstrip(".").casefold()
    for each in getattr(command, "commands", {}).values():
        assert each.help, f"{verb} {each.name}"


def test_long_lines_are_folded_for_a_terminal(tmp_path: Path) -> None:
    git("init", "-q", "--bare", ".", cwd=tmp_path)
    empty = git("hash-object", "-t", "tree", "-w", "/dev/null", cwd=tmp_path).strip()
    commit = git("commit-tree", "-m", "web1: reverted: " + "the page is empty " * 9, empty, cwd=tmp_path).strip()
    git("update-ref", REF, commit, cwd=tmp_path)
    folded = said(tmp_path, "log", COLUMNS="80")[1].splitlines()
    assert len(folded) > 1 and max(map(len, folded)) <= 80 and folded[1].startswith("    the")
    assert len(said(tmp_path, "log")[1].splitlines()) == 1
