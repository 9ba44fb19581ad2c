"""Documents of machines that pull are renewed before they expire, so that one which asks anew finds its last good.

A renewed document says "back to the last good, if that is not what you kept last": so it changes nothing that a person
has changed by hand since, and a machine that was installed anew, or was away for long, goes there. While a run works on
a machine, its document is the run's.
"""

import asyncio
import logging
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from flying_monkey.desired import BadDocument, Desired
from flying_monkey.signature import NotGenuine, unsealed
from toto.base.errors import TotoError
from toto.ledger.ledger import Ledger
from toto.ledger.target import HOST, Target
from toto.machine import documents, signer

log = logging.getLogger(__name__)

EVERY: Final = 3_600.0  # seconds between two looks


async def keep_up(repos: Path) -> None:
    """Renew what is due, for ever."""
    while True:
        await asyncio.sleep(EVERY)
        await renew(repos.glob("*.git"), datetime.now(UTC))


async def renew(repos: Iterable[Path], now: datetime) -> list[str]:
    """Renew the documents that expire within half of their time, or lead away from the last good; whose they are."""
    done = []
    for repo in repos:
        try:
            places = documents.machines(repo)
            ledger = Ledger(repo).read() if places else None
        except (TotoError, OSError) as error:
            log.warning("%s: documents cannot be renewed: %s", repo.name, error)
            continue
        for place in places:
            entry = ledger.get(Target(HOST, place.machine)) if ledger else None
            if entry is None or entry.good is None or entry.intent is not None:
                continue
            try:
                if await _renewed(repo, place, getattr(entry.good, "path", None), now):
                    done.append(place.machine)
            except (TotoError, NotGenuine, BadDocument, OSError) as error:
                log.warning("%s: its document cannot be renewed: %s", place.machine, error)
    return done


async def _renewed(repo: Path, place: documents.Place, good: str | None, now: datetime) -> bool:
    """Renew a machine's document if it is due; whether it was. Raises `NotSigned`, `NotGenuine`, `BadDocument`."""
    if (envelope := documents.published(place)) is None:
        return False
    old = Desired.read(unsealed(envelope)[0])
    if old.expires - now > signer.VALID / 2 and old.system.path == good:
        return False
    documents.publish(repo, place.machine, await signer.ask(resting(repo, old)))
    return True


def resting(repo: Path, old: Desired) -> signer.Request:
    """What is asked of the signer for a machine on which no run works; the rest is as in its `old` document."""
    return signer.Request(
        repo=str(repo),
        machine=old.machine.name,
        phase="back",
        activation=old.activation,
        reported=old.serial,
        activate=old.deadlines.activate,
        prepare=old.hooks.prepare,
        finish=old.hooks.finish,
        resting=True,
    )
