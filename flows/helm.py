"""One helm release: its difference in the rehearsal, and its roll-out."""

from typing import Literal

from prefect import flow

from tasks.helm import compare, look, reach, test, upgrade
from tasks.record import intend, record_good, record_verified
from toto.helm.diff import Difference
from toto.plan.changes import Why
from toto.plan.order import ReleaseOrder


@flow(name="rehearse release", flow_run_name="{order.label}: rehearse", persist_result=False)
async def rehearse(order: ReleaseOrder) -> Difference:
    """Render the release, lint it, and hold it against what is deployed."""
    return await compare(order)


@flow(name="roll out release", flow_run_name="{order.label}: roll out", persist_result=False)
async def roll_out(order: ReleaseOrder, difference: Difference) -> Literal["deployed", "recorded"]:
    """Upgrade the release, run its own tests, and record its revision. No difference: it is recorded only."""
    helm = await reach(order.repo, order.run)
    before, whole = await look(order, helm)
    if whole and difference.empty and order.change.why is not Why.AGAIN:
        await record_verified(order, before.revision)
        return "recorded"
    await intend(order, before)
    revision = await upgrade(order, helm, before)
    await test(order, helm)
    await record_good(order, revision)
    return "deployed"
