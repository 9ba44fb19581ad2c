"""Toto's own parsers on a huge text beside one half as long: a ratio of 2 is linear, one of 4 is a fault."""

import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Final

from bench.row import Row
from toto.rehearsal import tap
from toto.terraform.hcl import modules

ROUNDS: Final = 3
HUGE: Final = 500_000  # characters; the other is twice that

# Each is repeated up to the length. What opens and never closes is where a parser looks ahead in vain.
HCL: Final = {"heredocs": "<<A\n", "heredocs on one line": "<<A ", "comments": "/*", "templates": '"${', "blocks": "{"}
TAP: Final = {"tests": "ok - a # SKIP x\n  ---\n  a: b\n  ...\n", "yaml without end": "  a\n"}
BEFORE: Final = {"yaml without end": "ok 1\n  ---\n"}


async def measure(_: Path) -> AsyncIterator[Row]:
    """A row for each kind of text."""
    for name, text in HCL.items():
        yield _row(f"a .tf file: {name}", text, lambda text: list(modules(text)))
    for name, text in TAP.items():
        yield _row(f"TAP: {name}", text, tap.parse, BEFORE.get(name, ""))


def _row(what: str, text: str, parse: Callable[[str], object], before: str = "") -> Row:
    row = Row(f"{what}, {2 * HUGE // 1000} kB", [], "half of it", [])
    for _ in range(ROUNDS):
        for times, length in ((row.others, HUGE), (row.values, 2 * HUGE)):
            whole = before + text * (length // len(text))
            began = time.monotonic()
            parse(whole)
            times.append(time.monotonic() - began)
    return row
