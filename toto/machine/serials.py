"""The newest serial of a document that toto gave each machine of a repo."""

import json
from pathlib import Path

from toto.base import paths


def file(repo: Path) -> Path:
    """The file that has them; the signer alone writes it."""
    return paths.repo_state(repo) / "serials.json"


def read(repo: Path) -> dict[str, int]:
    """The serials, by machine; none before the first. Raises ValueError for a file that cannot be read."""
    try:
        found = json.loads(file(repo).read_text())
    except FileNotFoundError:
        return {}
    if not isinstance(found, dict) or not all(type(each) is int for each in found.values()):
        raise ValueError("not serials by machine")
    return found
