"""How a machine is: its own checks, which print TAP, units that failed, what needs a reboot, what differs by hand."""

import re
from pathlib import Path
from typing import Final

from flying_monkey import machine
from flying_monkey.desired import Desired
from flying_monkey.memory import Memory

_BOOTED: Final = Path("/run/booted-system")
_NEED_REBOOT: Final = ("kernel", "initrd", "kernel-modules")
_TEST: Final = re.compile(r"(not )?ok\b(?: +([0-9]{1,9})\b)?(.*)", re.ASCII)
_PLAN: Final = re.compile(r"1\.\.([0-9]{1,9})(?: *#.*)?", re.ASCII)
_EXCUSE: Final = re.compile(r"# *(skip|todo)\b", re.IGNORECASE)


def tap(text: str, problem: str = "") -> str:
    """What is wrong with the output of a check (TAP 13 or 14); "" for a pass. `problem` is how its program ended.

    A plan is asked for and must hold, numbers must be in order, and a program that ends badly has not passed. Indented
    lines (subtests, YAML) and comments say nothing.
    """
    plans: list[int] = []
    count, failed, wrong = 0, [], []
    for line in map(str.rstrip, text.splitlines()):
        if line.startswith("Bail out!"):
            return f"it bailed out: {line.removeprefix('Bail out!').strip() or 'no reason given'}"[:300]
        if found := _PLAN.fullmatch(line):
            plans.append(int(found[1]))
        elif found := _TEST.fullmatch(line):
            count += 1
            if found[2] and int(found[2]) != count:
                wrong.append(f"test {count} has the number {int(found[2])}")
            excuse = _EXCUSE.search(found[3])
            if found[1] and not (excuse and excuse[1].lower() == "todo"):
                failed.append(f"{count}{found[3]}")
    if failed:
        wrong.insert(0, f"{len(failed)} of {count} failed: {', '.join(failed[:5])}"[:300])
    elif not plans:
        wrong.append("there is no plan (a line like 1..3)" if count else "it printed no TAP")
    elif len(plans) > 1:
        wrong.append("it has two plans")
    elif plans[0] != count:
        wrong.append(f"it planned {plans[0]} and ran {count}")
    return "; ".join([*wrong[:3], *([problem] if problem and not failed else [])])


def reboot_needed() -> bool:
    """Whether the next boot begins with a different kernel, initrd or set of modules than this one did."""
    if not _BOOTED.exists() or not machine.PROFILE.exists():
        return False
    return any((_BOOTED / each).resolve() != (machine.PROFILE / each).resolve() for each in _NEED_REBOOT)


def drift(memory: Memory) -> str:
    """How the machine differs from what was kept last, and from what is tried; "" when it does not, or none was."""
    if not memory.kept or not memory.text:
        return ""
    document = Desired.read(memory.text.encode())
    meant = {memory.kept}
    if memory.step != "finished":
        meant |= {document.system.path, memory.system, memory.profile}
    running, boots = machine.running(), machine.boots()
    if document.activation != "boot" and running not in meant:
        return f"it runs {running or 'nothing'}, and not {memory.kept}"
    if document.activation != "test" and boots not in meant:
        return f"it boots {boots or 'nothing'} next, and not {memory.kept}"
    return ""
