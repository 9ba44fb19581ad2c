"""Reading a YAML file that the operator wrote: it knows the line of every value, and reports all mistakes at once.

It is stricter than YAML: it takes no tags, no merge keys and no key twice. Size and depth are limited.
The callers know what the values mean: `toto.infra_repo.manifest`, `toto.helm.cluster`.
"""

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from yaml.constructor import SafeConstructor
from yaml.reader import Reader

from toto.base.errors import InputError
from toto.base.model import Location, explain, shown

LARGEST: Final = 1 << 20  # bytes of a file
MOST_NODES: Final = 200_000  # values, aliases counted each time they are used
DEEPEST: Final = 12  # levels of nesting
MOST_PROBLEMS: Final = 100  # that one error names

_PLAIN: Final = r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}"

M = TypeVar("M", bound=BaseModel)


class FileError(InputError):
    """A file has mistakes. `problems` holds one line for each: `file:line: field: what`."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        named, more = self.problems[:MOST_PROBLEMS], len(self.problems) - MOST_PROBLEMS
        super().__init__("\n".join(named) + (f"\n… and {more} more" if more > 0 else ""))


class Unreadable(Exception):
    """The file cannot be read beyond `line`."""

    def __init__(self, line: int, what: str) -> None:
        super().__init__(what)
        self.line = line


def read_text(path: Path, *, missing: str) -> str:
    """The text of a file. Raises `Unreadable`; `missing` is the advice for when there is no such file."""
    try:
        if path.exists() and not path.is_file():
            raise Unreadable(1, "this is not a file")
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
    except FileNotFoundError:
        raise Unreadable(1, f"there is no such file: {missing}") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise Unreadable(1, f"cannot be read: {reason}") from None
    if len(data) > LARGEST:
        raise Unreadable(1, f"is larger than {LARGEST >> 20} MiB")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unreadable(data[: error.start].count(b"\n") + 1, "is not UTF-8 from here on") from None
    if bad := Reader.NON_PRINTABLE.search(text):
        line = text[: bad.start()].count("\n") + 1
        raise Unreadable(line, f"holds the character U+{ord(bad.group()):04X}, which YAML does not allow")
    return text


class Reading:
    """One reading of a file: the problems that were found, and the line of every value."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.problems: list[tuple[int, str]] = []
        self.lines: dict[Location, int] = {}
        self.nodes = 0

    @contextlib.contextmanager
    def reporting(self, error: type[FileError]) -> Iterator[None]:
        """Raise `error` with all problems at the end of the block, or when the file cannot be read further."""
        try:
            yield
        except Unreadable as problem:
            self.problem(problem.line, str(problem))
        if self.problems:
            raise error(text for _, text in sorted(self.problems, key=lambda each: each[0]))

    def problem(self, line: int, *what: str) -> None:
        """Note a problem in `line`; `what` are the parts of its message."""
        self.problems.append((line, ": ".join((f"{self.file}:{line}", *what))))

    def line(self, location: Location) -> int:
        """The line of what is at a location, or of the nearest thing around it."""
        while location not in self.lines and location:
            location = location[:-1]
        return self.lines.get(location, 1)

    def document(self, text: str, *, empty: str | None = None) -> object:
        """The value of a YAML text. Raises `Unreadable`, also for an empty text if `empty` says what it should hold."""
        node = _compose(text)
        if node is None and empty is not None:
            raise Unreadable(1, f"is empty: {empty}")
        return None if node is None else self._value(node, ())

    def validated(self, model: type[M], fields: object, place: Location = (), *label: str) -> M | None:
        """A `model` made of the `fields` at `place`; None when they are not valid, with the problems noted."""
        try:
            return model.model_validate(fields)
        except ValidationError as error:
            for location, what in explain(error, model):
                names = [quoted(part) for part in location if isinstance(part, str)]
                field = [".".join(names)] if names else []
                self.problem(self.line((*place, *location)), *label, *field, what)
            return None

    def _value(self, node: yaml.Node, place: Location) -> object:
        """The value of a node, lists as tuples. Notes the lines of values, and problems."""
        line = node.start_mark.line + 1
        self.nodes += 1
        if self.nodes > MOST_NODES:
            raise Unreadable(line, f"holds more than {MOST_NODES} values (aliases count each time)")
        if len(place) > DEEPEST:
            raise Unreadable(line, f"is nested more than {DEEPEST} levels deep")
        self.lines.setdefault(place, line)
        match node:
            case yaml.MappingNode(tag="tag:yaml.org,2002:map"):
                return self._mapping(node, place)
            case yaml.SequenceNode(tag="tag:yaml.org,2002:seq"):
                return tuple(self._value(each, (*place, index)) for index, each in enumerate(node.value))
            case yaml.ScalarNode():
                return self._scalar(node)
            case _:
                self.problem(line, f"the tag {shown(node.tag)} is not accepted here")
                return None

    def _mapping(self, node: yaml.MappingNode, place: Location) -> dict[str, object]:
        found: dict[str, object] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            self.nodes += 1
            key = self._scalar(key_node) if isinstance(key_node, yaml.ScalarNode) else None
            if not isinstance(key, str):
                raw = key_node.value if isinstance(key_node, yaml.ScalarNode) else "a list or mapping"
                reason = "YAML's merge key is not accepted" if raw == "<<" else "a key should be text: put it in quotes"
                self.problem(line, quoted(str(raw)), reason)
            elif key in found:
                first = self.line((*place, key))
                self.problem(line, quoted(key), f"is given twice, first on line {first}")
            else:
                self.lines[(*place, key)] = line
                found[key] = self._value(value_node, (*place, key))
        return found

    def _scalar(self, node: yaml.ScalarNode) -> object:
        line, text = node.start_mark.line + 1, node.value
        if any("\ud800" <= character <= "\udfff" for character in text):
            self.problem(line, f"{shown(text)} is not text: it holds half a character")
            return ""
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        if kind in ("str", "timestamp", "value"):
            return text
        if kind not in _SCALARS:
            if kind != "merge":
                self.problem(line, f"the tag {shown(node.tag)} is not accepted here")
            return None
        try:
            return _SCALARS[kind](node)
        except (ValueError, KeyError, OverflowError, IndexError):
            self.problem(line, f"{shown(text)} looks like a number and is not one: put it in quotes")
            return None


def _compose(text: str) -> yaml.Node | None:
    loader = yaml.SafeLoader(text)
    try:
        return loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = ": ".join(part for part in (error.context, error.problem) if part)
        if "'\\t'" in what:
            what = "a tab where YAML wants spaces"
        raise Unreadable(mark.line + 1 if mark else 1, f"is not YAML: {' '.join(what.split())}") from None
    except RecursionError:
        raise Unreadable(loader.get_mark().line + 1, "is nested too deeply") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        # PyYAML passes on ValueError and OverflowError, for a bad number or character reference.
        raise Unreadable(loader.get_mark().line + 1, f"is not YAML: {shown(str(error), 200)}") from None
    finally:
        loader.dispose()


_constructor: Final = SafeConstructor()
_SCALARS: Final[Mapping[str, Callable[[yaml.ScalarNode], object]]] = {
    "null": lambda node: None,
    "bool": _constructor.construct_yaml_bool,
    "int": _constructor.construct_yaml_int,
    "float": _constructor.construct_yaml_float,
}


def quoted(name: str) -> str:
    """`name` as it stands in a message: as it is when it is a plain name, else quoted."""
    return name if re.fullmatch(_PLAIN, name) else shown(name)
