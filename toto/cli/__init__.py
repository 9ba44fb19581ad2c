"""The command `toto`, one module a group of verbs; `toto.cli.verbs` lists them.

`toto.cli.about` has the exit statuses.
"""

import os
import signal
import sys
from typing import NoReturn

from toto.base.errors import TotoError
from toto.cli.failure import tell


def main() -> NoReturn:
    """The console script."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        del os.environ[name]  # they may name a hook's repository and quarantine, and GitPython would use them
    words = sys.argv[1:]
    try:
        try:
            sys.exit(_run(words))
        finally:
            sys.stdout.flush()
    except TotoError as error:
        sys.exit(tell(words, error.message, target=error.target, hint=error.hint))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `toto log | head`: whoever reads has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # (Python flushes once more as it ends)
        sys.exit(128 + signal.SIGPIPE)


def _run(words: list[str]) -> int:
    # Each imports only what its verb needs: some run for months, and one as root.
    match words:
        case ["serve", *rest]:
            from toto.server import serve  # noqa: PLC0415

            return serve.main(rest)
        case ["nix-daemon", *rest]:
            from toto.nix import daemon  # noqa: PLC0415

            return daemon.main(rest)
    from toto.cli import verbs  # noqa: PLC0415

    if os.environ.get("TOTO_URL") and words[:1] and words[0] in verbs.OVER_SSH and not {"-h", "--help"} & {*words}:
        from toto.cli import remote  # noqa: PLC0415

        remote.over_ssh(words)
    return verbs.run(words)
