"""Settle: take over and revert what dead or cancelled runs left open, and notify people of their deaths."""

import calendar
import tempfile
import time
from pathlib import Path
from typing import Final
from uuid import UUID

from prefect import Flow, get_client, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterParentFlowRunId
from prefect.client.schemas.objects import FlowRun, State
from prefect.deployments import arun_deployment
from prefect.exceptions import ObjectNotFound
from prefect.logging import get_run_logger
from prefect.states import Crashed

from tasks.notify import notify
from toto.base.errors import TotoError
from toto.git_host.shared import name_of
from toto.infra_repo import git, tree
from toto.infra_repo.manifest import Manifest
from toto.infra_repo.settings import RollOut, Settings
from toto.ledger import ledger, steps
from toto.ledger.ledger import Intent, Ledger
from toto.ledger.target import Target
from toto.machine.ssh import Unreachable
from toto.plan.kinds import place
from toto.report.report import Reverted, RunDied
from toto.server.orphans import SETTLE

RETRIED: Final = "retry"  # the tag of a settle that replaces one that died


async def settle_soon(flow: Flow[..., object], flow_run: FlowRun, state: State[object]) -> None:
    """Start a settle at once when a run was cancelled or crashed, because it may have left open intents.

    If it crashed, the settle also notifies people of that. (A cancelled run is also Crashed for a moment.)
    """
    if (repo := flow_run.parameters.get("repo")) is None:  # a run without what every deployment of toto's has
        return
    died = state.is_crashed() and not await was_cancelled(flow_run.id)
    if died or Ledger(Path(repo)).read().open_intents:
        await arun_deployment(
            SETTLE,
            timeout=0,
            as_subflow=False,
            idempotency_key=f"died-{flow_run.id}" if died else None,
            parameters={"repo": repo, "died": [str(flow_run.id)] if died else []},
        )
    if died:
        await mark_crashed(flow_run.id)


async def retry_settle(flow: Flow[..., object], flow_run: FlowRun, state: State[object]) -> None:
    """Start a settle again, once, when it died itself. (What it left half done is an open intent for later runs.)"""
    if flow_run.deployment_id and RETRIED not in flow_run.tags and not await was_cancelled(flow_run.id):
        await arun_deployment(
            SETTLE,
            timeout=0,
            as_subflow=False,
            tags=[RETRIED],
            parameters=flow_run.parameters,
            idempotency_key=f"retry-{flow_run.id}",
        )


@task(name="open intents", task_run_name="open intents", cache_policy=NO_CACHE)
async def dead_intents(repo: Path, run: str) -> dict[Target, Intent]:
    """The open intents whose run has ended or died, in the order of a revert: releases, terraform roots, hosts."""
    found = sorted(Ledger(repo).read().open_intents.items(), key=lambda each: place(each[0])[0], reverse=True)
    return {target: intent for target, intent in found if await _dead(intent, run)}


async def left_over(repo: Path, run: str) -> set[str]:
    """The labels of the targets that were left half done and could not be put back."""
    return {target.label for target in await dead_intents(repo, run)}


async def _dead(intent: Intent, run: str) -> bool:
    """Whether nobody works on an intent: its process is dead, or its run is over (a notebook's process lives on)."""
    if intent.run == run or ledger.owner_lives(intent.owner) is False:
        return True  # this run's own intent was taken over before and not reverted: this run rolls out only after that
    async with get_client() as client:
        try:
            state = (await client.read_flow_run(UUID(intent.run))).state
        except ObjectNotFound:
            return True
    return state is not None and state.is_final()


def activated_by(intent: Intent, settings: RollOut) -> float:
    """When the activation of a dead run has ended at the latest, in seconds since 1970."""
    return calendar.timegm(time.strptime(intent.at, "%Y-%m-%dT%H:%M:%SZ")) + settings.activation_timeout


def with_choices(repo: Path, target: Target, error: Exception) -> str:
    """The text of an error that a revert ended with, and what can be done with the target now."""
    text, hint = str(error) or repr(error), ""
    if isinstance(error, TotoError) and error.hint:
        text, hint = text.removesuffix(f"\nnext: {error.hint}"), f"{error.hint}; or "
    if isinstance(error, Unreachable):
        return f"{text}\nnext: {hint}wait until it answers: every run tries again"
    return (
        f"{text}\nnext: {hint}push a commit that goes on from what is there; or take what is there as good: "
        f"ssh toto accept {target.label} --repo {name_of(repo)} --reason WHY"
    )


@task(name="take over", task_run_name="take over", cache_policy=NO_CACHE)
async def take_over(repo: Path, target: Target, intent: Intent, run: str) -> None:
    """Make a dead run's intent this run's own. Raises `LostTarget` when a different run was faster."""
    await Ledger(repo).write(
        target,
        steps.take_over(intent, run),
        f"{target.label}: settling what run {intent.run} left open at `{intent.step}`",
    )


@task(name="manifest of the dead run", task_run_name="manifest of the dead run", cache_policy=NO_CACHE)
async def manifest_of(repo: Path, commit: str) -> tuple[Settings, Manifest]:
    """Settings and manifest of the commit that was being deployed: they say how to connect to its machines."""
    with tempfile.TemporaryDirectory() as directory:
        await git.checkout(repo, commit, Path(directory, "tree"))
        return tree.read_tree(Path(directory, "tree"), deployed=True)


async def was_cancelled(run: UUID) -> bool:
    """Whether a person has cancelled a run."""
    async with get_client() as client:
        return any(state.is_cancelling() or state.is_cancelled() for state in await client.read_flow_run_states(run))


async def mark_crashed(run: UUID) -> None:
    """Mark the subflows of a dead run as crashed. Otherwise they stay Running until a heartbeat is missed."""
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
    """Why a target was reverted, as text for the ledger; `notify_of_death` finds the entries by it."""
    return f"its run {run} died at {step}"


async def notify_of_death(died: UUID, repo: Path, reverted: list[Reverted]) -> None:
    """Notify people that a run has died: the same as of its end. What it left may have been settled before."""
    try:
        async with get_client() as client:
            run = await client.read_flow_run(died)
        if await was_cancelled(died):
            return
        its_own = {
            target: entry.reverted
            for target, entry in Ledger(repo).read().entries.items()
            if entry.reverted and entry.reverted.why.startswith(died_at(str(died), ""))
        }
        back = [Reverted(target.label, to=note.commit) for target, note in its_own.items()]
        back += [each for each in reverted if each.error]
        asked = run.parameters
        commit = asked.get("commit") or next((note.commit for note in its_own.values()), None) or "HEAD"
        await notify(
            repo,
            git.resolve(repo, commit),
            RunDied(run.name, back),
            origin=asked.get("origin", "ui"),
            named=asked.get("venues") or (),
            run=str(died),
            listening=not (asked.get("plan_only") or asked.get("rehearse_only")),
        )
    except Exception as error:  # what was reverted stays reverted
        get_run_logger().warning("could not notify anybody that run %s died: %s", died, error)
