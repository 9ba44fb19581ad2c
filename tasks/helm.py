"""Helm: render, lint and compare in the rehearsal, upgrade in the roll-out, roll back to the recorded revision."""

import itertools
import tempfile
from dataclasses import dataclass
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from blocks import KubeAccess
from blocks.access import READ_ONLY
from blocks.names import names
from tasks import Done, report
from tasks.record import record_reverted
from tasks.reversal import Reversal
from toto.base import runs
from toto.base.errors import InputError, TotoError
from toto.git_host import shared
from toto.helm import release as helm_release
from toto.helm.cluster import Helm
from toto.helm.command import ClusterUnreachable
from toto.helm.diff import Difference
from toto.helm.release import Release
from toto.helm.revert import revert as revert_release
from toto.helm.stored import Revision
from toto.infra_repo import git
from toto.ledger import steps
from toto.ledger.ledger import Deployed, Ledger
from toto.ledger.target import Target
from toto.plan.release import DeployedRelease, ReleaseBefore, ReleaseOrder


class TestsFailed(TotoError):
    """The chart's own tests failed. The message has their output."""


async def connect(repo: Path, run: str, access: KubeAccess | None = None) -> Helm:
    """helm with a cluster: that of `access`, else of the repo's block.

    The repo that may use the shared blocks goes without one by the environment's kubeconfig. Raises `InputError`.
    """
    directory = runs.run_directory(repo, run) / "helm"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    access = access or await KubeAccess.of_repo(repo)
    scratch = Path(tempfile.mkdtemp(dir=directory))  # of its own, since releases are rehearsed side by side
    kubeconfig = access.file(scratch)
    if kubeconfig is None and not shared.has_shared_blocks(repo):
        raise InputError(
            "this repository has no cluster",
            target=shared.name_of(repo),
            hint=f"save a block `Toto kube access` as {names(repo)[0]} in the UI",
        )
    return Helm(kubeconfig=kubeconfig, scratch=scratch)


@task(name="render and compare", task_run_name="render and compare", cache_policy=NO_CACHE)
async def compare(order: ReleaseOrder) -> Difference:
    """Lint the release, render it, and show what an upgrade would change.

    Raises `RenderFailed`, `ChartUnavailable`, `ClusterUnreachable`.
    """
    logger, helm, release = get_run_logger(), await connect(order.repo, order.run), order.release
    for warning in await helm.lint(release, order.tree):
        logger.warning("%s", warning)
    if said := await helm.outside_change(release, order.last.revision if order.last else 0):
        logger.warning("%s: %s", order.label, said)
    masks = await _masks_of_last(order, helm)
    difference = await helm.difference(release, order.tree, before=_before(order), masks=masks)
    for each in difference.unchecked:
        logger.warning("%s: %s", order.label, each)
    await report.show_difference(order.repo, order.target, "\n".join([*([said] if said else []), str(difference)]))
    return difference


def _before(order: ReleaseOrder) -> list[Release]:
    """The releases that are rolled out before this one."""
    return list(itertools.takewhile(lambda each: each.name != order.release.name, helm_release.discover(order.tree)))


async def _masks_of_last(order: ReleaseOrder, helm: Helm) -> set[str]:
    """What the values that are deployed call secret, as far as it can still be found out."""
    if order.last is None:
        return set()
    try:
        release, tree = await _of_commit(order.repo, order.run, order.target, order.last.commit)
        return await helm.secrets(release, tree)
    except TotoError as error:
        get_run_logger().info("%s: the values before are not known: %s", order.label, error.message)
        return set()


@task(name="render without deploying", task_run_name="render", cache_policy=NO_CACHE)
async def try_to_compare(order: ReleaseOrder) -> tuple[Difference | None, str]:
    """Lint and render the release in a run that will not deploy it, and compare it where a block that only reads is.

    Returns the difference, and how it was found or why there is none. Raises `RenderFailed`, `ChartUnavailable`.
    """
    release = order.release
    access = await KubeAccess.saved_of(order.repo, suffix=READ_ONLY)
    helm = await connect(order.repo, order.run, access) if access else Helm()
    for warning in await helm.lint(release, order.tree):
        get_run_logger().warning("%s", warning)
    await helm.render_alone(release, order.tree)
    if access is None:
        return None, "rendered without the cluster's credentials, which this run does not get: not compared with it"
    try:
        masks = await _masks_of_last(order, helm)
        difference = await helm.difference(release, order.tree, before=_before(order), masks=masks)
    except ClusterUnreachable as error:
        get_run_logger().warning("%s", error)
        return None, "rendered, and not compared with the cluster: the credentials that only read do not get there"
    await report.show_difference(order.repo, order.target, str(difference))
    return difference, f"{difference.summary} (compared with credentials that only read)"


@dataclass(frozen=True)
class Inspected:
    """The state of a release now: `before` is what a revert would go back to, `whole` whether it is deployed."""

    before: ReleaseBefore
    whole: bool


@task(name="inspect the release", task_run_name="inspect the release", cache_policy=NO_CACHE)
async def inspect(order: ReleaseOrder, helm: Helm) -> Inspected:
    """Find out what is there, and the revision that a revert goes back to: the newest whole one, whoever made it.

    Raises `ClusterUnreachable`.
    """
    now = await helm.newest(order.release)
    if now is None:
        return Inspected(ReleaseBefore(newest=0), whole=False)
    whole = now.status == "deployed"
    to = now.number if whole else await helm.last_whole(order.release)
    return Inspected(ReleaseBefore(revision=to, newest=now.number, status=now.status), whole)


@task(name="upgrade", task_run_name="upgrade", cache_policy=NO_CACHE)
async def upgrade(order: ReleaseOrder, helm: Helm, before: ReleaseBefore) -> Revision:
    """Install or upgrade the release, wait until it is ready, and return the new revision.

    A release that a killed helm left pending is repaired first. Raises `ReleaseFailed`, `ReleaseBusy`.
    """
    if done := await helm.repair(order.release, before.revision):
        get_run_logger().warning("%s: %s", order.label, done)
    deployed = await helm.upgrade(order.release, order.tree, description=f"toto, {order.commit[:8]}", run=order.run)
    get_run_logger().info("it is at revision %d", deployed.number)
    return deployed


@task(name="the chart's tests", task_run_name="the chart's tests", cache_policy=NO_CACHE)
async def test(order: ReleaseOrder, helm: Helm) -> Done:
    """Run the chart's own tests, if it has any. Raises `TestsFailed`, `ClusterUnreachable`."""
    results = await helm.test(order.release)
    for each in results:
        get_run_logger().info("%s %s", "ok" if each.passed else "not ok", each.name)
    if failed := [each for each in results if not each.passed]:
        raise TestsFailed(
            "\n".join([f"the chart's tests failed: {', '.join(each.name for each in failed)}", failed[0].said]),
            target=order.label,
            hint="fix the chart or its tests, and push again",
        )
    return Done()


@dataclass(frozen=True)
class ReadBack:
    """Marks of what differed from the manifests: see `toto.helm.drift`."""

    baseline: tuple[str, ...]


@task(name="read back", task_run_name="read back", cache_policy=NO_CACHE)
async def read_back(order: ReleaseOrder, helm: Helm) -> ReadBack:
    """Find out what differs from the manifests just after the roll-out: that is no drift later."""
    try:
        return ReadBack(await helm.baseline(order.release))
    except TotoError as error:  # the release is good all the same
        get_run_logger().warning("%s: it is not known what the cluster itself sets: %s", order.label, error.message)
        return ReadBack(())


async def revert(reversal: Reversal) -> str:
    """Take back what the run did to the release. Returns what it is now, in words.

    Raises `CannotGoBack`, `ReleaseFailed`, `ClusterUnreachable`, `LostTarget`; the intent is then still open.
    """
    repo, run, target = reversal.repo, reversal.run, reversal.target
    entry = Ledger(repo).get(target)
    intent, good, helm = steps.require_intent(entry, run), DeployedRelease.of(entry.good), await connect(repo, run)
    release, before = await release_at(repo, run, target, intent.desired.commit), ReleaseBefore.of(intent.before)
    reverted = await revert_release(helm, release, before.place, intent.left_by or intent.run)
    if good and reverted.revision and before.revision == good.revision:
        namespace = good.namespace or (await release_at(repo, run, target, good.commit)).namespace
        if namespace == release.namespace:
            good = good.model_copy(update={"revision": reverted.revision})
    await record_reverted(repo, target, good, intent.desired, run, reversal.why)
    stay = f"; the CRDs that were applied stay: {', '.join(before.crds)}" if before.crds else ""
    return reverted.words + stay


async def find_drift(repo: Path, run: str, target: Target, good: Deployed) -> list[str]:
    """What was changed outside toto since the last good, one line for each change. Raises `ClusterUnreachable`."""
    helm, (release, tree) = await connect(repo, run), await _of_commit(repo, run, target, good.commit)
    deployed = DeployedRelease.of(good)
    outside = await helm.outside_change(release, deployed.revision)
    difference = await helm.drift(release, known=deployed.baseline, masks=await helm.secrets(release, tree))
    return [*([outside] if outside else []), *([] if difference.empty else difference.lines())]


async def release_at(repo: Path, run: str, target: Target, commit: str) -> Release:
    """A release as it is at a commit. Raises `TotoError` when it is not in the commit."""
    return (await _of_commit(repo, run, target, commit))[0]


async def _of_commit(repo: Path, run: str, target: Target, commit: str) -> tuple[Release, Path]:
    """The same, with the files of the commit."""
    tree = runs.run_directory(repo, run) / "back" / f"helm-{target.name}"
    await git.checkout(repo, commit, tree)
    for release in helm_release.discover(tree):
        if release.name == target.name:
            return release, tree
    raise TotoError(f"there is no such release at {commit[:8]}", target=target.label)
