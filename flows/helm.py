"""The steps of one helm release: rehearse, roll out, revert, find drift."""

from typing import Literal

from prefect import flow
from prefect.utilities.annotations import quote

from tasks.helm import compare, connect, find_drift, inspect, read_back, revert, test, try_to_compare, upgrade
from tasks.record import intend, record_good, record_verified
from toto.helm.diff import Difference
from toto.plan.changes import Why
from toto.plan.release import ReleaseOrder
from toto.plan.verdict import Verdict

__all__ = ["find_drift", "rehearse", "revert", "roll_out"]


@flow(name="rehearse release", flow_run_name="{order.name}", persist_result=False, validate_parameters=False)
async def rehearse(order: ReleaseOrder) -> Verdict[Difference]:
    """Render the release, lint it, and compare it with what is deployed."""
    if not order.deploys:
        found, how = await try_to_compare(order)
        return Verdict.told(order, summary=how, difference=str(found or ""))
    difference = await compare(order)
    return Verdict.passed(order, difference, summary=difference.summary, difference=str(difference))


@flow(name="roll out release", flow_run_name="{order.name}", persist_result=False, validate_parameters=False)
async def roll_out(
    order: ReleaseOrder, verdict: Verdict[Difference]
) -> Literal["deployed", "recorded", "recorded without its CRDs"]:
    """Upgrade the release, run its own tests, and record its revision. Without a difference it is only recorded."""
    order.check_deploys()
    verdict.check(order)
    helm = await connect(order.repo, order.run)
    now = await inspect(order, helm)
    if now.whole and verdict.found is not None and verdict.found.empty and order.change.why is not Why.FORCED:
        same = order.last is not None and order.last.revision == now.before.revision
        baseline = order.last.baseline if order.last and same else ()
        await record_verified(order, revision=now.before.revision, baseline=baseline, wait_for=[now])
        return "recorded without its CRDs" if verdict.found.left_out else "recorded"
    applied = tuple(each.resource for each in verdict.found.crds) if verdict.found and verdict.found.applies else ()
    before = now.before.model_copy(update={"crds": applied})
    intended = await intend(order, before, wait_for=[now])
    revision = await upgrade(order, helm, quote(before), wait_for=[intended])
    tested = await test(order, helm, wait_for=[revision])
    read = await read_back(order, helm, wait_for=[tested])
    await record_good(order, revision=revision.number, baseline=read.baseline, wait_for=[read])
    return "deployed"
