"""One terraform root: its plan in the rehearsal, and the roll-out of that very plan."""

from typing import Literal

from prefect import flow

from tasks.record import intend, record_good, record_verified
from tasks.terraform import apply, plan_root
from toto.ledger.ledger import Before
from toto.plan.order import RootOrder
from toto.terraform.plan import Planned


@flow(name="rehearse root", flow_run_name="{order.label}: plan", persist_result=False)
async def rehearse(order: RootOrder) -> Planned:
    """Plan the root, and keep the plan: nothing else is applied later."""
    return await plan_root(order)


@flow(name="roll out root", flow_run_name="{order.label}: apply", persist_result=False)
async def roll_out(order: RootOrder, planned: Planned) -> Literal["deployed", "recorded"]:
    """Apply the plan that was rehearsed, and record it. An empty plan is recorded, and nothing is applied."""
    if planned.empty:
        await record_verified(order, planned.before.serial)
        return "recorded"
    await intend(order, Before(revision=planned.before.serial, resources=planned.before.resources))
    serial = await apply(order, planned)
    await record_good(order, serial)
    return "deployed"
