"""Which blocks an infra repo may use: those that are called after it. A server with one repo needs no such names."""

import hashlib
import re
from pathlib import Path

from toto.git_host import host, shared


def names(repo: Path, target: str | None = None) -> list[str]:
    """The names of the blocks of an infra repo, or of one of its targets, the most special first.

    They are `REPO--TARGET` and `REPO`, which no other repo has among its names, and for the repo that may use the
    shared blocks also `TARGET` and `toto`. Raises `InputError` when the server's rules are wrong.
    """
    own = _name(shared.name_of(repo))
    return [
        *([f"{own}--{_name(target)}"] if target else []),
        own,
        *_shared(repo, *([target] if target else []), "toto"),
    ]


def own_or_shared(repo: Path, name: str) -> list[str]:
    """The names of the blocks that an infra repo means by `name`: `REPO--NAME`, and `NAME` if it may use shared ones.

    Raises `InputError` when the server's rules are wrong.
    """
    return [f"{_name(shared.name_of(repo))}--{_name(name)}", *_shared(repo, name)]


def _shared(repo: Path, *wanted: str) -> list[str]:
    """Those of the shared names that an infra repo may use: never one that is a different repo's own."""
    if not shared.has_shared_blocks(repo):
        return []
    others = {_name(shared.name_of(each)) for each in host.infra_repos(repo.parent) if each.name != repo.name}
    return [name for name in dict.fromkeys(map(_plain, wanted)) if name not in others]


def _name(text: str) -> str:
    """`text` as part of a block's name: lower-case letters, digits and single dashes; different for each `text`."""
    if re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", text):
        return text
    return f"{_plain(text)}-{hashlib.sha256(text.encode()).hexdigest()[:8]}".lstrip("-")


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
