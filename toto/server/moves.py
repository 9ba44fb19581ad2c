"""Where toto's state has moved to, and where it was before: `toto migrate` moves it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from toto.base import files
from toto.base.errors import TotoError

_TO: Final = "moved-to"  # in the old state
_FROM: Final = "moved.json"  # in the new state: folders of the old toto, and what they are now


def moved(path: Path, moves: Mapping[Path, Path]) -> Path:
    """Where `path` is after the `moves` of folders; the innermost folder counts."""
    for old in sorted(moves, key=lambda each: -len(each.parts)):
        if path.is_relative_to(old):
            return moves[old] / path.relative_to(old)
    return path


def read(state: Path) -> Mapping[Path, Path]:
    """The moves that brought `state` here; none when it was here from the start."""
    file = state / _FROM
    return {Path(old): Path(new) for old, new in json.loads(file.read_text()).items()} if file.exists() else {}


def write(state: Path, moves: Mapping[Path, Path]) -> None:
    """Save in the new state which moves bring it there."""
    files.write(state / _FROM, json.dumps({str(old): str(new) for old, new in moves.items()}))


def mark(old: Path, new: Path) -> None:
    """Save in the old state that it is not in use any more."""
    files.write(old / _TO, f"{new}\n")


def refuse_old(state: Path) -> None:
    """Raise `TotoError` when `state` is not in use any more."""
    if (state / _TO).exists():
        new = (state / _TO).read_text().strip()
        raise TotoError(
            f"toto has moved to {new}", target=str(state), hint=f"start it there, as its owner: TOTO_STATE={new}"
        )
