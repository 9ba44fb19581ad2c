"""Which repository may use what once belonged to all of them: toto's old key, and the blocks that are called `toto`.

Every repository has a key and blocks of its own. A server with one repository needs no names for that, and a server
that was set up by version 0.1.0 has only what is shared. So one repository may use it, and no other: the one that
`shared_blocks` in the server's rules names, or else the only one that there is.
"""

from pathlib import Path

from toto.base import files, paths, server_rules
from toto.git_host import access, host


def name_of(repo: Path) -> str:
    """The name of a repository."""
    return repo.name.removesuffix(".git")


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
