"""The verbs of `activate.sh` for the agent: how it activates a system, outside of its own process.

What a verb leaves in `/run/toto/NAME` is read here; it is gone after a reboot.
"""

import os
from pathlib import Path
from typing import Final

from flying_monkey import machine

STATE: Final = Path("/run/toto")
RUN: Final = "monkey"  # the agent's activations have names that begin so
_SCRIPT: Final = Path(__file__).with_name("activate.sh")
_ON_MACHINE: Final = STATE / "activate.sh"
_PATIENCE: Final = 120.0  # seconds for a verb that waits for nothing
_MOST_LOG: Final = 16_384  # bytes of a log, its end


def begin(name: str, verb: str, path: str, before: tuple[str, str], finish: int, confirm: int) -> bool:
    """Begin an activation; False when a different tool activates. `before` is what to run and to boot after going back.

    `finish` and `confirm` are in seconds; with `confirm` 0 nothing goes back by itself. Raises `NotReady`.
    """
    return "busy" not in _script("begin", name, verb, path, *before, str(finish), str(confirm))


def has_begun(name: str) -> bool:
    """Whether the activation has a process of its own."""
    return bool(name) and (STATE / name / "begun").exists()


def is_decided(name: str) -> bool:
    """Whether an activation is confirmed, or goes back."""
    return (STATE / name / "decided").exists()


def is_confirmed(name: str) -> bool:
    """Whether somebody has stopped an activation's watchdog: a document, or root itself."""
    return (STATE / name / "confirmed").exists()


def has_died(name: str) -> bool:
    """Whether an activation's process, which is its watchdog, is gone."""
    try:
        process = int((STATE / name / "begun").read_text())
    except (OSError, ValueError):
        return False
    try:
        return name.encode() not in Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return True


def state(name: str) -> str:
    """`running`, `done N`, `back N` (exit statuses), or `unknown`."""
    folder = STATE / name
    for word, file in (("back", "back"), ("done", "status")):
        try:
            return f"{word} {int((folder / file).read_text())}"
        except (OSError, ValueError):
            continue
    return "running" if name and folder.is_dir() else "unknown"


def of_others() -> str:
    """The name of the newest activation that somebody else than the agent began; "" for none."""
    found = [each.parent for each in STATE.glob("*/path") if not each.parent.name.startswith(f"{RUN}.")]
    return max(found, key=lambda each: each.stat().st_mtime).name if found else ""


def path(name: str) -> str:
    """What an activation activates."""
    return (STATE / name / "path").read_text(errors="replace").strip()


def back(name: str) -> None:
    """Have the watchdog of an activation go back at once. Raises `NotReady`."""
    _script("back", name)


def back_all() -> None:
    """The same for every activation that is not decided, whoever began it: each holds up the next."""
    for file in STATE.glob("*/begun"):
        if not is_decided(file.parent.name):
            back(file.parent.name)


def confirm(name: str) -> bool:
    """Stop the watchdog of an activation; False when it has gone back. Raises `NotReady`."""
    return _script("confirm", name).strip() == "confirmed"


def confirm_all(path: str) -> None:
    """Stop every watchdog that would go back from `path`, whoever began the activation. Raises `NotReady`."""
    for file in STATE.glob("*/path"):
        if file.read_text(errors="replace").strip() == path:
            confirm(file.parent.name)


def broken() -> tuple[str, ...]:
    """The units that failed, or are started again and again. Raises `NotReady`."""
    return tuple(_script("broken").split())


def log(name: str) -> str:
    """The end of what an activation said."""
    try:
        return (STATE / name / "log").read_bytes()[-_MOST_LOG:].decode(errors="replace") if name else ""
    except OSError:
        return ""


def clean_up() -> None:
    """Remove the agent's files of activations, once none is under way. Raises `NotReady`."""
    _script("clean-up", RUN)


def _script(*words: str) -> str:
    """What a verb of `activate.sh` says."""
    STATE.mkdir(mode=0o700, exist_ok=True)
    fresh = STATE / f".activate.sh.{os.getpid()}"
    fresh.write_bytes(_SCRIPT.read_bytes())
    fresh.replace(_ON_MACHINE)
    return machine.run("/bin/sh", str(_ON_MACHINE), *words, longest=_PATIENCE)
