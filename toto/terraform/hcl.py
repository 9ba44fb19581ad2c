"""Just enough of HCL, the language of `.tf` files, to find the modules that a configuration calls.

A module's source is a literal, so nothing is evaluated here. What is no HCL is not told here either, but by terraform.
"""

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

_CODE: Final = re.compile(r"""
    (?P<blank> [^\S\n]+ | (?:\#|//)[^\n]* | /\*.*?(?:\*/|\Z) )
  | <<-?(?P<tag>[^\W\d][\w-]*)[^\n]*\n.*?(?:^[^\S\n]*(?P=tag)\b|\Z)
  | [^\W\d][\w-]*
  | . """, re.VERBOSE | re.DOTALL | re.MULTILINE)
_STRING: Final = re.compile(r'(?:[^"\\$%]|\\.|\$\$\{|%%\{|[$%](?!\{))+|[$%]\{|.', re.DOTALL)


@dataclass(frozen=True)
class Module:
    """A call of a module: `module "name" { source = "…" }`, and the line of its source."""

    name: str
    source: str
    line: int


def modules(text: str) -> Iterator[Module]:
    """The modules that a `.tf` file calls."""
    depth, name, before = 0, "", ("", "")
    for word, line in _tokens(text):
        match before, word:
            case ("module", label), "{" if depth == 0:
                name = label.strip('"')
            case ("source", "="), _ if depth == 1 and name and word.startswith('"'):
                yield Module(name, word.strip('"'), line)
        depth += (word == "{") - (word == "}")
        if depth == 0:
            name = ""
        before = (before[1], word)


def json_modules(text: str) -> Iterator[Module]:
    """The modules that a `.tf.json` file calls."""
    with suppress(ValueError, AttributeError, RecursionError):
        for calls in _listed(json.loads(text).get("module")):
            for name, bodies in calls.items():
                for source in (body.get("source") for body in _listed(bodies)):
                    if isinstance(source, str):
                        yield Module(name, source, text.count("\n", 0, max(0, text.find(json.dumps(source)))) + 1)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _tokens(text: str) -> Iterator[tuple[str, int]]:
    """Words, marks and whole strings (in their quotes), each with the line it begins on; no comments, no heredocs."""
    position, line, began, string = 0, 1, 1, ""
    inside: list[str] = []  # what is open of a string: its quote, and the templates and strings within
    while found := (_STRING if inside[-1:] == ['"'] else _CODE).match(text, position):
        word, position = found[0], found.end()
        if not inside and word == '"':
            string, began = "", line
        if inside:
            string += word
        match inside[-1:], word:
            case ['"'], '"':
                inside.pop()
                if not inside:
                    yield f'"{string}', began
            case (['"'], "${" | "%{") | (["{"], "{"):
                inside.append("{")
            case ["{"], "}":
                inside.pop()
            case ([] | ["{"]), '"':
                inside.append('"')
            case [], _ if word != "\n" and found.lastgroup is None:
                yield word, line
        line += word.count("\n")
