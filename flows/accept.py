"""Accept: take the present state of a target as good, by name and with a reason. Nothing of the target is touched."""

from collections.abc import Sequence
from pathlib import Path

from prefect import flow, runtime
from prefect.client.schemas.objects import State
from prefect.logging import get_run_logger
from prefect.states import Completed, Failed

from flows.kinds import steps_of
from tasks import accept as taking
from tasks import cancelled_by_sigterm, names
from tasks.limits import USER, one_roll_out
from toto.base import runs
from toto.base.errors import InputError, TotoError
from toto.ledger.target import Target


@flow(name="accept", flow_run_name=names.of_flow, persist_result=False)
async def accept(repo: Path, target: str, reason: str, by: str | None = None) -> State[None]:
    """Take the present state of a target as good, when it cannot be put back. Waits for a run that is rolling out.

    Args:
        repo: the bare infra repo on toto.
        target: a host, terraform root or release, such as `web1`, `terraform/dns`, `helm/grafana`.
        reason: why; it is recorded.
        by: who says so, where the run itself does not say who started it.
    """
    run = str(runtime.flow_run.id)
    try:
        async with cancelled_by_sigterm(), runs.claimed(repo, run), one_roll_out(repo, run):
            words = await accept_present(repo, run, [target], reason, by or "somebody in the UI")
    except TotoError as error:
        get_run_logger().error("%s", error)
        return Failed(message=str(error))
    return Completed(message=words)


async def accept_present(repo: Path, run: str, targets: Sequence[str], reason: str | None, by: str) -> str:
    """Take the present states of some targets as good; return them in words. The run must hold the roll-out slot.

    Raises `InputError` and other `TotoError`s: then the states of that target, and of those after it, are not recorded.
    """
    who = next((tag.removeprefix(USER) for tag in runtime.flow_run.tags if tag.startswith(USER)), None)
    words = []
    for target in map(Target.of, targets):
        if (read := steps_of(target).present) is None:
            raise InputError("the present state of this kind cannot be read", target=target.label)
        said = await taking.accept.with_options(task_run_name=f"accept {target.label}")(
            repo, run, target, read, why=reason or "", by=who or by
        )
        words.append(f"{target.label}: {said}")
    return f"{'; '.join(words)}: taken as good"
