"""What may run at the same time: sandboxes by memory and cores, one roll-out a repo. Prefect keeps the count."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final
from uuid import UUID

import httpx
from prefect import get_client
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.client.schemas.objects import ConcurrencyLeaseHolder
from prefect.concurrency.asyncio import concurrency
from prefect.exceptions import ObjectNotFound
from prefect.logging import get_run_logger

from toto.base import files, paths, resources
from toto.ledger.ledger import owner, owner_lives

SANDBOXES: Final = "toto-sandboxes"
SANDBOX_MEMORY: Final = 2048  # MB: what one sandbox is counted as when the limit is first made
LEASE: Final = 60  # seconds, the shortest that Prefect grants: how long a dead holder can keep a slot
ON_SQLITE: Final = 4  # subflows at once: with more, Prefect's server answers 503
ON_POSTGRES: Final = 16  # as many as its server has connections to the database (5, and 10 in need); more would wait


async def _ensure(client: PrefectClient, name: str, limit: int) -> None:
    """Make a limit that is not there yet; one that the operator has set is left as it is."""
    if await _is_there(client, name):
        return
    # One at a time: of two that make it at once, one is an error in the server's log.
    async with paths.alone(paths.state_home() / "limits.lock"):
        if not await _is_there(client, name):
            await client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=limit))


async def _is_there(client: PrefectClient, name: str) -> bool:
    try:
        await client.read_global_concurrency_limit_by_name(name)
    except ObjectNotFound:
        return False
    return True


async def side_by_side() -> int:
    """How many subflows of a run may be under way at once: by the database of Prefect's server, which is asked."""
    with suppress(httpx.HTTPError, KeyError, TypeError, ValueError):
        async with get_client() as client:
            told = (await client.request("GET", "/admin/settings")).json()
        if str(told["server"]["database"]["driver"]).startswith("postgresql"):  # as toto.server.environment sets it
            return ON_POSTGRES
    return ON_SQLITE


@asynccontextmanager
async def room_for_sandbox() -> AsyncIterator[None]:
    """Wait until another sandbox may run: the limit `toto-sandboxes`, made from memory and cores at first."""
    async with get_client() as client:
        await _ensure(client, SANDBOXES, resources.at_once(SANDBOX_MEMORY))
    # A lease that could not be renewed is no reason to give a rehearsal up: at worst there is one VM too many.
    async with concurrency(SANDBOXES, strict=True, lease_duration=LEASE, raise_on_lease_renewal_failure=False):
        yield


@asynccontextmanager
async def one_roll_out(repo: Path, run: str) -> AsyncIterator[None]:
    """Hold the one roll-out slot of a repo, from the first machine touched to the end of a revert.

    The slot is Prefect's, on a lease that is renewed; so it comes back when the holder dies. A holder that
    provably died on this machine is not waited for: its lease, noted beside the repo's state, is given back.
    """
    directory = paths.repo_state(repo)
    name = f"toto-roll-out-{directory.name}"
    note = directory / "roll-out.json"
    logger = get_run_logger()
    async with get_client() as client:
        await _ensure(client, name, 1)
        waiting = False
        while (lease := await _acquire(client, name, run)) is None:
            if not waiting:
                logger.info("waiting: another run is rolling out")
                waiting = True
            await _release_dead(client, note)
            await asyncio.sleep(1)
        files.write(note, json.dumps({"lease": str(lease), "owner": owner(), "run": run}))
        renewing = asyncio.create_task(_renew(client, lease))
        try:
            yield
        finally:
            renewing.cancel()
            note.unlink(missing_ok=True)
            await asyncio.shield(_give_back(client, lease))


async def _acquire(client: PrefectClient, name: str, run: str) -> UUID | None:
    try:
        answer = await client.increment_concurrency_slots_with_lease(
            names=[name], slots=1, mode="concurrency", lease_duration=LEASE,
            holder=ConcurrencyLeaseHolder(type="flow_run", id=UUID(run)))
    except httpx.HTTPStatusError as error:
        if error.response.status_code == httpx.codes.LOCKED:
            return None
        raise
    return UUID(answer.json()["lease_id"])


async def _renew(client: PrefectClient, lease: UUID) -> None:
    while True:
        await asyncio.sleep(LEASE / 4)
        # A lease that cannot be renewed now may be at the next turn; one that is lost for good is fenced
        # off by the ledger, which takes no write for a target that another run has taken over.
        with suppress(httpx.HTTPError):
            await client.renew_concurrency_lease(lease_id=lease, lease_duration=LEASE)


async def _release_dead(client: PrefectClient, note: Path) -> None:
    with suppress(FileNotFoundError, ValueError, KeyError):
        held = json.loads(note.read_text())
        if owner_lives(held["owner"]) is False:
            await _give_back(client, UUID(held["lease"]))


async def _give_back(client: PrefectClient, lease: UUID) -> None:
    with suppress(httpx.HTTPError):
        await client.release_concurrency_slots_with_lease(lease_id=lease)
