"""Compares two rendered Kubernetes manifests, or one with the live resources of the cluster.

It describes differences by resource and field. The contents of a Secret are never shown, wherever else they turn up.
`toto.helm.cluster` renders manifests and reads live resources.
"""

import base64
import binascii
import difflib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final, TypeAlias

import yaml

from toto.base import process
from toto.base.errors import InputError

Resource: TypeAlias = dict[str, Any]

SHORTEST_SECRET: Final = 6  # characters: a shorter text turns up everywhere by chance
LONGEST_LINE: Final = 300  # characters
MOST_FIELDS: Final = 200  # that are shown of one resource
DEEPEST: Final = 200  # levels of nesting
_EMPTY: Final[tuple[object, ...]] = (None, "", 0, False, [], {})
_THE_SERVERS: Final = ("apiVersion", "status")
_QUANTITY: Final = re.compile(r"([+-]?[0-9]+(?:\.[0-9]*)?)(?:([eE][+-]?[0-9]{1,3})|(m|k|Ki|[MGTPE]i?)?)")
_POWERS: Final = {"": Decimal(1), "m": Decimal("0.001"), "k": Decimal(1000), "Ki": Decimal(1024)} | {
    unit + suffix: Decimal(base) ** power
    for power, unit in enumerate("MGTPE", 2)
    for suffix, base in (("", 1000), ("i", 1024))
}


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML as Kubernetes reads it: a time and a lone `=` are text."""


for _tag in ("timestamp", "value"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", yaml.SafeLoader.construct_scalar)


@dataclass(frozen=True, order=True)
class Key:
    """What identifies a resource. `namespace` is "" when its manifest names none; then it is the release's."""

    group: str
    kind: str
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace}/{self.name}" if self.namespace else f"{self.kind} {self.name}"


@dataclass(frozen=True)
class Change:
    """One resource that differs. `fields` has a line for each field that does."""

    resource: str
    fields: tuple[str, ...]


@dataclass(frozen=True)
class Difference:
    """Resources added, removed and changed. It prints as lines, without the contents of any Secret.

    `crds` are CRDs of the chart's `crds/` that are not in the cluster, or different there; helm leaves them as they
    are. `applies` says whether toto applies them.
    """

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: tuple[Change, ...] = ()
    crds: tuple[Change, ...] = ()
    applies: bool = False

    @property
    def empty(self) -> bool:
        """Whether a roll-out would change nothing."""
        return not (self.added or self.removed or self.changed or (self.crds and self.applies))

    @property
    def left_out(self) -> tuple[str, ...]:
        """The CRDs that were meant and that a roll-out does not bring."""
        return () if self.applies else tuple(each.resource for each in self.crds)

    def lines(self, most: int = 60) -> list[str]:
        """One line for each resource and each field, at most `most` lines and one that counts the rest."""
        lines = [*(f"+ {each}" for each in self.added), *(f"- {each}" for each in self.removed)]
        for change in self.changed:
            lines += [f"~ {change.resource}", *(f"    {each}" for each in change.fields)]
        for change in self.crds:
            how = "~" if self.applies else "! NOT APPLIED (`crds: apply` in release.yaml does):"
            lines += [f"{how} {change.resource}", *(f"    {each}" for each in change.fields)]
        return lines if len(lines) <= most else [*lines[:most], f"… and {len(lines) - most} more lines"]

    @property
    def summary(self) -> str:
        """The changes in one line: `1 to add, 2 to change`."""
        counts = [(len(self.added), "add"), (len(self.changed), "change"), (len(self.removed), "remove")]
        if self.applies:
            counts.append((len(self.crds), "apply (CRDs)"))
        said = ", ".join(f"{count} to {what}" for count, what in counts if count) or "nothing to change"
        return f"{said}; not applied: {', '.join(self.left_out)}" if self.left_out else said

    def __str__(self) -> str:
        return "\n".join(self.lines()) or "nothing in the manifests"


def load(text: str) -> list[Any]:
    """The documents of a YAML text. Raises `InputError`, without YAML's own message, which quotes the text."""
    try:
        depth = 0
        for event in yaml.parse(text, Loader=_Loader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:  # libyaml's loader would overflow the stack, and take the process with it
                raise ValueError("nested too deeply")
        return list(yaml.load_all(text, Loader=_Loader))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"is not YAML: {type(error).__name__}", target="a rendered manifest") from None


def parse(text: str) -> dict[Key, Resource]:
    """The resources of a manifest by key, with each item of a List as its own resource. Raises `InputError`."""
    return {key_of(each): each for each in _apart(load(text))}


def _apart(documents: Iterable[Any]) -> Iterator[Resource]:
    for each in documents:
        if isinstance(each, dict) and str(each.get("kind", "")).endswith("List") and "items" in each:
            yield from _apart(each["items"] or ())
        elif isinstance(each, dict) and isinstance(each.get("metadata"), dict) and "kind" in each:
            yield each


def key_of(resource: Resource) -> Key:
    group, _, version = str(resource.get("apiVersion", "")).rpartition("/")
    about = resource["metadata"]
    return Key(
        group if version else "",
        str(resource["kind"]),
        str(about.get("namespace") or ""),
        str(about.get("name") or about.get("generateName") or ""),
    )


def secrets(resources: Iterable[Resource]) -> list[str]:
    """All texts in the Secrets among `resources`: plain and as base64, whole and line by line. The longest first."""
    found: set[str] = set()
    for each in resources:
        for value in _data(each).values() if each["kind"] == "Secret" else ():
            try:
                plain = base64.b64decode(value, validate=True).decode()
            except (binascii.Error, ValueError):
                plain = value
            found |= {value, plain, json.dumps(plain)[1:-1], *plain.splitlines()}
    return worth_masking(found)


def worth_masking(texts: Iterable[str]) -> list[str]:
    """The texts that are long enough to mask. The longest come first, because one may be part of a longer one."""
    return sorted((each for each in texts if len(each) >= SHORTEST_SECRET), key=len, reverse=True)


class _Hidden(str):
    """A value of a Secret: it compares like any text and shows as `******`."""

    __slots__ = ()


def _data(secret: Resource) -> dict[str, str]:
    """Everything in a Secret, as base64 (`stringData` is a second way to write `data`)."""
    data, texts = (each if isinstance(each := secret.get(part), dict) else {} for part in ("data", "stringData"))
    return {key: _Hidden("".join(str(value).split())) for key, value in data.items()} | {
        key: _Hidden(base64.b64encode(str(value).encode()).decode()) for key, value in texts.items()
    }


def compare(before: Mapping[Key, Resource], after: Mapping[Key, Resource]) -> Difference:
    """How the manifest `after` differs from the manifest `before`."""
    return _difference(before, after, partial=False)


def drift(stated: Mapping[Key, Resource], live: Mapping[Key, Resource]) -> Difference:
    """Where the `live` resources differ from a manifest. Fields that the manifest does not state are not compared."""
    return _difference(stated, {key: live[key] for key in stated if key in live}, partial=True)


def _difference(before: Mapping[Key, Resource], after: Mapping[Key, Resource], *, partial: bool) -> Difference:
    hidden = secrets([*before.values(), *after.values()])
    changed = []
    for key in sorted(before.keys() & after.keys()):
        old, new = (
            {**each, "data": _data(each), "stringData": {}} if key.kind == "Secret" else each
            for each in (before[key], after[key])
        )
        # Mask before shortening: half of a secret is a secret too.
        lines = [
            process.shorten(process.mask(line, hidden), LONGEST_LINE)
            for line in itertools.islice(_fields(old, new, "", partial), MOST_FIELDS)
        ]
        if lines:
            changed.append(Change(str(key), tuple(lines)))
    return Difference(
        added=tuple(map(str, sorted(after.keys() - before.keys()))),
        removed=tuple(map(str, sorted(before.keys() - after.keys()))),
        changed=tuple(changed),
    )


def _fields(old: Any, new: Any, path: str, partial: bool) -> Iterator[str]:
    """A line for each field that differs; with `partial`, only for fields that `old` states."""
    match old, new:
        case dict(), dict():
            for key in sorted(old.keys() | (() if partial else new.keys()), key=str):
                where = f"{path}{'.' if path and not str(key).startswith('[') else ''}{key}"
                if key not in new:
                    if not (partial and old[key] in _EMPTY):  # the API leaves out what is empty
                        yield f"- {where}: {_shown(old[key])}"
                elif key not in old:
                    yield f"+ {where}: {_shown(new[key])}"
                elif not (partial and (where in _THE_SERVERS or old[key] is None)):
                    yield from _fields(old[key], new[key], where, partial)
        case list(), list() if (left := _by_name(old)) and (right := _by_name(new)):
            yield from _fields(left, right, path, partial)
        case list(), list() if len(old) == len(new):
            for number, (one, other) in enumerate(zip(old, new, strict=True)):
                yield from _fields(one, other, f"{path}[{number}]", partial)
        case str(), str() if old != new and "\n" in old + new:
            yield f"{path}:"
            yield from (
                f"  {line}"
                for line in itertools.islice(
                    difflib.unified_diff(old.splitlines(), new.splitlines(), n=1, lineterm=""), 2, None
                )
            )
        case _ if old != new and not (partial and _same_quantity(old, new)):
            yield f"{path}: {_shown(old)} → {_shown(new)}"


def _by_name(items: Sequence[Any]) -> dict[str, Any]:
    """The items of a list by name, as `[name]`; empty when an item has no name or two share one."""
    named = {f"[{each['name']}]": each for each in items if isinstance(each, dict) and "name" in each}
    return named if len(named) == len(items) else {}


def _shown(value: object) -> str:
    if isinstance(value, _Hidden):
        return "******"
    return value if isinstance(value, str) and value.isprintable() and value else json.dumps(value, default=str)


def _same_quantity(one: object, other: object) -> bool:
    """Whether two values are the same quantity: the API writes 1000m as 1, and 1024Mi as 1Gi."""
    first, second = (_QUANTITY.fullmatch(str(each)) for each in (one, other))
    return first is not None and second is not None and _amount(first) == _amount(second)


def _amount(quantity: re.Match[str]) -> Decimal:
    return Decimal(quantity[1] + (quantity[2] or "")) * _POWERS[quantity[3] or ""]
