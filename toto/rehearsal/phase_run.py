"""One run of a phase's test scripts, in a sandbox or on the machine itself: what they are given, and what came of it.

`toto.rehearsal.run` runs them.
"""

import os
from pathlib import Path
from typing import Final, Self

from toto.base.model import Model
from toto.rehearsal.results import PhaseResult
from toto.rehearsal.suite import Phase

_PASSED_ON: Final = ("HOME", "LANG", "LC_ALL", "TMPDIR", "TERM")  # of toto's own environment


class Endpoint(Model):
    """How test scripts reach the machine: its ssh_config, its address, and the port that leads to each of its ports."""

    config: Path
    address: str
    ports: dict[int, int]

    def environment(self, host: str, phase: Phase, tools: Path) -> dict[str, str]:
        """The whole environment of a test script. `tools` comes first on its PATH; it holds no secret of toto's."""
        kept = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        return kept | {
            "PATH": f"{tools}:{os.environ.get('PATH', os.defpath)}",
            "TOTO_HOST": host,
            "TOTO_PHASE": str(phase),
            "TOTO_SSH_CONFIG": str(self.config),
            "TOTO_ADDRESS": self.address,
            **{f"TOTO_PORT_{port}": str(where) for port, where in self.ports.items()},
        }


class PhasePassed(Model):
    """A phase passed: how many tests it had, and how many seconds they took."""

    tests: int
    seconds: float

    @classmethod
    def of(cls, result: PhaseResult) -> Self:
        """The summary of a phase that passed."""
        return cls(tests=sum(len(each.report.tests) for each in result.results), seconds=result.seconds)
