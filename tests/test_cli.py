"""The command line as people use it."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from pytest import MonkeyPatch

from tests.conftest import free_port
from tests.ledger.test_ledger import WEB1, deployed, intent, note
from tests.repos import InfraRepo, git
from toto import __version__
from toto.base.errors import InputError
from toto.cli import about, deploy, verbs
from toto.cli.output import show
from toto.git_host import shell
from toto.infra_repo import manifest, working
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
    none = said(tmp_path, "log", "--author", "nobody", "--repo", str(book.repo))
    assert none == (0, "the history has nothing of that\n")
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


@pytest.fixture(scope="module")
def on_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PATH with the command `toto`."""
    place = tmp_path_factory.mktemp("bin")
    (place / "toto").write_text(
        f'#!/bin/sh\nPYTHONPATH={Path(__file__).parents[1]} exec {sys.executable} -m toto.cli "$@"\n'
    )
    (place / "toto").chmod(0o755)
    return f"{place}:{os.environ['PATH']}"


COMPLETED: dict[str, Sequence[str]] = {
    "bash": (
        "bash",
        "--norc",
        "-c",
        'source "$1"; COMP_WORDS=(toto fre); COMP_CWORD=1; _toto_completion toto; echo "${COMPREPLY[@]}"',
    ),
    # (zsh completes nothing without a terminal; what its function asks is asked here, and its script is read.)
    "zsh": ("zsh", "-f", "-c", 'zsh -n "$1" && _TOTO_COMPLETE=complete_zsh _TYPER_COMPLETE_ARGS="toto fre" toto'),
    "fish": ("fish", "--no-config", "-c", 'source $argv[1]; complete --do-complete "toto fre"'),
}


@pytest.mark.parametrize("shell", list(COMPLETED))
def test_a_shell_completes_the_verbs(shell: str, tmp_path: Path, on_path: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell}")
    script = tmp_path / "completion"
    script.write_text(said(tmp_path, "completion", shell)[1])
    argv = [*COMPLETED[shell], *([] if shell == "fish" else ["-"]), str(script)]
    done = subprocess.run(argv, env=os.environ | {"PATH": on_path}, capture_output=True, text=True, check=False)
    assert "freeze" in done.stdout and "unfreeze" not in done.stdout.split(), done


def test_the_version_and_the_man_page(tmp_path: Path) -> None:
    assert said(tmp_path, "--version") == (0, f"toto {__version__}\n")
    page = said(tmp_path, "man")[1]
    assert page.startswith(".TH TOTO 1") and page == about.as_man_page() + "\n"
    for verb in verbs.VERBS:
        assert f".SS toto {verb.replace('-', chr(92) + '-')}" in page
    if shutil.which("groff"):
        argv = ["groff", "-man", "-Tutf8", "-ww", "-z"]
        assert subprocess.run(argv, input=page, capture_output=True, text=True, check=True).stderr == ""


def test_help_waits_for_nothing_that_only_a_verb_needs() -> None:
    text = (
        "import sys; from toto.cli import verbs; verbs.run(['--help']); "
        "print(*{'asyncio', 'pydantic', 'git', 'rich', 'prefect', 'json'} & {*sys.modules}, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert done.stderr == "\n" and done.stdout.startswith("Usage: ")


def test_what_goes_over_ssh_is_what_the_git_host_admits() -> None:
    assert {each.split()[0] for each in shell.COMMANDS} - {"repo"} == verbs.OVER_SSH


@pytest.mark.parametrize(
    ("document", "status", "result"),
    [
        ("1..1\nok 1 - a\n", "0", "passes: 1 test passed"),
        ("1..1\nok 1 - a\n", "1", "FAILS: "),
        ("1..2\nok 1 - a\nnot ok 2 - b\n", "1", "FAILS: 1 of 2 tests failed: 2 b"),
        ("hello\n", "0", "FAILS: it printed no TAP"),
        ("1..1\nok 1 - \x1b[2J\n", "0", "passes: "),
    ],
)
def test_tap_says_what_toto_thinks_of_a_document(tmp_path: Path, document: str, status: str, result: str) -> None:
    (tmp_path / "out.tap").write_text(document)
    exit_status, text = said(tmp_path, "tap", "out.tap", "--status", status)
    assert text.splitlines()[-1].startswith(result) and exit_status == int(result.startswith("FAILS"))
    assert "\x1b" not in text
    (verdict,) = items(tmp_path, "tap", "out.tap", "--status", status)
    assert verdict["passed"] == result.startswith("passes")
    assert said(tmp_path, "tap", "none.tap") == (2, "toto: none.tap: cannot be read: No such file or directory\n")


def test_a_first_manifest_lists_the_hosts_and_deploys_none(tmp_path: Path) -> None:
    assert said(tmp_path, "init")[1].startswith("toto: there are no hosts here\n")
    for name in ("web1.nix", "db/default.nix", "not a host.nix", "lib/helper.txt"):
        (tmp_path / "hosts" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "hosts" / name).write_text("{ }")
    assert said(tmp_path, "init") == (0, "machines.yaml lists db, web1\n")
    fleet = manifest.load(tmp_path / "machines.yaml")
    assert [(each.name, each.address, each.deployed) for each in fleet.machines.values()] == [
        ("db", "db", False),
        ("web1", "web1", False),
    ]
    assert "machines.yaml: is there already" in said(tmp_path, "init")[1]


@pytest.mark.parametrize("url", ["toto.example.org", "ssh://toto", "http://[::1", "http://h:99999"])
def test_a_wrong_address_of_a_different_toto_is_told(tmp_path: Path, url: str) -> None:
    status, text = said(tmp_path, "status", TOTO_URL=url)
    assert status == 2 and text.startswith("toto: TOTO_URL: is no") and "https://USER:PASSWORD@" in text


def test_a_different_toto_that_does_not_answer_is_told(tmp_path: Path) -> None:
    status, text = said(tmp_path, "log", TOTO_URL=f"http://u:secret@127.0.0.1:{free_port()}")
    assert status == 2 and "no answer" in text and "is TOTO_URL right?" in text and "secret" not in text


async def test_a_working_tree_is_a_commit_without_what_it_ignores(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setenv("TOTO_STATE", str(tmp_path / "state"))
    tree = InfraRepo(tmp_path).work
    assert working.here(tree) is None, "it has no machines.yaml"
    for name, text in {
        ".gitignore": "result\n",
        "machines.yaml": "machines: []\n",
        "result": "x",
        "new.nix": "1",
    }.items():
        (tree / name).write_text(text)
    (tree / "hosts").mkdir()
    assert working.here(tree / "hosts") == tree
    repo, commit = await working.commit(tree)
    assert git("ls-tree", "--name-only", "-r", commit, cwd=repo).split() == [".gitignore", "machines.yaml", "new.nix"]
    (tree / "new.nix").write_text("2")
    again = await working.commit(tree)
    assert again[0] == repo and git("show", f"{again[1]}:new.nix", cwd=repo) == "2"
    assert git("status", "--short", cwd=tree).split() == ["??", ".gitignore", "??", "machines.yaml", "??", "new.nix"]


async def test_what_to_go_back_to_is_what_was_deployed_before(tmp_path: Path) -> None:
    book, first = await _deployed(tmp_path)
    work = tmp_path / "work"
    (work / "README.md").write_text("more")
    git("add", "--all", cwd=work)
    git("commit", "-q", "-m", "second", cwd=work)
    git("push", "-q", "origin", "main", cwd=work)
    second = git("rev-parse", "HEAD", cwd=work)
    before = deploy.before
    with pytest.raises(InputError, match="nothing was deployed before"):
        before(book.repo, None)
    good = deployed("/nix/store/new").model_copy(update={"commit": second})
    await book.write(WEB1, steps.intend(intent("run-3")), "web1: intent")
    await book.write(WEB1, steps.good(good, "run-3"), "web1: good")
    assert before(book.repo, None) == (first, [])
    assert before(book.repo, "web1") == before(book.repo, "host/web1") == (first, ["host/web1"])
    assert before(book.repo, second[:10]) == before(book.repo, "main") == (second, [])
    for word in ("web2", "xyzzy", "../x", "--help"):
        with pytest.raises(InputError, match="no commit and no deployed target"):
            before(book.repo, word)


async def test_a_plan_says_by_its_exit_status_whether_something_would_change(tmp_path: Path) -> None:
    repo = InfraRepo(tmp_path)
    repo.commit({"machines.yaml": "machines: []\n"})
    words = ("plan", "--no-build", "--exit-code", "--repo", str(repo.bare))
    assert said(tmp_path, *words)[0] == 0
    repo.commit({"terraform/main.tf": 'output "x" { value = 1 }\n'})
    assert said(tmp_path, *words)[0] == 2 and said(tmp_path, *words[:2], *words[3:])[0] == 0
    (row,) = items(tmp_path, *words[:2], *words[3:])
    assert (row["target"], row["action"], row["held"]) == ("terraform/main", "deploy", "")
    await Ledger(repo.bare).write(Target("terraform", "main"), steps.freeze(Frozen(by="a", why="b")), "frozen")
    (row,) = items(tmp_path, *words[:2], *words[3:])
    assert row["held"] == "frozen by a: b" and "held back" in row["action"]
    status, text = said(tmp_path, "diff", "terraform/main", "--repo", str(repo.bare))
    assert status == 0 and text.startswith("terraform/main: not deployed → ") and "new" in text
    repo.commit({"machines.yaml": "machines: 7\n"})
    assert said(tmp_path, *words)[0] == 1 and said(tmp_path, *words[:2], *words[3:])[0] == 2


async def test_status_follows_the_fleet(tmp_path: Path) -> None:
    book, _ = await _deployed(tmp_path)
    argv = [sys.executable, "-m", "toto.cli", "status", "--watch", "--json", "--repo", str(book.repo)]
    with subprocess.Popen(
        argv,
        env=os.environ | {"TOTO_STATE": str(tmp_path / "state")},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as toto:
        assert toto.stdout is not None
        lines = toto.stdout

        def frozen() -> dict[str, Any]:
            read = itertools.takewhile(lambda line: line != "}\n", lines)
            return {each["target"]: each["frozen"] for each in json.loads("".join([*read, "}"]))["items"]}

        try:
            assert frozen() == {"host/web1": None, "host/web2": None}
            await book.write(WEB1, steps.freeze(Frozen(by="alice", why="an audit")), "web1: frozen")
            assert frozen()["host/web1"] == {"by": "alice", "why": "an audit", "at": ""}
        finally:
            toto.kill()
