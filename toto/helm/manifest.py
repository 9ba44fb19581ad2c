"""Reads manifests: their documents, the resources in them, and what exactly they say.

`toto.helm.diff` says how two manifests differ, `toto.helm.drift` how a manifest differs from what is live.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final, TypeAlias

import yaml

from toto.base.errors import InputError

Resource: TypeAlias = dict[str, Any]

DEEPEST: Final = 200  # levels of nesting


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML as Kubernetes reads it: a time, a number like `1:30` and a lone `=` are text, `0o644` is a number."""


def _integer(loader: Any, node: Any) -> int | str:
    text = str(node.value).replace("_", "")
    if ":" in text:
        return str(node.value)
    if text.lstrip("+-").startswith("0o"):
        return int(text, 8)
    return int(yaml.SafeLoader.construct_yaml_int(loader, node))


for _tag in ("timestamp", "value"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", yaml.SafeLoader.construct_scalar)
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile("[+-]?0o[0-7]+$"), list("+-0"))
_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


@dataclass(frozen=True, order=True)
class Key:
    """What identifies a resource. `namespace` is "" when its manifest names none; then it is the release's.

    `nth` counts resources with the same kind and name (two hooks may have one): 0 for the first.
    """

    group: str
    kind: str
    namespace: str
    name: str
    nth: int = 0

    def __str__(self) -> str:
        name = f"{self.kind} {self.namespace}/{self.name}" if self.namespace else f"{self.kind} {self.name}"
        return f"{name} ({self.nth + 1})" if self.nth else name


def load(text: str) -> list[Any]:
    """The documents of a YAML text. Raises `InputError`, without YAML's own message, which quotes the text."""
    try:
        _check_depth(text)
        return list(yaml.load_all(text, Loader=_Loader))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise _no_yaml(error) from None


def exactly(text: str) -> list[str]:
    """A hash for each document of a manifest, which is the same only for documents that say exactly the same.

    Lists count with their order, `1`, `true` and `"1"` are three things. The order of a mapping's keys, comments and
    indentation do not count. Raises `InputError`.
    """
    try:
        _check_depth(text)
        nodes = list(yaml.compose_all(text, Loader=_Loader))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise _no_yaml(error) from None
    known: dict[int, str] = {}  # an alias stands for a node that was hashed already
    return [_hash(node, known) for node in nodes if node is not None and node.tag != "tag:yaml.org,2002:null"]


def _hash(node: Any, known: dict[int, str]) -> str:
    if (found := known.get(id(node))) is not None:
        return found
    known[id(node)] = "itself"
    said: list[Any] = [node.tag]
    match node:
        case yaml.MappingNode():
            said += sorted([_hash(key, known), _hash(value, known)] for key, value in node.value)
        case yaml.SequenceNode():
            said += [_hash(each, known) for each in node.value]
        case _:  # (a plain scalar may be more than text to whoever reads it)
            said += [node.style is None, node.value]
    known[id(node)] = hashlib.sha256(json.dumps(said).encode()).hexdigest()
    return known[id(node)]


def _check_depth(text: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:  # libyaml's loader would overflow the stack, and take the process with it
            raise ValueError("nested too deeply")


def _no_yaml(error: Exception) -> InputError:
    return InputError(f"is not YAML: {type(error).__name__}", target="a rendered manifest")


def parse(text: str) -> dict[Key, Resource]:
    """The resources of a manifest by key, with each item of a List as its own resource. Raises `InputError`."""
    found: dict[Key, Resource] = {}
    seen = Counter[Key]()
    for each in _apart(load(text)):
        key = key_of(each)
        found[replace(key, nth=seen[key])] = each
        seen[key] += 1
    return found


def joined(texts: Iterable[str]) -> str:
    """Several manifests as one."""
    return "\n---\n".join(texts)


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


def annotations(resource: Resource) -> dict[str, Any]:
    said = resource["metadata"].get("annotations")
    return said if isinstance(said, dict) else {}
