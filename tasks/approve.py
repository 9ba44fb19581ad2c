"""Approve: a person must agree before something that cannot be undone. The run pauses in the UI until they answer."""

import uuid

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.exceptions import FlowPauseTimeout
from prefect.flow_runs import apause_flow_run
from prefect.input import RunInput
from prefect.logging import get_run_logger
from pydantic import Field

from tasks.report import fenced
from tasks.run import Run
from toto.base.errors import TotoError
from toto.plan.verdict import Question

POLL = 2  # seconds between two checks for the answer


class NotApproved(TotoError):
    """Nobody approved a plan in time, or somebody refused it."""


class Approval(RunInput):
    """The Resume form in the UI."""

    approve: bool = Field(default=False, title="Apply this plan", description="off: nothing is touched at all")
    by: str = Field(default="", title="Your name", description="appears in the run's log")


async def approve(run: Run) -> Run:
    """Ask a person about each target whose verdict has a question. A refusal is a failure like any other.

    The run itself pauses, not a subflow, so that the list of runs shows it and Resume is on the run's page. A task
    represents the stage in the graph. Nothing has been touched yet, and no other run has to wait.
    Raises `Superseded`.
    """

    async def ask_all() -> None:
        for label, verdict in run.verdicts.items():
            if verdict.question is not None:
                try:
                    answers[label] = await _ask(label, verdict.question)
                except NotApproved as error:
                    run.report.failure(label, "approval", error)

    answers: dict[str, str] = {}
    await run.unless_superseded(ask_all())
    return await _approved(run, answers)


async def _ask(label: str, question: Question) -> str:
    """Ask a person and return the name of who approved. Raises `NotApproved`."""
    form = Approval.with_initial_data(description=f"# {label}\n{fenced(question.text)}")
    get_run_logger().warning(
        "%s: waiting up to %.0f s for an approval: press Resume on this run's page", label, question.seconds
    )
    try:
        answer = await apause_flow_run(
            wait_for_input=form, timeout=round(question.seconds), poll_interval=POLL, key=str(uuid.uuid4())
        )
    except FlowPauseTimeout:
        raise NotApproved(
            f"nobody approved its plan within {question.seconds:.0f} s",
            target=label,
            hint="start the run again, and press Resume on its page",
        ) from None
    if not answer.approve:
        raise NotApproved(f"its plan was refused by {answer.by or 'somebody'}", target=label)
    return answer.by or "somebody"


@task(name="approve", task_run_name="approve", cache_policy=NO_CACHE)
async def _approved(run: Run, answers: dict[str, str]) -> Run:
    """Log who approved what."""
    for label, who in answers.items():
        get_run_logger().info("%s: approved by %s", label, who)
    return run
