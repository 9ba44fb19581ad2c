"""The one thing that runs as root for toto's user: it acts on a signed document, or says how things are.

A request is JSON on standard input, `{"verb": …}`; the answer is JSON on standard output, with `error` where it was
refused. There are no arguments and no words of the environment's.

    facts             who the machine is, what it runs and boots, what it remembers
    arm ENVELOPE      obey a document of phase `try` or `back`
    confirm ENVELOPE  obey one of phase `keep`: toto's own tests have passed
    status WAIT       how the newest activation is, after up to so many seconds
    log               what it said

What is activated, and the way back when nobody confirms, is `activate.sh`, as in a deployment by sudo.
"""

import fcntl
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from flying_monkey import machine, signature
from flying_monkey.desired import BadDocument, Desired
from flying_monkey.machine import Configuration, Misconfigured, NotReady
from flying_monkey.memory import Lost, Memory, Refused, Step

MOST: Final = 300_000  # bytes of a request
_SCRIPT: Final = Path(__file__).with_name("activate.sh")
_ON_MACHINE: Final = Path("/run/toto/activate.sh")
_WAIT: Final = 60  # seconds that a status may wait
_PATIENCE: Final = 120.0  # seconds for a verb of the script that waits for nothing
_PHASES: Final = {"arm": ("try", "back"), "confirm": ("keep",)}

Answer = dict[str, Any]


class BadRequest(Exception):
    """A request that this helper does not know."""


def main() -> None:
    """Answer the request on standard input."""
    if len(sys.argv) > 1 or os.geteuid() != 0:
        raise SystemExit("it takes no arguments, and is root's")
    os.umask(0o077)
    for name in list(os.environ):
        del os.environ[name]
    os.environ.update(machine.environment())
    os.chdir("/")
    try:
        said = answer(_request(sys.stdin.buffer.read(MOST + 1)))
    except BadRequest as error:
        said = _refused(error)
    sys.stdout.write(json.dumps(said) + "\n")


def answer(request: dict[str, Any]) -> Answer:
    """The answer to a request, by this process, which is root's. It never raises: see `error` and `kind`."""
    try:
        return _answer(request)
    except (BadRequest, BadDocument, Refused, Lost, Misconfigured, NotReady, signature.NotGenuine) as error:
        return _refused(error)
    except (OSError, subprocess.SubprocessError) as error:
        return {"error": str(error), "kind": "Broken"}
    except Exception as error:  # whoever asks goes on living
        return {"error": f"{type(error).__name__}: {error}", "kind": "Broken"}


def _refused(error: Exception) -> Answer:
    return {"error": str(error), "kind": type(error).__name__}


def _request(text: bytes) -> dict[str, Any]:
    if len(text) > MOST:
        raise BadRequest(f"a request has at most {MOST} bytes")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise BadRequest("a request is JSON") from None
    if not isinstance(found, dict) or not isinstance(found.get("verb"), str):
        raise BadRequest("a request has a verb")
    return found


def _answer(request: dict[str, Any]) -> Answer:
    configuration = Configuration.load()
    memory_file = Path(configuration.memory)
    match request:
        case {"verb": "facts"}:
            return _facts(configuration, Memory.load(memory_file))
        case {"verb": "status", "wait": int(wait)}:
            return _status(Memory.load(memory_file), min(max(wait, 0), _WAIT))
        case {"verb": "log"}:
            memory = Memory.load(memory_file)
            return {"log": _script("result", memory.activation, "0").partition("\n")[2] if memory.activation else ""}
        case {"verb": "arm" | "confirm" as verb, "envelope": str(envelope)}:
            memory_file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with (memory_file.parent / "lock").open("w") as lock:  # one document after the other
                fcntl.flock(lock, fcntl.LOCK_EX)
                return _obey(configuration, memory_file, envelope.encode(), _PHASES[verb])
    raise BadRequest("no such verb, or not with these words")


def _facts(configuration: Configuration, memory: Memory) -> Answer:
    return {
        "repo": configuration.repo,
        "name": configuration.name,
        "host_keys": configuration.public_keys(),
        "system": machine.running(),
        "nar_hash": machine.nar_hash(machine.running()),
        "profile": machine.boots(),
        "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        "serial": memory.serial,
        "issued": memory.issued,
        "step": memory.step,
    }


def _status(memory: Memory, wait: int) -> Answer:
    """How the newest activation is: `none`, `running`, `done N`, `back N` (an exit status), or `unknown` (rebooted)."""
    state = _script("result", memory.activation, str(wait)).partition("\n")[0] if memory.activation else "none"
    return {"serial": memory.serial, "step": memory.step, "state": state, "system": machine.running()}


def _obey(configuration: Configuration, file: Path, envelope: bytes, phases: tuple[str, ...]) -> Answer:
    before = Memory.load(file)
    now = before.now(time.time(), configuration.built)
    revoked = None if configuration.revoked is None else Path(configuration.revoked)
    text = signature.opened(envelope, configuration.repo, Path(configuration.signers), now, revoked)
    document = Desired.read(text)
    if document.phase not in phases:
        raise Refused(f"its phase is {document.phase}")
    memory = before.accept(document, configuration.repo, configuration.name, configuration.public_keys(), now)
    if memory == before and memory.step != "accepted":
        return {"serial": memory.serial, "step": memory.step}  # said before, and begun
    machine.check(document.system)
    step: Step
    match document.phase:
        case "try":
            step, verb, confirm = "tried", _tried(document), document.deadlines.confirm
        case "back":
            step, verb, confirm = "back", document.activation, 0
        case "keep":
            step, verb, confirm = "kept", document.activation, 0
            _keep(before, document)
    name = f"monkey.{document.phase}.{document.serial}"
    replace(memory, step=step, activation=name).save(file)
    good = document.good.path if document.good else machine.running()
    boots = document.good.path if document.good else machine.boots()
    finish = str(document.deadlines.activate)
    if before.activation and document.phase == "back":
        _script("back", before.activation)
    said = _script("begin", name, verb, document.system.path, good, boots, finish, str(confirm))
    if "busy" in said:
        before.save(file)
        raise NotReady("another tool activates something on this machine just now")
    return {"serial": document.serial, "step": step}


def _tried(document: Desired) -> str:
    """How a system is tried: what is to be booted only is not activated before."""
    return "boot" if document.activation == "boot" else "test"


def _keep(memory: Memory, document: Desired) -> None:
    """Stop the watchdog of what is tried. Raises `NotReady` when it has gone back, or when something else runs."""
    if memory.activation:
        said = _script("confirm", memory.activation).strip()
        if said not in ("confirmed", "unknown"):
            raise NotReady("it was not confirmed in time, and the machine has gone back")
    if document.activation != "boot" and machine.running() != document.system.path:
        raise NotReady(f"this machine runs {machine.running()}, and not {document.system.path}")


def _script(*words: str) -> str:
    """What a verb of `activate.sh` says."""
    _ON_MACHINE.parent.mkdir(mode=0o700, exist_ok=True)
    fresh = _ON_MACHINE.with_name(f".{_ON_MACHINE.name}.{os.getpid()}")
    fresh.write_bytes(_SCRIPT.read_bytes())
    fresh.replace(_ON_MACHINE)
    return machine.run("/bin/sh", str(_ON_MACHINE), *words, longest=_PATIENCE)
