"""What an administrator does with the server's state."""

import pwd
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from toto.base import paths
from toto.base.errors import InputError
from toto.base.prefect_api import saved_auth
from toto.cli.common import Home, Repos
from toto.cli.output import say
from toto.cli.verbs import Verbs
from toto.server import backup as saving
from toto.server import environment
from toto.server import migrate as moving

verbs = Verbs()


@verbs.verb("password")
def password(home: Home) -> int:
    """Print user and password of UI and API: an administrator's."""
    if (auth := saved_auth(home / environment.PROFILES)) is None:
        raise InputError("there is no password yet", target=str(home), hint="start `toto serve`: it makes one")
    print(auth)
    return 0


@verbs.verb("migrate")
async def migrate(
    user: Annotated[str, Option(metavar="NAME", help="the user as whom toto will run")],
    to: Annotated[Path, Option(metavar="DIR", help="the new state")] = Path("/var/lib/toto"),
    home: Annotated[
        Path | None, Option(metavar="DIR", help="the server's home, where that is not `server` in the state")
    ] = None,
    repos: Annotated[
        Path | None, Option(metavar="DIR", help="the repositories, where they are not `repos` in that home")
    ] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="change nothing: tell all that would be done")] = False,
) -> int:
    """Take the state of a toto that ran as root to a user of its own."""
    try:
        owner = pwd.getpwnam(user)
    except KeyError:
        raise InputError(
            "there is no such user",
            target=user,
            hint=f"useradd --system --user-group --home-dir {to} --shell /bin/sh {user}",
        ) from None
    old = paths.state_home()
    before = (home or old / "server").absolute()
    found = (repos or before / "repos").absolute()
    await moving.migrate(moving.Migration(owner, old, before, found, to.absolute(), dry=dry_run))
    return 0


@verbs.verb("backup")
async def backup(
    file: Annotated[str, Argument(metavar="FILE", help="- for standard output")], home: Home, repos: Repos
) -> int:
    """Write all that cannot be made again to a file, also while toto runs."""
    await saving.backup(*_saved(file, home, repos), say)
    return 0


@verbs.verb("restore")
async def restore(
    file: Annotated[str, Argument(metavar="FILE", help="- for standard input")], home: Home, repos: Repos
) -> int:
    """Put a backup in the place of what is there, while toto does not run."""
    await saving.restore(*_saved(file, home, repos), say)
    return 0


def _saved(file: str, home: Path, repos: Path) -> tuple[saving.Place, Path | None]:
    return saving.Place(paths.state_home(), home, repos), None if file == "-" else Path(file).absolute()
