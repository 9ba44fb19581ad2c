"""The argument of a kind's revert: the target, the run that reverts it, and what that run knows about it."""

from dataclasses import dataclass
from pathlib import Path

from toto.infra_repo.manifest import Manifest
from toto.infra_repo.settings import Settings
from toto.ledger.target import Target


@dataclass(frozen=True)
class Reversal:
    """One target that `run`, which has an open intent on it, reverts because of `why`; "": it was only tried.

    `manifest` and `settings` are those of the commit that was being deployed. When a machine does not answer, the
    revert waits for its watchdog to revert it. That has begun to count by `since`, in seconds since 1970.
    """

    repo: Path
    run: str
    target: Target
    manifest: Manifest
    settings: Settings
    why: str
    since: float
