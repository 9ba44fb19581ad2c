"""Finds faults in the logs of toto's own processes, and knows the few errors that are harmless.

The logs are those of server, worker, runs (the fork server), database and `toto serve` itself, and what a hook prints
to a pusher. What a run logs about a target that fails is not a fault: it is the run's result.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Known:
    """Log entries that match `pattern` are harmless, for the `reason`."""

    pattern: str
    reason: str


KNOWN: Final = (
    Known(
        r"\| ERROR +\| (Flow|Task) run ['\"][^\n]* - ",
        "a target that fails says so in its run: that is the run's result",
    ),
    Known(
        r"prefect\.engine - Crash detected! Execution was (cancelled by|aborted by a termination signal)",
        "a run was cancelled, or toto was stopped during the run: the run's state says so",
    ),
    Known(
        r"Error emitting event: prefect\.flow-run\.heartbeat\s|RuntimeError: Cannot put items in a stopped service",
        "a run's last heartbeat may come as the run ends",
    ),
    Known(
        r"FATAL:  terminating connection due to administrator command",
        "PostgreSQL is stopped while a connection of a client that has ended is not yet closed",
    ),
)
# An entry begins with a time, a level or a program's name, and goes on until the next one.
_HEAD: Final = re.compile(
    r"(?m)^(?=\d\d:\d\d:\d\d\.\d{3} \| |\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\S* |toto: |"
    r"(?:DEBUG|INFO|WARNING|ERROR|CRITICAL): |Traceback \(most recent call last\))"
)
_FAULT: Final = re.compile(
    r"\A[\d:.]+ \| (?:ERROR|CRITICAL) |\A(?:ERROR|CRITICAL): |\Atoto: error: |"
    r"\A\d{4}-\d\d-\d\d [^\n]*\] (?:ERROR|FATAL|PANIC): |"
    r"(?m:^Traceback \(most recent call last\))|never retrieved|never awaited|Exception ignored in|"
    r"database is locked|dead letter queue"
)


def faults(text: str) -> Iterator[str]:
    """The entries of a log that somebody should check: errors, tracebacks, lost events; without those in `KNOWN`."""
    text = re.sub(r"(?m)^remote: ", "", text)  # git puts it before each line that a hook prints
    for entry in _HEAD.split(text):
        if _FAULT.search(entry) and not any(re.search(known.pattern, entry, re.S) for known in KNOWN):
            yield entry.rstrip("\n")
