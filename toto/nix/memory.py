"""What the evaluations of a repo's hosts have used of memory, remembered from run to run: a file in the repo's state.

It decides how many run side by side, and when one is ended. What it says is never trusted: a number that is too low
costs a second try, and one that is too high is not more than the machine has.
"""

import json
import logging
import os
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self, TypeVar

from toto.base import files, paths
from toto.base.resources import Room, memory_available
from toto.nix.messages import OutOfMemory

log = logging.getLogger(__name__)

T = TypeVar("T")
MB: Final = 1_000_000
_LARGEST: Final = 4_000_000  # bytes of the file
_MOST: Final = 20_000  # hosts
_HIGHEST: Final = 16_777_216  # MB


@dataclass
class Allowance:
    """The bytes that one evaluation may use, and the most that it was seen to use; 0 for one that was too short."""

    most: int
    used: int = 0


@dataclass
class Remembered:
    """The MB that each evaluation used last time, by the host's name, and by `NAME#vm` for that of its VM."""

    file: Path
    used: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, file: Path) -> Self:
        """What the file says; nothing for one that is missing or broken."""
        try:
            with file.open("rb") as source:
                found = json.loads(source.read(_LARGEST))
            used = {name: mb for name, mb in found.items() if type(mb) is int and 0 < mb <= _HIGHEST}
        except (OSError, ValueError, AttributeError, RecursionError):
            used = {}
        return cls(file, used)

    @classmethod
    def in_repo(cls, repo: Path) -> Self:
        """What the evaluations of an infra repo's hosts have used."""
        return cls.of(paths.repo_state(repo) / "evaluations.json")

    def write(self, hosts: Collection[str] | None = None) -> None:
        """Write the file; when `hosts` are all that there are, without those that have gone. A full disk loses it."""
        kept = [name for name in sorted(self.used) if hosts is None or name.partition("#")[0] in hosts][:_MOST]
        with suppress(OSError):
            files.write(self.file, json.dumps({name: self.used[name] for name in kept}))


class Evaluations:
    """Evaluations side by side, as many as memory and cores allow, by what each used last time.

    `usual` is the MB of one that is not known; one may use twice what is expected. `most` is the most that `usual` may
    be on this server.
    """

    def __init__(self, remembered: Remembered, usual: int, most: int) -> None:
        self.remembered, self.usual, self.most = remembered, usual, most
        self.room = Room(memory_available(), os.cpu_count() or 1)

    async def run(self, name: str, work: Callable[[Allowance], Awaitable[T]]) -> T:
        """Evaluate as soon as there is room. One that uses too much is tried once more alone, with more, if there is.

        Raises `OutOfMemory`, and what `work` raises.
        """
        expected = self.remembered.used.get(name, self.usual)
        allowed = 2 * max(expected, self.usual)
        try:
            async with self.room.of(expected):
                return await self._noted(name, allowed, work)
        except OutOfMemory as error:
            first = error
        async with self.room.alone():
            more = min(memory_available() * 3 // 4, 2 * self.most)
            if more <= allowed:
                raise _at_last(first, "and there is no more on this machine")
            log.warning(
                "%s: its evaluation used more than %d MB of memory; toto tries it again, alone and with %d MB",
                first.target,
                allowed,
                more,
            )
            try:
                return await self._noted(name, more, work)
            except OutOfMemory as error:
                raise _at_last(error, "although it was alone") from None

    async def _noted(self, name: str, allowed: int, work: Callable[[Allowance], Awaitable[T]]) -> T:
        allowance = Allowance(allowed * MB)
        try:
            return await work(allowance)
        finally:
            if allowance.used:
                self.remembered.used[name] = -(-allowance.used // MB)


def _at_last(error: OutOfMemory, why: str) -> OutOfMemory:
    return OutOfMemory(
        f"{error.message}, {why}",
        target=error.target,
        hint="is there a recursion without end? otherwise toto's machine needs more memory, or its server.toml "
        "a higher most.nix.evaluate_memory",
    )
