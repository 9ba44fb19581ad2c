"""The one thing that runs as root for toto's user: it acts on a signed document, or says how things are.

A request is JSON on standard input, `{"verb": …}`; the answer is JSON on standard output, with `error` where it was
refused. There are no arguments and no words of the environment's.

    facts             who the machine is, what it runs and boots, what it remembers
    arm ENVELOPE      obey a document of phase `try` or `back`
    confirm ENVELOPE  obey one of phase `keep`: toto's own tests have passed
    status WAIT       how the newest update is, after up to so many seconds
    log               what it said
    test ARGV         run a command as a user that may do nothing here; what follows the request's line is its input

See `flying_monkey.update` for what is done with a document, and `flying_monkey.sandbox` for a test.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

from flying_monkey import activation, health, hooks, machine, sandbox, signature, update
from flying_monkey.desired import BadDocument, Desired, Phase
from flying_monkey.machine import Configuration, Misconfigured, NotReady
from flying_monkey.memory import Lost, Memory, Refused

MOST: Final = 300_000  # bytes of a request
_WAIT: Final = 60  # seconds that a status may wait
_TICK: Final = 0.2  # seconds between two looks
_UNITS: Final = 50  # that are told
_LOG: Final = 2_000  # characters of an activation by others
_AGAIN: Final = 3.0  # seconds between two looks at whether anybody is at it
_PHASES: Final[dict[str, tuple[Phase, ...]]] = {"arm": ("try", "back"), "confirm": ("keep",)}

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
        request = _request(sys.stdin.buffer.readline(MOST + 1))
        if request["verb"] == "test":
            raise SystemExit(sandbox.run(Configuration.load(), request.get("argv")))
        said = answer(request)
    except (sandbox.NotRun, Misconfigured) as error:
        sys.stderr.write(f"flying-monkey: {error}\n")
        raise SystemExit(sandbox.NOT_RUN) from None
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
    memory = Memory.load(Path(configuration.memory))
    match request:
        case {"verb": "facts"}:
            return _facts(configuration, memory)
        case {"verb": "status", "wait": int(wait)}:
            return _status(configuration, min(max(wait, 0), _WAIT))
        case {"verb": "log"}:
            return {"log": update.log(configuration, memory)}
        case {"verb": "arm" | "confirm" as verb, "envelope": str(envelope)}:
            memory = update.arm(configuration, envelope.encode(), _PHASES[verb])
            return {"serial": memory.serial, "step": memory.step}
    raise BadRequest("no such verb, or not with these words")


def _facts(configuration: Configuration, memory: Memory) -> Answer:
    running, boots = machine.running(), machine.boots()
    hashes = {path: machine.nar_hash(path) for path in {running, boots}}
    return {
        "repo": configuration.repo,
        "name": configuration.name,
        "host_keys": configuration.public_keys(),
        "system": running,
        "nar_hash": hashes[running],
        "profile": boots,
        "profile_hash": hashes[boots],
        "boot": machine.boot(),
        "serial": memory.serial,
        "issued": memory.issued,
        "step": memory.step,
        **_by_others(),
        **_condition(configuration, memory),
    }


def _by_others() -> Answer:
    """How the newest activation ends that was not begun by a document, such as one by sudo that brought this helper."""
    if not (name := activation.of_others()):
        return {}
    found = {"path": activation.path(name), "state": activation.state(name), "log": activation.log(name)[-_LOG:]}
    return {"activated": found}


def _status(configuration: Configuration, wait: int) -> Answer:
    """How the newest update is; one that is `running` is waited for to change, for up to so many seconds.

    The state is `none`, `running`, `done N` (it is tried, and to be kept; or all is finished) or `back N`.
    """
    file, end = Path(configuration.memory), time.monotonic() + wait
    update.go_on(configuration)  # whoever was to do it may have been killed
    memory = first = Memory.load(file)
    looked = time.monotonic()
    while _state(memory) == "running" and memory.step == first.step:
        if time.monotonic() > looked + _AGAIN:
            update.go_on(configuration)
            looked = time.monotonic()
        if time.monotonic() > end:
            break
        time.sleep(_TICK)
        memory = Memory.load(file)
    complaint = update.COMPLAINT.read_text(errors="replace") if update.COMPLAINT.exists() else ""
    optional = {"error": memory.error or complaint, "hooks": dict(memory.hooks), "checks": dict(memory.checks)}
    return {
        "serial": memory.serial,
        "phase": Desired.read(memory.text.encode()).phase if memory.text else "",
        "step": memory.step,
        "state": _state(memory),
        "system": machine.running(),
        "boots": machine.boots(),
        **{name: value for name, value in optional.items() if value},
        **_condition(configuration, memory),
    }


def _state(memory: Memory) -> str:
    """After a reboot what was begun is yet to be settled."""
    return memory.state if memory.step == "finished" or memory.boot == machine.boot() else "running"


def _condition(configuration: Configuration, memory: Memory) -> Answer:
    """What the operator should know of a machine, whatever is done with it."""
    return {
        "failed_units": list(activation.broken())[:_UNITS],
        "reboot_needed": health.reboot_needed(),
        "drift": health.drift(memory),
        "signers": signature.listed(Path(configuration.signers)),
        "has_hooks": {each: hooks.names(f"{each}.d") for each in ("prepare", "finish")},
    }
