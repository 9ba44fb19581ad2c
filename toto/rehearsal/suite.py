"""The test scripts of a host: finding them, and their digest.

A script is an executable that prints TAP. `toto.rehearsal.run` runs it, and `toto.rehearsal.tap` judges its output. The
scripts learn from the environment how to connect to the machine. Scripts of all hosts may use files in `tests/lib/`.
"""

import difflib
import hashlib
import os
import stat
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from toto.base.errors import InputError
from toto.infra_repo.fields import check_name
from toto.nix.hosts import FOLDERS


class Phase(StrEnum):
    """When a script runs: in the sandbox without and with internet, on the machine before and after the switch."""

    NO_INTERNET = "no-internet"
    WITH_INTERNET = "with-internet"
    SMOKE = "smoke"
    POST_SWITCH = "post-switch"


@dataclass(frozen=True)
class Script:
    """A test script. `name` is its path in the host's tests, for people; `path` is its file."""

    phase: Phase
    name: str
    path: Path


@dataclass(frozen=True)
class Suite:
    """The scripts of a host, sorted by phase and name; none for a host without tests."""

    host: str
    scripts: tuple[Script, ...] = ()
    _files: tuple[tuple[str, bytes, Path], ...] = field(default=(), repr=False)  # phase or "", name, where

    def of(self, phase: Phase) -> tuple[Script, ...]:
        """The scripts of a phase."""
        return tuple(script for script in self.scripts if script.phase == phase)

    def digest(self, phases: Iterable[Phase] = tuple(Phase)) -> str:
        """The SHA-256 of the scripts of `phases` and their helpers: of the phase, name, mode and content of each file.

        Raises `InputError` for a file that cannot be read.
        """
        wanted = {"", *phases}
        total = hashlib.sha256()
        for phase, name, path in self._files:
            if phase in wanted:
                try:
                    content = path.read_bytes()
                    runnable = _runnable(path)
                except OSError as error:
                    raise InputError(f"cannot be read: {error.strerror}", target=shown(name)) from None
                for part in (phase.encode(), name, b"x" if runnable else b"-", content):
                    total.update(b"%d:" % len(part))
                    total.update(part)
        return total.hexdigest()


def find(tree: Path, host: str) -> Suite:
    """The tests of `host` in the infra repo checked out at `tree`.

    These are the executables in `tests/HOST/PHASE/` (or `test/HOST/PHASE/`), and next to the host file `HOST-test.sh`
    (no-internet) and `HOST-smoke-test.sh` (smoke). README*, *.md, dotfiles and subdirectories are not scripts.
    Raises `InputError` for a script that is not executable, a link that leads out of the tree, or a directory
    whose name is almost that of a phase.
    """
    try:
        check_name(host)
    except ValueError as error:
        raise InputError(f"a host's name {error}") from None
    tree = tree.resolve()
    scripts: list[Script] = []
    files: list[tuple[str, bytes, Path]] = []
    for root in (tree / "tests" / host, tree / "test" / host):
        for entry in _entries(tree, root):
            phase = _phase(tree, entry)
            if phase is None:
                files += [("", *each) for each in _walk(tree, entry) if not _document(entry)]
                continue
            for file in _entries(tree, entry):
                if _document(file):
                    continue
                files += [(phase.value, *each) for each in _walk(tree, file)]
                if not file.name.startswith(".") and not file.is_dir():
                    scripts.append(_script(tree, phase, file, f"{phase}/{shown(os.fsencode(file.name))}"))
    for file, phase in _beside(tree, host):
        files += [(phase.value, *each) for each in _walk(tree, file)]
        scripts.append(_script(tree, phase, file, file.name))
    if scripts:
        files += [("", *each) for each in _walk(tree, tree / "tests" / "lib")]
    order = list(Phase)
    return Suite(
        host,
        tuple(sorted(scripts, key=lambda each: (order.index(each.phase), each.name, each.path))),
        tuple(sorted(files, key=lambda each: each[:2])),
    )


def of_nobody(tree: Path, hosts: Collection[str]) -> list[str]:
    """The folders of tests, as `tests/web1`, that are of none of these hosts: they never run."""
    phases = [phase.value for phase in Phase]
    return [
        f"{folder}/{shown(os.fsencode(each.name))}"
        for folder in ("tests", "test")
        for each in (sorted((tree / folder).iterdir()) if (tree / folder).is_dir() else ())
        if each.name not in hosts and any((each / phase).is_dir() for phase in phases)
    ]


def _beside(tree: Path, host: str) -> Iterator[tuple[Path, Phase]]:
    for hosts in (tree / place for place in FOLDERS):
        for folder in (hosts, hosts / host):
            if os.path.lexists(test := folder / f"{host}-test.sh"):
                yield test, Phase.NO_INTERNET
            # With the hosts `web` and `web-smoke`, `web-smoke-test.sh` belongs to `web-smoke`.
            if (
                os.path.lexists(smoke := folder / f"{host}-smoke-test.sh")
                and not (hosts / f"{host}-smoke.nix").exists()
                and not (hosts / f"{host}-smoke").is_dir()
            ):
                yield smoke, Phase.SMOKE


def _phase(tree: Path, entry: Path) -> Phase | None:
    if not entry.is_dir():
        return None
    names = [phase.value for phase in Phase]
    if entry.name in names:
        return Phase(entry.name)
    if close := difflib.get_close_matches(entry.name.lower().replace("_", "-")[:60], names, n=1, cutoff=0.8):
        raise InputError(
            "this is not a phase: its scripts would never run",
            target=_relative(tree, entry),
            hint=f"did you mean `{close[0]}`? if not, give it a less similar name",
        )
    return None


def _document(path: Path) -> bool:
    return path.name.startswith("README") or path.name.endswith(".md")


def _script(tree: Path, phase: Phase, path: Path, name: str) -> Script:
    if not _runnable(path):
        where = _relative(tree, path)
        raise InputError(
            "this test script is not executable",
            target=where,
            hint=f"`chmod +x {where}`, or `git update-index --chmod=+x {where}`; then commit it",
        )
    return Script(phase, name, path)


def _runnable(path: Path) -> bool:
    return bool(path.stat().st_mode & 0o111)


def _relative(tree: Path, path: Path) -> str:
    return shown(os.fsencode(path.relative_to(tree)))


def shown(name: bytes) -> str:
    """A file name as text for messages, with a replacement for what cannot be printed."""
    return "".join(character if character.isprintable() else "�" for character in name.decode(errors="replace"))


def _entries(tree: Path, folder: Path) -> list[Path]:
    """The entries of a folder, sorted by name; none when there is no folder."""
    if not os.path.lexists(folder):
        return []
    _check_inside(tree, folder)
    if not folder.is_dir():
        raise InputError("should be a directory of phases", target=_relative(tree, folder))
    return sorted(folder.iterdir(), key=lambda path: os.fsencode(path.name))


def _check_inside(tree: Path, path: Path) -> None:
    try:
        inside = path.resolve(strict=True).is_relative_to(tree)
    except (OSError, RuntimeError):
        raise InputError("this link leads nowhere", target=_relative(tree, path)) from None
    if not inside:
        raise InputError(
            "this link leads out of the repository",
            target=_relative(tree, path),
            hint="put what it points to into the repository",
        )


def _walk(tree: Path, path: Path, around: tuple[Path, ...] = ()) -> Iterator[tuple[bytes, Path]]:
    """Every file at and below `path`, with links followed: its name in the tree, and its path."""
    if not os.path.lexists(path):
        return
    _check_inside(tree, path)
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        real = path.resolve()
        if real in around:
            raise InputError("this link leads round in a circle", target=_relative(tree, path))
        for entry in _entries(tree, path):
            yield from _walk(tree, entry, (*around, real))
    elif stat.S_ISREG(mode):
        yield os.fsencode(path.relative_to(tree)), path
    else:
        raise InputError("this is neither a file nor a directory", target=_relative(tree, path))
