"""Toto's own PostgreSQL: a cluster in toto's state that nobody else can connect to.

It listens on a unix socket in a folder of its own, accepts only the user that toto runs as (`peer`), and keeps
checksums of its pages. PostgreSQL refuses to run as root; when toto runs as root, its cluster runs as a different user.

The contents of the database are Prefect's. `toto.server.database_move` moves an older database here.
"""

import asyncio
import contextlib
import os
import pwd
import re
import shutil
import signal
import time
import urllib.parse
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import asyncpg

from toto.base import process
from toto.base.errors import TotoError

USER: Final = "toto"  # the role in the database, whatever the name of toto's user on the machine
NAME: Final = "prefect"
START: Final = 120  # seconds: after a crash a cluster replays its write-ahead log
STOP: Final = 60  # seconds
LONGEST_SOCKET: Final = 107  # bytes of a socket's path: the kernel's limit
SYSTEM_USERS: Final = ("toto", "postgres")  # the first that exists runs the cluster when toto is root
# That user cannot enter root's home, which has toto's state. It sees the cluster's folder at /tmp, in a mount namespace
# of its own, so nothing else has to be opened for it.
_AT: Final = Path("/tmp")  # noqa: S108
_DEBIAN: Final = Path("/usr/lib/postgresql")
_MOUNTED: Final = 'mount --bind -- "$1" /tmp && cd / && shift && exec "$@"'


class DatabaseError(TotoError):
    """Toto's own database could not be created, started or moved."""


@dataclass(frozen=True)
class Programs:
    """PostgreSQL's programs of one major version. `folder` contains `postgres` and `initdb`."""

    folder: Path
    major: int

    @classmethod
    async def installed(cls) -> list["Programs"]:
        """The installed ones: those on PATH first, then those in Debian's folder for each major version.

        Raises what `of` raises.
        """
        # The real folder as well: /usr/local/bin may hold a link to `postgres` alone.
        on_path = [
            each
            for found in [shutil.which("postgres")]
            if found
            for each in (Path(found).parent, Path(found).resolve().parent)
        ]
        folders = dict.fromkeys([*on_path, *sorted(_DEBIAN.glob("*/bin"))])
        return [await cls.of(each) for each in folders if (each / "postgres").exists() and (each / "initdb").exists()]

    def program(self, name: str) -> Path:
        """One of them. (`folder` may have links to `postgres` and `initdb` alone.)"""
        there = self.folder / name
        return there if there.exists() else (self.folder / "postgres").resolve().parent / name

    @classmethod
    async def of(cls, folder: Path) -> "Programs":
        """The programs in `folder`. Raises `DatabaseError` when they do not print their version."""
        said = (await process.run([folder / "postgres", "--version"], timeout=30, check=False)).stdout
        version = re.search(r"\(PostgreSQL\) (\d+)", said)
        if version is None:
            raise DatabaseError(f"`{folder / 'postgres'} --version` says {said.strip()!r}")
        return cls(folder, int(version[1]))


@dataclass(frozen=True)
class Cluster:
    """A cluster in `home`, the home of toto's server. `programs` run it; see `running`."""

    home: Path
    programs: Programs

    @property
    def folder(self) -> Path:
        """The cluster's folder; each major version has its own.

        When toto is root, root owns the folder and the access rules in it: the cluster's user cannot change who may
        connect, and cannot make root write anywhere else.
        """
        return self.home / "postgres" / str(self.programs.major)

    @property
    def socket(self) -> Path:
        """The folder of its socket, which clients use as the host."""
        return self.folder / "socket"

    @property
    def url(self) -> str:
        """The address for Prefect's settings."""
        return f"postgresql+asyncpg://{USER}@/{NAME}?host={urllib.parse.quote(str(self.socket))}"

    async def connect(self, database: str = NAME) -> asyncpg.Connection:
        """A new connection; the caller closes it."""
        return await asyncpg.connect(host=str(self.socket), user=USER, database=database, timeout=10)

    async def make(self) -> None:
        """Create the cluster unless it exists. It is created completely or not at all. Raises `DatabaseError`."""
        if self.folder.exists():
            return
        fresh = self.folder.with_suffix(".new")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        fresh.chmod(0o750)  # whatever the umask
        if owner := _other_user(fresh):
            os.chown(fresh, 0, owner.pw_gid)
        _own_folder(fresh / "data")
        # No locale: an index that is sorted by libc's rules breaks when a new libc changes them.
        try:
            await process.run(
                _as_owner(
                    fresh,
                    [
                        self.programs.folder / "initdb",
                        "--data-checksums",
                        "--encoding=UTF8",
                        "--no-locale",
                        "--auth-local=peer",
                        "--auth-host=reject",
                        f"--username={USER}",
                        "-D",
                        _seen(fresh) / "data",
                    ],
                ),
                env=_environment(),
                cwd="/",
                timeout=300,
            )
        except process.CommandFailed as error:
            raise DatabaseError(
                f"its PostgreSQL could not be created: {error.tail}",
                target=str(self.folder),
                hint="fix that, or run without it: `toto serve --sqlite`",
            ) from None
        fresh.rename(self.folder)

    @contextlib.asynccontextmanager
    async def running(self, log_file: Path) -> AsyncIterator[process.Running]:
        """Run the cluster's server from the moment it answers to the end of the block; create its database if needed.

        Raises `DatabaseError` when it does not start.
        """
        if len(os.fsencode(self.socket / ".s.PGSQL.5432")) > LONGEST_SOCKET:
            raise DatabaseError(
                f"the path of its socket has more than {LONGEST_SOCKET} characters: {self.socket}",
                hint="choose a shorter --home, or --sqlite",
            )
        await self.make()
        if not self.socket.exists():  # (a copy or a backup may leave it out)
            _own_folder(self.socket)
        self._let_in()
        # Settings on the command line, and not in its files, are the same for clusters of any age.
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": _seen(self.folder) / "socket",
            "hba_file": _seen(self.folder) / "pg_hba.conf",
            "ident_file": _seen(self.folder) / "pg_ident.conf",
            "unix_socket_permissions": "0700",
            "timezone": "UTC",
            "log_timezone": "UTC",
            "dynamic_shared_memory_type": "mmap",  # in its own folder, so a kill leaves none elsewhere
            "jit": "off",
        }  # queries are small: compiling them costs more than it saves
        argv = _as_owner(
            self.folder,
            [
                self.programs.folder / "postgres",
                "-D",
                _seen(self.folder) / "data",
                *(word for name, value in settings.items() for word in ("-c", f"{name}={value}")),
            ],
        )
        log_file.parent.mkdir(parents=True, exist_ok=True)
        with log_file.open("ab") as sink:
            async with process.start(
                argv,
                env=_environment(),
                cwd="/",
                stdout=sink.fileno(),
                stderr=sink.fileno(),
                signals=(signal.SIGINT,),
                grace=STOP,
            ) as server:
                await self._until_answers(server, log_file)
                yield server

    def _let_in(self) -> None:
        """Write the access rules: only toto's user on this machine, and only as one role."""
        user, owner = pwd.getpwuid(os.geteuid()).pw_name, _other_user(self.folder)
        for name, line in (
            ("pg_hba.conf", f"local all {USER} peer map=toto"),
            ("pg_ident.conf", f'toto "{user}" {USER}'),
        ):
            file = self.folder / name
            file.write_text(f"# Written by toto at each start.\n{line}\n")
            file.chmod(0o640)
            if owner:
                os.chown(file, 0, owner.pw_gid)

    async def _until_answers(self, server: process.Running, log_file: Path) -> None:
        deadline = time.monotonic() + START
        while not self._is_ready(server.pid):
            if server.status is not None or time.monotonic() > deadline:
                raise DatabaseError(
                    f"PostgreSQL did not start:\n{process.tail(log_file.read_text(errors='replace'))}",
                    hint=f"see {log_file}",
                )
            await asyncio.sleep(0.05)
        connection = await self.connect("postgres")
        try:
            if not await connection.fetchval("SELECT 1 FROM pg_database WHERE datname = $1", NAME):
                await connection.execute(f"CREATE DATABASE {NAME}")
        finally:
            await connection.close()

    def _is_ready(self, pid: int) -> bool:
        """Whether the server accepts connections; checked as pg_ctl does, since connecting too early logs an error."""
        try:
            lines = (self.folder / "data" / "postmaster.pid").read_text().split("\n")
        except FileNotFoundError:
            return False
        return lines[0] == str(pid) and lines[7:8] != [] and lines[7].strip() == "ready"


def versions(home: Path) -> list[int]:
    """The major versions of the clusters in `home`, oldest first. Toto uses the newest."""
    return sorted(int(each.name) for each in (home / "postgres").glob("*") if each.name.isdigit())


async def choose(home: Path) -> Cluster | None:
    """The cluster that toto's server in `home` uses; None for SQLite.

    A home keeps what it has: a cluster, with the PostgreSQL version that created it, or the SQLite file. A new home
    gets a cluster when PostgreSQL is installed. Raises `DatabaseError` when the cluster's version is not installed.
    """
    installed, made = await Programs.installed(), versions(home)
    if not made:
        newest = max(installed, key=lambda each: each.major, default=None)
        return None if (home / "prefect.db").exists() or newest is None else Cluster(home, newest)
    for programs in installed:
        if programs.major == made[-1]:
            return Cluster(home, programs)
    there = ", ".join(str(each.major) for each in installed) or "none"
    raise DatabaseError(
        f"its database is a cluster of PostgreSQL {made[-1]}, which is not installed ({there} is)",
        target=str(home),
        hint=f"put PostgreSQL {made[-1]} on PATH, or name its bin folder: "
        f"`toto database upgrade --home {home} --from DIR`",
    )


def _own_folder(folder: Path) -> None:
    """Make a folder of the cluster's user's."""
    folder.mkdir(mode=0o700)
    if owner := _other_user(folder.parent):
        os.chown(folder, owner.pw_uid, owner.pw_gid)


def _other_user(folder: Path) -> pwd.struct_passwd | None:
    """The user that runs the cluster in `folder` when toto is root: the owner of its files. None when toto is not."""
    if os.geteuid() != 0:
        return None
    with contextlib.suppress(FileNotFoundError):
        if owner := (folder / "data").lstat().st_uid:
            return pwd.getpwuid(owner)
    for name in SYSTEM_USERS:
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise DatabaseError(
        f"PostgreSQL does not run as root, and there is no user {' or '.join(SYSTEM_USERS)}",
        hint="useradd --system toto; or run toto as a different user, or with --sqlite",
    )


def _seen(folder: Path) -> Path:
    """The path of the cluster's folder for the cluster's own processes."""
    return _AT if os.geteuid() == 0 else folder


def _as_owner(folder: Path, argv: list[process.Argument]) -> list[process.Argument]:
    """`argv` as a command of the cluster's owner. (Changing the user resets the death signal, so that is set after.)"""
    owner = _other_user(folder)
    if owner is None:
        return argv
    return [
        "unshare",
        "--mount",
        "--propagation",
        "private",
        "--",
        "sh",
        "-c",
        _MOUNTED,
        "sh",
        folder,
        "setpriv",
        f"--reuid={owner.pw_uid}",
        f"--regid={owner.pw_gid}",
        "--clear-groups",
        "--pdeathsig",
        "KILL",
        "--",
        *argv,
    ]


def _environment() -> Mapping[str, str]:
    """An environment without PG* variables and without toto's secrets."""
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"}
