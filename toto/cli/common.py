"""What the verbs share: options and the repository that is meant."""

import contextlib
import difflib
import getpass
from pathlib import Path
from typing import Annotated, Final

from typer import Option

from toto.base import paths
from toto.base.errors import InputError
from toto.base.prefect_api import Api
from toto.git_host import access
from toto.git_host import host as git_host
from toto.git_host.access import Right
from toto.git_host.shared import name_of
from toto.infra_repo import git

_MOST: Final = 5  # repositories that an error names


def _absolute(path: Path | None) -> Path | None:
    return path and path.absolute()


Repo = Annotated[
    Path | None,
    Option(
        "--repo",
        metavar="REPO",
        help="the infra repo, by its name or its path (default: this directory's, or else toto's only one)",
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


def infra_or_none(chosen: Path | None, repos: Path | None = None) -> Path | None:
    """The infra repo that is named, or that of this directory; None when there is neither."""
    if chosen is not None:
        by_path = "/" in str(chosen) or chosen.exists()
        return git.bare(chosen) if by_path else on_toto(repos or git_host.default_repos(), str(chosen))
    with contextlib.suppress(InputError):
        return git.bare(Path())
    return None


def infra(chosen: Path | None, repos: Path | None = None) -> Path:
    """The infra repo that is meant: the one named, that of this directory, or the only one on toto."""
    if (found := infra_or_none(chosen, repos)) is not None:
        return found
    there = git_host.infra_repos(repos or git_host.default_repos())
    if len(there) == 1:
        return git.bare(there[0])
    raise InputError(
        "this directory is no infra repo",
        hint="say which: --repo " + (f"with one of {', '.join(map(name_of, there[:_MOST]))}" if there else "PATH"),
    )


async def of_user(repos: Path, chosen: Path | None, user: str | None, right: Right) -> Path:
    """The infra repo that is meant by a user of the git host (None: somebody on toto itself) who needs a right to it.

    Raises `InputError` when they do not have it; of a repository that they may not read it does not tell.
    """
    if user is None:
        return infra(chosen, repos)
    named = None if chosen is None else str(chosen)
    found = [
        each
        for each in git_host.infra_repos(repos)
        if named in (None, name_of(each)) and await access.may(repos, user, "read", name_of(each))
    ]
    if len(found) != 1:
        raise InputError(
            f"you may read {', '.join(map(name_of, found))}" if found else "there is no such repository of yours",
            target=named,
            hint="say which: --repo NAME" if found else f"ask someone who may deploy {access.ADMIN}",
        )
    if not await access.may(repos, user, right, name_of(found[0])):
        raise InputError(
            f"{user} may not {right} {name_of(found[0])}", hint=f"ask someone who may deploy {access.ADMIN}"
        )
    return found[0]


def who(user: str | None) -> str:
    """The person for whom this is, in a record: a user of the git host, else somebody on toto itself."""
    return user or f"{getpass.getuser()} (on toto itself)"


async def api_near(repo: Path | None, repos: Path) -> Api:
    """The API of the toto that has a repo, or that has the repositories in a folder."""
    for each in [repo] if repo else git_host.infra_repos(repos):
        with contextlib.suppress(InputError):
            return await git_host.api_of(each)
    return Api(git_host.Served().api_url)


def on_toto(repos: Path, name: str) -> Path:
    """A repository of the git host's. Raises `InputError` when there is none of this name."""
    path = access.path_of(repos, access.check_name(name))
    if not path.exists():
        there = [name_of(each) for each in git_host.infra_repos(repos)]
        close = difflib.get_close_matches(name, there, n=1)
        raise InputError(
            f"there is no repository {name}",
            hint=f"did you mean {close[0]}?" if close else f"`toto repo create {name}` makes it",
        )
    return git.bare(path)
