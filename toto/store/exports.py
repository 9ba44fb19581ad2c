"""What an NFS server exports of the grants: run by root, on toto's machine, whenever a grant has changed.

    python -IS exports.py CONFIG > /etc/exports.d/toto.exports

toto is a user without rights. So what root does for it is this one file, which imports nothing of toto's, and believes
nothing that toto has written: CONFIG, which is root's, says which machines there are, and at which addresses; toto's
folders say only whether a machine has a grant, and which store paths are in it. Whoever asks is squashed to nobody: it
reads what everybody on toto's machine may read, and nothing else.

A machine without a disk has a tree besides: hard links of the store paths themselves, for the lower layer of its store.
"""

import errno
import json
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

TREES: Final = Path("/nix/toto-store")
REGISTRATION: Final = "nix-path-registration"  # as NixOS calls it in the stores of machines without a disk
# `subtree_check`: without it a handle that a machine makes up reads any file of the same file system.
_OPTIONS: Final = "ro,sync,subtree_check,all_squash,sec=sys"
_NAME: Final = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,127}[A-Za-z0-9_-])?")
_ADDRESS: Final = re.compile(r"[0-9]{1,3}(?:\.[0-9]{1,3}){3}|[0-9a-f:]*:[0-9a-f:]*")
_NARINFO: Final = re.compile(r"[0-9a-z]{32}\.narinfo")
_PATH: Final = re.compile(r"[0-9a-df-np-sv-z]{32}-[A-Za-z0-9+._?=-]{1,211}")
_HASH: Final = re.compile(r"sha256:[0-9a-z]{52}")
_MOST: Final = 1_000_000  # bytes of a narinfo


@dataclass(frozen=True)
class Granted:
    """A store path that is granted, by its name, as nix's database has it."""

    name: str
    nar_hash: str
    nar_size: int
    references: tuple[str, ...]

    def registered(self) -> str:
        """What `nix-store --load-db` takes."""
        lines = [f"/nix/store/{self.name}", self.nar_hash, str(self.nar_size), "", str(len(self.references))]
        return "".join(f"{line}\n" for line in (*lines, *(f"/nix/store/{each}" for each in self.references)))


@dataclass(frozen=True)
class Machine:
    """A machine that mounts what it is granted. `repo` is the name of its repo's folder."""

    name: str
    repo: str
    address: str
    diskless: bool = False

    def __post_init__(self) -> None:
        if not (_NAME.fullmatch(self.name) and _NAME.fullmatch(self.repo) and _ADDRESS.fullmatch(self.address)):
            raise ValueError(f"{self.name} of {self.repo} at {self.address}")


@dataclass(frozen=True)
class Configuration:
    """Root's. `nix` is /nix with a store that can be linked from; on NixOS elsewhere, since its store is a mount."""

    granted: Path
    nix: Path
    machines: tuple[Machine, ...]

    @classmethod
    def load(cls, file: Path) -> "Configuration":
        """Raises OSError, ValueError, LookupError, TypeError."""
        found = json.loads(file.read_bytes())
        machines = tuple(Machine(name=name, **each) for name, each in sorted(found.pop("machines").items()))
        return cls(machines=machines, **{name: Path(value) for name, value in found.items()})

    def exports(self) -> Iterator[str]:
        """The lines for exportfs, once the trees are what they should be."""
        for machine in self.machines:
            folder = _folder(self.granted, machine.repo, machine.name)
            if folder is None:
                continue
            try:
                yield f"{self.granted / machine.repo / machine.name} {machine.address}({_OPTIONS})"
                if machine.diskless:
                    _make_tree(self.nix / "store", self.nix / TREES.name / machine.name, list(_read(folder)))
                    yield f"{TREES / machine.name} {machine.address}({_OPTIONS})"
            finally:
                os.close(folder)

    def tidy(self) -> None:
        """Remove the trees of machines that have none any more."""
        have = {
            each.name for each in self.machines if each.diskless and (self.granted / each.repo / each.name).is_dir()
        }
        trees = self.nix / TREES.name
        for tree in trees.iterdir() if trees.is_dir() else ():
            if tree.name not in have:
                shutil.rmtree(tree)


def _folder(above: Path, *names: str) -> int | None:
    """A folder, opened without following any link; None when there is none."""
    place = os.open(above, os.O_RDONLY | os.O_DIRECTORY)
    for name in names:
        try:
            inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=place)
        except OSError:
            return None
        finally:
            os.close(place)
        place = inner
    return place


def _read(cache: int) -> Iterator[Granted]:
    """The store paths that are in a binary cache."""
    for name in sorted(os.listdir(cache)):
        if not _NARINFO.fullmatch(name):
            continue
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=cache)
        with os.fdopen(file, "rb") as source:
            text = source.read(_MOST).decode() if stat.S_ISREG(os.fstat(file).st_mode) else ""
        said = dict(line.partition(": ")[::2] for line in text.splitlines())
        path, references = said.get("StorePath", "").removeprefix("/nix/store/"), said.get("References", "").split()
        if not (all(map(_PATH.fullmatch, (path, *references))) and _HASH.fullmatch(said.get("NarHash", ""))):
            raise ValueError(f"{name} is no narinfo")
        yield Granted(path, said["NarHash"], int(said.get("NarSize", "")), tuple(references))


def _make_tree(store: Path, tree: Path, paths: list[Granted]) -> None:
    """Make `tree` have these store paths, as far as the store has them, and nothing else."""
    tree.mkdir(mode=0o755, parents=True, exist_ok=True)
    fresh = tree / ".new"
    paths = [each for each in paths if any(os.path.lexists(place / each.name) for place in (tree, store))]
    for path in paths:
        if not os.path.lexists(tree / path.name):
            _remove(fresh)
            _link(store / path.name, fresh)
            fresh.rename(tree / path.name)
    fresh.write_text("".join(each.registered() for each in paths))
    fresh.chmod(0o644)
    fresh.rename(tree / REGISTRATION)
    wanted = {REGISTRATION, *(each.name for each in paths)}
    for each in tree.iterdir():
        if each.name not in wanted:
            _remove(each)


def _link(source: Path, target: Path) -> None:
    """A copy of a store path, of hard links."""
    if source.is_symlink() or not source.is_dir():
        try:
            os.link(source, target, follow_symlinks=False)
        except OSError as error:
            if error.errno != errno.EMLINK:  # a file that has as many names as it may
                raise
            shutil.copy2(source, target, follow_symlinks=False)
        return
    target.mkdir()
    for entry in os.scandir(source):
        _link(source / entry.name, target / entry.name)
    shutil.copystat(source, target)


def _remove(what: Path) -> None:
    if what.is_symlink() or not what.is_dir():
        what.unlink(missing_ok=True)
    else:
        shutil.rmtree(what)


def main() -> None:
    """Print the exports."""
    try:
        configuration = Configuration.load(Path(sys.argv[1]))
        print(*configuration.exports(), sep="\n")
        configuration.tidy()
    except (OSError, ValueError, LookupError, TypeError) as error:
        sys.exit(f"the exports stay as they are: {error}")


if __name__ == "__main__":
    main()
