"""The hosts of a commit. `toto.nix.commands` evaluates them; the ledger knows what is deployed."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from toto.base.errors import InputError
from toto.infra_repo import fields


@dataclass(frozen=True, order=True)
class Host:
    """One NixOS configuration. `file` is its path in the tree, or "" when the flake defines the host."""

    name: str
    file: str = ""

    @property
    def origin(self) -> str:
        """Where the host is defined, for messages."""
        return self.file or f"flake.nix#nixosConfigurations.{self.name}"


def check_name(name: str, where: str) -> str:
    """Return `name` if it can name a host; else raise `InputError` about the file `where`."""
    return fields.require_name(name, "a host's name", where, hint="rename it")


def named(tree: Path) -> Iterator[Host]:
    """The files that can be hosts, `hosts/NAME.nix` and `hosts/NAME/default.nix`, whatever their names."""
    folder = tree / "hosts"
    for entry in sorted(folder.iterdir()) if folder.is_dir() else []:
        if entry.name.startswith("."):
            continue
        if entry.suffix == ".nix" and entry.is_file():
            yield Host(entry.name.removesuffix(".nix"), f"hosts/{entry.name}")
        elif (entry / "default.nix").is_file():
            yield Host(entry.name, f"hosts/{entry.name}/default.nix")


def in_files(tree: Path) -> list[Host]:
    """The hosts `hosts/NAME.nix` and `hosts/NAME/default.nix`, by name.

    Raises `InputError` for a bad name, and for a name that is defined twice.
    """
    found: dict[str, Host] = {}
    for host in named(tree):
        check_name(host.name, host.file)
        if host.name in found:
            raise InputError(
                f"is defined twice: {found[host.name].file} and {host.file}",
                target=host.name,
                hint="remove one of them",
            )
        found[host.name] = host
    return list(found.values())
