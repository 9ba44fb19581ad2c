"""The files of a working tree as they are now, as a commit: what the plain library knows is commits of bare repos."""

import hashlib
import os
from pathlib import Path

import git as gitpython

from toto.base import paths
from toto.infra_repo import git, manifest


def here(folder: Path) -> Path | None:
    """The working tree of an infra repo that a folder is in; None when it is in none."""
    try:
        with gitpython.Repo(folder, search_parent_directories=True) as opened:
            tree = None if opened.bare else Path(str(opened.working_tree_dir))
    except (gitpython.InvalidGitRepositoryError, gitpython.NoSuchPathError):
        return None
    return tree if tree is not None and (tree / manifest.FILE).is_file() else None


async def commit(tree: Path) -> tuple[Path, str]:
    """A bare repo of toto's own that holds the files of a working tree, but for what is ignored; and their commit.

    It is the same repo each time, so that what was evaluated of the tree before is known. Raises `CommandFailed`.
    """
    real = tree.resolve()
    name = f"{real.name or 'tree'}-{hashlib.sha256(os.fsencode(real)).hexdigest()[:8]}"
    repo = paths.private_folder(paths.state_home() / "working") / f"{name}.git"
    async with paths.alone(repo.with_suffix(".lock")):
        if not (repo / "HEAD").exists():
            await git.git(repo, "init", "--quiet", "--bare", "--object-format=sha1", "--initial-branch=main", repo)
        within = {"GIT_WORK_TREE": str(real), "GIT_INDEX_FILE": str(repo / "index")}
        await git.git(repo, "add", "--all", extra=within)
        files = (await git.git(repo, "write-tree", extra=within)).stdout.strip()
        who = {f"GIT_{role}_{what}": "toto" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        made = await git.git(repo, "commit-tree", "-m", "the working tree", files, extra=who)
        found = made.stdout.strip()
        await git.git(repo, "update-ref", "refs/heads/main", found)
    return repo, found
