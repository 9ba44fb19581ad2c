"""`python -m tests.lab setup`, and `python -m tests.lab machine NAME --dir D --key K --address A`."""

import argparse
import asyncio
import signal
import sys
import time
from pathlib import Path

from tests.lab.machine import SSH_PORT, Machine
from tests.lab.setup import setup


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.lab", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("setup", help="make the lab's <nixpkgs> and print where it is")
    machine = verbs.add_parser("machine", help="run a machine in the foreground until Ctrl-C")
    machine.add_argument("name")
    machine.add_argument("--dir", type=Path, required=True, help="disk, console log; kept")
    machine.add_argument("--key", type=Path, required=True, help="private key that logs in; its .pub lies beside it")
    machine.add_argument("--address", default="127.0.1.1", help="loopback address of this machine's own")
    machine.add_argument("--port", type=int, action="append", help="further port to forward (default 8080)")
    arguments = parser.parse_args()
    if arguments.verb == "setup":
        begin = time.monotonic()
        print(setup())
        print(f"the lab is ready ({time.monotonic() - begin:.1f} s)", file=sys.stderr)
    else:
        asyncio.run(
            foreground(
                Machine(
                    arguments.name,
                    arguments.dir,
                    arguments.key,
                    address=arguments.address,
                    ports=arguments.port or (8080,),
                )
            )
        )


async def foreground(machine: Machine) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    begin = time.monotonic()
    async with machine:
        print(f"{machine.name} answers at {machine.address}:{SSH_PORT} ({time.monotonic() - begin:.1f} s)", flush=True)
        await stop.wait()
        await machine.stop()


if __name__ == "__main__":
    main()
