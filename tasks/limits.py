"""Limits what runs at the same time: sandboxes by memory and cores, runs by repo and pusher, and one roll-out a repo.

Prefect counts.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
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

from toto.base import files, paths, resources, server_rules
from toto.ledger.ledger import owner, owner_lives

USER: Final = "user:"  # the tag of a run that names its pusher begins with it
SANDBOX_MEMORY: Final = 2048  # MB: what one sandbox counts as when the limit is created
LEASE: Final = 60  # seconds, the shortest that Prefect grants: a dead holder keeps its slot at most that long
ON_SQLITE: Final = 4  # subflows at once: with more, Prefect's server answers 503
ON_POSTGRES: Final = 16  # about as many as its server's database connections (5, and 10 in need); more would wait


async def _ensure(client: PrefectClient, name: str, limit: int) -> None:
    """Create a limit unless it exists, so that what an operator has set stays."""
    if await _is_there(client, name):
        return
    # One process at a time: if two created it at once, one would be an error in the server's log.
    async with paths.alone(paths.state_home() / "limits.lock"):
        if not await _is_there(client, name):
            await client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=limit))


async def _set(client: PrefectClient, name: str, limit: int) -> None:
    """Create a limit, or change it to what the server's rules say."""
    async with paths.alone(paths.state_home() / "limits.lock"):
        await client.upsert_global_concurrency_limit_by_name(name, limit)


async def _is_there(client: PrefectClient, name: str) -> bool:
    try:
        await client.read_global_concurrency_limit_by_name(name)
    except ObjectNotFound:
        return False
    return True


async def side_by_side() -> int:
    """How many subflows of a run may run at once. It depends on the database of Prefect's server."""
    with suppress(httpx.HTTPError, KeyError, TypeError, ValueError):
        async with get_client() as client:
            settings = (await client.request("GET", "/admin/settings")).json()
        if str(settings["server"]["database"]["driver"]).startswith("postgresql"):  # as toto.server.environment sets it
            return ON_POSTGRES
    return ON_SQLITE


@asynccontextmanager
async def room_for_sandbox() -> AsyncIterator[None]:
    """Hold one slot of the limit `toto-sandboxes`, which is created with a size that fits memory and cores."""
    async with get_client() as client:
        await _ensure(client, resources.SANDBOXES, resources.at_once(SANDBOX_MEMORY))
    # Do not give up a rehearsal when its lease cannot be renewed: at worst there is one VM too many.
    async with concurrency(
        resources.SANDBOXES, strict=True, lease_duration=LEASE, raise_on_lease_renewal_failure=False
    ):
        yield


@asynccontextmanager
async def room_for_run(
    repo: Path, run: str, tags: Sequence[str], while_waiting: Callable[[], Awaitable[None]]
) -> AsyncIterator[None]:
    """Hold a slot of the runs that the server's rules allow at once: of those of a pusher, and of those of a repo.

    `tags` are the run's, which name its pusher. `while_waiting` is called every second, and may raise to give up.
    """
    rules = server_rules.load().runs
    wanted = {f"toto-runs-of-{tag.removeprefix(USER)}": rules.per_pusher for tag in tags if tag.startswith(USER)}
    wanted[f"toto-runs-in-{paths.repo_state(repo).name}"] = rules.per_repo
    async with get_client() as client, AsyncExitStack() as held:
        waiting = False
        for name, limit in wanted.items():  # always in this order, so that no two runs wait for each other
            await _set(client, name, limit)
            while (lease := await _acquire(client, name, run)) is None:
                if not waiting:
                    get_run_logger().info("waiting: as many runs as the server's rules allow are at work")
                    waiting = True
                await while_waiting()
                await asyncio.sleep(1)
            await held.enter_async_context(_renewed(client, lease))
        yield


@asynccontextmanager
async def room_in_context(
    repo: Path, run: str, executors: Mapping[str, int], ahead: Callable[[], Sequence[str]]
) -> AsyncIterator[str]:
    """Hold a slot of the first context of jobs that has a free one, and yield its name.

    `executors` says of each context that will do how many runs may be in it at once, `ahead` which contexts those wait
    for whose turn is first.
    """
    place = f"toto-jobs-{paths.repo_state(repo).name}-"
    async with get_client() as client:
        for name, slots in executors.items():
            await _set(client, place + name, slots)
        while True:
            before = ahead()
            for name in executors:
                if name not in before and (lease := await _acquire(client, place + name, run)) is not None:
                    async with _renewed(client, lease):
                        yield name
                    return
            await asyncio.sleep(min(5, 1 + len(before) / 20))


@asynccontextmanager
async def locked(repo: Path, run: str, locks: Sequence[str]) -> AsyncIterator[None]:
    """Hold all these locks of a repo's jobs."""
    async with get_client() as client, AsyncExitStack() as held:
        for name in sorted(f"toto-lock-{paths.repo_state(repo).name}-{each}" for each in locks):
            await _set(client, name, 1)  # (sorted, so that no two runs wait for each other)
            lease = None
            while lease is None:
                if (lease := await _acquire(client, name, run)) is None:
                    await asyncio.sleep(1)
            await held.enter_async_context(_renewed(client, lease))
        yield


@asynccontextmanager
async def _renewed(client: PrefectClient, lease: UUID) -> AsyncIterator[None]:
    """Renew a lease to the end of the block, and then give it back."""
    renewing = asyncio.create_task(_renew(client, lease))
    try:
        yield
    finally:
        renewing.cancel()
        await asyncio.shield(_give_back(client, lease))


@asynccontextmanager
async def one_roll_out(repo: Path, run: str) -> AsyncIterator[None]:
    """Hold the only roll-out slot of a repo, from the first touched machine to the end of a revert.

    The slot is Prefect's, on a lease that is renewed, so it becomes free when its holder dies. When the holder
    certainly died on this machine, toto does not wait: it releases the lease, which is noted beside the repo's state.
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
                logger.info("waiting: a different run is rolling out")
                waiting = True
            await _release_dead(client, note)
            await asyncio.sleep(1)
        files.write(note, json.dumps({"lease": str(lease), "owner": owner(), "run": run}))
        async with _renewed(client, lease):
            try:
                yield
            finally:
                note.unlink(missing_ok=True)


async def _acquire(client: PrefectClient, name: str, run: str) -> UUID | None:
    try:
        answer = await client.increment_concurrency_slots_with_lease(
            names=[name],
            slots=1,
            mode="concurrency",
            lease_duration=LEASE,
            holder=ConcurrencyLeaseHolder(type="flow_run", id=UUID(run)),
        )
    except httpx.HTTPStatusError as error:
        if error.response.status_code == httpx.codes.LOCKED:
            return None
        raise
    return UUID(answer.json()["lease_id"])


async def _renew(client: PrefectClient, lease: UUID) -> None:
    while True:
        await asyncio.sleep(LEASE / 4)
        # A lease that cannot be renewed now may be renewed later. When it is lost for good, the ledger protects the
        # targets: it accepts no write for a target that a different run has taken over.
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
