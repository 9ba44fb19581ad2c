"""Writing to toto's own branches in the infra repo (ledger, notifications, notes); there may be many writers at once.

A change is a function of the current texts, followed by a compare-and-swap: the branch moves only if it still is at the
commit where those texts were read. Otherwise a different writer was first, and the function is called again. `git
fast-import` does this in one process without an index: it writes the objects (git syncs them to the disk), then moves
the branch, so a writer that is killed leaves the branch either as it was or moved. It is not for branches that people
push to.
"""

import random
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, TypeAlias

import anyio
from gitdb.exc import BadName

from toto.base import process
from toto.infra_repo import git
from toto.infra_repo.git import GitError

TRIES: Final = 50  # a try fails when a different writer was first, so this many may write at the same time
KEPT: Final = "refs/toto/kept"  # commits that toto's branches name
CRASH_REPORTS: Final = "fast_import_crash_*"  # git leaves them in the repository when it cannot write

Texts: TypeAlias = Mapping[str, str]
Edit: TypeAlias = Callable[[Texts], Mapping[str, str | None]]
_Step: TypeAlias = Callable[[str], Awaitable[bytes]]  # takes a commit, gives the changes to it; b"" for none


class NotWritten(GitError):
    """A branch could not be written; it is as it was. `why` is what git said."""

    def __init__(self, repo: Path, ref: str, why: str) -> None:
        super().__init__(
            f"{ref} could not be written: {why}",
            target=str(repo),
            hint=f"is there room on the disk (`df -h {repo}`), and may toto write there?",
        )
        self.why = why


async def change(
    repo: Path, ref: str, paths: Sequence[str], edit: Edit, message: str, *, named: Callable[[], Iterable[str]] = tuple
) -> None:
    """Change files of the branch `ref` in one commit; the branch is made when it is missing.

    `edit` gets the text of each of `paths` that exists, and returns new texts by path (None removes the file). It is
    called again when a different writer was first. No commit is made when it changes nothing, nor when it raises.
    The commits of the repo that the new texts name, which `named` returns after `edit`, are kept by refs of their own:
    a forced push could take them from every branch, and git would collect them.
    Raises `NotWritten`, and what `edit` raises.
    """

    async def step(tip: str) -> bytes:
        old = _texts(repo, tip, paths)
        new = edit(old)
        return b"".join(
            f"D {path}\n".encode() if text is None else f"M 100644 inline {path}\n".encode() + _data(text)
            for path, text in new.items()
            if text != old.get(path)
        )

    def kept() -> bytes:
        there = _there(repo, dict.fromkeys(named()))
        return b"".join(f"reset {KEPT}/{each}\nfrom {each}\n\n".encode() for each in there)

    await _swap(repo, ref, step, message, kept)


def read(repo: Path, ref: str, paths: Sequence[str]) -> Texts:
    """The text of each of `paths` that exists in the branch `ref`; nothing else of it is read."""
    return _texts(repo, git.tip(repo, ref), paths)


async def change_note(repo: Path, ref: str, commit: str, edit: Callable[[str], str]) -> None:
    """As `change`, for the note of a commit in `ref` (below refs/notes); `edit` gets "" when there is none."""

    async def step(_: str) -> bytes:
        # The note may be newer than the tip; then fast-import refuses, and the step runs again.
        old = (await git.git(repo, "notes", f"--ref={ref}", "show", commit, check=False)).stdout
        new = edit(old)
        return b"" if new == old else f"N inline {commit}\n".encode() + _data(new)

    await _swap(repo, ref, step, "toto's notes")


async def _swap(repo: Path, ref: str, step: _Step, message: str, kept: Callable[[], bytes] = bytes) -> None:
    for attempt in range(TRIES):
        tip = git.tip(repo, ref)
        changes = await step(tip)
        if not changes:
            return
        # fast-import only fast-forwards the ref from `tip`: that makes this a compare-and-swap.
        stream = b"".join(
            (
                b"feature done\n",
                kept(),
                f"commit {ref}\ncommitter toto <toto@localhost> now\n".encode(),
                _data(message),
                f"from {tip}\n".encode() if tip else b"",
                changes,
                b"done\n",
            )
        )
        try:
            done = await git.git(repo, "fast-import", "--quiet", "--date-format=now", stdin=stream, check=False)
        except process.CommandTimeout as error:
            raise NotWritten(repo, ref, error.message) from error
        if done.status == 0:
            return
        locked = await git.until_unlocked(repo, ref)
        if done.status != 1 or not (locked or git.tip(repo, ref) != tip):  # 1: objects written, ref not moved
            _clear(repo)
            raise NotWritten(repo, ref, _said(done.stderr))
        await anyio.sleep(random.uniform(0, 0.02 * (attempt + 1)))  # noqa: S311
    raise NotWritten(repo, ref, f"other writers were first {TRIES} times")


def _there(repo: Path, hashes: Iterable[str]) -> list[str]:
    """Those of some commits, by their whole hashes, that the repo has."""
    found = []
    with git.open_repo(repo) as opened:
        for each in hashes:
            with suppress(BadName, ValueError):
                if opened.commit(each).hexsha == each:
                    found.append(each)
    return found


def _texts(repo: Path, tip: str, paths: Sequence[str]) -> dict[str, str]:
    if not tip:
        return {}
    with git.open_repo(repo) as opened:
        blobs = git.blobs(opened, tip)
        return {path: git.blob(opened, blobs[path]).decode(errors="replace") for path in paths if path in blobs}


def _data(text: str) -> bytes:
    data = text.encode()
    return b"data %d\n%b\n" % (len(data), data)


def _said(stderr: str) -> str:
    lines = [line for line in stderr.splitlines() if "dumping crash report" not in line]
    return process.tail("\n".join(lines)) or "git said nothing"


def _clear(repo: Path) -> None:
    for report in repo.glob(CRASH_REPORTS):
        with suppress(OSError):
            report.unlink()
