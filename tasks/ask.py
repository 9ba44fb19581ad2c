"""Asks a person to approve something, and pauses the flow run until they have answered.

They answer by name, with `ssh toto approve RUN`; the answer is recorded in `toto.ledger.approvals`. The Resume button
in the UI does not say who has pressed it, so it counts only where the server's rules say so.
"""

import asyncio
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Final

import httpx
from prefect import get_client
from prefect.exceptions import FlowPauseTimeout
from prefect.flow_runs import apause_flow_run
from prefect.input import RunInput
from prefect.logging import get_run_logger
from pydantic import Field

from tasks.report import fenced
from toto.base import server_rules
from toto.base.errors import TotoError
from toto.ledger import approvals
from toto.ledger.approvals import Answer, NothingAsked

POLL: Final = 2  # seconds between two checks for the answer


class NotApproved(TotoError):
    """Nobody approved a plan in time, or somebody rejected it."""


class Approval(RunInput):
    """The Resume form in the UI, where it approves."""

    approve: bool = Field(default=False, title="Go on", description="off: nothing is touched at all")
    by: str = Field(default="", title="Your name", description="it is recorded, and not verified")


async def ask(repo: Path, run: str, plans: Mapping[str, str], seconds: float) -> Answer:
    """Ask to approve `plans`, by label, and return the answer of who did. Raises `NotApproved`.

    `run` is the flow run, which waits up to `seconds`. Call `approvals.withdraw` when it does not wait any more.
    """
    by_button = server_rules.load().resume_button
    await approvals.ask(repo, run, plans, seconds)
    deadline = monotonic() + seconds
    get_run_logger().warning(
        "%s: waiting up to %.0f s for an approval: ssh toto approve %s (or reject)", ", ".join(plans), seconds, run
    )
    form = "\n".join(f"# {label}\n{fenced(plan)}" for label, plan in plans.items()) if by_button else None
    while (answer := _answer(repo, run)) is None:
        pressed = await _pause(repo, run, deadline, form)
        if _answer(repo, run) is not None:
            continue
        if monotonic() >= deadline:
            raise NotApproved(
                f"nobody approved its plan within {seconds:.0f} s",
                hint="start the run again, and type the line that its log has",
            )
        if pressed is None:
            get_run_logger().warning(
                "the Resume button does not say who has pressed it, so it approves nothing: ssh toto approve %s", run
            )
            continue
        with suppress(NothingAsked):  # somebody else was faster
            await approvals.answer(
                repo, run, approved=pressed.approve, by=f"{pressed.by or 'somebody'} (Resume button)"
            )
    if not answer.approved:
        raise NotApproved(f"its plan was rejected by {answer.by}")
    return answer


def _answer(repo: Path, run: str) -> Answer | None:
    asked = approvals.read(repo, run)
    return asked.answer if asked else None


async def _pause(repo: Path, run: str, deadline: float, form: str | None) -> Approval | None:
    """Pause the run until it has an answer, the `deadline` has come, or somebody presses Resume.

    Returns the `form` that they filled in.
    """
    resuming = asyncio.create_task(_resume(repo, run, deadline))
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
