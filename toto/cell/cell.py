"""A cell: where a process that runs something pushed is kept.

bubblewrap (https://github.com/containers/bubblewrap) makes it: user, pid, mount, net, ipc, uts and cgroup namespaces of
its own, no capability, no new privileges, no user namespaces inside, an environment and a root made from nothing. A
process in a cell sees the machine's programs and what its `Cell` names, all of it read-only, and writes only to /tmp
and to what the cell names for that. When the process ends, or toto does, everything in the cell ends.

It takes three steps, each a program that becomes the next one:

1. A first bwrap makes a mount namespace with what the cell sees below /run/cell: the cell's user cannot enter toto's
   folders, and is not to learn their names. `toto.cell.mounts` adds a closure there, since bwrap's time is quadratic in
   its mounts.
2. When toto is root, setpriv changes to a user of the machine that only this cell has. (bwrap alone, started by root,
   would leave the process the owner of /proc/sys.)
3. bwrap makes the cell.
"""

import os
import secrets
import shutil
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

from toto.base import files, paths
from toto.base.errors import InputError
from toto.cell.limits import Limits, limited

if TYPE_CHECKING:
    from toto.base.process import Running
    from toto.cell.namespace import Namespace

INFRA: Final = Path("/infra")  # in a cell of the commit: where it is exported
HOME: Final = "/tmp"  # noqa: S108  (the cell's own)
TOOLS: Final = "TOTO_TOOLS"
PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
STORE: Final = Path("/nix/store")
READ: Final = "TOTO_CELL_READ"  # of toto's environment: folders that every cell may read, such as a provider mirror
_STAGE: Final = Path("/run/cell")
_MOUNTS: Final = Path(__file__).with_name("mounts.py")
_PYTHON: Final = Path("/opt/python")
_PYTHON_PROGRAM: Final = f"bin/python{sys.version_info.major}.{sys.version_info.minor}"
_UID: Final = 1000  # inside of a cell
# No user of systemd's ranges (https://systemd.io/UIDS-GIDS) has such a number. One of 2^27 is not met twice.
_FIRST_USER: Final = 2_000_000_000
_USERS: Final = 1 << 27
# What programs of the machine need besides /usr. A link, such as Debian's /bin, is made a link in the cell.
_SYSTEM: Final = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
_ETC: Final = ("/etc/alternatives", "/etc/ld.so.cache")
_CERTIFICATES: Final = Path("/etc/ssl/certs")
HOSTS: Final = "127.0.0.1 localhost\n"
_FILES: Final = {
    "passwd": f"cell:x:{_UID}:{_UID}::{HOME}:/bin/sh\n",
    "group": f"cell:x:{_UID}:\n",
    "hosts": HOSTS,
    "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
}


def fresh_user() -> int | None:
    """A user id of the machine that nothing else has, when toto is root; else None: a cell then has toto's own."""
    return _FIRST_USER + secrets.randbelow(_USERS) if os.geteuid() == 0 else None


@dataclass(frozen=True)
class Cell:
    """A cell, for one process at a time.

    `read` and `write` say what is mounted, by the place in the cell. The folders in `write` belong to the cell's user
    (`give`); toto must read them as a stranger's. `store` is True for all of /nix/store, or has the store paths that
    the cell sees. `network` is None for a loopback of its own and nothing else; the cells of a `Namespace` have its
    `user`. `devices` are mounted as they are, and `groups` are groups of the machine that the process is in, for them.
    `scratch` is the size of /tmp, and of /dev/shm, in bytes.
    """

    read: Mapping[Path, Path] = field(default_factory=dict)
    write: Mapping[Path, Path] = field(default_factory=dict)
    store: bool | Sequence[str] = ()
    network: "Namespace | None" = None
    devices: Sequence[Path] = ()
    groups: Sequence[int] = ()
    scratch: int = 1_000_000_000
    limits: Limits = field(default_factory=Limits)
    user: int | None = field(default_factory=fresh_user)

    def environment(self, env: Mapping[str, str]) -> dict[str, str]:
        """The whole environment of a process in the cell: `env`, and what every program expects."""
        return {"PATH": search_path(), "HOME": HOME, "TMPDIR": HOME, "LANG": "C.UTF-8", "TERM": "dumb"} | dict(env)

    def command(self, argv: Sequence[str], cwd: str | None = None) -> list[str]:
        """The command line that runs `argv` in the cell, in its folder `cwd`.

        Raises `InputError` when the machine lacks what a cell needs.
        """
        programs, stage, closure = _programs(), Stage(), self._closure
        words = [programs["bwrap"], *self._inner(stage), *(() if cwd is None else ("--chdir", cwd))]
        words += ["--", *self.limits.prefix, *argv]
        entry = [] if self.network is None else self.network.entry
        if os.geteuid() == 0:
            words = [*as_user(self.user, self.groups), *entry, *words]
        if closure:
            words = [sys.executable, "-I", "-S", str(_MOUNTS), str(_STAGE / "store"), *closure, "--", *words]
        words = [programs["bwrap"], *stage.words(mounts=bool(closure)), "--", *words]
        if os.geteuid() != 0:
            words = [*entry, *words]
        return words

    @asynccontextmanager
    async def held(self, running: "Running") -> AsyncIterator[None]:
        """Hold a process and what it starts to the cell's limits, while the block runs."""
        async with limited(running, self.limits, list(self.write.values())):
            yield

    def give(self) -> None:
        """Make what is in `write` the cell's user's, so that it can write there."""
        if self.user is not None:
            for folder in self.write.values():
                os.chown(folder, self.user, self.user)

    @property
    def _closure(self) -> Sequence[str]:
        return () if isinstance(self.store, bool) else tuple(dict.fromkeys([*self.store, *system_closure()]))

    def _inner(self, stage: "Stage") -> list[str]:
        words = [*_NAMESPACES, *(() if self.network is not None else ("--unshare-net",)), *_system()]
        for device in self.devices:
            words += ["--dev-bind", str(device), str(device)]
        for memory in ("/dev/shm", "/tmp"):  # noqa: S108
            words += ["--perms", "1777", "--size", str(self.scratch), "--tmpfs", memory]
        etc = stage.place(_etc())
        files_of_etc = {name: f"{etc}/{name}" for name in _FILES}
        if self.network is not None:
            files_of_etc["hosts"] = stage.place(self.network.hosts)
            files_of_etc["resolv.conf"] = stage.place(self.network.resolver)
        words += [word for name, where in files_of_etc.items() for word in ("--ro-bind", where, f"/etc/{name}")]
        if self.store is True:
            words += ["--ro-bind", str(STORE), str(STORE)]
        elif self._closure:
            words += ["--ro-bind", str(_STAGE / "store"), str(STORE)]
        for place, source in {**shared(), **self.read}.items():
            words += ["--ro-bind", stage.place(source), str(place)]
        for place, source in self.write.items():
            words += ["--bind", stage.place(source, write=True), str(place)]
        return [*words, "--remount-ro", "/dev", "--remount-ro", "/"]


_NAMESPACES: Final = (
    *("--unshare-user", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"),
    *("--disable-userns", "--die-with-parent", "--cap-drop", "ALL", "--hostname", "cell"),
    *("--uid", str(_UID), "--gid", str(_UID)),
)


class Stage:
    """The first mount namespace: the machine's, with what the cell sees below /run/cell."""

    def __init__(self) -> None:
        self.binds: list[str] = []

    def place(self, source: Path, *, write: bool = False) -> str:
        """Have `source` seen by every user at the place that is returned."""
        place = f"{_STAGE}/{len(self.binds) // 3}"
        self.binds += ["--bind" if write else "--ro-bind", str(source), place]
        return place

    def words(self, *, mounts: bool) -> list[str]:
        """What follows bwrap, up to the command. With `mounts` the command may mount."""
        user, capabilities = ["--unshare-user", "--uid", "0", "--gid", "0"], ["CAP_SYS_ADMIN", "CAP_SETFCAP"]
        if os.geteuid() == 0:
            user, capabilities = [], ["CAP_SETUID", "CAP_SETGID", *(["CAP_SYS_ADMIN"] if mounts else [])]
        return [
            *user,
            # With process ids of its own: when their first process dies, the kernel ends all the others. (By
            # --die-with-parent alone it could not: root's bwrap has no capability, and may not end another user's.)
            *("--die-with-parent", "--unshare-pid"),
            *("--dev-bind", "/", "/", "--perms", "0755", "--tmpfs", "/run"),
            *("--perms", "0755", "--dir", str(_STAGE), "--perms", "0755", "--dir", str(_STAGE / "store")),
            *self.binds,
            *(word for each in capabilities for word in ("--cap-add", each)),
        ]


def shared() -> Mapping[Path, Path]:
    """The folders that the server's settings open to every cell, by their own places.

    Raises `InputError` for one that does not exist.
    """
    folders = [Path(each) for each in os.environ.get(READ, "").split(os.pathsep) if each]
    for folder in folders:
        if not folder.is_absolute() or not folder.exists():
            raise InputError(f"there is no {folder}", target=READ, hint="name whole paths that exist")
    return {folder: folder.resolve() for folder in folders}


def python() -> tuple[list[str], Mapping[Path, Path]]:
    """The words by which env(1) runs Python in a cell, and what its cell has to `read` for that."""
    base = Path(sys.base_prefix)
    if base == Path("/usr") or base.is_relative_to(STORE):
        return [f"{base}/{_PYTHON_PROGRAM}"], {}
    return python_at(_PYTHON), {_PYTHON: base}


def python_at(place: Path | str) -> list[str]:
    """The words by which env(1) runs toto's Python from `place`, where its folder is mounted.

    It would look for a shared library of its own, such as pyenv's can have, only where it was built.
    """
    return [f"LD_LIBRARY_PATH={place}/lib", f"{place}/{_PYTHON_PROGRAM}"]


def as_user(user: int | None, groups: Sequence[int] = ()) -> list[str]:
    """The words that make root's command run as `user`, with no way back; none for None: toto is not root."""
    if user is None:
        return []
    more = ["--groups", ",".join(map(str, groups))] if groups else ["--clear-groups"]
    return [
        *(_programs()["setpriv"], "--reuid", str(user), "--regid", str(user), *more),
        *("--no-new-privs", "--inh-caps=-all", "--ambient-caps=-all"),
        *("--pdeathsig", "KILL", "--"),
    ]


@cache
def _programs() -> dict[str, str]:
    """The programs that make a cell, by name. Raises `InputError` when one is missing."""
    found = {name: shutil.which(name) for name in ("bwrap", "setpriv", "nsenter")}
    if missing := [name for name, path in found.items() if path is None]:
        raise InputError(
            f"{missing[0]} is not on PATH: toto keeps what is pushed in cells, and makes none without it",
            hint="on Debian: apt install bubblewrap util-linux; on NixOS: nix/toto.nix brings it",
        )
    # (By their real places: the first mount namespace has no /run, where NixOS has links to the machine's programs.)
    return {name: os.path.realpath(path) for name, path in found.items() if path is not None}


@cache
def _system() -> Sequence[str]:
    """The words that mount what every cell sees of the machine: its programs, its processes, its devices."""
    words: list[str] = []
    for path in map(Path, _SYSTEM):
        if path.is_symlink():
            words += ["--symlink", str(path.readlink()), str(path)]
        elif path.is_dir():
            words += ["--ro-bind", str(path), str(path)]
    for path in map(Path, _ETC):
        if path.exists():
            words += ["--ro-bind", str(path.resolve()), str(path)]
    return [*words, *_certificates(), "--proc", "/proc", "--dev", "/dev"]


def _certificates() -> list[str]:
    """The words that mount the machine's certificates. On NixOS they are links, by way of /etc/static, to the store."""
    if not _CERTIFICATES.exists():
        return []
    pairs = [(_CERTIFICATES.resolve(), _CERTIFICATES)]
    if (_CERTIFICATES / "ca-certificates.crt").resolve().is_relative_to(STORE):
        pairs = [(each.resolve(), each) for each in _CERTIFICATES.iterdir() if each.exists()]
    return [word for source, place in pairs for word in ("--ro-bind", str(source), str(place))]


@cache
def system_closure() -> Sequence[str]:
    """The store paths of the machine's own programs: on NixOS they are in the store, on Debian in /usr.

    The server's environment names a file with them, a line each: TOTO_TOOLS.
    """
    file = os.environ.get(TOOLS)
    return tuple(Path(file).read_text().split()) if file else ()


@cache
def search_path() -> str:
    """The PATH of a cell: those folders of toto's own that are in the store and in a cell, then the usual ones."""
    inside = set(system_closure())
    places = [Path(each).resolve() for each in os.environ.get("PATH", "").split(os.pathsep) if each]
    return ":".join([*(str(each) for each in places if str(Path(*each.parts[:4])) in inside), PATH])


@cache
def _etc() -> Path:
    """The folder with the files of a cell's /etc."""
    folder = paths.state_home() / "cells" / "etc"
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.mkdir(exist_ok=True)
    folder.chmod(0o755)  # (every cell's user reads it)
    for name, text in _FILES.items():
        if not (folder / name).is_file() or (folder / name).read_text() != text:
            files.write(folder / name, text, 0o644)
    return folder
