"""Fifteen random sequences of what happens to a root: whatever it was, a failed run harms nothing."""

import shutil
from pathlib import Path

import pytest

from tests import terraform_provider
from tests.terraform import sequences

pytestmark = [
    pytest.mark.minutes(1.5),
    pytest.mark.skipif(shutil.which("terraform") is None, reason="THERE IS NO TERRAFORM on this machine"),
]


async def test_a_failed_run_harms_nothing_in_any_sequence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    provider = terraform_provider.install(tmp_path / "provider")
    monkeypatch.setenv("TOTO_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("TF_CLI_CONFIG_FILE", str(provider))
    monkeypatch.setenv("TOTO_CELL_READ", ":".join(map(str, terraform_provider.needs(provider))))
    ends = await sequences.sequences(tmp_path / "roots", 15, seed=11)
    assert ends.total() == 15 and ends["is back"] >= 5 and ends["cannot go back"] >= 1, ends
