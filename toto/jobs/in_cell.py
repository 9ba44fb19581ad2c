"""Becomes a job's script, in its cell: `in_cell.py ENVIRONMENT SCRIPT [ARGUMENT]...`.

ENVIRONMENT is a file with the variables, as JSON: what is pushed must not be in the environment of the programs that
make the cell. This file runs by itself, with the standard library alone.
"""

import json
import os
import signal
import sys


def main() -> int:
    place, script, *arguments = sys.argv[1:]
    with open(place, encoding="utf-8") as file:  # noqa: PTH123
        environment = json.load(file)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # which Python ignores
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvpe(script, [script, *arguments], environment)  # noqa: S606
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        print(f"[toto] {script} could not be started: {why}{_advice(script)}", file=sys.stderr)
    return 126


def _advice(script: str) -> str:
    try:
        with open(script, "rb") as file:  # noqa: PTH123
            first = file.readline(256)
    except OSError:
        return "" if "/" in script else "; it is not on the PATH of the cell"
    if not os.access(script, os.X_OK):
        return "; make it executable (chmod +x)"
    if not first.startswith(b"#!"):
        return "; begin it with `#!/bin/sh` or `#!/usr/bin/env bash`"
    if first.rstrip(b"\n").endswith(b"\r"):
        return "; its first line ends like a DOS file's (CR LF): save it with plain line ends"
    return "; its interpreter is not in its cell: use one of /usr or of the nix store"


if __name__ == "__main__":
    sys.exit(main())
