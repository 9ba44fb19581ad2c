"""Selects targets by name, tag or kind."""

import difflib
from collections.abc import Collection, Iterable, Sequence

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

    def takes(self, target: Target, tags: Iterable[str] = (), *, due: bool = True) -> bool:
        """Whether the run includes a target. One that is not `due` it includes only by its name."""
        names = {target.name, str(target)}
        words = {*names, target.kind, *tags} if due else names
        self.known |= words
        return bool(words & self.only) if self.only else due

    def names(self, target: Target) -> bool:
        """Whether the run is limited to some targets by name, and this is one of them."""
        return not self.only.isdisjoint({target.name, str(target)})

    def check(self) -> None:
        """Raises `InputError` for words that match no target. Call it after `takes` was called for all of them."""
        if unknown := sorted(self.only - self.known):
            hint = meant(unknown[0], self.known)
            raise InputError(f"there is no target, tag or kind {', '.join(unknown)}", target="only", hint=hint)


def meant(word: str, known: Collection[str]) -> str:
    """A hint for a word that is not one of `known`: the closest ones, or else all of them."""
    close = difflib.get_close_matches(word[:100], known, n=3)
    return f"did you mean {' or '.join(close)}?" if close else "known are " + ", ".join(sorted(known))
