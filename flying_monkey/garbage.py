"""Removes what a machine does not need any more: old generations, then as much garbage as its disk is short of room.

    python -m flying_monkey.garbage GENERATIONS FREE

The newest GENERATIONS generations of the system stay, and whatever their age: what runs, what was booted, what the next
boot begins, and what was kept last, to which toto sends the machine back. Garbage is collected until FREE bytes of the
disk are free, and no further: what is in the store already need not be fetched again. While an update is under way
nothing is removed, and no garbage within an hour of anything that was added to the store.
"""

import os
import re
import sys
import time
from pathlib import Path
from typing import Final

from flying_monkey import machine, memory
from flying_monkey.machine import PROFILE, STORE, Configuration, Misconfigured, NotReady
from flying_monkey.memory import Lost, Memory

_BOOTED: Final = Path("/run/booted-system")
_ROOT: Final = Path("/nix/var/nix/gcroots/flying-monkey-kept")
_LONGEST: Final = 3_600.0  # seconds to collect garbage
_YOUNG: Final = 3_600.0  # seconds in which what toto has copied may not be an update's yet, and so has no root


def collect(configuration: Configuration, generations: int, free: int) -> str:
    """Remove what is not needed; what was done, in a line. Raises `NotReady`, `Lost`."""
    file = Path(configuration.memory)
    with memory.locked(file):
        known = Memory.load(file)
        if known.step != "finished":
            return "an update is under way: nothing is removed"
        machine.keep(known.kept, _ROOT)
        removed = _remove_generations(generations, {known.kept, machine.running(), machine.boots(), _booted()})
        if abs(time.time() - STORE.stat().st_mtime) < _YOUNG:
            return f"{removed} generations removed; the store was just written to: garbage is left for the next time"
    # (Without the lock: a machine may be told to go back at any time. What an update has begun with has roots.)
    had = machine.free()
    if had < free:
        machine.run("nix-store", "--gc", "--max-freed", str(free - had), longest=_LONGEST)
    now = machine.free()
    line = f"{removed} generations removed; {now / 1e6:.0f} MB are free"
    return line if now >= free else f"{line}, less than the {free / 1e6:.0f} MB that should be: nothing else is garbage"


def _remove_generations(newest: int, needed: set[str]) -> int:
    """Remove generations of the system but for the newest ones, and those of the systems that are needed."""
    found = {}
    for link in PROFILE.parent.glob(f"{PROFILE.name}-*-link"):
        if number := re.fullmatch(rf"{re.escape(PROFILE.name)}-([0-9]+)-link", link.name):
            found[int(number[1])] = str(link.resolve())
    old = sorted(found)[: -max(newest, 1)]
    gone = [str(number) for number in old if found[number] not in needed]
    if gone:
        machine.run("nix-env", "--profile", str(PROFILE), "--delete-generations", *gone)
    return len(gone)


def _booted() -> str:
    return str(_BOOTED.resolve()) if _BOOTED.exists() else ""


def main() -> None:
    """Run on this machine, as its configuration says."""
    if os.geteuid() != 0 or len(sys.argv) != 3 or not all(map(str.isdecimal, sys.argv[1:])):
        raise SystemExit("it takes the generations to keep and the bytes to have free, and is root's")
    os.environ.clear()
    os.environ.update(machine.environment())
    try:
        print(collect(Configuration.load(), int(sys.argv[1]), int(sys.argv[2])), flush=True)
    except (Misconfigured, NotReady, Lost, OSError) as error:
        raise SystemExit(f"flying-monkey: {error}") from None


if __name__ == "__main__":
    main()
