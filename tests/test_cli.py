"""The command line as people use it."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from pytest import MonkeyPatch

from tests.ledger.test_ledger import WEB1, deployed, intent, note
from tests.repos import InfraRepo, git
from toto.cli import about, verbs
from toto.cli.output import show
from toto.ledger import steps
from toto.ledger.ledger import REF, Frozen, Ledger
from toto.ledger.target import Target


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
    return _said(folder, words, environment, subprocess.STDOUT)


def items(folder: Path, *words: str, **environment: str) -> list[dict[str, Any]]:
    """The items of what the command prints as JSON."""
    found = json.loads(_said(folder, [*words, "--json"], environment, subprocess.DEVNULL)[1])
    assert set(found) == {"toto", "kind", "items"} and found["toto"] == 1
    return list(found["items"])


def _said(folder: Path, words: Sequence[str], environment: dict[str, str], errors: int) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "toto.cli", *words],
        cwd=folder,
        env={**os.environ, "TOTO_STATE": str(folder / "state"), "COLUMNS": "", **environment},
        stdout=subprocess.PIPE,
        stderr=errors,
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
        status, text = said(tmp_path, verb)
        assert status == 0 and text.endswith("nothing was deployed from here yet\n")
    assert said(tmp_path, "key", "infar") == (2, "toto: there is no repository infar\nnext: did you mean infra?\n")
    git("init", "-q", "--bare", str(repos / "web.git"), cwd=tmp_path)
    status, text = said(tmp_path, "log")
    assert status == 2 and "next: say which: --repo with one of infra, web\n" in text
    assert said(tmp_path, "log", "--repo", "web") == (0, "nothing was deployed from here yet\n")
    assert said(tmp_path, "status")[0] == 0, "the page of the fleet has all of them too"


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


def test_long_lines_are_folded_for_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    show("web1: reverted: " + "the page is empty " * 9)
    folded = capsys.readouterr().out.splitlines()
    assert len(folded) > 1 and max(map(len, folded)) <= 80 and folded[1].startswith("    ")
    monkeypatch.delenv("COLUMNS")
    show("web1: reverted: " + "the page is empty " * 9 + "\x1b[2J")
    assert capsys.readouterr().out.splitlines() == ["web1: reverted: " + "the page is empty " * 9 + "�[2J"]


async def _deployed(folder: Path) -> tuple[Ledger, str]:
    """A ledger with one host that was deployed, and one that was put back; and the commit."""
    repo = InfraRepo(folder)
    commit, book, web2 = repo.commit({"hosts/web1.nix": "{ }"}), Ledger(repo.bare), Target("host", "web2")
    good = deployed("/nix/store/" + "0" * 32 + "-nixos-system-web1").model_copy(update={"commit": commit})
    await book.write(WEB1, steps.intend(intent("run-1")), "web1: intent")
    await book.write(WEB1, steps.good(good, "run-1"), "web1: good")
    await book.write(web2, steps.intend(intent("run-2")), "web2: intent")
    await book.write(web2, steps.revert(None, note("run-2"), "run-2"), "web2: reverted")
    return book, commit


async def test_the_history_is_limited_by_target_time_author_and_number(tmp_path: Path) -> None:
    book, commit = await _deployed(tmp_path)

    def happened(*words: str) -> list[tuple[str, str]]:
        found = items(tmp_path, "log", "--repo", str(book.repo), *words)
        return [(each["target"], each["what"]) for each in found]

    newest = [("host/web2", "reverted"), ("host/web2", "begun"), ("host/web1", "good"), ("host/web1", "begun")]
    assert happened() == newest and happened("-n", "1") == newest[:1]
    assert happened("web1") == newest[2:] and happened("--author", "OP") == newest[2:3]
    assert happened("--author", "nobody") == [] and happened("--since", "2030-01-01") == []
    assert happened("--since", "1 week ago") == newest
    text = said(tmp_path, "log", "web1", "--repo", str(book.repo))[1]
    title, good, begun = text.splitlines()
    assert title.split() == ["WHEN", "TARGET", "WHAT", "COMMIT", "AUTHOR", "TOOK", "WHY"]
    assert good.split()[2:6] == ["web1", "good", commit[:8], "op"] and begun.split()[3] == "begun"


async def test_each_target_is_a_line_that_fits_the_terminal(tmp_path: Path) -> None:
    book, commit = await _deployed(tmp_path)
    await book.write(WEB1, steps.freeze(Frozen(by="alice", why="until the audit is over")), "web1: frozen")
    status, text = said(tmp_path, "status", "--repo", str(book.repo))
    title, web2, web1 = text.splitlines()[-3:]
    assert status == 0 and title.split() == ["TARGET", "STATE", "COMMIT", "AGE", "SYSTEM", "LAST", "RUN", "NOTES"]
    assert web2.split()[:2] == ["web2", "reverted"] and web2.endswith("a test failed")
    assert web1.split()[:3] == ["web1", "good", commit[:8]] and "0000000" in web1
    assert web1.endswith("frozen by alice: until the audit is over") and "\x1b" not in text
    narrow = said(tmp_path, "status", "--repo", str(book.repo), COLUMNS="80")[1].splitlines()[-2:]
    assert all(len(line) <= 80 for line in narrow) and narrow[1].endswith("…")


def test_an_error_is_json_too_and_has_its_status(tmp_path: Path) -> None:
    for words, exit_status in ((["log"], 2), (["plan", "--exit-code"], 1), (["plan", "--exit-code", "--xyzzy"], 1)):
        status, text = said(tmp_path, *words, "--json")
        found = json.loads(text)
        assert status == exit_status and (found["toto"], found["kind"]) == (1, "error")
        (item,) = found["items"]
        assert item["status"] == exit_status and set(item) == {"message", "target", "hint", "status"}
    assert said(tmp_path, "log")[1].startswith("toto: this directory is no infra repo\nnext: ")


def test_the_documentation_is_what_the_command_says() -> None:
    page = Path(__file__).parents[1] / "docs/cli.md"
    assert page.read_text() == about.as_markdown() + "\n", "toto man --markdown > docs/cli.md"
