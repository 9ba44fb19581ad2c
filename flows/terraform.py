"""The steps of one terraform root: rehearse (make a plan), roll out (apply exactly that plan), revert, find drift."""

from typing import Literal

from prefect import flow

from tasks.record import intend, record_good, record_verified
from tasks.terraform import apply, before_of, facts, find_drift, plan_root, revert, try_to_plan
from toto.base.errors import TotoError
from toto.plan.changes import Why
from toto.plan.root import RootOrder
from toto.plan.verdict import Verdict
from toto.terraform.plan import Planned

__all__ = ["find_drift", "rehearse", "revert", "roll_out"]


@flow(name="rehearse root", flow_run_name="{order.name}", persist_result=False, validate_parameters=False)
async def rehearse(order: RootOrder) -> Verdict[Planned]:
    """Plan the root and keep the plan: the roll-out applies exactly this plan."""
    if not order.deploys:
        attempt = await try_to_plan(order)
        return Verdict.told(order, summary=attempt.summary, difference=str(attempt.planned or ""))
    planned = await plan_root(order)
    return Verdict.passed(
        order, planned, summary=planned.summary, difference=str(planned), question=order.question(planned)
    )


@flow(name="roll out root", flow_run_name="{order.name}", persist_result=False, validate_parameters=False)
async def roll_out(order: RootOrder, verdict: Verdict[Planned]) -> Literal["deployed", "recorded"]:
    """Apply the plan of the rehearsal and record it. An empty plan is only recorded."""
    order.check_deploys()
    verdict.check(order)
    planned = verdict.found
    if planned is None:
        raise TotoError("its rehearsal left no plan, and toto applies nothing else", target=order.label)
    half_done = order.change.why is Why.INTENT  # toto could not go back: this run goes on from what is there
    if planned.empty and not half_done:
        await record_verified(order, **facts(planned.before, planned.place))
        return "recorded"
    intended = await intend(order, before_of(order, planned))
    state = planned.before if planned.empty else await apply(order, planned, wait_for=[intended])
    await record_good(order, **facts(state, planned.place), wait_for=[state])
    return "deployed"
