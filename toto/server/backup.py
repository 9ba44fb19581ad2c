"""`toto backup` and `toto restore`: what cannot be made again, in one file.

    toto backup FILE          while toto runs, or not; FILE is readable by its owner only, for it holds every key
    toto restore FILE         while toto does not run; what was there is moved aside, into TOTO_STATE/replaced-…

In the file, a tar: the repositories, each as a bundle of git's, which has the ledger and the approvals of one instant;
keys, serials, owners and rules; terraform's local states; the dump of Prefect's database. They are read in this order,
so the ledger of a backup is never newer than what else is in it.
"""

import asyncio
import contextlib
import json
import os
import shutil
import stat
import sys
import tarfile
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Final, Literal, TypeAlias

import asyncpg
from pydantic import BaseModel, ConfigDict, ValidationError

from toto.base import files, paths, process
from toto.base.errors import InputError, TotoError
from toto.git_host import host as git_host
from toto.git_host.access import ADMIN, path_of
from toto.git_host.shared import name_of
from toto.infra_repo import git
from toto.ledger.ledger import Ledger
from toto.metrics.fleet import BACKED_UP
from toto.server import database_move
from toto.server.database import Cluster, DatabaseError, Programs, choose, versions
from toto.server.environment import PROFILES
from toto.server.serve import only_one

VERSION: Final = 1
LONGEST: Final = 3600  # seconds for one repository
Say: TypeAlias = Callable[[str], None]
Kind: TypeAlias = Literal["postgresql", "sqlite", "none"]

# In toto's state; what else is there is made again.
_STATE: Final = (
    *("*.json", "*.toml", "keys/*", "signer/key*", "signer/next*", "api/ca.pem", "api/ca.key"),
    *("repos/*/keys/*", "repos/*/serials.json", "repos/*/*known_hosts", "repos/*/terraform/**/*"),
    "api/told/*/*/document",
)
_HOME: Final = (PROFILES, "logging.yml")
_REPO: Final = ("HEAD", "config", "toto/id", "toto/creator")  # of a repository; hooks are installed by each start
_BUNDLE: Final = "bundle"
_ABOUT: Final = "backup.json"
_DUMP: Final = "database"
_TRIES: Final = 50  # for a file that is just being written; a tenth of a second each


class About(BaseModel):
    """What a backup says of itself. `state`, `home` and `repos` are the paths that it can be restored to."""

    model_config = ConfigDict(extra="forbid")

    version: int
    at: str
    state: str
    home: str
    repos: str
    database: Kind


@dataclass(frozen=True)
class Place:
    """The folders of one toto: its state, and in it the server's home and the repositories."""

    state: Path
    home: Path
    repos: Path

    def __post_init__(self) -> None:
        for each in (self.home, self.repos):
            if not each.is_relative_to(self.state):
                raise InputError(f"is not in toto's state, {self.state}", target=str(each), hint="set TOTO_STATE")
        if (owner := self.state.stat().st_uid) != os.geteuid():
            raise InputError(f"is of the user {owner}", target=str(self.state), hint="run it as that user")

    def lasting(self) -> Iterator[Path]:
        """The files of the state and of the home that a backup has as they are."""
        for folder, patterns in ((self.state, _STATE), (self.home, _HOME)):
            for pattern in patterns:
                yield from (each for each in sorted(folder.glob(pattern)) if stat.S_ISREG(each.lstat().st_mode))

    def repositories(self) -> list[Path]:
        """All of them, the one with the rules of access among them."""
        admin = path_of(self.repos, ADMIN)
        return [*git_host.infra_repos(self.repos), *([admin] if admin.exists() else [])]


async def backup(place: Place, file: Path | None, say: Say) -> None:
    """Write a backup to `file`, in one step, or to standard output. Raises `TotoError` when it would not be whole."""
    if not place.repositories():
        raise InputError("there are no repositories", target=str(place.repos), hint="set TOTO_STATE")
    with _scratch(place) as folder:
        for repo in place.repositories():
            await _save_repo(repo, folder / repo.relative_to(place.state), say)
        for each in place.lasting():
            await _copy(each, folder / each.relative_to(place.state))
        kind = await _dump(place.home, folder / _DUMP)
        if kind == "none":
            say("toto keeps no database of its own here: back up the one that TOTO_DATABASE_URL names besides")
        if not (place.state / "keys/blocks").exists():
            say("the key of the blocks' secrets is not in toto's state: keep a copy of the credential toto-blocks")
        where = {"state": str(place.state), "home": str(place.home), "repos": str(place.repos)}
        about = About(version=VERSION, at=git.now(), database=kind, **where)
        files.write(folder / _ABOUT, about.model_dump_json(indent=1))
        if file is None:
            await asyncio.to_thread(_pack, folder, sys.stdout.buffer)
        else:
            await asyncio.to_thread(_pack_file, folder, file)
    (place.state / BACKED_UP).touch(mode=0o600)


@contextlib.contextmanager
def _scratch(place: Place) -> Iterator[Path]:
    folder = paths.private_folder(place.home / "tmp")
    with tempfile.TemporaryDirectory(prefix="backup-", dir=folder) as name:
        yield Path(name)


async def _save_repo(repo: Path, folder: Path, say: Say) -> None:
    folder.mkdir(parents=True)
    for each in _REPO:
        if (repo / each).is_file():
            await _copy(repo / each, folder / each)
    if (await git.git(repo, "for-each-ref", "--count=1")).stdout:  # (there is no bundle of nothing)
        await _git(repo, "bundle", "create", "--quiet", folder / _BUNDLE, "--all")
    for target in Ledger(repo).read().open_intents:
        say(f"{name_of(repo)}: {target.label} is being changed just now; a restore of this puts it back")


async def _git(repo: Path, *words: str | Path) -> None:
    argv = ["git", f"--git-dir={repo}", *words]
    await process.run(argv, env=git.environment(), timeout=LONGEST, target=repo.name)


async def _copy(file: Path, copy: Path) -> None:
    """Copy a file as it is when nobody writes to it. (Terraform rewrites a state where it is.)"""
    copy.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    for _ in range(_TRIES):
        try:
            before, data, after = file.stat(), file.read_bytes(), file.stat()
        except FileNotFoundError:
            return  # it was removed meanwhile
        if before.st_mtime_ns == after.st_mtime_ns and len(data) == after.st_size and _is_whole(file, data):
            files.write_bytes(copy, data, before.st_mode & 0o777)
            return
        await asyncio.sleep(0.1)
    raise TotoError("is not whole for five seconds", target=str(file), hint="look at it, or try again later")


def _is_whole(file: Path, data: bytes) -> bool:
    if file.suffix == ".tfstate" and data:
        try:
            json.loads(data)
        except ValueError:
            return False
    return True


async def _dump(home: Path, to: Path) -> Kind:
    if versions(home) and (cluster := await choose(home)):
        async with _answering(cluster):
            await database_move.tool(cluster.programs, "pg_dump", cluster, "--format=custom", f"--file={to}")
        return "postgresql"
    if (home / "prefect.db").exists():
        await asyncio.to_thread(database_move.copy_sqlite, home / "prefect.db", to)
        return "sqlite"
    return "none"


@contextlib.asynccontextmanager
async def _answering(cluster: Cluster) -> AsyncIterator[None]:
    """The cluster as it runs, or else running for this block."""
    try:
        await (await cluster.connect()).close()
    except (OSError, asyncpg.PostgresError):
        with only_one(cluster.home, "server"):
            async with cluster.running(cluster.home / "logs" / "database.log"):
                yield
    else:
        yield


def _pack_file(folder: Path, file: Path) -> None:
    fresh = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as sink:
            _pack(folder, sink)
            sink.flush()
            os.fsync(sink.fileno())
        fresh.replace(file)
    except OSError as error:
        raise InputError(f"cannot be written: {error.strerror}", target=str(file)) from None
    finally:
        fresh.unlink(missing_ok=True)


def _pack(folder: Path, sink: BinaryIO) -> None:
    with tarfile.open(fileobj=sink, mode="w|") as tar:
        # What it says of itself comes first.
        for each in sorted(folder.rglob("*"), key=lambda each: (each.name != _ABOUT, str(each))):
            if each.is_file():
                tar.add(each, arcname=str(each.relative_to(folder)))


async def restore(place: Place, file: Path | None, say: Say) -> None:
    """Put a backup in the place of what is there, from `file` or from standard input.

    No toto may run. Raises `InputError` before anything is changed for what is no backup, or one of different paths.
    """
    fresh = place.state / "restoring"
    shutil.rmtree(fresh, ignore_errors=True)
    paths.private_folder(fresh)
    try:
        await asyncio.to_thread(_unpack, file, fresh)
        about = _about(fresh, file)
        _check(place, about)
        programs = await _programs() if about.database == "postgresql" else None
        paths.private_folder(place.home)
        with only_one(place.home, "server"), only_one(place.home, "worker"):
            aside = place.state / f"replaced-{time.strftime('%Y%m%d-%H%M%S')}"
            if moved := list(_move_aside(place, aside)):
                say(f"moved what was there to {aside}: {len(moved)} files and folders")
            for each in sorted((fresh / place.repos.relative_to(place.state)).glob("*.git")):
                await _restore_repo(each, place.repos / each.name)
            for each in sorted(each for each in fresh.rglob("*") if each.is_file()):
                if each not in {fresh / _ABOUT, fresh / _DUMP}:
                    to = place.state / each.relative_to(fresh)
                    to.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                    each.replace(to)
            if programs is not None:
                say(f"restoring the database in PostgreSQL {programs.major}")
                async with database_move.new_cluster(place.home, programs) as cluster:
                    await database_move.tool(programs, "pg_restore", cluster, "--exit-on-error", str(fresh / _DUMP))
            elif about.database == "sqlite":
                (fresh / _DUMP).replace(place.home / "prefect.db")
        say(f"restored what toto was at {about.at}; start it: it installs the hooks, and settles what was under way")
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _unpack(file: Path | None, to: Path) -> None:
    try:
        with (
            contextlib.nullcontext(sys.stdin.buffer) if file is None else file.open("rb") as source,
            tarfile.open(fileobj=source, mode="r|") as tar,
        ):
            for each in tar:
                name = PurePosixPath(each.name)
                data = tar.extractfile(each) if each.isreg() else None
                if data is None or name.is_absolute() or ".." in name.parts:
                    raise InputError(f"has {each.name!a}, which no backup has", target=str(file))
                place = to / name
                place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                with os.fdopen(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as sink:
                    shutil.copyfileobj(data, sink)
                place.chmod(each.mode & 0o755 | 0o600)
    except (OSError, tarfile.TarError) as error:
        raise InputError(f"cannot be read: {error}", target=str(file)) from None


def _about(folder: Path, file: Path | None) -> About:
    try:
        about = About.model_validate_json((folder / _ABOUT).read_text())
    except (OSError, ValidationError):
        raise InputError("is no backup of toto", target=str(file)) from None
    if about.version != VERSION:
        raise InputError(f"is of version {about.version}, and this toto reads {VERSION}", target=str(file))
    return about


def _check(place: Place, about: About) -> None:
    for was, now, option in (
        (about.state, place.state, "TOTO_STATE="),
        (about.home, place.home, "--home "),
        (about.repos, place.repos, "--repos "),
    ):
        if was != str(now):
            raise InputError(f"the backup is of {was}, and names it in many places", target=str(now),
                             hint=f"restore it there: {option}{was}")  # fmt: skip


async def _programs() -> Programs:
    newest = max(await Programs.installed(), key=lambda each: each.major, default=None)
    if newest is None:
        raise DatabaseError("its database is PostgreSQL's, and no `postgres` is on PATH", hint="install PostgreSQL")
    return newest


def _move_aside(place: Place, aside: Path) -> Iterable[Path]:
    """Move away what a backup has, and nothing else: GC roots, for one, stay."""
    databases = [*place.home.glob("postgres"), *place.home.glob("prefect.db*")]
    for each in [*place.lasting(), *place.repositories(), *databases]:
        to = aside / each.relative_to(place.state)
        to.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        each.rename(to)
        yield to


async def _restore_repo(saved: Path, repo: Path) -> None:
    words = ["git", "init", "--quiet", "--bare", "--object-format=sha1"]
    await process.run([*words, repo], env=git.environment(), timeout=60)
    if (bundle := saved / _BUNDLE).exists():
        await _git(repo, "fetch", "--quiet", "--no-write-fetch-head", bundle, "+refs/*:refs/*")
        bundle.unlink()
