"""Prefect's database: to PostgreSQL, and to a newer one."""

from pathlib import Path
from typing import Annotated

from typer import Option

from toto.base.errors import InputError
from toto.cli.common import Home
from toto.cli.output import say
from toto.cli.verbs import Verbs
from toto.plan.changes import table
from toto.server import database_move, serve

verbs = Verbs()
database = verbs.group("database")


@database.verb("move")
async def move(home: Home) -> int:
    """Copy the SQLite database into a PostgreSQL of toto's own, and use that from now on.

    The server must not run meanwhile.
    """
    _require(home)
    with serve.only_one(home, "server"):
        moved = await database_move.move(home, say)
    print(table([{"table": each.table, "rows": str(each.copied)} for each in moved if each.copied], ("table", "rows")))
    for line in database_move.left_behind(moved):
        say(line)
    say(f"moved; `toto serve` uses PostgreSQL from now on, and the old file is {home / database_move.MOVED}")
    return 0


@database.verb("upgrade")
async def upgrade(
    home: Home,
    old_bin: Annotated[
        Path | None,
        Option(
            "--from",
            metavar="DIR",
            help="the bin folder of its current version, when that is not installed in the way of Debian",
        ),
    ] = None,
) -> int:
    """Upgrade toto's PostgreSQL to the newest version that is installed.

    The server must not run meanwhile.
    """
    _require(home)
    with serve.only_one(home, "server"):
        old, new = await database_move.upgrade(home, say, old_bin)
    say(
        f"`toto serve` uses PostgreSQL {new} from now on; the cluster of {old} is still in "
        f"{home / 'postgres' / str(old)}: remove it when all is well"
    )
    return 0


def _require(home: Path) -> None:
    if not home.is_dir():
        raise InputError("no server has run in this folder", target=str(home), hint="name the right one with --home")
