"""Programs of the machine's own that the agent runs: hooks before and after an update, and checks.

They lie in folders below /etc/flying-monkey, and only what root alone can write is run. A hook gets a small environment
that says what happens, and no input:

    TOTO_PHASE    prepare, check or finish
    TOTO_REASON   try, back or reboot: what comes, and what a check is of; or kept or back: what came of it
    TOTO_SERIAL   the serial of the document
    TOTO_SYSTEM   the store path that the document is about
"""

import contextlib
import os
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from flying_monkey import machine

FOLDER: Final = Path("/etc/flying-monkey")
MOST: Final = 65_536  # bytes of output that are kept, the newest
_TICK: Final = 0.1  # seconds between two looks
_GRACE: Final = 5.0  # seconds between asking a program to end and killing it, and for it to be gone then


class Unfit(Exception):
    """A program is not there, or is not root's alone."""


@dataclass(frozen=True)
class Ran:
    """How a program ended. `problem` is "" for one that did well; `cut` says that `said` is only the end."""

    problem: str
    said: str
    cut: bool = False


def names(folder: str) -> list[str]:
    """The programs in a folder such as `checks.d`, in order."""
    try:
        return sorted(each.name for each in (FOLDER / folder).iterdir() if not each.name.startswith("."))
    except FileNotFoundError:
        return []


def find(folder: str, name: str) -> Path:
    """The program `name` of a folder such as `prepare.d`. Raises `Unfit`."""
    try:
        place = (FOLDER / folder).resolve(strict=True)
        program = (place / name).resolve(strict=True)
        for each in (place, program.parent):
            _check(each, folder)
        found = _check(program, name)
    except OSError as error:
        raise Unfit(f"{folder}/{name}: {error.strerror}") from None
    if not stat.S_ISREG(found.st_mode) or not found.st_mode & stat.S_IXUSR:
        raise Unfit(f"{folder}/{name}: not a program")
    return program


def _check(path: Path, name: str) -> os.stat_result:
    seen = path.stat()
    # In a folder such as nix's store others may add files, and change none.
    shared = stat.S_ISDIR(seen.st_mode) and seen.st_mode & stat.S_ISVTX
    if seen.st_uid != 0 or (seen.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not shared):
        raise Unfit(f"{name}: not root's, or others may write to it")
    return seen


def run(program: Path, environment: Mapping[str, str], longest: float, look: Callable[[], None]) -> Ran:
    """Run a program for at most `longest` seconds. Meanwhile `look` is called; what that raises ends the program."""
    try:
        process = subprocess.Popen(
            [str(program)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            umask=0o022,
            cwd="/",
            env={"PATH": machine.PATH, "LANG": "C.UTF-8", "HOME": "/root", **environment},
        )
    except OSError as error:
        return Ran(f"it cannot be started: {error.strerror}", "")
    assert process.stdout is not None
    deadline, said, cut, late = time.monotonic() + longest, bytearray(), False, False
    os.set_blocking(process.stdout.fileno(), False)
    try:
        while True:
            ended = process.poll() is not None
            while chunk := process.stdout.read(MOST):
                said += chunk
                cut = cut or len(said) > MOST
                del said[:-MOST]
                if time.monotonic() > deadline:
                    break
            if ended:
                break
            if late := time.monotonic() > deadline:
                break
            look()
            time.sleep(_TICK)
    finally:
        if process.returncode is None:
            _end(process)
        process.stdout.close()
    text = said.decode(errors="replace")
    if late:
        return Ran(f"it did not end within {longest:.0f} s", text, cut)
    if process.returncode < 0:
        return Ran(f"it was ended by {signal.Signals(-process.returncode).name}", text, cut)
    return Ran(f"it exited with status {process.returncode}" if process.returncode else "", text, cut)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a program and what it started. One that waits for a dead disk cannot be ended, and is left."""
    for each in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, each)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
