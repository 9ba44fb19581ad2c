"""Choosing targets by name, tag or kind."""

from collections.abc import Iterable, Sequence

from toto.base.errors import InputError
from toto.infra_repo.manifest import Manifest
from toto.ledger.target import Target
from toto.plan.kinds import KINDS


class Selector:
    """What a run is limited to: targets by name, tag or kind; everything when no word is given."""

    def __init__(self, only: Sequence[str], manifest: Manifest) -> None:
        self.only = set(only)
        self.known: set[str] = set(KINDS)
        for machine in manifest.machines.values():  # one that waits for its host file is known as well
            self.known |= {machine.name, *machine.tags}

    def takes(self, target: Target, tags: Iterable[str] = ()) -> bool:
        """Whether a run takes a target."""
        words = {target.name, str(target), target.kind, *tags}
        self.known |= words
        return not self.only or bool(words & self.only)

    def check(self) -> None:
        """Raises `InputError` for words that no target has, once all have been asked for."""
        if unknown := sorted(self.only - self.known):
            raise InputError(f"there is no target, tag or kind {', '.join(unknown)}", target="only",
                             hint="known are " + ", ".join(sorted(self.known)))
