"""What the verbs share: options, the repository that is meant, and how they print."""

import contextlib
import difflib
import shutil
import sys
import textwrap
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final

from typer import Option

from toto.base import paths
from toto.base.errors import InputError
from toto.git_host import access
from toto.git_host import host as git_host
from toto.infra_repo import git

_NARROWEST: Final = 40  # columns of a terminal for which lines are folded
_MOST: Final = 5  # repositories that an error names
_LAST: Final = 253_402_300_799.0  # of the year 9999
_AS_IT_IS: Final[dict[str, Any]] = {
    "replace_whitespace": False,
    "drop_whitespace": True,
    "break_long_words": False,
    "break_on_hyphens": False,
}


def _absolute(path: Path | None) -> Path | None:
    return path and path.absolute()


Repo = Annotated[
    Path | None,
    Option(
        "--repo",
        metavar="PATH",
        help="the infra repo on toto (default: this directory, or else toto's only one)",
        show_default=False,
    ),
]
Repos = Annotated[
    Path,
    Option(
        "--repos",
        metavar="DIR",
        help="the folder of the repositories",
        default_factory=git_host.default_repos,
        callback=_absolute,
        show_default="server/repos in toto's state",
    ),
]
Home = Annotated[
    Path,
    Option(
        "--home",
        metavar="DIR",
        help="the server's home",
        default_factory=lambda: paths.state_home() / "server",
        callback=_absolute,
        show_default="server in toto's state",
    ),
]
By = Annotated[str | None, Option("--by", metavar="USER", help="the user of the git host for whom this is")]


def infra(chosen: Path | None) -> Path:
    """The infra repo that is meant: the one named, that of this directory, or the only one on toto."""
    if chosen is not None:
        return git.bare(chosen)
    with contextlib.suppress(InputError):
        return git.bare(Path())
    there = git_host.infra_repos(git_host.default_repos())
    if len(there) == 1:
        return git.bare(there[0])
    raise InputError(
        "this directory is no infra repo",
        hint="say which: --repo " + (f"with one of {', '.join(map(str, there[:_MOST]))}" if there else "PATH"),
    )


def on_toto(repos: Path, name: str) -> Path:
    """A repository of the git host's. Raises `InputError` when there is none of this name."""
    path = access.path_of(repos, access.check_name(name))
    if not path.exists():
        there = [each.name.removesuffix(".git") for each in git_host.infra_repos(repos)]
        close = difflib.get_close_matches(name, there, n=1)
        raise InputError(
            f"there is no repository {name}",
            hint=f"did you mean {close[0]}?" if close else f"`toto repo create {name}` makes it",
        )
    return git.bare(path)


def show(text: str) -> None:
    """Print text, its lines folded where a terminal is narrower."""
    width = shutil.get_terminal_size((0, 0)).columns
    for line in text.splitlines():
        fits = len(line) <= width or width < _NARROWEST
        print(line if fits else textwrap.fill(line, width, subsequent_indent="    ", **_AS_IT_IS))


def say(text: str) -> None:
    """Tell of what is being done, on standard error."""
    print(f"toto: {text}", file=sys.stderr, flush=True)


def moment(at: float) -> str:
    """A time for people, in seconds since 1970."""
    if at > _LAST:
        return "the end of time"
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")
