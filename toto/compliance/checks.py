"""The compliance checks of an infra repo: its InSpec profiles and its pytest-testinfra modules, and which are for whom.

inspec/PROFILE/       an InSpec profile, with an inspec.yml; its own waivers.yaml and inputs.yaml, if it has them
compliance/NAME.py    a module of pytest-testinfra; conftest.py and _NAME.py are for what modules share
"""

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from toto.base.errors import InputError
from toto.infra_repo.fields import require_name
from toto.infra_repo.settings import FILE, Compliance, Settings

PROFILES: Final = "inspec"
MODULES: Final = "compliance"
_LARGEST: Final = 50_000_000  # bytes of a file
_MOST: Final = 10_000  # files


@dataclass(frozen=True)
class Check:
    """A profile or a module: its path in the tree, such as `inspec/base`, and the controls that are run; () for all."""

    kind: Literal["inspec", "testinfra"]
    name: str
    path: Path
    controls: tuple[str, ...] = ()

    def __str__(self) -> str:
        return str(self.path)


def includes(settings: Compliance, tags: Iterable[str]) -> bool:
    """Whether a machine with these tags is one of those that are checked."""
    return not settings.tags or not set(settings.tags).isdisjoint(tags)


def gated(settings: Settings, tags: Iterable[str]) -> bool:
    """Whether a roll-out to a machine with these tags depends on its compliance."""
    return settings.roll_out.compliance == "gate" and includes(settings.compliance, tags)


def find(tree: Path, settings: Compliance, tags: Iterable[str]) -> tuple[Check, ...]:
    """The checks in the commit that is exported at `tree`, for a machine with these tags.

    Raises `InputError` for a folder that is almost a profile, for two of one name, and for settings of none.
    """
    found: dict[str, Check] = {}
    for check in (*_profiles(tree), *_modules(tree)):
        if (other := found.setdefault(check.name, check)) is not check:
            raise InputError(f"has the name of {other}", target=str(check), hint="rename one of them")
    if unknown := sorted(settings.checks.keys() - found.keys()):
        known = ", ".join(map(str, found.values())) or "none: they are inspec/PROFILE/ and compliance/NAME.py"
        raise InputError(
            f"compliance.checks.{unknown[0]}: there is no such check", target=FILE, hint=f"there are {known}"
        )
    tags = set(tags)
    chosen = []
    for name, check in found.items():
        its = settings.checks.get(name)
        if its is None:
            chosen.append(check)
        elif not its.tags or not tags.isdisjoint(its.tags):
            chosen.append(Check(check.kind, check.name, check.path, its.controls))
    return tuple(chosen)


def digest(tree: Path, checks: Iterable[Check]) -> str:
    """The SHA-256 of what `checks` run: of the name, mode and content of each file that they may read.

    Raises `InputError` for files that cannot be read.
    """
    total = hashlib.sha256()
    checks = list(checks)
    for each in checks:
        total.update(repr((str(each), each.controls)).encode())
    folders = [tree / each.path for each in checks if each.kind == "inspec"]
    if any(each.kind == "testinfra" for each in checks):
        folders.append(tree / MODULES)
    for folder in folders:
        for path in _files(tree, folder):
            total.update(repr((path.relative_to(tree), *_content(tree, path))).encode())
    return total.hexdigest()


def _content(tree: Path, path: Path) -> tuple[str, bytes]:
    """A file's kind and content; a link's is where it leads to."""
    try:
        its = path.lstat()
        if stat.S_ISLNK(its.st_mode):
            return "link", os.fsencode(path.readlink())
        if not stat.S_ISREG(its.st_mode) or its.st_size > _LARGEST:
            raise InputError(
                f"is no file, or one of more than {_LARGEST // 1_000_000} MB", target=str(path.relative_to(tree))
            )
        return "runs" if its.st_mode & 0o111 else "file", path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", target=str(path.relative_to(tree))) from None


def _files(tree: Path, folder: Path) -> list[Path]:
    """Every file below a folder, in order; links are not followed."""
    found: list[Path] = []
    for place, folders, names in os.walk(folder):
        folders.sort()
        links = [each for each in folders if Path(place, each).is_symlink()]
        found += [Path(place, each) for each in sorted([*names, *links])]
        if len(found) > _MOST:
            raise InputError(f"has more than {_MOST} files", target=str(folder.relative_to(tree)))
    return found


def _profiles(tree: Path) -> Iterator[Check]:
    for folder in _entries(tree, PROFILES):
        if not folder.is_dir():
            continue
        path = Path(PROFILES, folder.name)
        if not (folder / "inspec.yml").is_file():
            if (folder / "controls").is_dir():
                raise InputError("has controls and no inspec.yml", target=str(path), hint="`inspec init` writes one")
            continue
        require_name(folder.name, "a profile's name", str(path), hint="rename the folder")
        yield Check("inspec", folder.name, path)


def _modules(tree: Path) -> Iterator[Check]:
    for file in _entries(tree, MODULES):
        if file.suffix != ".py" or file.name == "conftest.py" or file.name.startswith("_") or not file.is_file():
            continue
        path = Path(MODULES, file.name)
        require_name(file.stem, "a module's name", str(path), hint="rename the file")
        yield Check("testinfra", file.stem, path)


def _entries(tree: Path, name: str) -> list[Path]:
    """The entries of a folder of the tree that are not hidden, and lead nowhere else; none when there is no folder."""
    folder = tree / name
    if not folder.is_dir():
        return []
    found = sorted(each for each in folder.iterdir() if not each.name.startswith("."))
    for each in (folder, *found):
        if not each.resolve().is_relative_to(tree.resolve()):
            raise InputError(
                "this link leads out of the repository",
                target=str(each.relative_to(tree)),
                hint="put what it points to into the repository",
            )
    return found
