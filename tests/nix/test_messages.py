"""What nix says of an evaluation, as the operator reads it."""

from pathlib import Path

import pytest

from toto.base.process import Completed
from toto.cell.limits import Limits
from toto.nix import commands, messages
from toto.nix.hosts import Host

COPY = f"/nix/store/{'0' * 32}-source"
INPUT = f"/nix/store/{'1' * 32}-source"


def told(tmp_path: Path, said: str, host: str = "hosts/a.nix") -> str:
    (tmp_path / "hosts").mkdir(exist_ok=True)
    (tmp_path / "hosts/a.nix").touch()
    return str(messages.failed(Completed((), 1, "", said, 0), Host("a", host), tmp_path, COPY))


def test_a_position_in_a_text_of_totos_is_not_the_operators(tmp_path: Path) -> None:
    said = "error: attribute 'x' missing\n\n at «string»:45:12:\n\n … while evaluating\n\n at /infra/hosts/a.nix:3:1:"
    assert told(tmp_path, said).startswith("a: does not evaluate (hosts/a.nix:3):\nerror: attribute 'x' missing\n")


@pytest.mark.parametrize("stray", [f"{INPUT}/hosts/a.nix", "../secret", "/etc/passwd", "x" * 500])
def test_only_a_file_of_the_operators_is_theirs_to_fix(tmp_path: Path, stray: str) -> None:
    said = told(tmp_path, f"error: no\n\n at {stray}:1:1:\n\n at {COPY}/hosts/a.nix:7:1:")
    assert said.startswith("a: does not evaluate (hosts/a.nix:7):\nerror: no\n")
    assert f"at {stray[:100]}" in said


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("nixpkgs/nixos", "next: say where nixpkgs is: nix.nixpkgs in toto.toml, or NIX_PATH of toto's server"),
        (
            "home-manager/nixos",
            "next: toto's NIX_PATH has no <home-manager>: pin it in the repo (npins, niv, or an input",
        ),
    ],
)
def test_what_is_not_on_the_search_path_is_named(tmp_path: Path, missing: str, words: str) -> None:
    said = told(
        tmp_path, f"error: file '{missing}' was not found in the Nix search path (add it using $NIX_PATH or -I)"
    )
    assert words in said


def test_a_module_of_totos_names_itself(tmp_path: Path) -> None:
    said = told(tmp_path, "error: The option `x' is defined twice\n\n at /toto/rehearsal.nix:20:3:")
    assert "at toto's nix/rehearsal.nix:20:3" in said
    assert said.endswith("next: fix hosts/a.nix and push again")


def test_a_lock_that_totos_nix_is_too_old_for(tmp_path: Path) -> None:
    said = told(tmp_path, "error: lock file '/infra/flake.lock' has unsupported version 8")
    assert said == (
        "a: toto's nix is too old for version 8 of flake.lock:\n"
        "error: lock file 'flake.lock' has unsupported version 8\n"
        "next: give toto a newer nix, or lock with the nix that it has"
    )


@pytest.mark.parametrize(
    "line",
    [
        "evaluation warning: x is deprecated",
        "trace: warning: x is deprecated",
        "trace: evaluation warning: x is deprecated",
        "trace: \x1b[1;35mevaluation warning:\x1b[0m x is deprecated",
        "trace: \x1b[1;31mwarning: x is deprecated\x1b[0m",
    ],
)
def test_a_warning_is_told_once_under_every_nix(line: str) -> None:
    said = f"warning: you don't have Internet access\n{line}\ncopying path x\n{line}\n"
    assert messages.warnings(said) == ["warning: x is deprecated"]


def test_a_warning_has_all_its_lines() -> None:
    said = "trace: warning: system.stateVersion is not set,\ndefaulting to 24.11\nwarning: you did not specify a root"
    assert messages.warnings(said) == ["warning: system.stateVersion is not set,\n  defaulting to 24.11"]


NEW_NIX = f"""\
warning: Git tree is dirty
error:
       … while calling the 'head' builtin
         at {INPUT}/lib/attrsets.nix:1575:11:
         1574|         || pred here
         1575|           head values
             |           ^
       … while evaluating the option `system.build.toplevel':

       … while evaluating definitions from `{INPUT}/nixos/modules/system/activation/top-level.nix':

       … while evaluating the option `networking.hostName':

       (stack trace truncated; use '--show-trace' to show the full, detailed trace)

       error: A definition for option `networking.hostName' is not of type `string'. Definition values:
       - In `{COPY}/hosts/a.nix, via option flake.nixosModules.a': 3
"""
LOST = f"""\
error:
       … while evaluating the attribute 'value'
         at {INPUT}/lib/modules.nix:809:9:
       … while evaluating the option `services.web.port':
       … while calling anonymous lambda
         at {COPY}/hosts/a.nix:12:3:
       error: attempt to call something which is not a function
       at {INPUT}/lib/lists.nix:7:1:
"""
OLD_NIX = f"""\
error: attempt to call something which is not a function

       at {INPUT}/lib/lists.nix:7:1:

       … while calling anonymous lambda

       at {COPY}/hosts/a.nix:12:3:

       … while evaluating the option `services.web.port':

       … while evaluating the attribute 'value'

       at {INPUT}/lib/modules.nix:809:9:
"""
IFD = """\
error: builder for '/nix/store/x.drv' failed with exit code 1;
       last 1 log lines:
       > curl: (6) Could not resolve host: example.org
       For full logs, run 'nix-store -l /nix/store/x.drv'.
error: 1 dependencies of derivation '/nix/store/y.drv' failed to build
"""


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (
            NEW_NIX,
            """\
a: does not evaluate (hosts/a.nix):
error: A definition for option `networking.hostName' is not of type `string'. Definition values:
       - In `hosts/a.nix, via option flake.nixosModules.a': 3
next: fix hosts/a.nix and push again""",
        ),
        *(
            (
                said,
                f"""\
a: does not evaluate (hosts/a.nix:12):
error: attempt to call something which is not a function{gap}
       at {INPUT}/lib/lists.nix:7:1:
       … while calling anonymous lambda at hosts/a.nix:12:3
       … while evaluating the option `services.web.port':
next: fix hosts/a.nix:12 and push again""",
            )
            for said, gap in ((LOST, ""), (OLD_NIX, "\n"))
        ),
        (
            "error: flake 'path:/infra?lastModified=1&narHash=sha256-x=' requires lock file changes but they're not "
            "allowed due to '--no-update-lock-file'",
            """\
a: its flake.lock is not what flake.nix asks for:
error: flake 'path:.' requires lock file changes but they're not allowed due to '--no-update-lock-file'
next: run `nix flake lock` and commit flake.lock""",
        ),
        (
            "warning: error: unable to download 'https://example.org/x': no (6); retrying in 1 ms\n"
            "error: unable to download 'https://example.org/x': no (6)\n"
            "(use '--show-trace' to show detailed location information)",
            """\
a: does not evaluate (hosts/a.nix):
error: unable to download 'https://example.org/x': no (6)
next: an evaluation has no network: have https://example.org/x as an input of a flake, or fetch it in a build """
            "(pkgs.fetchurl), with its hash",
        ),
    ],
)
def test_an_error_reads_like_this_under_every_nix(tmp_path: Path, said: str, message: str) -> None:
    assert told(tmp_path, said) == message


def test_a_file_of_which_the_tree_has_none_is_not_the_operators_to_fix(tmp_path: Path) -> None:
    said = told(tmp_path, "error: The option `x' has conflicting definition values:\n- In `<unknown-file>': 1")
    assert said.startswith("a: does not evaluate (hosts/a.nix):\n")


def test_a_text_of_totos_names_its_file(tmp_path: Path) -> None:
    lines = (messages.EXPRESSIONS / "evaluate.nix").read_text().splitlines()
    number = next(number for number, line in enumerate(lines, 1) if "configured =" in line)
    said = told(
        tmp_path, f"error: attribute 'a' missing\n\n at «string»:{number}:3:\n\n  {number}|{lines[number - 1]}\n"
    )
    assert f"at toto's nix/evaluate.nix:{number}:3:" in said


def test_a_vm_that_does_not_evaluate_says_what_to_replace_where(tmp_path: Path) -> None:
    host = Host("a", "hosts/a.nix")
    said = Completed((), 1, "", "error: The option `services.foo' is used but not defined.", 0)
    assert (
        str(messages.of_the_vm(messages.failed(said, host, tmp_path), host))
        == """\
a: its VM does not evaluate (hosts/a.nix):
error: The option `services.foo' is used but not defined.
next: replace `services.foo` in `virtualisation.vmVariant` of hosts/a.nix: the machine's own system evaluates"""
    )


@pytest.mark.parametrize(
    ("said", "transient"),
    [
        (IFD, True),
        ("error: unable to download 'https://cache.nixos.org/abc.narinfo': Connection refused", True),
        ("error: unable to download 'https://example.org/x.tar.gz': Could not resolve host", False),
        ("error: builder for '/nix/store/x.drv' failed with exit code 1;\n > make: no rule", False),
    ],
)
def test_a_download_of_a_build_that_failed_is_the_networks(tmp_path: Path, said: str, transient: bool) -> None:
    host = Host("a", "hosts/a.nix")
    error = messages.failed(Completed((), 1, "", said, 0), host, tmp_path)
    assert error.transient is transient
    if transient:
        assert str(messages.of_the_network(error, "x could not be downloaded", 3)).startswith(
            "a: x could not be downloaded, after 3 tries:\nerror: "
        )


@pytest.mark.parametrize("failures", [2, 3])
async def test_a_download_that_fails_is_tried_again_and_then_the_networks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    """A network that comes back cannot be had in a test: an evaluation that fails so often stands in for it."""
    host = Host("a", "hosts/a.nix")
    tries = iter(range(failures))
    done = Completed((), 0, "", "", 0)

    async def evaluate(*_: object) -> Completed:
        if next(tries, None) is not None:
            raise messages.failed(Completed((), 1, "", IFD, 0), host, tmp_path)
        return done

    monkeypatch.setattr(commands, "_evaluate_once", evaluate)
    monkeypatch.setattr(commands, "_PAUSES", (0, 0))
    if failures == 2:
        assert await commands._evaluate(host, tmp_path, [], Limits(), 60) is done
        return
    with pytest.raises(messages.EvaluationFailed) as caught:
        await commands._evaluate(host, tmp_path, [], Limits(), 60)
    assert str(caught.value).startswith(
        "a: what its evaluation builds could not be downloaded, after 3 tries:\nerror: builder for"
    )
    assert str(caught.value).endswith(
        "that is the network's or the other server's; start the run again when it answers"
    )
