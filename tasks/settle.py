"""What a dead run left open in the ledger, and taking it over."""

import calendar
import tempfile
import time
from pathlib import Path
from uuid import UUID

from prefect import get_client, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterParentFlowRunId
from prefect.exceptions import ObjectNotFound
from prefect.logging import get_run_logger
from prefect.states import Crashed

from tasks.tell import tell
from toto.infra_repo import git, tree
from toto.infra_repo.manifest import Manifest
from toto.infra_repo.settings import RollOut, Settings
from toto.ledger import ledger, steps
from toto.ledger.ledger import Intent, Ledger
from toto.ledger.target import KINDS, Target
from toto.report.report import Returned, RunDied


@task(name="open intents", task_run_name="open intents", cache_policy=NO_CACHE)
async def dead_intents(repo: Path, run: str) -> dict[Target, Intent]:
    """The open intents whose run is over or dead, in the order of a revert: releases, terraform roots, hosts."""
    found = sorted(Ledger(repo).read().open_intents.items(), key=lambda each: KINDS.index(each[0].kind), reverse=True)
    return {target: intent for target, intent in found if await _dead(intent, run)}


async def _dead(intent: Intent, run: str) -> bool:
    """Whether nobody is at work on an intent: its process is gone, or (a notebook's lives on) its run is over."""
    if intent.run == run or ledger.owner_lives(intent.owner) is False:
        return True  # its own: taken over before, and not put back yet; nothing is rolled out before all is settled
    async with get_client() as client:
        try:
            state = (await client.read_flow_run(UUID(intent.run))).state
        except ObjectNotFound:
            return True
    return state is not None and state.is_final()


def healing_for(intent: Intent, settings: RollOut) -> float:
    """Seconds for which the machine of a dead run may still be healing itself; 0 when that is long over."""
    opened = calendar.timegm(time.strptime(intent.at, "%Y-%m-%dT%H:%M:%SZ"))
    return max(0.0, opened + settings.activation_timeout + settings.confirm_timeout - time.time())


@task(name="take over", task_run_name="take over", cache_policy=NO_CACHE)
async def take_over(repo: Path, target: Target, intent: Intent, run: str) -> None:
    """Make a dead run's intent this run's own; whoever loses the race raises `LostTarget`."""
    await Ledger(repo).write(target, steps.take_over(intent, run),
                             f"{target.label}: settling what run {intent.run} left open at `{intent.step}`")


@task(name="manifest of the dead run", task_run_name="manifest of the dead run", cache_policy=NO_CACHE)
async def manifest_of(repo: Path, commit: str) -> tuple[Settings, Manifest]:
    """Settings and manifest of the commit that was being deployed: how its machines are reached."""
    with tempfile.TemporaryDirectory() as directory:
        await git.checkout(repo, commit, Path(directory, "tree"))
        return tree.read_tree(Path(directory, "tree"))


async def was_cancelled(run: UUID) -> bool:
    """Whether a person has asked for the end of a run."""
    async with get_client() as client:
        return any(state.is_cancelling() or state.is_cancelled() for state in await client.read_flow_run_states(run))


async def bury(run: UUID) -> None:
    """A run that has died takes its subflows with it: left alone they stay Running until a heartbeat is missed."""
    async with get_client() as client:
        parents = [run]
        while parents:
            of = FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=parents))
            children = await client.read_flow_runs(flow_run_filter=of)
            for child in children:
                if child.state is None or not child.state.is_final():
                    await client.set_flow_run_state(child.id, Crashed(message="its parent run has died"), force=True)
            parents = [child.id for child in children]


def died_at(run: str, step: str) -> str:
    """Why a target was put back: in the ledger, and found again there."""
    return f"its run {run} died at {step}"


async def tell_of(died: UUID, repo: Path, put_back: list[Returned]) -> None:
    """Tell that a run has died, to those who would have heard of its end. What it left may have been settled before."""
    try:
        async with get_client() as client:
            run = await client.read_flow_run(died)
        if await was_cancelled(died):
            return
        mine = {target: entry.reverted for target, entry in Ledger(repo).read().entries.items()
                if entry.reverted and entry.reverted.why.startswith(died_at(str(died), ""))}
        back = [Returned(target.label, to=note.commit) for target, note in mine.items()]
        back += [each for each in put_back if each.error]
        asked = run.parameters
        commit = asked.get("commit") or next((note.commit for note in mine.values()), None) or "HEAD"
        await tell(repo, git.resolve(repo, commit), RunDied(run.name, back), origin=asked.get("origin", "ui"),
                   named=asked.get("venues") or (), run=str(died),
                   listening=not (asked.get("plan_only") or asked.get("rehearse_only")))
    except Exception as error:  # what was put back stays so
        get_run_logger().warning("that run %s died could not be told: %s", died, error)
