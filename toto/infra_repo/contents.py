"""What a commit contains, as git lists it, and which of it is unfinished: not the files that were meant.

The pre-receive hook uses it too, so it imports neither pydantic nor GitPython.
"""

import asyncio
import posixpath
import re
import tomllib
import unicodedata
from collections.abc import AsyncGenerator, Collection, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from toto.base import process

SETTINGS: Final = "toto.toml"
LINK: Final = "120000"  # git's mode of a symbolic link
_OR: Final = f"; or, if nothing reads it, name it in `unfinished` of [tree] in {SETTINGS}"
_GITLINK: Final = "160000"  # of a submodule: a commit of a different repository
_LINKS: Final = 40  # links that lead to each other, as in Linux
_SMALL: Final = 4096  # bytes: a pointer of git-lfs has at most 1,024, a link as many as a path
_BLOB: Final = re.compile(r"([0-9a-f]{40,64}) blob \d+")

# How the content of a file begins that stands for different content, and what makes such files.
_STAND_INS: Final[Mapping[str, str]] = {
    "version https://git-lfs.github.com/spec/": "git-lfs",
    "version https://hawser.github.com/spec/": "git-lfs",
    "version http://git-media.io/v/": "git-lfs",
    "/annex/objects/": "git-annex",
    "\0GITCRYPT\0": "git-crypt",
}


@dataclass(frozen=True)
class File:
    """One entry of a commit: git's `mode`, its object's `hash`, its `size` in bytes (0 for a submodule), its `path`."""

    mode: str
    hash: str
    size: int
    path: str


@dataclass(frozen=True)
class Unfinished:
    """A path that is not what was meant: `why`, and what to do `next`."""

    path: str
    why: str
    next: str

    def __str__(self) -> str:
        return f"{_shown(self.path)}: {self.why}"


def _shown(path: str) -> str:
    return ascii(path)[1:-1]


async def listed(repo: Path, commit: str, env: Mapping[str, str]) -> AsyncGenerator[File, None]:
    """The files of a commit, as git lists them. (A push of a few kilobytes can have a billion: stop in time.)"""
    async with process.start(
        ["git", f"--git-dir={repo}", "ls-tree", "-r", "-l", "-z", "--full-tree", commit],
        env=env,
        stdout=asyncio.subprocess.PIPE,
    ) as running:
        assert running.process.stdout is not None
        rest = b""
        try:
            while chunk := await running.process.stdout.read(65_536):
                *entries, rest = (rest + chunk).split(b"\0")
                for each in entries:
                    about, _, path = each.partition(b"\t")
                    mode, _, name, size = about.decode().split()
                    yield File(mode, name, int(size) if size.isdigit() else 0, path.decode(errors="surrogateescape"))
        finally:
            await running.end()
            while await running.process.stdout.read(65_536):  # (the pipe is closed when all of it has been read)
                pass


async def unfinished(
    repo: Path, commit: str, env: Mapping[str, str], allowed: Sequence[str] = (), *, most: int = 100_000
) -> list[Unfinished]:
    """What in a commit would not be deployed as it was meant; nothing for one of more than `most` files.

    That are submodules (their folder would be empty), files that stand for others (git-lfs, git-annex, git-crypt),
    names that differ only by case, and links out of the repo or to nothing. `allowed` are files and folders that may be
    unfinished; no link out of the repo may.
    """
    found: list[Unfinished] = []
    out: list[Unfinished] = []
    links: dict[str, str] = {}
    there = set[str]()
    small: dict[str, list[File]] = {}
    spelled: dict[str, str] = {}
    async with aclosing(listed(repo, commit, env)) as files:
        async for file in files:
            if (most := most - 1) < 0:
                return []
            there.update((file.path, *_folders(file.path)))
            if file.mode == _GITLINK:
                why = "is a submodule, and toto has only this repository: the folder would be empty"
                found.append(Unfinished(file.path, why, f"commit its files, for example by `git subtree add`{_OR}"))
            elif file.size <= _SMALL:
                small.setdefault(file.hash, []).append(file)
            found += _spelled_twice(file.path, spelled)
    for name, head in (await _heads(repo, small, env)).items():
        for file in small[name]:
            if file.mode == LINK:
                out += _leads_out(file.path, head)
                links[file.path] = head
            else:
                found += _stands_in(file.path, head)
    found += [each for path in links for each in _leads_nowhere(path, links, there)]
    told = [each for each in found if not any(f"{each.path}/".startswith(f"{path}/") for path in allowed)]
    return list(dict.fromkeys([*told, *out]))


def words(found: Sequence[Unfinished], most: int = 5) -> list[str]:
    """What is unfinished, in lines for people: the first `most`, and what to do."""
    if not found:
        return []
    more = [f"… and {len(found) - most} more"] if len(found) > most else []
    return [*map(str, found[:most]), *more, *(f"next: {hint}" for hint in dict.fromkeys(each.next for each in found))]


def allowed(settings: str) -> list[str]:
    """The setting `tree.unfinished` in the text of a toto.toml, without telling what is wrong in it."""
    try:
        paths = tomllib.loads(settings)["tree"]["unfinished"]
        return [posixpath.normpath(path) for path in paths if isinstance(path, str)]
    except (ValueError, LookupError, TypeError, RecursionError):
        return []


def _folders(path: str) -> Iterator[str]:
    """The folders that a path leads through."""
    return (path[: slash.start()] for slash in re.finditer("/", path))


def _spelled_twice(path: str, spelled: dict[str, str]) -> Iterator[Unfinished]:
    """Whether the path, or a folder of it, differs from one in `spelled` only by case; puts them there."""
    for each in (*_folders(path), path):
        other = spelled.setdefault(unicodedata.normalize("NFC", each).casefold(), each)
        if other != each:
            why = f"differs from {_shown(other)} only by case or accents, so that many systems have only one of them"
            yield Unfinished(each, why, f"rename one of them{_OR}")
            return


def _stands_in(path: str, head: str) -> Iterator[Unfinished]:
    """Whether a file that begins with `head` stands for different content."""
    for begins, tool in _STAND_INS.items():
        if head.startswith(begins):
            why = f"is not the file but what {tool} has committed in its place, and toto runs no {tool}"
            yield Unfinished(path, why, f"commit the file itself{_OR}")


def _leads_out(path: str, to: str) -> Iterator[Unfinished]:
    """Whether a link leads out of the repo. (One that nix left, called `result`, is nobody's input.)"""
    if to.startswith("/nix/store/") and re.fullmatch(r"result(-.*)?", posixpath.basename(path)):
        return
    if posixpath.isabs(to) or posixpath.normpath(posixpath.join(posixpath.dirname(path), to)).split("/")[0] == "..":
        yield Unfinished(path, f"is a link that leads out of the repo, to {_shown(to)}", "commit the file itself")


def _leads_nowhere(path: str, links: Mapping[str, str], there: Collection[str]) -> Iterator[Unfinished]:
    """Whether a link leads to nothing that is in the commit, such as a file that git ignores, or in a circle."""
    at = path.split("/")[:-1]
    rest, most = links[path].split("/")[::-1], _LINKS
    while rest and most:
        part = rest.pop()
        if part == "..":
            if not at:
                return  # out of the repo
            at.pop()
        elif part not in ("", "."):
            at.append(part)
            if (step := links.get("/".join(at))) is not None:
                most -= 1
                at.pop()
                rest += step.split("/")[::-1]
                if posixpath.isabs(step):
                    return
            elif "/".join(at) not in there:
                break
    else:
        if most:
            return
    if not (posixpath.isabs(links[path]) or "\ufffd" in links[path]):  # (a name that is no text)
        why = f"is a link to {_shown(links[path])}, which is not in the repo"
        yield Unfinished(path, why, f"commit what it leads to{_OR}")


async def _heads(repo: Path, objects: Collection[str], env: Mapping[str, str]) -> dict[str, str]:
    """The first line of each of these small files."""
    heads: dict[str, str] = {}
    name = ""

    def note(line: str) -> None:
        nonlocal name
        if name:
            heads.setdefault(name, line)
            name = ""
        elif (header := _BLOB.fullmatch(line)) and header[1] in objects:
            name = header[1]

    await process.run(
        ["git", f"--git-dir={repo}", "cat-file", "--batch", "--buffer"],
        env=env,
        stdin="".join(f"{each}\n" for each in objects).encode(),
        on_line=note,
        timeout=300,
    )
    return heads
