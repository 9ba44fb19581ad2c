"""Says where what is live differs from a manifest, by value: a field is what the API server makes of it.

Fields that the manifest does not state are not compared; null, an empty value and one that is left out are the same.
"""

import hashlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Final

from toto.base import process
from toto.helm.diff import (
    LONGEST_LINE,
    Change,
    Difference,
    Field,
    below,
    changed,
    masks_of,
    names_of,
    opened,
    rank_of,
    shown,
)
from toto.helm.manifest import Key, Resource
from toto.helm.secret import Hidden, Masks

MOST_FIELDS: Final = 200  # of one resource
GONE: Final = "there is no such kind in the cluster any more"

_THE_SERVERS: Final = ("apiVersion", "status", "metadata.creationTimestamp", "metadata.managedFields")
# Below these every text is taken as it is; elsewhere it may be a quantity.
_VERBATIM: Final = (
    *("data", "stringData", "binaryData", "annotations", "labels", "matchLabels", "nodeSelector"),
    *("env", "args", "command"),
)
_MODE: Final = re.compile("0o?[0-7]+")
_QUANTITY: Final = re.compile(r"([+-]?(?:0|[1-9][0-9]*)(?:\.[0-9]*)?)(?:([eE][+-]?[0-9]{1,3})|(m|k|Ki|[MGTPE]i?)?)")
_POWERS: Final = {"": Decimal(1), "m": Decimal("0.001"), "k": Decimal(1000), "Ki": Decimal(1024)} | {
    unit + suffix: Decimal(base) ** power
    for power, unit in enumerate("MGTPE", 2)
    for suffix, base in (("", 1000), ("i", 1024))
}


@dataclass(frozen=True)
class Drift:
    """What differs, for a person, and a mark of each field that differs: `marks` tells later whether it still does.

    What a Secret holds has no mark.
    """

    difference: Difference
    marks: tuple[str, ...] = ()


def drift(
    stated: Mapping[Key, Resource],
    live: Mapping[Key, Resource],
    *,
    known: Collection[str] = (),
    absent: Collection[Key] = (),
    masks: Iterable[str] = (),
    to_come: bool = False,
) -> Drift:
    """Where the `live` resources differ from a manifest.

    `known` are marks of an earlier drift, which are left out. `absent` are those whose kind the cluster does not have.
    With `to_come` it is said as a change from what is live to what the manifest states.
    """
    hidden = masks_of([*stated.values(), *live.values()], masks)
    marks: list[str] = []
    changes = []
    for key in sorted(stated.keys() & live.keys()):
        comparison = _Comparison(key, hidden, to_come)
        comparison.find(stated[key], live[key])
        marks += (mark for _, mark in comparison.found)
        if fields := [each for each, mark in comparison.found if not mark or mark not in known]:
            changes.append(Change(str(key), tuple(fields)))
    gone = sorted(stated.keys() - live.keys())
    removed = tuple(f"{key}: {GONE}" if key in absent else str(key) for key in gone)
    return Drift(Difference(removed=removed, changed=tuple(changes)), tuple(each for each in marks if each))


@dataclass
class _Comparison:
    """Compares one resource with the live one. `found` has each difference with its mark."""

    key: Key
    masks: Masks
    to_come: bool = False
    found: list[tuple[Field, str]] = field(default_factory=list)
    _seen: set[tuple[int, int]] = field(default_factory=set)

    def find(self, stated: Resource, live: Resource) -> None:
        if stated.get("aggregationRule"):  # the rules are those of other roles
            stated = {name: each for name, each in stated.items() if name != "rules"}
        for path, line, hidden in self._of(opened(self.key, stated), opened(self.key, live), "", verbatim=False):
            masked = self.masks(line)
            about = f"{self.key.group}/{self.key}\n{path}\n{masked}"
            mark = "" if hidden else hashlib.sha256(about.encode()).hexdigest()[:16]
            self.found.append((Field((process.shorten(masked, LONGEST_LINE),), rank_of(self.key, path)), mark))
            if len(self.found) >= MOST_FIELDS:
                return

    def _of(self, stated: Any, live: Any, path: str, *, verbatim: bool) -> Iterator[tuple[str, str, bool]]:
        if path in _THE_SERVERS or path.endswith("caBundle") or _unsaid(stated, verbatim=verbatim):
            return
        if _empty(stated) and _empty(live):
            return
        if isinstance(stated, dict | list):
            if (id(stated), id(live)) in self._seen:
                return
            self._seen.add((id(stated), id(live)))
        match stated, live:
            case dict(), dict():
                yield from self._of_mapping(stated, live, path, verbatim=verbatim)
            case list(), list() if names := names_of(stated, live):
                left, right = (dict(zip(*each, strict=True)) for each in ((names[0], stated), (names[1], live)))
                yield from self._of_mapping(left, right, path, verbatim=verbatim)
            case list(), list() if len(stated) == len(live):
                for number, (one, other) in enumerate(zip(stated, live, strict=True)):
                    yield from self._of(one, other, f"{path}[{number}]", verbatim=verbatim)
            case _ if not _same_value(stated, live, exact=verbatim):
                old, new = (live, stated) if self.to_come else (stated, live)
                yield path, f"{path}: {changed(old, new, self.masks)}", isinstance(stated, Hidden)

    def _of_mapping(
        self, stated: Mapping[Any, Any], live: Mapping[Any, Any], path: str, *, verbatim: bool
    ) -> Iterator[tuple[str, str, bool]]:
        for key, each in sorted(stated.items(), key=lambda item: str(item[0])):
            where, exact = below(path, key), verbatim or key in _VERBATIM
            if key in live:
                yield from self._of(each, live[key], where, verbatim=exact)
            elif not _empty(each):
                yield where, f"{'+' if self.to_come else '-'} {where}: {shown(each)}", isinstance(each, Hidden)


def _unsaid(value: object, *, verbatim: bool) -> bool:
    """Whether a manifest leaves a field to the API server, by its value."""
    return value is None or value == {} or (value == "" and not verbatim)


def _empty(value: object) -> bool:
    """Whether the API leaves out a field with such a value."""
    if isinstance(value, dict):
        return all(map(_empty, value.values()))
    return value is None or value in ("", 0, False, [])


def _same_value(stated: object, live: object, *, exact: bool) -> bool:
    if isinstance(stated, bool) or isinstance(live, bool):
        return stated is live
    if isinstance(stated, str) and isinstance(live, str) and (exact or stated == live):
        return stated == live
    if isinstance(stated, str) and _MODE.fullmatch(stated) and live == int(stated, 8):
        return True
    return stated == live or _same_quantity(stated, live)


def _same_quantity(one: object, other: object) -> bool:
    """Whether two values are the same quantity: the API writes 1000m as 1, and 1024Mi as 1Gi."""
    first, second = (_QUANTITY.fullmatch(str(each)) for each in (one, other))
    return first is not None and second is not None and _amount(first) == _amount(second)


def _amount(quantity: re.Match[str]) -> Decimal:
    return Decimal(quantity[1] + (quantity[2] or "")) * _POWERS[quantity[3] or ""]
