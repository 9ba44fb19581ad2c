"""How verbs print: for people, or with `--json` as one document, whose shape is the same for all of them."""

import json
import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Final

from typer import Option

from toto.git_host.follow import clean
from toto.plan.changes import table

SHAPE: Final = 1  # it grows when a document is no longer what its readers know; new fields do not count
_NARROWEST: Final = 40  # columns of a terminal for which lines are folded
_AS_IT_IS: Final[dict[str, Any]] = {
    "replace_whitespace": False,
    "drop_whitespace": True,
    "break_long_words": False,
    "break_on_hyphens": False,
}
_COLOURS: Final = {"bad": "31", "warn": "33", "busy": "36", "none": "2"}  # of a line's mood; SGR

AsJson = Annotated[bool, Option("--json", help="print it as JSON, in the shape that `toto man` describes")]


def document(kind: str, items: Iterable[Any]) -> str:
    """The items of one kind as JSON."""
    return json.dumps({"toto": SHAPE, "kind": kind, "items": list(items)}, indent=1, ensure_ascii=False)


def emit(kind: str, items: Sequence[Any], text: str | list[str], *, as_json: bool) -> None:
    """Print items as JSON, or what people read: a `text`, or the lines that `lines_of` has laid out."""
    if as_json:
        print(document(kind, items))
    elif isinstance(text, str):
        show(text)
    else:
        print("\n".join(text))


def width() -> int:
    """The columns for which lines are laid out; 0 where nobody says: then lines are as long as they are."""
    columns = shutil.get_terminal_size((0, 0)).columns
    return columns if columns >= _NARROWEST else 0


def show(text: str) -> None:
    """Print text, its lines folded where a terminal is narrower."""
    print(_folded(text))


def _folded(text: str) -> str:
    columns, lines = width(), []
    for line in map(clean, text.split("\n")):
        fits = len(line) <= columns or not columns
        lines.append(line if fits else textwrap.fill(line, columns, subsequent_indent="    ", **_AS_IT_IS))
    return "\n".join(lines)


def say(text: str) -> None:
    """Tell of what is being done, on standard error."""
    print(_folded(f"toto: {text}"), file=sys.stderr, flush=True)


def lines_of(rows: Sequence[Mapping[str, str]], columns: tuple[str, ...], moods: Sequence[str] = ()) -> list[str]:
    """Rows as aligned lines below their titles, each cut to the terminal's width; `moods` colour the rows there."""
    most = width()
    made = [clean(line) for line in table([_one_line(row) for row in rows], columns).split("\n")]
    cut = [line if len(line) <= most or not most else f"{line[: most - 1]}…" for line in made]
    return [cut[0], *(_coloured(line, mood) for line, mood in zip(cut[1:], moods or [""] * len(rows), strict=True))]


def _one_line(row: Mapping[str, str]) -> dict[str, str]:
    return {name: " ".join(value.split()) for name, value in row.items()}


def _coloured(text: str, mood: str) -> str:
    if mood not in _COLOURS or os.environ.get("NO_COLOR") or not sys.stdout.isatty():
        return text
    return f"\x1b[{_COLOURS[mood]}m{text}\x1b[0m"
