"""Finds the failures that are one: the same words about several targets are told once, with the targets named."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

NAMES: Final = 4  # shown of a list


@dataclass(frozen=True)
class Alike:
    """What was said of these targets: `text` is without their names before it, and may have several lines."""

    names: tuple[str, ...]
    text: str

    @property
    def first_line(self) -> str:
        return self.text.split("\n", 1)[0].removesuffix(":")


def alike(said: Iterable[tuple[str, str]]) -> list[Alike]:
    """Errors by target, those with the same text together, in the order in which the first of each came.

    Texts that differ only in the target's own name are the same as well: `hosts/{web1,web2}.nix`.
    """
    exact: dict[str, list[str]] = {}
    for name, text in said:
        exact.setdefault(text.removeprefix(f"{name}: "), []).append(name)
    groups: dict[str, list[tuple[str, list[str]]]] = {}
    for text, names in exact.items():
        key = re.sub(rf"(?<![\w.-]){re.escape(names[0])}(?![\w-])", "\0", text) if len(names) == 1 else text
        groups.setdefault(key, []).append((text, names))
    return [
        Alike(
            tuple(name for _, names in group for name in names),
            group[0][0] if len(group) == 1 else key.replace("\0", _braces([names[0] for _, names in group])),
        )
        for key, group in groups.items()
    ]


def _braces(names: Sequence[str]) -> str:
    return f"{{{','.join([*names[:NAMES], *(['…'] if len(names) > NAMES else [])])}}}"


def listed(names: Sequence[str]) -> str:
    """Names in a line. Of many, it has the first few and the number of the others."""
    more = len(names) - NAMES
    return ", ".join(names) if more < 2 else f"{', '.join(names[:NAMES])} and {more} more"


def all_of(names: Sequence[str]) -> str:
    """A line with all names, where `listed` leaves some out: whoever looks for one target finds it; else empty."""
    return f"all {len(names)}: {', '.join(names)}" if len(names) - NAMES > 1 else ""
