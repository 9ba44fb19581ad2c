"""What changes between two closures: packages by name and version, and units. (The idea is nvd's.)

Nothing is read from a machine: a GC root keeps the last good, so both closures are in the local store.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from toto.nix import commands as nix

_VERSION: Final = re.compile(r"-(?=[0-9])")
_UNITS: Final = "etc/systemd/system"


@dataclass(frozen=True)
class Difference:
    """Packages and units added, removed and changed, and by how many bytes the closure grows."""

    packages_changed: tuple[str, ...] = ()
    packages_added: tuple[str, ...] = ()
    packages_removed: tuple[str, ...] = ()
    units_changed: tuple[str, ...] = ()
    units_added: tuple[str, ...] = ()
    units_removed: tuple[str, ...] = ()
    bytes: int = 0

    def lines(self, most: int = 40) -> list[str]:
        """One line for each change, at most `most` of them; the last line is the change in size."""
        named = [
            (sign, what)
            for sign, group in (
                ("~", self.packages_changed),
                ("+", self.packages_added),
                ("-", self.packages_removed),
                ("~ unit", self.units_changed),
                ("+ unit", self.units_added),
                ("- unit", self.units_removed),
            )
            for what in group
        ]
        lines = [f"{sign} {what}" for sign, what in named[:most]]
        if len(named) > most:
            lines.append(f"… and {len(named) - most} more")
        return [*lines, f"closure {self.bytes:+,} bytes"]

    def __str__(self) -> str:
        return "\n".join(self.lines())


def name_and_version(path: str) -> tuple[str, str]:
    """`/nix/store/HASH-openssh-9.2p1` → (`openssh`, `9.2p1`): cut, as nix does, at the first `-` before a digit."""
    name = Path(path).name[33:]
    found = _VERSION.search(name)
    return (name[: found.start()], name[found.end() :]) if found else (name, "")


async def difference(old: str | None, new: str) -> Difference:
    """What changes from the toplevel `old` to `new`; everything is new when `old` is None. Both must be in the store.

    Raises `CommandFailed`.
    """
    before = await nix.closure(old) if old else []
    after = await nix.closure(new)
    gone, come = sorted(set(before) - set(after)), sorted(set(after) - set(before))
    was, will = _versions(before), _versions(after)
    size = await nix.sizes([*gone, *come])
    changed = [
        f"{name} {_shown(was[name])} → {_shown(will[name])}"
        for name in sorted(was.keys() & will.keys())
        if was[name] != will[name]
    ]
    rebuilt = [name for name in sorted(_versions(come).keys() & _versions(gone).keys()) if was[name] == will[name]]
    units_before, units_after = _units(old) if old else {}, _units(new)
    return Difference(
        packages_changed=(*changed, *(f"{name} {_shown(will[name])} (rebuilt)".replace("  ", " ") for name in rebuilt)),
        packages_added=tuple(f"{name} {_shown(will[name])}".strip() for name in sorted(will.keys() - was.keys())),
        packages_removed=tuple(f"{name} {_shown(was[name])}".strip() for name in sorted(was.keys() - will.keys())),
        units_changed=tuple(
            sorted(unit for unit in units_before.keys() & units_after.keys() if units_before[unit] != units_after[unit])
        ),
        units_added=tuple(sorted(units_after.keys() - units_before.keys())),
        units_removed=tuple(sorted(units_before.keys() - units_after.keys())),
        bytes=sum(size[path] for path in come) - sum(size[path] for path in gone),
    )


def _versions(paths: Iterable[str]) -> dict[str, set[str]]:
    versions: defaultdict[str, set[str]] = defaultdict(set)
    for path in paths:
        name, version = name_and_version(path)
        versions[name].add(version)
    return versions


def _shown(versions: set[str]) -> str:
    return ", ".join(sorted(version for version in versions if version))


def _units(toplevel: str) -> dict[str, str]:
    """The unit files of a toplevel, each with its text, or (as on NixOS) with the store path that it links to."""
    folder = Path(toplevel, _UNITS)
    if not folder.is_dir():
        return {}
    return {
        unit.name: str(unit.resolve()) if unit.is_symlink() else unit.read_text(errors="replace")
        for unit in folder.iterdir()
        if unit.is_symlink() or unit.is_file()
    }
