"""What the agent knows of its machine, as Prometheus reads it: from a file, or from a port of loopback."""

import os
import select
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from flying_monkey import apart, durable
from flying_monkey.apart import User
from flying_monkey.machine import Configuration

_PREFIX: Final = "flying_monkey"
_SERVED: Final = Path("/run/flying-monkey/metrics.prom")
_ASKS: Final = 2.0  # seconds that a client may take
_MOST: Final = 8_192  # bytes of a request
_HELP: Final = {
    "up": "1 while the agent runs",
    "system_info": "the system that runs, is booted next, or is desired, by its store path",
    "serial": "the serial of the newest document that the machine obeys, or has been given",
    "contact_timestamp_seconds": "when toto answered last",
    "reports_waiting": "reports that toto has not got yet",
    "step_info": "the newest step of the newest update, and how it is",
    "failed": "1 when the newest update did not end well",
    "step_duration_seconds": "how long each step of the newest update took, as the agent saw it",
    "reboot_needed": "1 when a different kernel or initrd than the running one is booted next",
    "drift": "1 when the machine differs from what it was last told to be",
    "failed_units": "units that have failed",
    "hook_failed": "1 for each hook or check of the newest update that did not do well",
}


def text(state: Mapping[str, Any]) -> str:
    """The metrics of a state.

    `current` and `desired` are the serials; `running`, `boots` and `wanted` are store paths. `contact` is in seconds
    since 1970, `durations` in seconds by step. The others are the helper's words, as far as there are any.
    """
    lines: list[str] = []
    for name, help_ in _HELP.items():
        found = list(_values(name, state))
        if found:
            lines += [f"# HELP {_PREFIX}_{name} {help_}.", f"# TYPE {_PREFIX}_{name} gauge"]
            lines += [f"{_PREFIX}_{name}{_labels(labels)} {value:.15g}" for labels, value in found]
    return "\n".join([*lines, ""])


def write(file: Path, state: Mapping[str, Any]) -> None:
    """Replace `file` by the metrics of a state; everybody may read it. Raises OSError."""
    durable.write(file, text(state).encode(), 0o644)


def _values(name: str, state: Mapping[str, Any]) -> Iterator[tuple[dict[str, str], float]]:
    """The labels and values of one metric; none for what is not known."""
    match name:
        case "up":
            yield {}, 1
        case "system_info":
            kinds = {"running": "running", "boots": "boot", "wanted": "desired"}
            yield from (({"kind": kind, "path": str(state[key])}, 1) for key, kind in kinds.items() if state.get(key))
        case "serial":
            yield from (({"kind": key}, float(state[key])) for key in ("current", "desired") if key in state)
        case "contact_timestamp_seconds" if "contact" in state:
            yield {}, float(state["contact"])
        case "reports_waiting" if "waiting" in state:
            yield {}, float(state["waiting"])
        case "step_info" if "step" in state:
            yield {"step": str(state["step"]), "state": str(state.get("state", ""))}, 1
        case "failed" if "state" in state:
            yield {}, float(bool(state.get("error")) or state["state"] not in ("none", "running", "done 0"))
        case "step_duration_seconds":
            yield from (({"step": str(step)}, float(took)) for step, took in dict(state.get("durations", {})).items())
        case "reboot_needed" | "drift" if name in state:
            yield {}, float(bool(state[name]))
        case "failed_units" if isinstance(state.get("failed_units"), list):
            yield {}, float(len(state["failed_units"]))
        case "hook_failed":
            for kind in ("hooks", "checks"):
                found = state.get(kind)
                each = found.items() if isinstance(found, dict) else ()
                yield from (({"kind": kind, "name": str(hook)}, float(bool(said))) for hook, said in each)


def _labels(labels: Mapping[str, str]) -> str:
    if not labels:
        return ""
    escaped = (
        (name, value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ")) for name, value in labels.items()
    )
    return "{" + ",".join(f'{name}="{value}"' for name, value in escaped) + "}"


def place(configuration: Configuration) -> Path | None:
    """The file of a machine's metrics; None when nobody wants them."""
    if configuration.metrics:
        return Path(configuration.metrics)
    return _SERVED if configuration.metrics_port else None


def serve(configuration: Configuration, who: User | None) -> int:
    """Serve the file of the metrics on a port of loopback, from a child without rights, while this process lives.

    Returns what keeps it: a file that stays open. Raises OSError when the port is taken.
    """
    file = place(configuration)
    assert file is not None
    if file == _SERVED:
        file.parent.mkdir(mode=0o711, exist_ok=True)
        file.parent.chmod(0o711)
    listener = socket.create_server(("127.0.0.1", configuration.metrics_port))
    alive, kept = os.pipe()
    if os.fork() != 0:
        os.close(alive)
        listener.close()
        return kept
    try:
        os.close(kept)
        apart.become(who)
        while True:
            ready, _, _ = select.select([listener.fileno(), alive], [], [])
            if alive in ready:
                break
            _answer(listener, file)
    finally:
        os._exit(0)


def _answer(listener: socket.socket, file: Path) -> None:
    try:
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(_ASKS)
            connection.recv(_MOST)
            body = file.read_bytes()
            head = f"HTTP/1.0 200 OK\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)
    except OSError:
        pass
