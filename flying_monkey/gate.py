"""The login shell of toto's user on a machine: a few verbs, and nothing else.

sshd starts it as `gate -c flying-monkey`, by its ForceCommand, with the command in the environment: so no subsystem is
there that sshd runs by itself, such as `internal-sftp`. Without that it would be `gate -c COMMAND`. The gate compares
the whole command with what it knows, takes nothing of it apart, and hands a request to the helper, which sudo runs as
root without arguments. Documents come on standard input.
"""

import base64
import json
import os
import re
import subprocess
import sys
import threading
from typing import Final, NoReturn

from flying_monkey.machine import Configuration, Misconfigured
from flying_monkey.sandbox import MOST_INPUT, pump

FORCED: Final = "flying-monkey"
WRITE: Final = "nix-store --serve --write"  # what nix-copy-closure and ssh:// send
MOST: Final = 200_000  # bytes of a document
_PATH: Final = "/run/wrappers/bin:/run/current-system/sw/bin:/usr/bin:/bin"
_PLAIN: Final = {"facts", "log"}
_DOCUMENTS: Final = {"arm", "confirm"}
_STATUS: Final = re.compile(r"status ([0-9]{1,2})", re.ASCII)
_TEST: Final = re.compile(r"test ([A-Za-z0-9_-]{2,40000})={0,2}", re.ASCII)


def main() -> None:
    """Do what the command says."""
    words, asked = sys.argv[1:], os.environ.get("SSH_ORIGINAL_COMMAND", "")
    for name in list(os.environ):
        del os.environ[name]
    os.environ.update({"PATH": _PATH, "LANG": "C.UTF-8", "HOME": "/var/empty"})
    try:
        configuration = Configuration.load()
    except Misconfigured as error:
        _refuse(str(error))
    match ["-c", asked] if words == ["-c", FORCED] else words:
        case ["-c", str(command)] if command == WRITE and configuration.writable_store:
            os.execvp("nix-store", WRITE.split())  # noqa: S606
        case ["-c", str(command)] if found := _TEST.fullmatch(command):
            _test(configuration, found[1])
        case ["-c", str(command)] if (request := _request(command)) is not None:
            done = subprocess.run(
                [configuration.sudo, "-n", "--", configuration.helper], input=json.dumps(request).encode(), check=False
            )
            raise SystemExit(done.returncode)
    _refuse()


def _test(configuration: Configuration, words: str) -> NoReturn:
    """Have the helper run a command, with our input and outputs; its exit status is ours."""
    if not configuration.tests:
        _refuse("this machine runs no tests")
    try:
        argv = json.loads(base64.urlsafe_b64decode(words + "=" * (-len(words) % 4)))
    except (ValueError, RecursionError):
        _refuse("a test is a list of words: JSON, in base 64 for URLs")
    with subprocess.Popen([configuration.sudo, "-n", "--", configuration.helper], stdin=subprocess.PIPE) as helper:
        assert helper.stdin is not None
        line = json.dumps({"verb": "test", "argv": argv}).encode() + b"\n"
        threading.Thread(target=pump, args=(0, helper.stdin, MOST_INPUT, line), daemon=True).start()
        raise SystemExit(helper.wait())


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


def _refuse(why: str = "this user can do: facts, status SECONDS, arm, confirm, log, test") -> NoReturn:
    sys.stderr.write(f"flying-monkey: {why}\n")
    raise SystemExit(64)
