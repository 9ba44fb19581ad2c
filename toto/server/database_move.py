"""Moves Prefect's database into toto's own PostgreSQL: from the SQLite file of a home, or from an older major version.

The new cluster is created in a different folder, filled, and moved to its place at the end, so a move that breaks off
changes nothing. The old database stays as it was.
"""

import asyncio
import contextlib
import io
import os
import shutil
import sqlite3
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final, TypeAlias

import asyncpg

from toto.base import process
from toto.base.errors import InputError
from toto.server import environment
from toto.server.database import NAME, USER, Cluster, DatabaseError, Programs, versions

Say: TypeAlias = Callable[[str], None]
Row: TypeAlias = tuple[Any, ...]

BATCH: Final = 2000  # rows; a batch that is refused is halved until the row at fault is found
MOVED: Final = "prefect.db.moved"  # the name of the SQLite file after the move
LONGEST: Final = 3600  # seconds for a dump, its restore, or a migration of a large database
_EPOCH: Final = datetime(1970, 1, 1)


@dataclass
class Moved:
    """The result for one table: how many rows were copied and how many stay behind; `why` is the first one's reason."""

    table: str
    copied: int = 0
    left: int = 0
    why: str = ""

    def leave(self, rows: int, why: str) -> None:
        """Record that rows stay behind."""
        self.left += rows
        self.why = self.why or why


async def move(home: Path, say: Say) -> list[Moved]:
    """Copy the SQLite database of `home` into a new cluster, which `toto serve` uses from now on, and rename the file.

    No server may run in `home` meanwhile. `say` gets a line for each step. Raises `InputError` when there is nothing to
    move, `DatabaseError` when it cannot be moved.
    """
    file = home / "prefect.db"
    if versions(home):
        raise InputError("its database is in PostgreSQL already", target=str(home))
    if not file.exists():
        raise InputError("there is no SQLite database to move", target=str(file))
    installed = await Programs.installed()
    if not installed:
        raise InputError("there is no `postgres` on PATH", hint="install PostgreSQL (Debian: postgresql)")
    async with new_cluster(home, max(installed, key=lambda each: each.major)) as cluster:
        say(f"copying {file} ({file.stat().st_size / 1e6:.0f} MB), and bringing the copy up to date")
        copy = cluster.home / "prefect.db"
        await asyncio.to_thread(copy_sqlite, file, copy)
        await _migrate(cluster.home, f"sqlite+aiosqlite:///{copy}")
        say(f"making the tables in PostgreSQL {cluster.programs.major}")
        await _migrate(cluster.home, cluster.url)
        connection = await cluster.connect()
        try:
            with contextlib.closing(sqlite3.connect(copy)) as source:
                moved = await _copy_all(source, connection, say)
            await connection.execute("ANALYZE")
        finally:
            await connection.close()
    # Under its old name the file would become the database again if the cluster were ever removed.
    for suffix in ("-wal", "-shm", ""):
        with contextlib.suppress(FileNotFoundError):
            file.with_name(file.name + suffix).rename(home / f"{MOVED}{suffix}")
    return moved


async def upgrade(home: Path, say: Say, old_bin: Path | None = None) -> tuple[int, int]:
    """Upgrade the cluster of `home` to the newest installed PostgreSQL; return the old and the new major version.

    `old_bin` is the folder with the programs of the cluster's version, when they are not in a usual place. No server
    may run in `home` meanwhile. Raises `InputError` when there is nothing to do, `DatabaseError` when a program
    is missing, `CommandFailed` when the dump or the restore fails.
    """
    if not (made := versions(home)):
        raise InputError("has no PostgreSQL cluster", target=str(home), hint="toto database move")
    installed = await Programs.installed()
    newest = max(installed, key=lambda each: each.major, default=None)
    if newest is None or newest.major <= made[-1]:
        raise InputError(f"no newer PostgreSQL than its {made[-1]} is installed", target=str(home))
    olds = [await Programs.of(old_bin)] if old_bin else installed
    old = next((each for each in olds if each.major == made[-1]), None)
    if old is None:
        raise DatabaseError(
            f"the programs of PostgreSQL {made[-1]}, which made it, are not "
            f"{f'in {old_bin}' if old_bin else 'installed'}",
            target=str(home),
            hint="install them again, or name their bin folder: --from DIR",
        )
    current = Cluster(home, old)
    async with new_cluster(home, newest) as cluster, current.running(home / "logs" / "database.log"):
        dump = cluster.home / "dump"
        say(f"dumping the cluster of PostgreSQL {old.major}")
        await tool(newest, "pg_dump", current, "--format=custom", f"--file={dump}")
        say(f"restoring it in PostgreSQL {newest.major}")
        await tool(newest, "pg_restore", cluster, "--exit-on-error", str(dump))
    return old.major, newest.major


async def tool(programs: Programs, name: str, cluster: Cluster, *words: str) -> None:
    """Run a client program of PostgreSQL's on a cluster's database. Raises `CommandFailed`."""
    where = [f"--host={cluster.socket}", f"--username={USER}", f"--dbname={NAME}"]
    await process.run(
        [programs.program(name), *where, *words],
        env={"PATH": os.defpath, "LC_ALL": "C.UTF-8"},
        timeout=LONGEST,
        target=str(cluster.folder),
    )


@contextlib.asynccontextmanager
async def new_cluster(home: Path, programs: Programs) -> AsyncIterator[Cluster]:
    """A new cluster. The block fills it; it becomes the cluster of `home` when the block ends without an error."""
    beside = home / "new"  # short: the path of a socket has a limit
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(mode=0o700)
    try:
        cluster = Cluster(beside, programs)
        async with cluster.running(home / "logs" / "database.log"):
            yield cluster
        place = Cluster(home, programs).folder
        place.parent.mkdir(mode=0o700, exist_ok=True)
        cluster.folder.rename(place)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def copy_sqlite(file: Path, copy: Path) -> None:
    """Copy a database as it is at one instant, including its write-ahead log. The source is only read."""
    with (
        contextlib.closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as source,
        contextlib.closing(sqlite3.connect(copy)) as target,
    ):
        source.backup(target)


async def _migrate(home: Path, url: str) -> None:
    """Migrate the tables to the schema of the installed Prefect."""
    await process.run(
        [sys.executable, "-m", "prefect", "server", "database", "upgrade", "-y"],
        env=environment.server_environment(home, database_url=url),
        timeout=LONGEST,
        target=url,
    )


async def _copy_all(source: sqlite3.Connection, connection: asyncpg.Connection, say: Say) -> list[Moved]:
    """Copy each table that both databases have. References are checked at the end, because they form circles."""
    tables = [
        row["table_name"]
        for row in await connection.fetch(
            "SELECT table_name FROM information_schema.tables WHERE table_schema = current_schema() "
            "AND table_type = 'BASE TABLE' AND table_name <> 'alembic_version' ORDER BY table_name"
        )
    ]
    await connection.execute(f"TRUNCATE {', '.join(map(_quoted, tables))}")  # rows from the migrations
    await connection.execute("SET session_replication_role = replica")
    moved = {}
    for table in tables:
        moved[table] = await _copy(source, connection, table)
        if moved[table].copied >= BATCH:
            say(f"copied {table}: {moved[table].copied} rows")
    await _drop_dangling(connection, moved)
    here = {name for (name,) in source.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    for table in sorted(here - set(tables) - {"alembic_version"}):
        if not table.startswith("sqlite_") and (rows := _count(source, table)):
            moved[table] = Moved(table)
            moved[table].leave(rows, "PostgreSQL has no such table")
    return list(moved.values())


async def _copy(source: sqlite3.Connection, connection: asyncpg.Connection, table: str) -> Moved:
    """Copy the columns that both databases have, in the text format of PostgreSQL's COPY."""
    types = {
        row["column_name"]: row["data_type"]
        for row in await connection.fetch(
            "SELECT column_name, data_type FROM information_schema.columns WHERE table_schema = current_schema() "
            "AND table_name = $1",
            table,
        )
    }
    columns = [name for _, name, *_ in source.execute(f"PRAGMA table_info({_quoted(table)})") if name in types]
    moved = Moved(table)
    if not columns:
        return moved
    intervals = [types[name] == "interval" for name in columns]
    rows = source.execute(f"SELECT {', '.join(map(_quoted, columns))} FROM {_quoted(table)}")  # noqa: S608
    while batch := rows.fetchmany(BATCH):
        lines = [_line(row, intervals) for row in batch]
        await _insert(connection, moved, columns, lines)
    return moved


async def _insert(connection: asyncpg.Connection, moved: Moved, columns: Sequence[str], lines: Sequence[bytes]) -> None:
    try:
        async with connection.transaction():
            await connection.copy_to_table(moved.table, source=io.BytesIO(b"".join(lines)), columns=columns)
        moved.copied += len(lines)
    except asyncpg.PostgresError as error:
        if len(lines) == 1:
            moved.leave(1, str(error))
            return
        for half in (lines[: len(lines) // 2], lines[len(lines) // 2 :]):
            await _insert(connection, moved, columns, half)


def _line(row: Row, intervals: Sequence[bool]) -> bytes:
    """A row in the text format of COPY: https://www.postgresql.org/docs/current/sql-copy.html."""
    return b"\t".join(_field(value, interval) for value, interval in zip(row, intervals, strict=True)) + b"\n"


def _field(value: Any, interval: bool) -> bytes:
    if value is None:
        return rb"\N"
    if interval:
        value = f"{(datetime.fromisoformat(value) - _EPOCH).total_seconds()} seconds"
    if isinstance(value, bytes):
        value = rf"\x{value.hex()}"
    text = str(value)
    for character, escaped in (("\\", r"\\"), ("\t", r"\t"), ("\n", r"\n"), ("\r", r"\r")):
        text = text.replace(character, escaped)
    return text.encode(errors="replace")


async def _drop_dangling(connection: asyncpg.Connection, moved: dict[str, Moved]) -> None:
    """Delete rows that refer to a row that stayed behind, and then rows that refer to these."""
    references = await connection.fetch(
        "SELECT conrelid::regclass::text AS table, confrelid::regclass::text AS other, "
        "(SELECT attname FROM pg_attribute WHERE attrelid = conrelid AND attnum = conkey[1])::text AS column, "
        "(SELECT attname FROM pg_attribute WHERE attrelid = confrelid AND attnum = confkey[1])::text AS key "
        "FROM pg_constraint WHERE contype = 'f'"
    )
    found = True
    while found:
        found = False
        for table, other, column, key in references:
            # (Names come from PostgreSQL's own catalogue, which quotes them where needed.)
            gone = await connection.execute(
                f"DELETE FROM {table} a WHERE a.{_quoted(column)} IS NOT NULL AND NOT EXISTS "  # noqa: S608
                f"(SELECT 1 FROM {other} b WHERE b.{_quoted(key)} = a.{_quoted(column)})"
            )
            if rows := int(gone.split()[-1]):
                found = True
                moved[table].copied -= rows
                moved[table].leave(rows, f"it refers to a row of {other} that is not there")


def left_behind(moved: Sequence[Moved]) -> Iterator[str]:
    """A line for each table with rows that stay behind."""
    for each in moved:
        if each.left:
            yield f"{each.table}: {each.left} of {each.left + each.copied} rows stay behind; the first: {each.why}"


def _count(source: sqlite3.Connection, table: str) -> int:
    return int(source.execute(f"SELECT count(*) FROM {_quoted(table)}").fetchone()[0])  # noqa: S608


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
