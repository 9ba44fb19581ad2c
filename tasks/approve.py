"""A person's word before terraform does what cannot be taken back: the run pauses in the UI until it is given."""

import uuid

from prefect.exceptions import FlowPauseTimeout
from prefect.flow_runs import apause_flow_run
from prefect.input import RunInput
from prefect.logging import get_run_logger
from pydantic import Field

from tasks.report import fenced
from toto.base.errors import TotoError
from toto.plan.order import RootOrder
from toto.terraform import plan as tfplan
from toto.terraform.plan import Planned

POLL = 2  # seconds between two looks for the answer


class NotApproved(TotoError):
    """Nobody approved a plan in time, or somebody said no."""


class Approval(RunInput):
    """What a person answers in the UI's Resume form."""

    approve: bool = Field(default=False, title="Apply this plan", description="off: nothing is touched at all")
    by: str = Field(default="", title="Your name", description="goes to the run's log")


def needed(order: RootOrder, planned: Planned) -> bool:
    """Whether the settings want a person's word for this plan."""
    return tfplan.wants_approval(planned, order.root.approve)


async def ask(order: RootOrder, planned: Planned) -> None:
    """Pause the run until a person says yes. Nothing has been touched yet, and no other run is kept waiting.

    Raises `NotApproved`.
    """
    seconds = order.settings.terraform.approve_timeout
    form = Approval.with_initial_data(description=f"# {order.label}\n{fenced(str(planned))}")
    get_run_logger().warning("%s: waiting up to %.0f s for an approval: press Resume on this run's page", order.label,
                             seconds)
    try:
        answer = await apause_flow_run(wait_for_input=form, timeout=round(seconds), poll_interval=POLL,
                                       key=str(uuid.uuid4()))
    except FlowPauseTimeout:
        raise NotApproved(f"nobody approved its plan within {seconds:.0f} s", target=order.label,
                          hint="start the run again, and press Resume on its page") from None
    if not answer.approve:
        raise NotApproved(f"its plan was refused by {answer.by or 'somebody'}", target=order.label)
    get_run_logger().info("%s: approved by %s", order.label, answer.by or "somebody")
