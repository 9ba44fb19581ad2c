"""Says how two manifests differ, by resource and field, for a person to read.

What is shown may be looser than what is compared: `Difference.empty` is true only for manifests that say exactly the
same. The contents of a Secret are never shown, wherever else they turn up.
"""

import difflib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from toto.base import process
from toto.helm import manifest, secret
from toto.helm.manifest import Key, Resource
from toto.helm.secret import MASK, Hidden, Masks

LONGEST_LINE: Final = 300  # characters
LONGEST_IMAGE: Final = 1_500
MOST_LINES: Final = 120  # for fields; resources and images are not counted
MOST_OF_A_FIELD: Final = 15  # lines
MOST_FIELDS: Final = 2_000  # that are looked at of one resource
MOST_NAMED: Final = 3  # in a summary

IMAGE, ORDINARY, LAST = range(3)  # what is shown first when there is not room for all

KEEP: Final = "helm.sh/resource-policy"
_IMAGE: Final = re.compile(r"(^|\.)\w*[iI]mages?(\[[^\]]*\])?(\.(repository|tag|name|newTag|digest))?$")
_LIKE_AN_IMAGE: Final = re.compile(r"(?<![\w/])[\w-]+(\.[\w-]+)+/[\w./-]+(:\w[\w.-]*|@sha256:\w+)")
_DULL: Final = re.compile(
    r"\.(labels|annotations)\.(helm\.sh/chart|app\.kubernetes\.io/(version|managed-by)|chart|heritage|checksum/.*)$"
)
# What tells the items of a list apart: the first of these that all items have, and that is different for each.
_NAMES: Final = (
    ("name",),
    ("key",),
    ("containerPort", "protocol"),
    ("port", "protocol"),
    ("mountPath", "subPath"),
    ("devicePath",),
    ("topologyKey",),
    ("ip",),
    ("host",),
    ("path",),
    ("secretName",),
    ("type",),
)


@dataclass(frozen=True)
class Field:
    """One field that differs, in words. `rank` says how much it matters: `IMAGE`, `ORDINARY` or `LAST`."""

    lines: tuple[str, ...]
    rank: int = ORDINARY


@dataclass(frozen=True)
class Change:
    """One resource that differs, and where."""

    resource: str
    fields: tuple[Field, ...]

    @property
    def dull(self) -> bool:
        """Whether nothing differs but labels with the chart's version, or descriptions."""
        return all(each.rank == LAST for each in self.fields)


@dataclass(frozen=True)
class Difference:
    """Resources added, removed and changed. It prints as lines, without the contents of any Secret.

    `identical` says whether the two manifests say exactly the same, also where nothing is shown. `kept` leave the
    manifest and stay in the cluster, since the chart has helm keep them. `crds` are CRDs of the chart's `crds/` that
    are not in the cluster, or different there; helm leaves them as they are. `applies` says whether toto applies them.
    `unchecked` says in words what the cluster could not check yet.
    """

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: tuple[Change, ...] = ()
    kept: tuple[str, ...] = ()
    crds: tuple[Change, ...] = ()
    applies: bool = False
    identical: bool = True
    unchecked: tuple[str, ...] = ()

    @property
    def empty(self) -> bool:
        """Whether a roll-out would change nothing."""
        return self.identical and not (
            self.added or self.removed or self.kept or self.changed or (self.crds and self.applies)
        )

    @property
    def left_out(self) -> tuple[str, ...]:
        """The CRDs that were meant and that a roll-out does not bring."""
        return () if self.applies else tuple(each.resource for each in self.crds)

    def lines(self, most: int = MOST_LINES) -> list[str]:
        """A line for each resource and each change of an image, and about `most` for the other fields that differ."""
        lines = [*(f"+ {each}" for each in self.added), *(f"- {each}" for each in self.removed)]
        lines += [f"= {each} stays in the cluster: the chart has helm keep it ({KEEP})" for each in self.kept]
        how = "~" if self.applies else "! NOT APPLIED (`crds: apply` in release.yaml does):"
        changes = [*(("~", each) for each in self.changed), *((how, each) for each in self.crds)]
        for (sign, change), shown in zip(changes, _chosen([each for _, each in changes], most), strict=True):
            if not shown and change.dull:
                lines.append(f"{sign} {change.resource} (only labels of the chart, or descriptions)")
                continue
            lines += [f"{sign} {change.resource}", *(f"    {line}" for each in shown for line in _lines_of(each))]
            if left := len(change.fields) - len(shown):
                lines.append(f"    … and {left} more field{'s' if left > 1 else ''}")
        if not self.identical and not lines:
            lines.append("~ only the order of the resources, or how something is written")
        return [*lines, *(f"? {each}" for each in self.unchecked)]

    @property
    def summary(self) -> str:
        """The changes in one line: `1 to add, 2 to change`."""
        counts = [(len(self.added), "add"), (len(self.changed), "change"), (len(self.removed), "remove")]
        counts.append((len(self.kept), "leave in the cluster"))
        if self.applies:
            counts.append((len(self.crds), "apply (CRDs)"))
        nothing = "nothing to change" if self.identical else "only its order or form changes"
        said = ", ".join(f"{count} to {what}" for count, what in counts if count) or nothing
        if left := self.left_out:
            said += f"; not applied: {', '.join(left) if len(left) <= MOST_NAMED else f'{len(left)} CRDs'}"
        return f"{said}; not checked by the cluster yet: {'; '.join(self.unchecked)}" if self.unchecked else said

    def __str__(self) -> str:
        return "\n".join(self.lines()) or "nothing in the manifests"


def _lines_of(one: Field) -> tuple[str, ...]:
    left = len(one.lines) - MOST_OF_A_FIELD
    return one.lines if left <= 1 else (*one.lines[:MOST_OF_A_FIELD], f"  … and {left} more lines")


def _chosen(changes: Sequence[Change], most: int) -> list[list[Field]]:
    """The fields of each change that there is room for: every image, then in turn one of each resource.

    Of resources in which nothing but labels or descriptions differ, it is all of them or none.
    """
    chosen: list[set[int]] = [{n for n, one in enumerate(each.fields) if one.rank == IMAGE} for each in changes]
    room = most // 4
    brief = sum(len(_lines_of(one)) for each in changes if each.dull for one in each.fields) > room
    for rank in (ORDINARY, LAST):
        most = min(most, room) if rank == LAST else most
        ranked = [
            [n for n, one in enumerate(each.fields) if one.rank == rank and not (brief and each.dull)]
            for each in changes
        ]
        for row in itertools.zip_longest(*ranked):
            for number, index in enumerate(row):
                if index is not None and most > 0:
                    chosen[number].add(index)
                    most -= len(_lines_of(changes[number].fields[index]))
    return [[one for n, one in enumerate(each.fields) if n in some] for each, some in zip(changes, chosen, strict=True)]


def compare(before: str, after: str, masks: Iterable[str] = (), public: Iterable[str] = ()) -> Difference:
    """How the manifest `after` differs from the manifest `before`.

    `masks` are secrets besides what the manifests' Secrets hold, `public` words that are none. Raises `InputError`.
    """
    old, new = manifest.parse(before), manifest.parse(after)
    hidden = masks_of([*old.values(), *new.values()], masks, public)
    gone = sorted(old.keys() - new.keys())
    keeps = {key for key in gone if manifest.annotations(old[key]).get(KEEP) == "keep"}
    return Difference(
        added=tuple(map(str, sorted(new.keys() - old.keys()))),
        removed=tuple(str(key) for key in gone if key not in keeps),
        changed=tuple(
            Change(str(key), fields)
            for key in sorted(old.keys() & new.keys())
            if (fields := _Comparison(key, hidden).fields(old[key], new[key]))
        ),
        kept=tuple(str(key) for key in gone if key in keeps),
        identical=manifest.exactly(before) == manifest.exactly(after),
    )


def masks_of(resources: Sequence[Resource], more: Iterable[str] = (), public: Iterable[str] = ()) -> Masks:
    """What is masked in texts about resources: what their Secrets hold, and `more`; but no word that they show."""
    return Masks.worth({*secret.of_manifest(resources), *more}, {*secret.public(resources), *public})


def opened(key: Key, resource: Resource) -> Resource:
    """A resource to compare; that of a Secret has all its contents in `data`, which are not shown."""
    return {**resource, "data": secret.data(resource), "stringData": {}} if key.kind == "Secret" else resource


@dataclass
class _Comparison:
    """Compares one resource with itself."""

    key: Key
    masks: Masks
    _seen: set[tuple[int, int]] = field(default_factory=set)

    def fields(self, old: Resource, new: Resource) -> tuple[Field, ...]:
        return tuple(itertools.islice(self._of(opened(self.key, old), opened(self.key, new), ""), MOST_FIELDS))

    def _of(self, old: Any, new: Any, path: str) -> Iterator[Field]:
        if isinstance(old, dict | list) and isinstance(new, dict | list):
            if (id(old), id(new)) in self._seen:  # aliases: a few can stand for a billion fields
                return
            self._seen.add((id(old), id(new)))
        match old, new:
            case dict(), dict():
                yield from self._of_mapping(old, new, path)
            case list(), list() if names := names_of(old, new):
                left, right = dict(zip(names[0], old, strict=True)), dict(zip(names[1], new, strict=True))
                yield from self._of_mapping(left, right, path)
                if [each for each in left if each in right] != [each for each in right if each in left]:
                    yield self._field(path, f"{path}: the order is {_listed(left)} → {_listed(right)}")
            case list(), list():
                yield from self._of_list(old, new, path)
            case str(), str() if old != new and "\n" in old + new and not isinstance(old, Hidden):
                yield self._field(path, f"{path}:", *(f"  {line}" for line in self._text(old, new)))
            case _ if not same(old, new):
                yield self._field(path, f"{path}: {changed(old, new, self.masks)}", values=(old, new))

    def _of_mapping(self, old: Mapping[Any, Any], new: Mapping[Any, Any], path: str) -> Iterator[Field]:
        for key in sorted(old.keys() | new.keys(), key=str):
            where = below(path, key)
            if key in old and key in new:
                yield from self._of(old[key], new[key], where)
            else:
                yield self._whole("-" if key in old else "+", where, old[key] if key in old else new[key])

    def _of_list(self, old: list[Any], new: list[Any], path: str) -> Iterator[Field]:
        """Lists whose items have no names: what they have in common stays."""
        left, right = ([canonical(each) for each in items] for items in (old, new))
        for _, a, b, c, d in difflib.SequenceMatcher(None, left, right, autojunk=False).get_opcodes():
            if b - a == d - c:
                for one, other in zip(range(a, b), range(c, d), strict=True):
                    yield from self._of(old[one], new[other], f"{path}[{other}]")
            else:
                yield from (self._whole("-", f"{path}[{n}]", old[n]) for n in range(a, b))
                yield from (self._whole("+", f"{path}[{n}]", new[n]) for n in range(c, d))

    def _whole(self, sign: str, path: str, value: Any) -> Field:
        """A field that is there on one side only. Images in it are named, however long it is."""
        line = self.masks(f"{sign} {path}: {shown(value)}")
        images = [f"{sign} {where}: {image}" for where, image in _images(value, path)]
        return self._field(path, line, *(images if len(line) > LONGEST_LINE else ()), image=bool(images))

    def _field(self, path: str, *lines: str, values: Sequence[object] = (), image: bool = False) -> Field:
        # Mask before shortening: half of a secret is a secret too.
        longest = LONGEST_IMAGE if _IMAGE.search(path) else LONGEST_LINE
        cut = tuple(process.shorten(self.masks(line), longest) for line in lines)
        image = image or any(isinstance(each, str) and _is_image(each) for each in values)
        return Field(cut, IMAGE if image else rank_of(self.key, path))

    def _text(self, old: str, new: str) -> list[str]:
        """A diff of two texts. A line that had a secret, as its successor has one, is masked as that one is."""
        lines = list(difflib.unified_diff(old.splitlines(), new.splitlines(), n=1, lineterm=""))[2:]
        masked = [self.masks(line) for line in lines]
        for number, line in enumerate(masked):
            if line[:1] not in ("-", "+") or MASK in line:
                continue
            for other in masked[max(0, number - 40) : number + 40]:
                start = other.partition(MASK)[0]
                opposite = MASK in other and other[:1] not in ("@", " ", line[:1])
                if opposite and len(start.strip("-+ \t")) > 1 and line[1:].startswith(start[1:]):
                    masked[number] = line[:1] + secret.like(line[1:], other[1:])
        return masked


def names_of(old: Sequence[Any], new: Sequence[Any]) -> tuple[list[str], list[str]] | None:
    """The items' names in two lists, like `[web]` or `[8080/UDP]`; None when they have none, or share one."""
    if not all(isinstance(each, dict) for each in (*old, *new)) or not (old or new):
        return None
    for keys in _NAMES:
        if all(isinstance(each.get(keys[0]), str | int) for each in (*old, *new)):
            left, right = ([_name(each, keys) for each in items] for items in (old, new))
            if len(set(left)) == len(left) and len(set(right)) == len(right):
                return left, right
    return None


def _name(item: Mapping[str, Any], keys: Sequence[str]) -> str:
    return f"[{'/'.join(str(item[key]) for key in keys if item.get(key) not in (None, 'TCP'))}]"


def rank_of(key: Key, path: str) -> int:
    """How much it matters that a field differs, by its path."""
    if _IMAGE.search(path):
        return IMAGE
    described = key.kind == "CustomResourceDefinition" and path.endswith(".description")
    return LAST if described or _DULL.search(path) else ORDINARY


def below(path: str, key: object) -> str:
    return f"{path}{'.' if path and not str(key).startswith('[') else ''}{key}"


def canonical(value: object) -> str:
    """A text that is the same only for values of the same types: `1`, `true` and `"1"` are three."""
    return json.dumps(value, sort_keys=True, default=str)


def same(old: object, new: object) -> bool:
    return type(old) is type(new) and old == new if isinstance(old, str) else canonical(old) == canonical(new)


def changed(old: object, new: object, masks: Masks) -> str:
    """The words for a field that has become something else."""
    left, right = shown(old), shown(new)
    if left == right and not isinstance(old, Hidden):
        left, right = json.dumps(old, default=str), json.dumps(new, default=str)
    if not isinstance(old, Hidden):
        left, right = masks.pair(left, right)
    return f"{left} → {right}"


def shown(value: object) -> str:
    if isinstance(value, Hidden):
        return MASK
    return value if isinstance(value, str) and value.isprintable() and value else json.dumps(value, default=str)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(each.strip("[]") for each in names)


def _is_image(text: str) -> bool:
    return len(text) < 1000 and _LIKE_AN_IMAGE.search(text) is not None


def _images(value: object, path: str) -> Iterator[tuple[str, str]]:
    match value:
        case dict():
            for key, each in value.items():
                where = below(path, key)
                if isinstance(each, str) and _IMAGE.search(where):
                    yield where, each
                else:
                    yield from _images(each, where)
        case list():
            for number, each in enumerate(value):
                name = each.get("name", number) if isinstance(each, dict) else number
                yield from _images(each, f"{path}[{name}]")
