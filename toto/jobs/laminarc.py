"""`laminarc`, for a job's scripts: asks toto, by a door out of the cell, for runs of the jobs of the same repo.

Usage: laminarc COMMAND [PARAMETERS...]
  queue JOB_LIST...     queues one or more runs
  start JOB_LIST...     the same, and waits until they have begun
  run JOB_LIST...       the same, and waits until they have ended
  set NAME=VALUE        sets a variable for the scripts of this run that come after this one
  abort JOB NUMBER      aborts a run; one that waits leaves the queue
  show-jobs             lists the jobs
  show-queued           lists the runs that wait
  show-running          lists the runs that have begun
JOB_LIST is JOB [NAME=VALUE]... [JOB [NAME=VALUE]...]..., and --next before a JOB puts its run before those that wait.

The exit status is 1 for bad usage, 2 when it could not be done, 3 when a run did not succeed. This file runs by itself,
with the standard library alone.
"""

import json
import os
import socket
import sys
from pathlib import Path

BAD_USAGE, NOT_DONE, RUN_FAILED = 1, 2, 3
DOOR = Path(__file__).with_name("door")


def main(words: list[str]) -> int:
    """Do what the words say; the exit status."""
    match words:
        case ["-h" | "--help"]:
            print(__doc__, end="")
            return 0
        case ["queue" | "start" | "run" as verb, *jobs] if jobs:
            return _queue(verb, jobs)
        case ["set", pair, *_] if "=" in pair:  # (laminar's takes the first one alone, too)
            name, _, value = pair.partition("=")
            return _told({"do": "set", "name": name, "value": value})
        case ["abort", job, number] if number.isascii() and number.isdecimal():
            return _told({"do": "abort", "job": job, "number": int(number)})
        case ["show-jobs" | "show-queued" | "show-running" as verb]:
            return _told({"do": verb})
    print(__doc__, end="", file=sys.stderr)
    return BAD_USAGE


def _queue(verb: str, words: list[str]) -> int:
    """Queue all that is asked for, then wait for each where that is asked for, too."""
    asked = []
    while words:
        first = words[0] == "--next"
        job, *rest = words[first:] or [""]
        if not job or "=" in job:
            return main([])
        count = next((place for place, word in enumerate(rest) if "=" not in word), len(rest))
        parameters = dict(word.split("=", 1) for word in rest[:count])
        words = rest[count:]
        asked.append({"do": verb, "job": job, "parameters": parameters, "next": bool(first)})
    status = 0
    for connection in [_send(each) for each in asked]:
        answer = _answer(connection)
        if "error" in answer:
            print(f"laminarc: {answer['error']}", file=sys.stderr)
            status = RUN_FAILED if verb == "run" else NOT_DONE
        for label, state in answer.get("runs", ()):
            print(label, flush=True)
            if verb == "run" and state != "success":
                status = RUN_FAILED
    return status


def _told(request: dict[str, object]) -> int:
    answer = _answer(_send(request))
    if "error" in answer:
        print(f"laminarc: {answer['error']}", file=sys.stderr)
        return NOT_DONE
    for line in answer.get("lines", ()):
        print(line)
    return 0


def _send(request: dict[str, object]) -> "socket.socket | str":
    """A connection on which the answer comes, or why there is none."""
    request["reason"] = os.environ.get("LAMINAR_REASON", "")
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(str(DOOR))
        connection.sendall(json.dumps(request).encode() + b"\n")
        connection.shutdown(socket.SHUT_WR)
    except OSError as error:
        return str(error)
    return connection


def _answer(connection: "socket.socket | str") -> dict:  # type: ignore[type-arg]
    if isinstance(connection, str):
        return {"error": f"toto does not answer: {connection}"}
    try:
        with connection, connection.makefile("rb") as answer:
            return json.loads(answer.read())  # type: ignore[no-any-return]
    except (OSError, ValueError):
        return {"error": "toto did not answer"}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
