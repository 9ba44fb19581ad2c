"""What a kind's revert is given: the target, under which intent it is reverted, and what is known of it."""

from dataclasses import dataclass
from pathlib import Path

from toto.infra_repo.manifest import Manifest
from toto.infra_repo.settings import Settings
from toto.ledger.target import Target


@dataclass(frozen=True)
class Reversal:
    """One target to be reverted by `run`, which has an open intent on it, because of `why`.

    `manifest` and `settings` are those of the commit that was being deployed. A machine that does not answer is given
    `patience` seconds: time for its watchdog to bring it back.
    """

    repo: Path
    run: str
    target: Target
    manifest: Manifest
    settings: Settings
    why: str
    patience: float
