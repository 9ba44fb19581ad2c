"""Reading the infra repo, and exporting a commit to a tree without .git. `toto.infra_repo.branch` writes to it.

GitPython reads objects (it keeps its own `git cat-file` running while a repo is open); `toto.base.process` runs every
other git command. Both use an environment without the GIT_DIR and the quarantine of a hook.
"""

import os
import random
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import anyio
import git as gitpython
from gitdb.exc import BadName, BadObject

from toto.base import owned, paths, process, server_rules
from toto.base.errors import InputError, TotoError
from toto.base.without_git import without_git
from toto.infra_repo import contents

STALE: Final = 20  # seconds; git needs a ref's lock for milliseconds only
DEEPEST: Final = 64  # nested folders of a commit


class GitError(TotoError):
    """git failed on the infra repo."""


class NoSuchCommit(InputError):
    """The commit or branch is not in the infra repo."""


@dataclass(frozen=True)
class Commit:
    """A commit, for people to read. `committer` is the committer's mail address: most likely the pusher's."""

    hash: str
    subject: str = ""
    author: str = ""
    committer: str = ""


def environment(extra: dict[str, str] | None = None) -> dict[str, str]:
    """This process's environment for git, with `extra`: no GIT_* of a hook is in it, nothing asks for a password.

    Nor is the configuration of this machine and user: a commit's .gitattributes could ask for its filters.
    """
    own = {"GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": os.devnull, "GIT_TERMINAL_PROMPT": "0"}
    return without_git() | own | (extra or {})


async def git(
    repo: Path,
    *arguments: str | Path,
    stdin: bytes | None = None,
    check: bool = True,
    extra: dict[str, str] | None = None,
) -> process.Completed:
    """Run git on a bare repo, with `extra` in its environment.

    Raises `CommandFailed` when `check`, and `CommandTimeout` after 300 seconds.
    """
    return await process.run(
        ["git", f"--git-dir={repo}", "-c", "core.fsync=loose-object,reference", *arguments],
        env=environment(extra),
        stdin=stdin,
        check=check,
        timeout=300,
        target=repo.name,
    )


@contextmanager
def open_repo(repo: Path) -> Iterator[gitpython.Repo]:
    """Open the repo for reading while the block lasts. Raises `InputError` when there is none."""
    try:
        opened = gitpython.Repo(repo)
    except (gitpython.InvalidGitRepositoryError, gitpython.NoSuchPathError) as error:
        raise InputError("is not a git repository", target=str(repo), hint="name the path of the bare repo") from error
    with opened:
        opened.git.update_environment(GIT_DIR=str(opened.git_dir))
        yield opened


def bare(path: Path) -> Path:
    """The git directory of a repo, bare or with a work tree. Raises `InputError` when there is none."""
    with open_repo(path) as opened:
        return Path(opened.git_dir)


def resolve(repo: Path, revision: str) -> str:
    """The full hash of the commit that `revision` names: a branch, a tag, or a hash. Raises `NoSuchCommit`.

    A branch comes before a tag of the same name, and both before a shortened hash. `HEAD` is the deployed branch.
    """
    if not revision or revision.startswith("-") or "\n" in revision:
        raise NoSuchCommit(f"{revision!r} does not name a commit", target=str(repo))
    name = re.split(r"[~^@:]", revision)[0]
    plain = name == "HEAD" or name.startswith("refs/") or re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", name)
    with open_repo(repo) as opened:
        for prefix in () if plain else ("refs/heads/", "refs/tags/"):
            with suppress(BadName, BadObject, ValueError, IndexError, NotImplementedError):
                return str(opened.commit(f"{prefix}{revision}").hexsha)
        try:
            return str(opened.commit(revision).hexsha)
        except (BadName, BadObject, ValueError, IndexError, NotImplementedError) as error:
            raise NoSuchCommit(
                f"has no commit {revision!r}", target=str(repo), hint="push it first, or see `git log --all`"
            ) from error


def tip(repo: Path, ref: str) -> str:
    """The commit that a ref of toto's own is at, by its whole name; "" when there is no such ref."""
    with open_repo(repo) as opened:
        try:
            return str(gitpython.SymbolicReference.dereference_recursive(opened, ref))
        except ValueError:
            return ""


def blobs(opened: gitpython.Repo, commit: str) -> dict[str, str]:
    """The files of a commit: git's names for what is in them, by path.

    (GitPython's own trees take ten times as long.)
    """
    entry = re.compile(rb"([0-7]+) ([^\0]+)\0(.{%d})" % (len(commit) // 2), re.DOTALL)
    found, folders = {}, [("", f"{commit}^{{tree}}")]
    for place, folder in folders:
        for mode, name, itself in entry.findall(blob(opened, folder)):
            path = place + name.decode(errors="surrogateescape")
            if mode == b"40000":
                folders.append((f"{path}/", itself.hex()))
            else:
                found[path] = itself.hex()
    return found


def blob(opened: gitpython.Repo, name: str) -> bytes:
    """What is in an object of git's. Raises ValueError when it is not there."""
    return bytes(opened.git.stream_object_data(name)[3].read())


async def describe(repo: Path, commit: str) -> Commit:
    """The commit's hash and subject, its author's name and its committer's mail address. Raises `CommandFailed`.

    Anyone can write anything into them: none of it is verified.
    """
    done = await git(
        repo,
        "-c",
        "log.showSignature=false",
        "log",
        "-1",
        "--no-color",
        "--encoding=UTF-8",
        "--format=%H%x00%s%x00%an%x00%ce",
        commit,
        "--",
    )
    return Commit(*done.stdout.removesuffix("\n").split("\0"))


async def checkout(repo: Path, commit: str, destination: Path) -> None:
    """Write the files of a commit to `destination`, and nothing else: it is emptied first.

    There is no .git, so no revision gets into a drv; nor does the path, since cells have it at one that is always the
    same. Links into the nix store are left out. Raises `InputError` for a link that leads out of the tree, and for a
    commit that has more files, or larger ones, than the server allows; `CommandFailed`.
    """
    await _check_size(repo, commit)
    owned.remove(destination)
    destination.mkdir(parents=True)
    index = destination.with_name(f"{destination.name}.index")
    index.unlink(missing_ok=True)
    try:
        # Not `git archive`: it expands export-subst, which would write the revision into the tree.
        extra = {"GIT_INDEX_FILE": str(index), "GIT_WORK_TREE": str(destination)}
        await git(repo, "read-tree", commit, extra=extra)
        await git(repo, "checkout-index", "--all", "--force", "--quiet", extra=extra)
    finally:
        index.unlink(missing_ok=True)
    _close_links(destination)
    # A flake's self.lastModified is the newest time in its tree. It has to be the same in every checkout, for the drv.
    for directory, folders, files in os.walk(destination, topdown=False):
        for name in (*files, *folders):
            path = Path(directory, name)
            if not path.is_symlink():
                path.chmod(_readable(path.stat().st_mode))
            os.utime(path, (1, 1), follow_symlinks=False)
    destination.chmod(0o755)
    os.utime(destination, (1, 1))


def _readable(mode: int) -> int:
    """The permissions with which a cell's user may read what git has written, whatever toto's umask is."""
    return 0o755 if mode & 0o100 else 0o644


async def _check_size(repo: Path, commit: str) -> None:
    """Raise `InputError` when the files of a commit are too many, too large in sum, or nested too deep.

    (A push of a few kilobytes can have a billion files, since git stores what is the same once.)
    """
    most, files, size, wrong = server_rules.load().push, 0, 0, ""
    async with aclosing(contents.listed(repo, commit, environment())) as listed:
        async for file in listed:
            files, size = files + 1, size + file.size
            if file.path.count("/") > DEEPEST:
                wrong = f"has a file that is nested more than {DEEPEST} folders deep"
            elif files > most.files:
                wrong = f"has more than {most.files} files"
            elif size > most.unpacked:
                wrong = f"has files of more than {most.unpacked} bytes in all"
            if wrong:
                break
    if wrong:
        raise InputError(wrong, target=commit[:12], hint="see `push` in the server's server.toml: docs/operations.md")


def _close_links(tree: Path) -> None:
    """Remove the links into the nix store; raise `InputError` for other links that lead out of the tree.

    (`result` is such a link. Nothing that may read the tree may follow it, and what a commit builds itself could be a
    link to any file of this machine.)
    """
    root = os.path.realpath(tree)
    into_store: list[Path] = []
    for directory, folders, files in os.walk(tree):
        for name in (*folders, *files):
            path = Path(directory, name)
            if path.is_symlink():
                leads = os.path.realpath(path)
                if leads.startswith("/nix/store/"):
                    into_store.append(path)
                elif not (leads == root or leads.startswith(root + os.sep)):
                    raise InputError(
                        f"is a link that leads out of the repo, to {path.readlink()}",
                        target=str(path.relative_to(tree)),
                        hint="commit the file itself",
                    )
    for path in into_store:
        path.unlink()


async def check_finished(repo: Path, commit: str, allowed: Sequence[str]) -> None:
    """Raise `InputError` when something in a commit is not what was meant, such as a submodule's empty folder.

    `allowed` are the files and folders of which that is not asked.
    """
    most = server_rules.load().push.files  # (a commit of more is refused)
    found = await contents.unfinished(repo, commit, environment(), allowed, most=most)
    if lines := contents.words(found):
        raise InputError("\n".join(lines))


async def superseded_by(repo: Path, commit: str) -> str | None:
    """The commit whose deployment was requested last, or None if that is `commit` itself.

    The hook writes it to `refs/toto/wanted`; without that ref it is the newest commit of the deployed branch (the bare
    repo's HEAD). It need not be newer than `commit`: a commit that a force push removed must not be rolled out either.
    """
    for name in ("refs/toto/wanted", "HEAD"):
        done = await git(repo, "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}", check=False)
        if newest := done.stdout.strip():
            return newest if newest != commit else None
    return None


async def mark(repo: Path, tag: str, commit: str) -> None:
    """Point a lightweight tag at a commit; move it if it exists. Raises `GitError`."""
    if (done := await update_ref(repo, f"refs/tags/{tag}", commit, message=f"toto: {tag}")).status != 0:
        raise GitError(f"could not be moved to {commit[:8]}: {process.tail(done.stderr)}", target=tag)


async def update_ref(repo: Path, ref: str, new: str, old: str | None = None, *, message: str) -> process.Completed:
    """Move a ref to `new` if it still is at `old` (anywhere, when None). The status is 0 if it was moved.

    A git that was killed, or a power failure, leaves the ref locked for ever. The lock is removed after `STALE`
    seconds: no living git holds one for that long.
    """
    deadline = time.monotonic() + 2 * STALE
    while True:
        expected = [] if old is None else [old]
        done = await git(repo, "update-ref", "-m", message, ref, new, *expected, check=False)
        if done.status == 0 or time.monotonic() > deadline or not await until_unlocked(repo, ref):
            return done


async def until_unlocked(repo: Path, ref: str) -> bool:
    """Wait until a ref is not locked, for at most twice `STALE` seconds. Returns whether it was locked."""
    lock, deadline, locked = repo / f"{ref}.lock", time.monotonic() + 2 * STALE, False
    while lock.exists() and time.monotonic() < deadline:
        locked = True
        async with paths.alone(repo / "toto-stale.lock"):  # two at once might remove the new lock of a third
            with suppress(FileNotFoundError):
                if time.time() - lock.stat().st_mtime > STALE:
                    lock.unlink()
        await anyio.sleep(random.uniform(0.01, 0.1))  # noqa: S311
    return locked


def now() -> str:
    """The current time as records have it: UTC, to the second, like 2024-05-01T12:00:00Z."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
