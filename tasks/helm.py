"""Helm: render, lint and compare in the rehearsal, upgrade in the roll-out, roll back to the recorded revision."""

import tempfile
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from blocks import KubeAccess
from tasks import report
from tasks.record import record_back
from toto.base import runs
from toto.base.errors import TotoError
from toto.helm import back as helm_back
from toto.helm import release as helm_release
from toto.helm.cluster import Helm
from toto.helm.diff import Difference
from toto.helm.release import Release
from toto.infra_repo import git
from toto.ledger import steps
from toto.ledger.ledger import Before, Ledger
from toto.ledger.target import Target
from toto.plan.order import ReleaseOrder


class TestsFailed(TotoError):
    """The chart's own tests did not pass; the message has what they said."""


async def reach(repo: Path, run: str) -> Helm:
    """helm, and the cluster of the block `toto` (else of the environment's kubeconfig)."""
    directory = runs.run_directory(repo, run) / "helm"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    # A folder of its own for each: releases are rehearsed side by side.
    return Helm(kubeconfig=(await KubeAccess.load_or_default()).file(Path(tempfile.mkdtemp(dir=directory))))


@task(name="render and compare", task_run_name="render and compare", cache_policy=NO_CACHE)
async def compare(order: ReleaseOrder) -> Difference:
    """Lint the release, render it, and show what an upgrade would change.

    Raises `RenderFailed`, `ChartUnavailable`, `ClusterUnreachable`.
    """
    logger, reached, release = get_run_logger(), await reach(order.repo, order.run), order.release
    for warning in await reached.lint(release, order.tree):
        logger.warning("%s", warning)
    last = order.change.last
    if said := await reached.outside_change(release, last.revision if last else 0):
        logger.warning("%s: %s", order.label, said)
    difference = await reached.difference(release, order.tree)
    await report.show_difference(order.label, "\n".join([*([said] if said else []), str(difference)]))
    return difference


@task(name="look at the release", task_run_name="look at the release", cache_policy=NO_CACHE)
async def look(order: ReleaseOrder, helm: Helm) -> tuple[Before, bool]:
    """The revision to which the release goes back (the last good one, else what is there), and whether it is whole."""
    last, now = order.change.last, await helm.current(order.release)
    if last is not None or now is None:
        return Before(revision=last.revision if last else 0), now is not None and now.status == "deployed"
    return Before(revision=await helm.last_whole(order.release)), now.status == "deployed"


@task(name="upgrade", task_run_name="upgrade", cache_policy=NO_CACHE)
async def upgrade(order: ReleaseOrder, helm: Helm, before: Before) -> int:
    """Install or upgrade, and wait until it is ready; the new revision.

    What a killed helm has left pending is repaired first. Raises `ReleaseFailed`, `ReleaseBusy`.
    """
    if done := await helm.repair(order.release, before.revision):
        get_run_logger().warning("%s: %s", order.label, done)
    deployed = await helm.upgrade(order.release, order.tree, description=f"toto, {order.commit[:8]}")
    get_run_logger().info("it is at revision %d", deployed.number)
    return deployed.number


@task(name="the chart's tests", task_run_name="the chart's tests", cache_policy=NO_CACHE)
async def test(order: ReleaseOrder, helm: Helm) -> None:
    """Run the chart's own tests, when it has any. Raises `TestsFailed`."""
    results = await helm.test(order.release)
    for each in results:
        get_run_logger().info("%s %s", "ok" if each.passed else "not ok", each.name)
    if failed := [each for each in results if not each.passed]:
        raise TestsFailed("\n".join([f"the chart's tests failed: {', '.join(each.name for each in failed)}",
                                     failed[0].said]), target=order.label,
                          hint="mend the chart or its tests, and push again")


@task(name="put back", task_run_name="put back", cache_policy=NO_CACHE)
async def put_back(repo: Path, run: str, target: Target, why: str) -> str:
    """Roll back to the recorded revision; a release that was new is uninstalled. What it is now, in words.

    Raises `ReleaseFailed`, `ClusterUnreachable`; the intent is then still open.
    """
    entry = Ledger(repo).read().get(target)
    intent = steps.mine(entry, run)
    good, failed, reached = entry.good, intent.desired, await reach(repo, run)
    release = await release_at(repo, run, target, failed.commit)
    to = good.revision if good else intent.before.revision
    was = await release_at(repo, run, target, good.commit) if good else None
    back = await helm_back.put_back(reached, release, to, was)
    await record_back(repo, target, good and good.model_copy(update={"revision": back.revision}), failed, run, why)
    return back.words


async def release_at(repo: Path, run: str, target: Target, commit: str) -> Release:
    """A release as a commit describes it."""
    tree = runs.run_directory(repo, run) / "back" / f"helm-{target.name}"
    await git.checkout(repo, commit, tree)
    for release in helm_release.discover(tree):
        if release.name == target.name:
            return release
    raise TotoError(f"there is no such release at {commit[:8]}", target=target.label)
