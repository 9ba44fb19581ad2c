"""What test scripts are given to find the machine that they test."""

from pathlib import Path

import pytest

from toto.rehearsal.phase_run import Endpoint, PhasePassed
from toto.rehearsal.results import PhaseResult
from toto.rehearsal.suite import Phase


def test_scripts_are_given_the_machine_and_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {"PREFECT_API_AUTH_STRING": "toto:secret", "TOTO_STATE": "/s"}
    for name, value in {"HOME": "/h", "PATH": "/bin", **secrets}.items():
        monkeypatch.setenv(name, value)
    for name in ("LANG", "LC_ALL", "TMPDIR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    endpoint = Endpoint(config=Path("/run/ssh_config"), address="127.0.0.1", ports={80: 30_080})
    assert endpoint.environment("web1", Phase.SMOKE, Path("/tools")) == {
        "HOME": "/h",
        "PATH": "/tools:/bin",
        "TOTO_HOST": "web1",
        "TOTO_PHASE": "smoke",
        "TOTO_SSH_CONFIG": "/run/ssh_config",
        "TOTO_ADDRESS": "127.0.0.1",
        "TOTO_PORT_80": "30080",
    }


def test_a_phase_without_scripts_passes_with_no_tests() -> None:
    assert PhasePassed.of(PhaseResult("web1", Phase.SMOKE)) == PhasePassed(tests=0, seconds=0)
