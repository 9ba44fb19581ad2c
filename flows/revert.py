"""Revert what a run touched, in reverse order, each target on its own; settle what dead runs left open."""

import time
from collections.abc import Sequence
from pathlib import Path
from uuid import UUID

from prefect import flow, runtime, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.logging import get_run_logger
from prefect.states import Completed, Failed

from flows.kinds import steps_of
from flows.stage import stage
from tasks import cancelled_by_sigterm
from tasks import names as run_names
from tasks.limits import one_roll_out
from tasks.record import intend_to_revert
from tasks.reversal import Reversal
from tasks.run import Run
from tasks.settle import (
    activated_by,
    dead_intents,
    died_at,
    manifest_of,
    notify_of_death,
    retry_settle,
    take_over,
    with_choices,
)
from toto.base import runs
from toto.base.errors import TotoError
from toto.ledger.ledger import Ledger, LostTarget
from toto.machine.ssh import Unreachable
from toto.report.message import names
from toto.report.report import Reverted, revert_words

HEALING = 60  # seconds that a machine may take to revert itself after its watchdog has decided to


async def revert(run: Run) -> Run:
    """Revert what a run touched. All intents are opened first, so that the next run finds each of them in any case.

    It does not depend on Prefect: when the stage cannot be shown, the targets are reverted without it.
    """
    reversals = await _open_intents(run)
    if not reversals:
        return run

    @stage("revert", lambda run: names([each.target.label for each in reversed(reversals)]))
    async def revert_all(run: Run) -> None:
        """Revert what the run touched, in reverse order."""
        await _revert(reversals, run.report.reverted)

    with run.report.timed(names([each.target.label for each in reversals]), "revert"):
        try:
            return await revert_all(run)
        except Exception as error:
            get_run_logger().warning("the stage `revert` could not be shown: %s", error)
            done = {each.target for each in run.report.reverted}
            await _revert([each for each in reversals if each.target.label not in done], run.report.reverted)
            return run


async def _open_intents(run: Run) -> list[Reversal]:
    """What is to be reverted, the last first, each under an intent. It needs nothing but the repo."""
    entries = Ledger(run.repo).read()
    since = time.time() + HEALING
    reversals: list[Reversal] = []
    for target in run.to_revert:
        entry = entries.get(target)
        if not entry.touched_by(run.id):
            continue
        try:
            await intend_to_revert(run.repo, target, run.id)
        except (TotoError, OSError) as error:
            half_done = entry.intent is not None and entry.intent.run == run.id
            if isinstance(error, LostTarget) or not half_done:
                # It passed its tests, or a different run has it: what it runs and what the ledger says stay the same.
                run.report.reverted.append(Reverted(target.label, error=str(error)))
                continue
            get_run_logger().error(
                "%s: toto reverts it, although it could not write the ledger: %s", target.label, error
            )
        reversals.append(Reversal(run.repo, run.id, target, run.plan.manifest, run.plan.settings, run.why_back, since))
    return reversals[::-1]


async def _revert(reversals: Sequence[Reversal], results: list[Reverted]) -> None:
    """Revert one target after the other, and add what came of each to `results`. A failure does not stop the others."""
    for each in reversals:
        label = each.target.label
        try:
            results.append(Reverted(label, to=await revert_target.with_options(task_run_name=f"revert {label}")(each)))
        except Exception as error:  # whatever it was, the others are reverted
            results.append(
                Reverted(label, error=with_choices(each.repo, each.target, error), away=isinstance(error, Unreachable))
            )


@task(name="revert", task_run_name="revert", cache_policy=NO_CACHE)
async def revert_target(reversal: Reversal) -> str:
    """Revert a target by its kind's step; return what it is now, in words. Raises `TotoError`."""
    return await steps_of(reversal.target).revert(reversal)


@flow(name="settle", flow_run_name=run_names.of_flow, persist_result=False, on_crashed=[retry_settle])
async def settle(repo: Path, died: list[UUID] | None = None) -> State[None]:
    """Revert every target that a dead run left half done. Waits for a run that is rolling out.

    Args:
        repo: the bare infra repo on toto.
        died: runs that have died; people are notified of that, the same as of the ends of the runs.
    """
    run = str(runtime.flow_run.root_flow_run_id or runtime.flow_run.id)
    async with cancelled_by_sigterm(), runs.claimed(repo, run), one_roll_out(repo, run):
        results = await _settle(repo, run)
    for each in died or ():
        await notify_of_death(each, repo, results)
    ended = Failed if any(each.error for each in results) else Completed
    return ended(message=revert_words(results))


async def settle_first(repo: Path, run: str) -> list[Reverted]:
    """Settle what dead runs left open, for a run that already has the roll-out slot."""
    return await _settle_first(repo, run) if Ledger(repo).read().open_intents else []


@flow(name="settle first", flow_run_name="what dead runs left open", persist_result=False)
async def _settle_first(repo: Path, run: str) -> list[Reverted]:
    return await _settle(repo, run)


async def _settle(repo: Path, run: str) -> list[Reverted]:
    results: list[Reverted] = []
    for target, intent in (await dead_intents(repo, run)).items():
        get_run_logger().warning("%s: run %s died at `%s`: reverting it", target.label, intent.run, intent.step)
        try:
            await take_over(repo, target, intent, run)
            settings, manifest = await manifest_of(repo, intent.desired.commit)
            await _revert(
                [
                    Reversal(
                        repo,
                        run,
                        target,
                        manifest,
                        settings,
                        died_at(intent.left_by or intent.run, intent.step),
                        activated_by(intent, settings.roll_out),
                    )
                ],
                results,
            )
        except TotoError as error:
            results.append(Reverted(target.label, error=with_choices(repo, target, error)))
    for each in results:
        if each.error:
            get_run_logger().error("%s COULD NOT BE REVERTED: %s", each.target, each.error)
    return results
