"""What nix says of an evaluation, as the operator reads it."""

from pathlib import Path

import pytest

from toto.base.process import Completed
from toto.nix import commands as nix
from toto.nix.hosts import Host

COPY = f"/nix/store/{'0' * 32}-source"
INPUT = f"/nix/store/{'1' * 32}-source"


def told(tmp_path: Path, said: str, host: str = "hosts/a.nix") -> str:
    (tmp_path / "hosts").mkdir(exist_ok=True)
    (tmp_path / "hosts/a.nix").touch()
    return str(nix._evaluation_failed(Completed((), 1, "", said, 0), Host("a", host), tmp_path, COPY))


def test_a_position_in_a_text_of_totos_is_not_the_operators(tmp_path: Path) -> None:
    said = "error: attribute 'x' missing\n\n at «string»:45:12:\n\n … while evaluating\n\n at /infra/hosts/a.nix:3:1:"
    assert told(tmp_path, said).startswith("a: does not evaluate (hosts/a.nix:3):\nerror: attribute 'x' missing\n")


@pytest.mark.parametrize("stray", [f"{INPUT}/hosts/a.nix", "../secret", "/etc/passwd", "x" * 500])
def test_only_a_file_of_the_operators_is_theirs_to_fix(tmp_path: Path, stray: str) -> None:
    said = told(tmp_path, f"error: no\n\n at {stray}:1:1:\n\n at {COPY}/hosts/a.nix:7:1:")
    assert said.startswith("a: does not evaluate (hosts/a.nix:7):\nerror: no\n")
    assert f"at {stray[:100]}" in said


def test_a_module_of_totos_names_itself(tmp_path: Path) -> None:
    said = told(tmp_path, "error: The option `x' is defined twice\n\n at /toto/rehearsal.nix:20:3:")
    assert "at toto's nix/rehearsal.nix:20:3" in said
    assert said.endswith("next: fix hosts/a.nix and push again")


def test_a_lock_that_totos_nix_is_too_old_for(tmp_path: Path) -> None:
    said = told(tmp_path, "error: lock file '/infra/flake.lock' has unsupported version 8")
    assert said.endswith(
        "toto's nix is too old for version 8 of flake.lock: give toto a newer nix, or lock with its own"
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
    said = f"warning: you don't have Internet access\n{line}\ncopying\n{line}\n"
    assert nix.warnings(said) == ["warning: x is deprecated"]
