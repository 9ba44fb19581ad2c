"""A repository with toto's hooks but without a server, a pusher to it, and keys to sign with."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import free_port
from tests.git_host.test_host import Pusher
from toto.git_host import host as git_host


@pytest.fixture
async def repo(tmp_path: Path) -> Path:
    return await git_host.create(tmp_path / "infra.git", api_url=f"http://127.0.0.1:{free_port()}/api")


@pytest.fixture
def pusher(tmp_path: Path, repo: Path) -> Pusher:
    """Its pushes start nothing: there is no server. test_host.py tests that."""
    there = Pusher(tmp_path / "clone", repo)
    there.git("config", "push.pushOption", "skip")
    return there


@pytest.fixture
def signing(tmp_path: Path) -> Iterator[Path]:
    """A folder with the ssh keys `good` and `bad`, and the gpg homes `bob` (whose key it is) and `toto` (keyring)."""
    for name in ("good", "bad"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", tmp_path / name], check=True)
    yield tmp_path
    for home in ("bob", "toto"):
        if (tmp_path / home).exists():
            subprocess.run(["gpgconf", "--homedir", tmp_path / home, "--kill", "all"], check=False)
