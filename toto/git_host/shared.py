"""Which repository may use which blocks, and what once was all of theirs: toto's old key, the blocks called `toto`.

Every repository has a key and blocks of its own. A server with one repository needs no names for that, and a server
that was set up by version 0.1.0 has only what is shared. So one repository may use it, and no other: the one that
`shared_blocks` in the server's rules names, or else the only one that there is.

A name of blocks is the first repository's that uses it, by an id in the bare repository: `names.json` in toto's state
has it. So who makes a repository with the name of one that is gone, or of another one's block, gets nothing by that.
"""

import contextlib
import fcntl
import hashlib
import json
import re
import uuid
from pathlib import Path
from typing import Final

from toto.base import files, paths, server_rules
from toto.base.errors import InputError
from toto.git_host import access, host

_NAMES: Final = "names.json"


def name_of(repo: Path) -> str:
    """The name of a repository."""
    return repo.name.removesuffix(".git")


def block_name(text: str) -> str:
    """`text` as part of a block's name: lower-case letters, digits and single dashes; different for each `text`."""
    if re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", text):
        return text
    return f"{plain(text)}-{hashlib.sha256(text.encode()).hexdigest()[:8]}".lstrip("-")


def plain(text: str) -> str:
    """`text` in lower-case letters, digits and single dashes; the same for some."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def is_free(repo: Path, name: str) -> bool:
    """Whether a name of blocks is the repository's, or nobody's."""
    return _names().get(name) in (None, _id(repo))


def claim(repo: Path, name: str, *, take: bool = False) -> None:
    """Make a name of blocks the repository's.

    Raises `InputError` when it is a different one's, unless the repository may `take` it.
    """
    if _names().get(name) == _id(repo):
        return
    with files.lock(paths.state_home() / f"{_NAMES}.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not take and not is_free(repo, name):
            raise InputError(
                f"the blocks called {name} belong to a different repository, or to one of this name that was there "
                "before",
                target=name_of(repo),
                hint=f"if they are to be this one's, on toto: toto repo create {name_of(repo)} --inherit",
            )
        if repo.exists():
            files.write(paths.state_home() / _NAMES, json.dumps(_names() | {name: _id(repo)}, indent=1, sort_keys=True))


def require_new(repo: Path) -> None:
    """Raise `InputError` when `repo` is not there, and something is left of one that was there or had its name."""
    left = paths.repo_state_of(repo).exists() or block_name(name_of(repo)) in {*_names(), "toto"}
    if left and not repo.exists():  # (one that is being made leaves something only when it is there)
        raise InputError(
            "a repository of this name was there before, or a block of a different one has it: its keys, machines and "
            "secrets would be the new one's",
            target=name_of(repo),
            hint=f"choose a different name, or, if that is meant, on toto: toto repo create {name_of(repo)} --inherit",
        )


def _names() -> dict[str, str]:
    """The ids of the repositories that names of blocks belong to."""
    try:
        found: dict[str, str] = json.loads((paths.state_home() / _NAMES).read_text())
        return found
    except FileNotFoundError:
        return {}


def _id(repo: Path) -> str:
    """The id of a repository, which moves with it; it is made when first needed. "" when there is no repository."""
    if not repo.exists():
        return ""
    file = repo / "toto" / "id"
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        fresh = files.write(file.with_name(f"id.{uuid.uuid4()}"), str(uuid.uuid4()))
        with contextlib.suppress(FileExistsError):  # (who links it first has made it)
            file.hardlink_to(fresh)
        fresh.unlink()
    return file.read_text()


def is_only_one(repo: Path) -> bool:
    """Whether there is no other infra repo beside this one."""
    return [each.resolve() for each in host.infra_repos(repo.parent)] in ([], [repo.resolve()])


def has_shared_blocks(repo: Path) -> bool:
    """Whether a repository also uses the blocks that are called `toto`. Raises `InputError` for wrong rules."""
    chosen = server_rules.load().shared_blocks
    return is_only_one(repo) if chosen is None else chosen == name_of(repo)


def keep_with_the_first(repos: Path, new: str) -> str | None:
    """Before a second repository is made, write down that the first one keeps the shared blocks.

    Returns the name of the first one if it was written. Raises `InputError` for wrong rules.
    """
    others = [each for each in host.infra_repos(repos) if each != access.path_of(repos, new)]
    if len(others) != 1 or access.path_of(repos, new).exists() or server_rules.load().shared_blocks is not None:
        return None
    file = paths.state_home() / server_rules.FILE
    first = name_of(others[0])
    rest = file.read_text() if file.exists() else ""
    files.write(file, f'shared_blocks = "{first}"  # it alone also uses the blocks that are called toto\n{rest}')
    return first
