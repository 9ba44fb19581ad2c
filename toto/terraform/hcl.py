"""Just enough of HCL, the language of `.tf` files, to find the modules that a configuration calls, and its moves.

A module's source is a literal, so nothing is evaluated here. Mistakes in a file are not reported here: terraform
reports them. (python-hcl2 refuses such a file instead, has no line numbers, and takes seconds for 70 kB.)
"""

import json
import re
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

# Possessive quantifiers (`++`, `*+`) do not backtrack: with backtracking, a file of one long line could take minutes.
_CHARACTERS: Final = r'(?:[^"\\$%]++|\\.|\$\$\{|%%\{|[$%](?!\{))'
_CODE: Final = re.compile(
    rf"""
    (?P<nothing> \s++ | (?:\#|//)[^\n]*+ | /\*.*?(?:\*/|\Z)
               | <<-?(?P<tag>[^\W\d][\w-]*+)\r?\n.*?(?:^[^\S\n]*+(?P=tag)\b|\Z) )
  | (?P<string> "{_CHARACTERS}*+" )
  | \w[\w-]*+
  | [^\w\s{{}}="\#/<]++
  | . """,
    re.VERBOSE | re.DOTALL | re.MULTILINE,
)
_STRING: Final = re.compile(rf"{_CHARACTERS}++|[$%]\{{|.", re.DOTALL)


@dataclass(frozen=True)
class Module:
    """A call of a module: `module "name" { source = "…" }`. `line` is the line of its source, counted from 1."""

    name: str
    source: str
    line: int


def modules(text: str) -> Iterator[Module]:
    """The modules that the text of a `.tf` file calls. Raises nothing: what it cannot read, it skips."""
    depth, name, before = 0, "", ("", "")
    line, counted = 1, 0
    for word, place in _tokens(text):
        if word == "{":
            if depth == 0 and before[0] == "module":
                name = before[1].strip('"')
            depth += 1
        elif word == "}":
            depth -= 1
        elif depth == 1 and name and word[0] == '"' and before == ("source", "="):
            line, counted = line + text.count("\n", counted, place), place
            yield Module(name, word.strip('"'), line)
        if depth == 0:
            name = ""
        before = (before[1], word)


def json_modules(text: str) -> Iterator[Module]:
    """The modules that the text of a `.tf.json` file calls. Raises nothing: a file that is no JSON calls none."""
    line, counted = 1, 0
    with suppress(ValueError, AttributeError, RecursionError):
        for calls in _listed(json.loads(text).get("module")):
            for name, bodies in calls.items():
                for source in (body.get("source") for body in _listed(bodies)):
                    if isinstance(source, str):
                        place = max(counted, text.find(json.dumps(source), counted + 1))
                        line, counted = line + text.count("\n", counted, place), place
                        yield Module(name, source, line)


def without(text: str, blocks: Collection[str]) -> str:
    """The text of a `.tf` file without its blocks of these names, such as `moved`; the lines keep their numbers."""
    parts, end, began, depth = list[str](), 0, -1, 0
    before = ("", 0)
    for word, place in _tokens(text):
        if word == "{":
            if depth == 0 and before[0] in blocks:
                began = before[1]
            depth += 1
        elif word == "}":
            depth -= 1
            if depth == 0 and began >= 0:
                parts += [text[end:began], "\n" * text.count("\n", began, place)]
                end, began = place + 1, -1
        before = (word, place)
    return "".join([*parts, text[end:]])


def json_without(text: str, blocks: Collection[str]) -> str:
    """The same of a `.tf.json` file; a file that is no JSON stays as it is."""
    with suppress(ValueError, AttributeError, RecursionError):
        document = json.loads(text)
        if document.keys() & set(blocks):
            return json.dumps({name: each for name, each in document.items() if name not in blocks})
    return text


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _tokens(text: str) -> Iterator[tuple[str, int]]:
    """Words, marks and whole strings (in their quotes), each with its offset; comments and heredocs are skipped."""
    place, began = 0, 0
    inside: list[str] = []  # the open parts of a string: its quote, and the templates and strings within it
    while found := (_STRING if inside[-1:] == ['"'] else _CODE).match(text, place):
        start, place, word = place, found.end(), found[0]
        if inside[-1:] == ['"']:
            if word == '"':
                inside.pop()
                if not inside:
                    yield text[began:place], began
            elif word in ("${", "%{"):
                inside.append("{")
        elif found.lastgroup == "nothing":
            continue
        elif word == '"':  # a string that has templates in it, or no end
            began = began if inside else start
            inside.append('"')
        elif not inside:
            yield word, start
        elif word == "{":
            inside.append("{")
        elif word == "}":
            inside.pop()
