"""`python -m blocks NAME…`: send a message to venues, to see that it arrives."""

import argparse
import asyncio
import sys

from blocks import venues
from toto.base.errors import TotoError
from toto.report.message import Message


async def main() -> int:
    """Send the message to each venue; the exit status, 1 when one of them failed."""
    parser = argparse.ArgumentParser("python -m blocks", description="Send a test message to venues.")
    parser.add_argument("names", nargs="+", metavar="NAME", help="as in toto.toml and machines.yaml")
    message = Message(repo="test", state="done", summary="this is only a test: toto's messages arrive here")
    status = 0
    for name in parser.parse_args().names:
        try:
            for venue in await venues.named(name):
                await venue.send(message)
            print(f"{name}: sent")
        except TotoError as error:
            print(error, file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
