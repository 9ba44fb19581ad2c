"""`toto migrate`: takes a toto that ran as root to a user of its own.

    toto migrate --user toto --to /var/lib/toto --dry-run

It copies; the old state stays as it is, with a mark that keeps toto from starting on it again. What breaks off at
any instant goes on when it is called again: each step looks at what is there already, and the mark comes last. A dry
run takes the same steps and changes nothing.

What was built as root, without a sandbox, could be anything. It is removed from the nix store, and built anew when it
is needed; what something else still needs is built once more in the sandbox, and compared.
"""

import contextlib
import hashlib
import json
import os
import pwd
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Final

from toto.base import files, paths, process
from toto.base.errors import InputError, TotoError
from toto.cell import folders
from toto.git_host import host as git_host
from toto.git_host.shared import name_of
from toto.ledger.ledger import Ledger
from toto.machine import keys, owners
from toto.nix import builders, daemon
from toto.server import moves
from toto.server.serve import only_one

_UNFINISHED: Final = ".migrating"  # in the new state, until all of it is there
_STORE: Final = "/nix/store/"
_DAEMON: Final = Path("/run/toto-nix-migrate")
_AT_ONCE: Final = 500  # store paths on one command line
_NIX: Final = ("--extra-experimental-features", "nix-command")
_KEEP: Final = 200_000_000  # bytes of what nix lists
Say = Callable[[str], None]


@dataclass(frozen=True)
class Migration:
    """From where to where. `home` is the old server's, `repos` the old folder of its repositories."""

    user: pwd.struct_passwd
    old: Path
    home: Path
    repos: Path
    new: Path
    dry: bool = False
    say: Say = field(default=print, repr=False)

    @cached_property
    def moves(self) -> Mapping[Path, Path]:
        """The folders that are copied, and where to: the state, what of the server is not in it, and what toto keeps of
        a repo, which is called after the repo's path."""
        found = {self.old: self.new}
        if not self.home.is_relative_to(self.old):
            found[self.home] = self.new / "server"
        if not any(self.repos.is_relative_to(each) for each in found):
            found[self.repos] = self.new / "server" / "repos"
        for repo in git_host.infra_repos(self.repos):
            old, new = (paths.repo_folder(each) for each in (repo, moves.moved(repo.resolve(), found)))
            for each in ("repos", "api/told", "api/said"):
                if (self.old / each / old).is_dir():
                    found[self.old / each / old] = self.new / each / new
        return found

    @property
    def outermost(self) -> list[Path]:
        """The old folders that are in no other."""
        return [each for each in self.moves if not any(above in self.moves for above in each.parents)]

    def passes(self, path: Path) -> bool:
        """Whether something of the old toto is made anew: what runs leave, sockets, locks, what is root's to have."""
        return (
            path.suffix == ".lock"
            or (path.parent == self.old and path.name in {"nix", "cells", "sandboxes", "store"})
            or path.with_suffix("") == self.old / "keys" / builders.KEY
            or (path.parent == self.home and path.name in {"tmp", "ui"})
            or (path.parent.parent == self.old / "repos" and path.name in {"runs", "runs.new"})
            or (path.parent.parent == self.home / "postgres" and path.name == "socket")
        )

    def moved(self, path: Path) -> Path:
        """Where something of the old toto is in the new one."""
        return moves.moved(path, self.moves)


async def migrate(migration: Migration) -> None:
    """Do all of it, or in a dry run tell all of it. Raises `InputError` and `TotoError` before anything is changed."""
    say, new = migration.say, migration.new
    with _stopped(migration):
        repos = git_host.infra_repos(migration.repos)
        _check(migration, repos)
        if not migration.dry:
            await _begin(migration)
        for old, to in migration.moves.items():
            count, size, left = _copy(migration, old, to)
            say(f"{old} → {to}: {count} files, {size / 1e6:.0f} MB")
            for each in left:
                say(f"  left behind, it is no file, folder or link: {each}")
        for repo in repos:
            await _identities(migration, repo)
            if not migration.dry:
                _waiting_pushes(migration, repo)
        if not migration.dry:
            owners.relocate(new, migration.moved)
        owning, conflicts = await owners.adoption(repos)
        for name, owner in owning.machines.items():
            say(f"{name_of(owner.repo)} owns the machine {name}")
        for line in keys.with_the_old_key(repos) + conflicts:
            say(f"look at this: {line}")
        await _store(migration)
        if migration.dry:
            say("nothing was changed: it was a dry run")
            return
        await _gc_roots(migration)
        moves.write(new, migration.moves)
        folders.own(new, migration.user.pw_uid, migration.user.pw_gid)
        (new / _UNFINISHED).unlink(missing_ok=True)
        moves.mark(migration.old, new)
    say(_NEXT.format(user=migration.user.pw_name, new=new, old=" ".join(map(str, migration.outermost))))


_NEXT: Final = """\
toto's state is in {new}, and belongs to {user}.
next, in this order:
- as root, for good: toto nix-daemon --group {user}   (docs/operations.md has both units)
- as {user}: TOTO_STATE={new} toto serve   (it claims the machines, encrypts blocks anew, and installs the hooks)
- TOTO_STATE={new} toto repo sshd --repos {new}/server/repos   (what sshd is told has new paths, and a new user)
- when all is well: rm -r {old}"""


@contextlib.contextmanager
def _stopped(migration: Migration) -> Iterator[None]:
    """Hold the locks of the old server and worker: neither runs, and none starts meanwhile."""
    with contextlib.ExitStack() as stack:
        for part in ("server", "worker") if migration.home.is_dir() else ():
            stack.enter_context(only_one(migration.home, part))
        yield


def _check(migration: Migration, repos: Iterable[Path]) -> None:
    old, new, user = migration.old, migration.new, migration.user
    if os.geteuid() != 0:
        raise InputError("only root can give files to a different user", target="toto migrate", hint="run it by sudo")
    if user.pw_uid == 0:
        raise InputError("is root: choose a user that only toto uses", target=user.pw_name)
    if not old.is_dir():
        raise InputError("there is no such state", target=str(old), hint="name it: TOTO_STATE=…")
    moves.refuse_old(old)
    if new.is_relative_to(old) or old.is_relative_to(new) or re.search(r"[^\S ]", str(new)):
        raise InputError("is no place for it: choose a folder of its own, with a plain name", target=str(new))
    if new.is_dir() and any(new.iterdir()) and not (new / _UNFINISHED).exists():
        raise InputError("is not empty", target=str(new), hint="choose a different --to, or empty it")
    for repo in repos:
        if not any(repo.resolve().is_relative_to(each) for each in migration.outermost):
            raise InputError(
                f"is a link to {repo.resolve()}, which is not copied", target=str(repo), hint="move the repository here"
            )
        if left := Ledger(repo).read().open_intents:
            raise InputError(
                f"{', '.join(each.label for each in left)} was left half done: that is settled first",
                target=name_of(repo),
                hint="start the old toto once more, and run settle/settle",
            )
    size = sum(each.lstat().st_size for folder in migration.outermost for each in folder.rglob("*") if each.is_file())
    above = next(each for each in (new, *new.parents) if each.exists())
    if (free := shutil.disk_usage(above).free) < size + paths.LEAST_FREE:
        raise InputError(f"only {free / 1e6:.0f} MB are free, and the state has {size / 1e6:.0f} MB", target=str(above))


async def _begin(migration: Migration) -> None:
    """Make the new state's folder, which only root may enter until all is there."""
    new, user = migration.new, migration.user
    new.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    words = [
        "setpriv",
        f"--reuid={user.pw_uid}",
        f"--regid={user.pw_gid}",
        "--clear-groups",
        "test",
        "-x",
        str(new.parent),
    ]
    if (await process.run(words, check=False, timeout=60)).status != 0:
        raise InputError(f"{user.pw_name} may not enter it", target=str(new.parent), hint="choose a different --to")
    new.mkdir(mode=0o700, exist_ok=True)
    new.chmod(0o700)
    os.chown(new, 0, 0)
    files.write(new / _UNFINISHED, "")


def _copy(migration: Migration, old: Path, new: Path) -> tuple[int, int, list[Path]]:
    """Copy a folder, but for what passes; how many files, of how many bytes; and what is neither file, folder nor link.

    What is there already, of the same size and time, is not copied again. Links are copied, and not followed.
    """
    count, size, left = 0, 0, []
    left_to_do = [Path()]
    while left_to_do:
        folder = left_to_do.pop()
        if not migration.dry:
            (new / folder).mkdir(mode=0o700, parents=True, exist_ok=True)
        for entry in os.scandir(old / folder):
            place, found = folder / entry.name, entry.stat(follow_symlinks=False)
            if migration.passes(old / place) or old / place in migration.moves:
                continue
            if entry.is_dir(follow_symlinks=False):
                left_to_do.append(place)
            elif entry.is_symlink():
                if not migration.dry:
                    _link(new / place, migration.moved((old / place).readlink()))
            elif stat.S_ISREG(found.st_mode):
                count, size = count + 1, size + found.st_size
                if not migration.dry:
                    _copy_file(old / place, new / place, found)
            else:
                left.append(old / place)
    return count, size, left


def _link(link: Path, target: Path) -> None:
    link.unlink(missing_ok=True)
    link.symlink_to(target)


def _copy_file(old: Path, new: Path, found: os.stat_result) -> None:
    with contextlib.suppress(FileNotFoundError):
        there = new.lstat()
        if (there.st_size, there.st_mtime_ns) == (found.st_size, found.st_mtime_ns):
            return
    fresh = new.with_name(f".{new.name[:200]}.migrating")
    fresh.unlink(missing_ok=True)
    with old.open("rb") as source, os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as sink:
        shutil.copyfileobj(source, sink)
        os.fsync(sink.fileno())
    fresh.chmod(found.st_mode & 0o777)
    os.utime(fresh, ns=(found.st_atime_ns, found.st_mtime_ns))
    fresh.replace(new)


def _waiting_pushes(migration: Migration, repo: Path) -> None:
    """Have the requests of pushes that wait for a start of toto name the repo by its new path."""
    new = migration.moved(repo)
    for waiting in git_host.waiting(new):
        text = waiting.file.read_text()
        files.write(waiting.file, text.replace(json.dumps(str(repo)), json.dumps(str(new))))


async def _identities(migration: Migration, repo: Path) -> None:
    """Take over the keys that the manifest names by a file: those with which the repo has deployed a machine.

    (Nobody but the ledger is believed: whoever pushes could name any file of root's.)
    """
    for file in await owners.identity_files(repo):
        if any(file.is_relative_to(each) for each in migration.moves) or not file.is_file():
            migration.say(f"look at this: {name_of(repo)} names the key {file}, which is not taken over")
            continue
        # (Two files of one name, in different folders, are two keys.)
        digest = hashlib.sha256(os.fsencode(file)).hexdigest()[:4]
        name = f"{re.sub(r'[^A-Za-z0-9_-]', '-', file.name).strip('-') or 'key'}-{digest}"
        migration.say(f"{name_of(repo)}: {file} becomes its key {name}; write `identity: {name}` in its machines.yaml")
        if not migration.dry:
            folder = migration.new / "repos" / paths.repo_folder(migration.moved(repo.resolve())) / "keys"
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            files.write_bytes(folder / name, file.read_bytes())


async def _store(migration: Migration) -> None:
    """Remove from the nix store what was built without a sandbox. Raises `TotoError` for what cannot be verified."""
    if daemon.of_the_machine():
        migration.say("the nix store: the machine's own daemon has built what is in it, so that stays")
        return
    built = await unverified()
    migration.say(f"the nix store: {len(built)} paths were built here, maybe without a sandbox; they are built anew")
    if built and not migration.dry:
        for folder in migration.outermost:
            for link in _store_links(folder):
                link.unlink()
        async with daemon.running(_DAEMON) as socket:
            await remove_or_verify(built, daemon.client(socket), migration.say)


async def unverified() -> dict[str, str | None]:
    """The store paths that were built on this machine, with their derivers: not signed, not what their name says."""
    said = (await process.run(["nix", *_NIX, "path-info", "--all", "--json"], timeout=3600, keep=_KEEP)).stdout
    found = json.loads(said)
    infos = found if isinstance(found, list) else [{"path": path, **info} for path, info in found.items() if info]
    return {
        info["path"]: info.get("deriver")
        for info in infos
        if not info.get("ca") and not info.get("signatures") and not info["path"].endswith(".drv")
    }


async def remove_or_verify(built: Mapping[str, str | None], client: Mapping[str, str], say: Say) -> None:
    """Delete store paths that nothing needs; build the others once more by a daemon with a sandbox, and compare.

    Raises `TotoError` naming those that are different, or cannot be built.
    """
    live = set((await process.run(["nix-store", "--gc", "--print-live"], timeout=3600, keep=_KEEP)).lines)
    dead = [path for path in built if path not in live]
    for begin in range(0, len(dead), _AT_ONCE):
        some = [path for path in dead[begin : begin + _AT_ONCE] if Path(path).exists()]  # (some go with others)
        if some:
            await process.run(["nix-store", "--delete", *some], timeout=3600)
        say(f"  removed {min(begin + _AT_ONCE, len(dead))} of {len(dead)}")
    bad = []
    for path in sorted(live & built.keys()):
        deriver = built[path]
        words = ["nix-store", "--realise", "--check", str(deriver)]
        done = await process.run(words, env={**os.environ, **client}, timeout=7200, check=False)
        if deriver is None or done.status != 0:
            bad.append(path)
        say(f"  {'DIFFERENT' if path in bad else 'the same'}: {path}")
    if bad:
        raise TotoError(
            f"{len(bad)} paths that something else on this machine needs cannot be verified:\n" + "\n".join(bad),
            hint="`nix-store --query --roots PATH` says what needs one; remove that, and call this again",
        )


async def _gc_roots(migration: Migration) -> None:
    """Make the links to the store GC roots; those to nothing are removed."""
    for link in _store_links(migration.new):
        target = link.readlink()
        link.unlink()
        if target.exists() and target.suffix != ".drv":
            words: list[process.Argument] = ["nix-store", "--realise", target, "--add-root", link, "--indirect"]
            await process.run(words, timeout=300)


def _store_links(folder: Path) -> list[Path]:
    entries = [Path(above, name) for above, inner, names in os.walk(folder) for name in (*inner, *names)]
    return [each for each in entries if each.is_symlink() and str(each.readlink()).startswith(_STORE)]
