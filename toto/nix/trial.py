"""A build of next to nothing, to see whether a build works at all: here, or on a builder."""

import time

from toto.base import process
from toto.nix.commands import BuildFailed, environment


async def build(system: str = "", *, builder: str | None = None, timeout: float = 60) -> str:
    """Build for a system (default: this machine's), and return what was built.

    With `builder`, that builder has to build it; nix obeys that for root alone.
    Raises `BuildFailed`, `CommandTimeout` after `timeout` seconds, `DaemonFailed`.
    """
    chosen = f'"{system}"' if system else "builtins.currentSystem"
    expression = (
        f'derivation {{ name = "toto-doctor"; now = "{time.time_ns()}"; system = {chosen}; builder = "/bin/sh"; '
        'args = [ "-c" "echo ok > $out" ]; }'
    )
    made = await process.run(["nix-instantiate", "--expr", expression], env=environment(), timeout=timeout)
    words = ["nix-store", "--realise", made.stdout.strip()]
    if builder is None:
        words += ["--builders", ""]
    else:
        words += ["--max-jobs", "0", "--builders", f"ssh://{builder} {system} - 1 1 - - -"]
    try:
        return (await process.run(words, env=environment(), timeout=timeout)).stdout.strip()
    except process.CommandFailed as error:
        raise BuildFailed(process.tail(error.tail, 3), target=system or None, transient=False) from None
