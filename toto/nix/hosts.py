"""The hosts of a commit. `toto.nix.commands` evaluates them; the ledger knows what is deployed."""

import posixpath
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from toto.base.errors import InputError
from toto.infra_repo import fields

FLAKE: Final = "flake.nix"
FOLDERS: Final = ("hosts", "machines")
_IN_FOLDER: Final = ("default.nix", "configuration.nix")  # of a folder that has both the first one is the host


@dataclass(frozen=True, order=True)
class Host:
    """One NixOS configuration. `file` is its path in the tree, or "" when the flake of the file `flake` defines it.

    `nixpkgs` is the store path of its nixpkgs, where the repo pins it by npins or niv.
    """

    name: str
    file: str = ""
    flake: str = FLAKE
    nixpkgs: str = ""

    @property
    def origin(self) -> str:
        """Where the host is defined, for messages."""
        return self.file or f"{self.flake}#nixosConfigurations.{self.name}"

    @property
    def folder(self) -> str:
        """The flake's folder in the tree; "" for the tree itself."""
        return posixpath.dirname(self.flake)


def check_name(name: str, where: str) -> str:
    """Return `name` if it can name a host; else raise `InputError` about the file `where`."""
    return fields.require_name(name, "a host's name", where, hint="rename it")


def is_name(name: str) -> bool:
    """Whether a host can have this name."""
    with suppress(ValueError):
        return bool(fields.check_name(name))
    return False


def named(tree: Path) -> Iterator[Host]:
    """The files that can be hosts, whatever their names: in hosts/ or machines/, `NAME.nix`, or a folder NAME with a
    default.nix or a configuration.nix."""
    for place in FOLDERS:
        folder = tree / place
        for entry in sorted(folder.iterdir()) if folder.is_dir() else []:
            if entry.name.startswith("."):
                continue
            if entry.suffix == ".nix" and entry.is_file():
                yield Host(entry.name.removesuffix(".nix"), f"{place}/{entry.name}")
            elif file := next((each for each in _IN_FOLDER if (entry / each).is_file()), None):
                yield Host(entry.name, f"{place}/{entry.name}/{file}")


def in_files(tree: Path, listed: Collection[str], *, unlisted: bool = False) -> list[Host]:
    """The hosts that are files, by name. `listed` are the names in the manifest.

    Raises `InputError` for a bad name, and for a name that two files have; of those that are not listed only with
    `unlisted`: they may be no hosts at all, such as hosts/common/default.nix.
    """
    found: dict[str, Host] = {}
    for host in named(tree):
        asked = unlisted or host.name in listed
        if asked:
            check_name(host.name, host.file)
        elif not is_name(host.name):
            continue
        if host.name in found and asked:
            raise InputError(
                f"is defined twice: {found[host.name].file} and {host.file}",
                target=host.name,
                hint="remove one of them, or move it out of hosts/ and machines/",
            )
        found.setdefault(host.name, host)
    return list(found.values())
