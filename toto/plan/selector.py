"""Selects targets by name, tag or kind."""

from collections.abc import Iterable, Sequence

from toto.base.errors import InputError
from toto.infra_repo.manifest import Manifest
from toto.ledger.target import Target
from toto.plan.kinds import KINDS


class Selector:
    """The targets that a run is limited to, by name, tag or kind; all targets when `only` is empty."""

    def __init__(self, only: Sequence[str], manifest: Manifest) -> None:
        self.only = set(only)
        self.known: set[str] = set(KINDS)
        for machine in manifest.machines.values():  # also those whose host file does not exist yet
            self.known |= {machine.name, *machine.tags}

    def takes(self, target: Target, tags: Iterable[str] = ()) -> bool:
        """Whether the run includes a target."""
        words = {target.name, str(target), target.kind, *tags}
        self.known |= words
        return not self.only or bool(words & self.only)

    def check(self) -> None:
        """Raises `InputError` for words that match no target. Call it after `takes` was called for all of them."""
        if unknown := sorted(self.only - self.known):
            raise InputError(
                f"there is no target, tag or kind {', '.join(unknown)}",
                target="only",
                hint="known are " + ", ".join(sorted(self.known)),
            )
