"""A trial: the scripts of one phase against one machine, in a sandbox or for real. What they are told, what came of it.

How they are run is `toto.rehearsal.run`'s.
"""

import os
from pathlib import Path
from typing import Final, Self

from toto.base.model import Model
from toto.rehearsal.results import PhaseResult
from toto.rehearsal.suite import Phase

_PASSED_ON: Final = ("HOME", "LANG", "LC_ALL", "TMPDIR", "TERM")  # of toto's own environment


class Reached(Model):
    """How test scripts reach the machine: ssh_config, address, and where each of its ports is."""

    config: Path
    address: str
    ports: dict[int, int]

    def environment(self, host: str, phase: Phase, tools: Path) -> dict[str, str]:
        """The whole environment of a test script, `tools` first on its PATH. No secret of toto's own is in it."""
        kept = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        return kept | {
            "PATH": f"{tools}:{os.environ.get('PATH', os.defpath)}",
            "TOTO_HOST": host, "TOTO_PHASE": str(phase), "TOTO_SSH_CONFIG": str(self.config),
            "TOTO_ADDRESS": self.address,
            **{f"TOTO_PORT_{port}": str(where) for port, where in self.ports.items()}}


class Trial(Model):
    """How many tests of a phase passed, in how many seconds."""

    tests: int
    seconds: float

    @classmethod
    def of(cls, result: PhaseResult) -> Self:
        """What came of a phase that passed."""
        return cls(tests=sum(len(each.report.tests) for each in result.results), seconds=result.seconds)
