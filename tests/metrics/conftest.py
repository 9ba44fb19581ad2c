"""The fixtures of these tests."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.flying_monkey.conftest import new_key
from tests.metrics.fleet import SmallFleet

__all__ = ["new_key"]


@pytest.fixture(scope="session")
def host_key(new_key: Callable[[str], Path]) -> Path:
    """The ssh host key of web1."""
    return new_key("ssh_host_ed25519_key")


@pytest.fixture
async def fleet(tmp_path: Path, host_key: Path, monkeypatch: pytest.MonkeyPatch) -> SmallFleet:
    """A small fleet, in a state of the test's own."""
    monkeypatch.setenv("TOTO_STATE", str(tmp_path / "state"))
    made = SmallFleet(tmp_path / "repos", host_key)
    await made.make()
    return made
