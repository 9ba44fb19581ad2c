"""The login shell of toto's user on a machine: a few verbs, and nothing else.

sshd starts it as `gate -c COMMAND`. It compares the whole command with what it knows, takes nothing of it apart, and
hands a request to the helper, which sudo runs as root without arguments. Documents come on standard input.
"""

import json
import os
import re
import subprocess
import sys
from typing import Final, NoReturn

from flying_monkey.machine import Configuration, Misconfigured

WRITE: Final = "nix-store --serve --write"  # what nix-copy-closure and ssh:// send
MOST: Final = 200_000  # bytes of a document
_PATH: Final = "/run/wrappers/bin:/run/current-system/sw/bin:/usr/bin:/bin"
_PLAIN: Final = {"facts", "log"}
_DOCUMENTS: Final = {"arm", "confirm"}
_STATUS: Final = re.compile(r"status ([0-9]{1,2})", re.ASCII)


def main() -> None:
    """Do what the command says."""
    for name in list(os.environ):
        del os.environ[name]
    os.environ.update({"PATH": _PATH, "LANG": "C.UTF-8", "HOME": "/var/empty"})
    try:
        configuration = Configuration.load()
    except Misconfigured as error:
        _refuse(str(error))
    match sys.argv[1:]:
        case ["-c", str(command)] if command == WRITE and configuration.writable_store:
            os.execvp("nix-store", WRITE.split())  # noqa: S606
        case ["-c", str(command)] if (request := _request(command)) is not None:
            done = subprocess.run(
                ["sudo", "-n", "--", configuration.helper], input=json.dumps(request).encode(), check=False
            )
            raise SystemExit(done.returncode)
    _refuse()


def _request(command: str) -> dict[str, object] | None:
    """The helper's request that a command stands for; None for any other command."""
    if command in _PLAIN:
        return {"verb": command}
    if command in _DOCUMENTS:
        text = sys.stdin.buffer.read(MOST + 1)
        if len(text) > MOST:
            _refuse(f"a document has at most {MOST} bytes")
        return {"verb": command, "envelope": text.decode(errors="replace")}
    if found := _STATUS.fullmatch(command):
        return {"verb": "status", "wait": int(found[1])}
    return None


def _refuse(why: str = "this user can do: facts, status SECONDS, arm, confirm, log") -> NoReturn:
    sys.stderr.write(f"flying-monkey: {why}\n")
    raise SystemExit(64)
