"""A document, and keys that sign it."""

import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from flying_monkey.desired import Desired, Machine, System

HOST_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIHl1bmdlcnRoYW55b3V0aGluazAwMDAwMDAwMDAwMDAw"
ISSUED = datetime(2026, 3, 1, 12, tzinfo=UTC)


def system(letter: str) -> System:
    return System(f"/nix/store/{letter * 32}-nixos-system-web1-24.11", f"sha256:{'0' * 51}{letter}")


@pytest.fixture
def document() -> Desired:
    return Desired(
        repo="infra",
        machine=Machine("web1", HOST_KEY),
        serial=7,
        issued=ISSUED,
        expires=datetime(2026, 3, 8, 12, tzinfo=UTC),
        phase="try",
        activation="switch",
        system=system("a"),
        good=system("b"),
    )


@pytest.fixture(scope="session")
def new_key(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes a signing key; the public half is beside it."""

    def make(name: str) -> Path:
        file = tmp_path_factory.mktemp("key") / name
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", file], check=True)
        return file

    return make
