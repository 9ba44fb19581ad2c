"""Approve: a person must agree before something that cannot be undone. The run pauses until they have answered.

They answer by name, with `ssh toto approve RUN`; the answer is recorded in `toto.ledger.approvals`. The Resume button
in the UI does not say who has pressed it, so it counts only where the server's rules say so.
"""

import asyncio
import uuid
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Final

import httpx
from prefect import get_client, task
from prefect.cache_policies import NO_CACHE
from prefect.exceptions import FlowPauseTimeout
from prefect.flow_runs import apause_flow_run
from prefect.input import RunInput
from prefect.logging import get_run_logger
from pydantic import Field

from tasks.report import fenced
from tasks.run import Run
from toto.base import server_rules
from toto.base.errors import TotoError
from toto.ledger import approvals
from toto.ledger.approvals import Answer, NothingAsked
from toto.plan.verdict import Question

POLL: Final = 2  # seconds between two checks for the answer
BACK: Final = 7 * 86_400.0  # seconds for which the plan of a revert may be approved


class NotApproved(TotoError):
    """Nobody approved a plan in time, or somebody rejected it."""


class Approval(RunInput):
    """The Resume form in the UI, where it approves."""

    approve: bool = Field(default=False, title="Go on", description="off: nothing is touched at all")
    by: str = Field(default="", title="Your name", description="it is recorded, and not verified")


async def approve(run: Run) -> Run:
    """Ask a person to approve the plans of all targets whose verdict has a question. A no is a failure like any other.

    The run itself pauses, not a subflow, so that the list of runs shows it. A task represents the stage in the graph.
    Nothing has been touched yet, and no other run has to wait. Raises `Superseded`.
    """
    questions = {label: each.question for label, each in run.verdicts.items() if each.question is not None}
    answers: list[Answer] = []

    async def ask() -> None:
        try:
            answers.append(await _ask(run, questions))
        except NotApproved as error:
            for label in questions:
                run.report.failure(label, "approval", error)

    try:
        await run.unless_superseded(ask())
    finally:
        await approvals.withdraw(run.repo, run.id)
    return await _answered(run, answers)


async def _ask(run: Run, questions: dict[str, Question]) -> Answer:
    """Ask, and return the answer of who approved. Raises `NotApproved`."""
    seconds = min(each.seconds for each in questions.values())
    plans = {label: each.text for label, each in questions.items()}
    by_button = server_rules.load().resume_button
    await approvals.ask(run.repo, run.id, plans, seconds)
    deadline = monotonic() + seconds
    get_run_logger().warning(
        "%s: waiting up to %.0f s for an approval: ssh toto approve %s (or reject)", ", ".join(plans), seconds, run.id
    )
    form = "\n".join(f"# {label}\n{fenced(plan)}" for label, plan in plans.items()) if by_button else None
    while (answer := _answer(run)) is None:
        pressed = await _pause(run, deadline, form)
        if _answer(run) is not None:
            continue
        if monotonic() >= deadline:
            raise NotApproved(
                f"nobody approved its plan within {seconds:.0f} s",
                hint="start the run again, and type the line that its log has",
            )
        if pressed is None:
            get_run_logger().warning(
                "the Resume button does not say who has pressed it, so it approves nothing: ssh toto approve %s", run.id
            )
            continue
        with suppress(NothingAsked):  # somebody else was faster
            await approvals.answer(
                run.repo, run.id, approved=pressed.approve, by=f"{pressed.by or 'somebody'} (Resume button)"
            )
    if not answer.approved:
        raise NotApproved(f"its plan was rejected by {answer.by}")
    return answer


def _answer(run: Run) -> Answer | None:
    asked = approvals.read(run.repo, run.id)
    return asked.answer if asked else None


async def _pause(run: Run, deadline: float, form: str | None) -> Approval | None:
    """Pause the run until it has an answer, the `deadline` has come, or somebody presses Resume.

    Returns the `form` that they filled in.
    """
    resuming = asyncio.create_task(_resume(run.repo, run.id, deadline))
    key, timeout = str(uuid.uuid4()), round(max(0, deadline - monotonic())) + 600  # (`_resume` comes before that)
    try:
        if form is None:
            await apause_flow_run(timeout=timeout, poll_interval=POLL, key=key)
            return None
        asked = Approval.with_initial_data(description=form)
        return await apause_flow_run(wait_for_input=asked, timeout=timeout, poll_interval=POLL, key=key)
    except FlowPauseTimeout:
        return None
    finally:
        resuming.cancel()
        await asyncio.wait((resuming,))


async def _resume(repo: Path, run: str, deadline: float) -> None:
    """Resume the run when it has an answer, or the deadline has come. (It may not have paused yet: tries again.)"""
    while True:
        asked = approvals.read(repo, run)
        if asked is None or asked.answer is not None or monotonic() >= deadline:
            with suppress(httpx.HTTPError):
                async with get_client() as client:
                    await client.resume_flow_run(uuid.UUID(run), {"approve": False, "by": ""})
        await asyncio.sleep(POLL)


async def approve_back(repo: Path, run: str, label: str, plan: str, asks: bool) -> None:
    """Ask a person to approve the plan of a revert, where it `asks` for that. Nobody waits: the next revert goes on.

    `run` is the run that is reverted. An answer counts only for exactly this plan.
    Raises `NotApproved` until somebody has approved it, with the command that does.
    """
    if not asks:
        return
    label = f"{label}, the way back"
    asked = approvals.read(repo, run)
    same = asked is not None and asked.plans.get(label) == plan
    if asked is not None and same and asked.answer is not None:
        if asked.answer.approved:
            get_run_logger().info("%s: approved by %s at %s", label, asked.answer.by, asked.answer.at)
            return
        raise NotApproved(
            f"its way back was rejected by {asked.answer.by}",
            hint="push a commit that says what it shall be, and toto goes on from what is there",
        )
    if asked is None or not (same and asked.waits):
        others = asked.plans if asked is not None and asked.answer is None else {}
        await approvals.ask(
            repo,
            run,
            {name: text for name, text in others.items() if name.endswith("the way back")} | {label: plan},
            BACK,
        )
    raise NotApproved(
        f"its way back waits for an approval:\n{plan}",
        hint=f"`ssh toto approve {run}` (or reject), then start settle/settle, or push: that goes on with it",
    )


@task(name="approve", task_run_name="approve", cache_policy=NO_CACHE)
async def _answered(run: Run, answers: list[Answer]) -> Run:
    """Log who approved what."""
    for each in answers:
        labels = ", ".join(label for label, verdict in run.verdicts.items() if verdict.question)
        get_run_logger().info("%s: approved by %s at %s", labels, each.by, each.at)
    return run
