"""Measures the ledger with 1,000 targets, beside one with ten."""

import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

from bench.row import Row
from tests.ledger.test_ledger import deployed, note
from tests.repos import InfraRepo, git
from toto.ledger import ledger, steps
from toto.ledger.ledger import Ledger
from toto.ledger.target import Target

MANY: Final = 1_000
FEW: Final = 10
_TIMES: Final = 10


async def measure(folder: Path) -> AsyncIterator[Row]:
    """The rows: the first reading, a write, one entry, and the reading after a write."""
    many, few = [await _taken(folder / str(count), count) for count in (MANY, FEW)]
    for what, ours in many.items():
        yield Row(f"the ledger of {MANY} targets, {what}", ours, f"that of {FEW}", few[what])


async def _taken(folder: Path, count: int) -> dict[str, list[float]]:
    repo, took = InfraRepo(folder), dict[str, list[float]]()
    entry = json.dumps({"good": json.loads(deployed("/nix/store/x").model_dump_json())})
    commit = repo.commit({f"host/web{number}.json": entry for number in range(count)})
    git("update-ref", ledger.REF, commit, cwd=repo.bare)
    book, web1 = Ledger(repo.bare), Target("host", "web1")

    def note_time(what: str, began: float) -> float:
        took.setdefault(what, []).append(time.monotonic() - began)
        return time.monotonic()

    began = time.monotonic()
    book.read()
    note_time("first reading", began)
    for number in range(_TIMES):
        began = time.monotonic()
        await book.write(web1, steps.not_reached(note(f"run-{number}")), "web1: unreachable")
        began = note_time("a write", began)
        book.get(web1)
        began = note_time("one entry", began)
        book.read()
        began = note_time("after a write", began)
    return took
