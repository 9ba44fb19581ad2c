"""Approve: a person must agree before something that cannot be undone. The run pauses until they have answered.

`tasks.ask` asks.
"""

from pathlib import Path
from typing import Final

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from tasks.ask import NotApproved, ask
from tasks.run import Run
from toto.ledger import approvals
from toto.ledger.approvals import Answer

BACK: Final = 7 * 86_400.0  # seconds for which the plan of a revert may be approved


async def approve(run: Run) -> Run:
    """Ask a person to approve the plans of all targets whose verdict has a question. A no is a failure like any other.

    The run itself pauses, not a subflow, so that the list of runs shows it. A task represents the stage in the graph.
    Nothing has been touched yet, and no other run has to wait. Raises `Superseded`.
    """
    questions = {label: each.question for label, each in run.verdicts.items() if each.question is not None}
    plans = {label: each.text for label, each in questions.items()}
    seconds = min(each.seconds for each in questions.values())
    answers: list[Answer] = []

    async def answered() -> None:
        try:
            answers.append(await ask(run.repo, run.id, plans, seconds))
        except NotApproved as error:
            for label in questions:
                run.report.failure(label, "approval", error)

    try:
        await run.unless_superseded(answered())
    finally:
        await approvals.withdraw(run.repo, run.id)
    return await _answered(run, answers)


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
