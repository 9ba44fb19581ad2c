"""Revert: put back what a run touched, in reverse order, each on its own. And settle what a dead run left open."""

from pathlib import Path
from uuid import UUID

from prefect import Flow, flow, runtime
from prefect.client.schemas.objects import FlowRun, State
from prefect.deployments import arun_deployment
from prefect.logging import get_run_logger
from prefect.states import Completed, Failed

from tasks import cancelled_by_sigterm, names
from tasks import helm as releases
from tasks import roll_out as hosts
from tasks import terraform as roots
from tasks.limits import one_roll_out
from tasks.settle import dead_intents, died_at, healing_for, manifest_of, take_over, tell_of, was_cancelled
from toto.base import runs
from toto.base.errors import TotoError
from toto.infra_repo.manifest import Manifest
from toto.infra_repo.settings import Settings
from toto.ledger.target import Target
from toto.report.report import Returned, return_words

AGAIN = "again"  # the tag of a run that another had to be begun once more for
HEALING = 60  # seconds that a machine may take to go back by itself, once its watchdog has decided to


@flow(flow_run_name="revert: {why_short}", persist_result=False)
async def revert(repo: Path, run: str, targets: list[Target], manifest: Manifest, settings: Settings, why: str,
                 why_short: str = "what this run touched", patience: float | None = None) -> list[Returned]:
    """Put `targets` (in the order in which they were touched) back, the last one first; one failure stops no other.

    A machine that does not answer is given `patience` seconds: time for its watchdog to bring it back.
    """
    if patience is None:
        patience = settings.roll_out.confirm_timeout + HEALING
    results = []
    for target in reversed(targets):
        name = f"{target.label}: put back"
        try:
            match target.kind:
                case "host":
                    machine = manifest.machines.get(target.name)
                    if machine is None:
                        raise TotoError("is not in the manifest any more: toto does not know how to reach it",
                                        target=target.name,
                                        hint="put it back into machines.yaml, or go back by hand")
                    to = await hosts.put_back.with_options(task_run_name=name)(
                        repo, run, machine, settings.roll_out, why, patience)
                case "terraform":
                    to = await roots.put_back.with_options(task_run_name=name)(repo, run, target, why)
                case "helm":
                    to = await releases.put_back.with_options(task_run_name=name)(repo, run, target, why)
            results.append(Returned(target.label, to=to))
        except Exception as error:  # whatever it was, the others go back
            results.append(Returned(target.label, error=str(error) or repr(error)))
    return results


async def settle_again(flow: Flow[..., object], flow_run: FlowRun, state: State[object]) -> None:
    """A settle that has died itself is begun once more. (What it had begun is an open intent for any later run.)"""
    if flow_run.deployment_id and AGAIN not in flow_run.tags and not await was_cancelled(flow_run.id):
        await arun_deployment("settle/settle", timeout=0, as_subflow=False, tags=[AGAIN],
                              parameters=flow_run.parameters, idempotency_key=f"again-{flow_run.id}")


@flow(flow_run_name=names.of_flow, persist_result=False, on_crashed=[settle_again])
async def settle(repo: Path, died: list[UUID] | None = None) -> State[None]:
    """Put back every target whose run died before it was done with it. Waits for a run that is rolling out.

    Args:
        repo: the bare infra repo on toto.
        died: runs that have died: whoever would have heard of their ends is told.
    """
    run = str(runtime.flow_run.root_flow_run_id or runtime.flow_run.id)
    async with cancelled_by_sigterm(), runs.claimed(repo, run), one_roll_out(repo, run):
        results = await settle_left_open(repo, run)
    for each in died or ():
        await tell_of(each, repo, results)
    ended = Failed if any(each.error for each in results) else Completed
    return ended(message=return_words(results))


async def settle_left_open(repo: Path, run: str) -> list[Returned]:
    """As `settle`, for a run that has the roll-out slot already."""
    results: list[Returned] = []
    for target, intent in (await dead_intents(repo, run)).items():
        get_run_logger().warning("%s: run %s died at `%s`: putting it back", target.label, intent.run, intent.step)
        try:
            await take_over(repo, target, intent, run)
            settings, manifest = await manifest_of(repo, intent.desired.commit)
            [back] = await revert(
                repo, run, [target], manifest, settings, died_at(intent.left_by or intent.run, intent.step),
                why_short=f"{target.label}, left open by a run that died",
                patience=healing_for(intent, settings.roll_out))
        except TotoError as error:
            back = Returned(target.label, error=str(error))
        results.append(back)
    for each in results:
        if each.error:
            get_run_logger().error("%s COULD NOT BE PUT BACK: %s", each.target, each.error)
    return results
