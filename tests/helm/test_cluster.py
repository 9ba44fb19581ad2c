"""Releases on a real cluster, with helm 4 and helm 3: failures are reported, and no secret is shown."""

import asyncio
import functools
import http.server
import json
import logging
import os
import signal
import socket
import ssl
import subprocess
import threading
import uuid
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.lab.kube import Cluster
from toto.base import process
from toto.base.errors import InputError
from toto.helm.cluster import Helm
from toto.helm.command import (
    AccessRefused,
    ChartUnavailable,
    ClusterUnreachable,
    HelmError,
    ReleaseBusy,
    ReleaseFailed,
    ReleaseMissing,
    RenderFailed,
)
from toto.helm.release import Release, discover
from toto.helm.revert import CannotGoBack, Place, RevertedRelease, revert
from toto.helm.stored import Deployed

pytestmark = pytest.mark.minutes(2)

POISON = "poison-4d1c"
CHART = "apiVersion: v2\nname: page\nversion: 0.1.0\n"
FILES = {
    "values.yaml": "{}",
    "chart/Chart.yaml": CHART,
    "chart/values.yaml": "text: hello\npassword: first-secret\nreplicas: 1\nfate: ''\ncheck: ''\n",
    "chart/templates/all.yaml": """
apiVersion: v1
kind: ConfigMap
metadata: {name: page}
data: {text: {{ .Values.text | quote }}, kube: {{ .Capabilities.KubeVersion | quote }}}
---
apiVersion: v1
kind: Secret
metadata: {name: page}
stringData: {password: {{ .Values.password | quote }}}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: page}
spec:
  replicas: {{ .Values.replicas }}
  selector: {matchLabels: {app: page}}
  template:
    metadata:
      labels: {app: page}
      annotations: {lab/fate: {{ .Values.fate | quote }}, text: {{ .Values.text | quote }}}
    spec:
      containers: [{name: page, image: page, resources: {limits: {cpu: 1000m}}}]
""",
    "chart/templates/test.yaml": """
apiVersion: v1
kind: Pod
metadata:
  name: page-test
  annotations: {helm.sh/hook: test, lab/fate: {{ .Values.check | quote }}}
spec:
  restartPolicy: Never
  containers: [{name: test, image: test}]
""",
}


@dataclass
class Lab:
    """One helm, one cluster, and a tree with one release, in a namespace of its own."""

    helm: Helm
    cluster: Cluster
    tree: Path
    namespace: str

    def write(self, files: dict[str, str]) -> None:
        for name, text in files.items():
            path = self.tree / "helm/page" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    def set(self, **values: object) -> None:
        self.write({"values.yaml": json.dumps(values)})

    def release(self, **fields: object) -> Release:
        self.write({"release.yaml": json.dumps({"namespace": self.namespace, "timeout": 120} | fields)})
        (release,) = discover(self.tree)
        return release

    async def upgrade(self, release: Release | None = None, *, run: str = "", **values: object) -> Deployed:
        self.set(**values)
        return await self.helm.upgrade(release or self.release(), self.tree, run=run)

    async def get(self, kind: str, name: str = "page", api: str = "api/v1") -> Any:
        return await self.cluster.get(f"/{api}/namespaces/{self.namespace}/{kind}/{name}")

    async def text(self) -> str | None:
        found = await self.get("configmaps")
        return None if found is None else str(found["data"]["text"])

    async def by_hand(self, *words: str) -> None:
        """What someone does with a helm of their own."""
        await process.run(
            [self.helm.binary, *words, "--namespace", self.namespace], timeout=120, env=self.cluster.environment
        )

    async def change_by_hand(self, replicas: int) -> None:
        await self.cluster.patch(
            f"/apis/apps/v1/namespaces/{self.namespace}/deployments/page", {"spec": {"replicas": replicas}}
        )

    def helms(self) -> list[int]:
        """The processes that are at work on this namespace."""
        found = subprocess.run(
            ["pgrep", "--full", f"namespace {self.namespace}"], stdout=subprocess.PIPE, text=True, check=False
        )
        return [int(pid) for pid in found.stdout.split()]

    async def until_pending(self, release: Release) -> None:
        async with asyncio.timeout(120):
            while (now := await self.helm.current(release)) is None or not now.pending:
                await asyncio.sleep(0.05)


@pytest.fixture
def lab(request: pytest.FixtureRequest, cluster: Cluster, tmp_path: Path) -> Lab:
    """With helm 4, unless a test says otherwise."""
    binary = os.environ[getattr(request, "param", "TOTO_HELM4")]
    made = Lab(
        Helm(binary, cluster.kubeconfig, tmp_path / "state"), cluster, tmp_path / "tree", f"page-{uuid.uuid4().hex[:8]}"
    )
    made.write(FILES)
    return made


both = pytest.mark.parametrize("lab", ["TOTO_HELM4", "TOTO_HELM3"], indirect=True)


@both
async def test_release_is_installed_changed_rolled_back_and_removed(lab: Lab) -> None:
    release, helm, tree = lab.release(), lab.helm, lab.tree
    assert await helm.current(release) is None
    assert await helm.history(release) == []
    assert await helm.outside_change(release, 0) is None
    assert await helm.lint(release, tree) == ()
    assert (await helm.difference(release, tree)).lines() == [
        "+ ConfigMap page",
        "+ Pod page-test",
        "+ Secret page",
        "+ Deployment page",
    ]

    first = await helm.upgrade(release, tree, description="toto: commit 1234")
    assert (first.number, first.status, first.chart, first.description, first.tests, first.pending) == (
        1,
        "deployed",
        "page-0.1.0",
        "toto: commit 1234",
        ("page-test",),
        False,
    )
    assert await lab.text() == "hello"
    assert (await lab.get("deployments", api="apis/apps/v1"))["status"]["readyReplicas"] == 1
    assert [(each.name, each.passed, each.said) for each in await helm.test(release)] == [("page-test", True, "")]
    assert (await helm.difference(release, tree)).empty
    assert (await helm.drift(release)).empty
    assert await helm.outside_change(release, 1, first.digest) is None
    assert await helm.repair(release) is None

    lab.set(text="again", password=POISON, replicas=2)
    release = lab.release()
    assert (await helm.difference(release, tree)).lines() == [
        "~ ConfigMap page",
        "    data.text: hello → again",
        "~ Secret page",
        "    data.password: ****** → ******",
        "~ Deployment page",
        "    spec.replicas: 1 → 2",
        "    spec.template.metadata.annotations.text: hello → again",
    ]
    second = await helm.upgrade(release, tree)
    assert second.number == 2 and second.digest != first.digest
    assert await lab.text() == "again"

    back = await helm.rollback(release, 1)
    assert (back.number, back.status, back.digest) == (3, "deployed", first.digest)
    assert await lab.text() == "hello"
    assert [(each.number, each.status) for each in await helm.history(release)] == [
        (1, "superseded"),
        (2, "superseded"),
        (3, "deployed"),
    ]

    assert await helm.uninstall(release)
    assert await lab.text() is None
    assert not await helm.uninstall(release)
    assert await helm.outside_change(release, 3) == "it was deleted outside toto, which had left revision 3"
    assert (await helm.drift(release)).lines() == ["- the release page"]


async def test_failing_upgrade_is_reported_with_its_pods_and_a_rollback_brings_the_release_back(lab: Lab) -> None:
    good = await lab.upgrade()
    with pytest.raises(ReleaseFailed) as caught:
        await lab.upgrade(lab.release(timeout=2), text="bad", fate="stuck")
    assert str(caught.value).startswith("helm/page: UPGRADE FAILED: ")
    assert "deadline exceeded" in str(caught.value)
    assert "\npod page-" in str(caught.value) and ": page runs but is not ready\nnext: " in str(caught.value)
    assert await lab.text() == "bad"
    now = await lab.helm.current(lab.release())
    assert now is not None and (now.number, now.status, now.pending) == (2, "failed", False)
    back = await lab.helm.rollback(lab.release(), good.number)
    assert (back.number, back.digest) == (3, good.digest)
    assert await lab.text() == "hello"
    assert await lab.helm.outside_change(lab.release(), back.number) is None


async def test_first_installation_that_fails_is_removed_again(lab: Lab) -> None:
    with pytest.raises(ReleaseFailed):
        await lab.upgrade(lab.release(timeout=2), fate="stuck")
    now = await lab.helm.current(lab.release())
    assert now is not None and now.status == "failed"
    assert await lab.helm.uninstall(lab.release())
    assert await lab.text() is None


@both
async def test_upgrade_that_was_killed_is_repaired_and_the_next_one_works(lab: Lab) -> None:
    good = await lab.upgrade()
    release = lab.release()
    upgrade = asyncio.create_task(lab.upgrade(text="bad", fate="stuck"))
    await lab.until_pending(release)
    for pid in lab.helms():
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(ReleaseFailed, match="helm was ended by SIGKILL"):
        await upgrade

    lab.set(text="next")
    difference = str(await lab.helm.difference(release, lab.tree))
    assert "data.text: bad → next" in difference and "kube" not in difference
    with pytest.raises(ReleaseBusy, match="a different helm is working on it, or was killed"):
        await lab.helm.upgrade(release, lab.tree)
    with pytest.raises(ReleaseBusy, match=r"it has been pending-upgrade for \d+ s: that helm may be alive"):
        await lab.helm.repair(release)
    done = await lab.helm.repair(release, good.number, patience=0)
    assert done == (
        "a helm that was killed had left it pending-upgrade at revision 2; it was rolled back to "
        "revision 1, as revision 3"
    )
    assert await lab.text() == "hello"
    assert (await lab.upgrade(text="next")).number == 4
    assert await lab.text() == "next"


async def test_killed_upgrade_is_repaired_without_a_record_to_what_was_whole(lab: Lab) -> None:
    await lab.upgrade(text="whole")
    with pytest.raises(ReleaseFailed):
        await lab.upgrade(lab.release(timeout=1), text="failed", fate="stuck")
    assert await lab.helm.last_whole(lab.release()) == 1
    upgrade = asyncio.create_task(lab.upgrade(text="killed", fate="stuck"))
    await lab.until_pending(lab.release())
    for pid in lab.helms():
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(ReleaseFailed):
        await upgrade
    assert "rolled back to revision 1," in str(await lab.helm.repair(lab.release(), patience=0))
    assert await lab.text() == "whole"
    assert await lab.helm.last_whole(lab.release()) == 4


async def place(lab: Lab, release: Release) -> Place:
    """What the roll-out's `inspect` finds and records."""
    now = await lab.helm.newest(release)
    if now is None:
        return Place(newest=0)
    to = now.number if now.status == "deployed" else await lab.helm.last_whole(release)
    return Place(to, now.number, now.status)


async def test_release_is_reverted_to_what_it_was(lab: Lab) -> None:
    release = lab.release()
    nothing = await place(lab, release)
    assert await revert(lab.helm, release, nothing, "run-1") == RevertedRelease(0, "not installed")
    await lab.upgrade(run="run-1")
    gone = RevertedRelease(0, f"uninstalled from namespace {lab.namespace}")
    assert await revert(lab.helm, release, nothing, "run-1") == gone
    assert await lab.text() is None
    kept = "  name: kept\n  annotations: {helm.sh/resource-policy: keep}\n"
    lab.write({"chart/templates/kept.yaml": f"apiVersion: v1\nkind: ConfigMap\nmetadata:\n{kept}"})
    await lab.upgrade(run="run-1")
    words = (await revert(lab.helm, release, nothing, "run-1")).words
    assert words == f"{gone.words}; what the chart has helm keep stays: ConfigMap kept"
    assert await lab.get("configmaps", "kept") is not None
    lab.write({"chart/templates/kept.yaml": ""})
    await lab.upgrade(text="first", run="run-1")
    first = await place(lab, release)
    assert await revert(lab.helm, release, first, "run-2") == RevertedRelease(1, "at revision 1, as it was")
    await lab.upgrade(text="second", run="run-2")
    back = RevertedRelease(3, "rolled back to revision 1, as revision 3")
    assert await revert(lab.helm, release, first, "run-2") == back
    assert await revert(lab.helm, release, first, "run-2") == back  # one that was killed before it could say so
    assert await lab.text() == "first"


@both
async def test_nothing_that_was_there_before_is_uninstalled(lab: Lab) -> None:
    """A release that somebody else has installed, whole or not, is what it was after a failed run."""
    chart = str(lab.tree / "helm/page/chart")
    release = lab.release(timeout=2)
    with pytest.raises(process.CommandFailed):
        await lab.by_hand(
            "install", "page", chart, "--create-namespace", "--set", "text=theirs,fate=stuck", "--wait", "--timeout=1s"
        )
    before = await place(lab, release)
    assert before == Place(0, 1, "failed")
    assert "at revision 1 (page-0.1.0, failed), and not by toto" in str(await lab.helm.outside_change(release, 0))
    with pytest.raises(ReleaseFailed):
        await lab.upgrade(release, text="ours", fate="stuck", run="run-1")
    assert await lab.text() == "ours"
    done = await revert(lab.helm, release, before, "run-1")
    assert done.words == "rolled back to revision 1, which was never whole, as revision 3"
    assert await lab.text() == "theirs"


async def test_a_release_that_was_uninstalled_keeps_its_history(lab: Lab) -> None:
    chart = str(lab.tree / "helm/page/chart")
    await lab.by_hand("install", "page", chart, "--create-namespace")
    await lab.by_hand("uninstall", "page", "--keep-history", "--wait")
    release = lab.release(timeout=2)
    before = await place(lab, release)
    assert before == Place(0, 1, "uninstalled")
    with pytest.raises(ReleaseFailed):
        await lab.upgrade(release, text="ours", fate="stuck", run="run-1")
    assert await revert(lab.helm, release, before, "run-1") == RevertedRelease(
        0, f"uninstalled from namespace {lab.namespace}"
    )
    assert await lab.text() is None
    newest = await lab.helm.newest(release)
    assert newest is not None and newest.status == "uninstalled"


async def test_what_somebody_does_during_the_run_stops_its_way_back(lab: Lab) -> None:
    release, chart = lab.release(), str(lab.tree / "helm/page/chart")
    nothing = await place(lab, release)
    await lab.upgrade(text="ours", run="run-1")
    await lab.by_hand("upgrade", "page", chart, "--set", "text=theirs")
    with pytest.raises(CannotGoBack) as caught:
        await revert(lab.helm, release, nothing, "run-1")
    assert "cannot go back by itself: revision 2 (page-0.1.0, deployed, 20" in str(caught.value)
    assert f"look at `helm --namespace {lab.namespace} history page`; then `helm" in str(caught.value)
    assert await lab.text() == "theirs"
    theirs = await place(lab, release)
    await lab.upgrade(text="ours again", run="run-2")
    with pytest.raises(CannotGoBack, match=r"revision 3 .* is not of this run"):
        await revert(lab.helm, release, theirs, "run-3")
    done = await revert(lab.helm, release, theirs, "run-2")
    assert done.words == "rolled back to revision 2, as revision 4"
    assert await lab.text() == "theirs"


async def test_the_record_of_an_older_version_uninstalls_nothing(lab: Lab) -> None:
    release = lab.release()
    await lab.upgrade(text="first")
    with pytest.raises(CannotGoBack, match="did not record whether the release was there before"):
        await revert(lab.helm, release, Place(), "run-1")
    assert await lab.text() == "first"
    await lab.upgrade(text="second")
    assert (await revert(lab.helm, release, Place(1), "run-1")).words == "rolled back to revision 1, as revision 3"
    await lab.by_hand("uninstall", "page")
    assert (await revert(lab.helm, release, Place(), "run-1")).words == "not installed"


@both
async def test_what_is_there_and_not_the_releases_is_refused_before_anything_is_touched(lab: Lab) -> None:
    release = lab.release()
    await lab.cluster.post("/api/v1/namespaces", {"metadata": {"name": lab.namespace}})
    maps = f"/api/v1/namespaces/{lab.namespace}/configmaps"
    theirs = {"metadata": {"name": "page"}, "data": {"text": "theirs"}}
    await lab.cluster.post(maps, theirs)
    with pytest.raises(RenderFailed, match="cannot be imported into the current release") as caught:
        await lab.helm.difference(release, lab.tree)
    assert "next: it is not this release's: remove it or rename it" in str(caught.value)
    with pytest.raises(RenderFailed):
        await lab.upgrade()
    labels = {
        "labels": {"app.kubernetes.io/managed-by": "Helm"},
        "annotations": {"meta.helm.sh/release-name": "page", "meta.helm.sh/release-namespace": lab.namespace},
    }
    await lab.cluster.patch(f"{maps}/page", {"metadata": labels})  # as the release that was there has left it
    with pytest.raises(RenderFailed, match="ConfigMap page: there already, with the labels of a release of this name"):
        await lab.helm.difference(release, lab.tree)
    assert await lab.text() == "theirs" and await lab.helm.newest(release) is None
    await lab.cluster.delete(f"{maps}/page")
    await lab.upgrade(run="run-1")
    await lab.cluster.post(maps, theirs | {"metadata": {"name": "more"} | labels})
    more = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: more, annotations: {POLICY}}\n"
    lab.write({"chart/templates/more.yaml": more.replace("POLICY", "")})
    with pytest.raises(RenderFailed, match="ConfigMap more: there already"):
        await lab.upgrade()
    lab.write({"chart/templates/more.yaml": more.replace("POLICY", "helm.sh/resource-policy: keep")})
    before = await place(lab, release)
    await lab.upgrade(run="run-2")
    await revert(lab.helm, release, before, "run-2")
    assert (await lab.get("configmaps", "more"))["data"] == {"text": "theirs"}


async def test_killed_installation_is_reverted_and_that_of_somebody_else_is_not_removed(lab: Lab) -> None:
    release = lab.release()
    before = await place(lab, release)
    upgrade = asyncio.create_task(lab.upgrade(fate="stuck", run="run-1"))
    await lab.until_pending(release)
    for pid in lab.helms():
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(ReleaseFailed):
        await upgrade
    with pytest.raises(ReleaseBusy, match="no revision of it was ever whole: toto removes nothing") as caught:
        await lab.helm.repair(release, patience=0)
    assert f"next: `helm --namespace {lab.namespace} uninstall page`, and push again" in str(caught.value)
    left = await place(lab, release)
    assert left == Place(0, 1, "pending-install")
    assert (await revert(lab.helm, release, left, "run-2")).words == "at revision 1, as it was"
    with pytest.raises(CannotGoBack):
        await revert(lab.helm, release, before, "run-2")
    assert "uninstalled" in (await revert(lab.helm, release, before, "run-1")).words
    assert await lab.helm.newest(release) is None
    assert (await lab.upgrade()).number == 1


async def test_cancelled_upgrade_leaves_no_helm_and_nothing_pending(lab: Lab) -> None:
    await lab.upgrade()
    upgrade = asyncio.create_task(lab.upgrade(text="bad", fate="stuck"))
    await lab.until_pending(lab.release())
    upgrade.cancel()
    with pytest.raises(asyncio.CancelledError):
        await upgrade
    assert lab.helms() == []
    now = await lab.helm.current(lab.release())
    assert now is not None and (now.number, now.status) == (2, "failed")


async def test_what_is_done_outside_toto_is_reported_in_plain_words(lab: Lab) -> None:
    chart = str(lab.tree / "helm/page/chart")
    first = await lab.upgrade()
    release = lab.release()
    assert await lab.helm.outside_change(release, 0) == (
        "it is there already, at revision 1 (page-0.1.0), and not by toto"
    )
    await lab.by_hand("upgrade", "page", chart, "--set", f"text=hand,password={POISON}")
    words = await lab.helm.outside_change(release, 1)
    assert words is not None
    assert words.startswith("outside toto it was upgraded to page-0.1.0 (revision 2, deployed, 20")
    await lab.by_hand("rollback", "page", "1")
    words = await lab.helm.outside_change(release, 1)
    assert words is not None
    assert ", then rolled back to revision 1 (revision 3, deployed, 20" in words
    assert words.endswith(" UTC); toto had left revision 1")
    await lab.by_hand("uninstall", "page", "--keep-history")
    assert await lab.helm.outside_change(release, 1) == "it was deleted outside toto, which had left revision 1"
    await lab.by_hand("uninstall", "page")
    await lab.by_hand("upgrade", "--install", "page", chart, "--set", "text=anew")
    assert await lab.helm.outside_change(release, 3) == (
        "it was deleted and installed anew outside toto: it is at revision 1 (page-0.1.0), toto had left revision 3"
    )
    assert "installed anew" in str(await lab.helm.outside_change(release, 1, first.digest))
    lab.set()
    assert "data.text: anew → hello" in str(await lab.helm.difference(release, lab.tree))


async def test_rollback_that_cannot_be_done_is_reported(lab: Lab) -> None:
    release = lab.release()
    with pytest.raises(ReleaseMissing, match="helm/page: cannot be rolled back to revision 1: it is not installed"):
        await lab.helm.rollback(release, 1)
    await lab.upgrade()
    with pytest.raises(ReleaseFailed, match="helm/page: release has no 99 version"):
        await lab.helm.rollback(release, 99)
    await lab.upgrade(text="next")
    lab.cluster.fates[f"{lab.namespace}/page-"] = "stuck"
    try:
        with pytest.raises(ReleaseFailed, match="deadline exceeded"):
            await lab.helm.rollback(lab.release(timeout=1), 1)
    finally:
        del lab.cluster.fates[f"{lab.namespace}/page-"]
    now = await lab.helm.current(release)
    assert now is not None and now.status == "failed"


async def test_what_was_changed_by_hand_is_drift_and_stops_neither_upgrade_nor_rollback(lab: Lab) -> None:
    await lab.upgrade(replicas=1)
    await lab.change_by_hand(3)
    await lab.cluster.delete(f"/api/v1/namespaces/{lab.namespace}/configmaps/page")
    await lab.cluster.patch(f"/api/v1/namespaces/{lab.namespace}/secrets/page", {"stringData": {"password": POISON}})
    assert (await lab.helm.drift(lab.release())).lines() == [
        "- ConfigMap page",
        "~ Secret page",
        "    data.password: ****** → ******",
        "~ Deployment page",
        "    spec.replicas: 1 → 3",
    ]
    await lab.upgrade(replicas=2)
    assert (await lab.helm.drift(lab.release())).empty
    await lab.change_by_hand(3)
    await lab.helm.rollback(lab.release(), 1)
    assert (await lab.helm.drift(lab.release())).empty


async def test_release_of_helm_3_is_carried_on_by_helm_4(lab: Lab) -> None:
    newer, lab.helm = lab.helm, Helm(os.environ["TOTO_HELM3"], lab.helm.kubeconfig, lab.helm.state)
    await lab.upgrade()
    lab.helm = newer
    assert (await lab.upgrade(text="next")).number == 2
    assert (await lab.helm.rollback(lab.release(), 1)).number == 3
    assert await lab.text() == "hello"


async def test_failing_test_of_a_chart_is_a_result(lab: Lab) -> None:
    await lab.upgrade(check="failed")
    (result,) = await lab.helm.test(lab.release())
    assert (result.name, result.passed) == ("page-test", False)
    assert "Error: " in result.said
    (stuck,) = await lab.helm.test(lab.release(timeout=1))
    assert not stuck.passed
    assert await lab.helm.test(lab.release(test=False)) == ()
    await lab.upgrade()
    assert [each.passed for each in await lab.helm.test(lab.release())] == [True]
    (lab.tree / "helm/page/chart/templates/test.yaml").unlink()
    assert (await lab.upgrade()).tests == ()
    assert await lab.helm.test(lab.release()) == ()


async def test_value_that_is_left_out_again_has_its_default(lab: Lab) -> None:
    await lab.upgrade(text="by hand")
    (lab.tree / "helm/page/values.yaml").unlink()
    release = lab.release()
    assert release.values == ()
    await lab.helm.upgrade(release, lab.tree)
    assert await lab.text() == "hello"


async def test_later_values_go_over_earlier_ones_whatever_the_files_are_called(lab: Lab) -> None:
    lab.write({"a, b.yaml": "text: earlier\nreplicas: 0\n", "é 'x'.yaml": "text: later\n"})
    await lab.helm.upgrade(lab.release(values=["a, b.yaml", "é 'x'.yaml"]), lab.tree)
    assert await lab.text() == "later"
    assert (await lab.get("deployments", api="apis/apps/v1"))["spec"]["replicas"] == 0


async def test_namespace_is_made_only_where_it_may_be(lab: Lab) -> None:
    with pytest.raises(ReleaseFailed, match="not found"):
        await lab.upgrade(lab.release(create_namespace=False))
    assert (await lab.upgrade(lab.release(create_namespace=True))).number == 1
    assert (await lab.upgrade(lab.release(create_namespace=False))).number == 2


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"chart/templates/x.yaml": "a: {{ .Values.x.y.z }}\n"}, "helm/page/chart/templates/x.yaml:1:1"),
        ({"chart/templates/x.yaml": "a: {{ if }}\n"}, "helm/page/chart/templates/x.yaml:1"),
        ({"chart/templates/x.yaml": "a: [\n"}, "YAML parse error on helm/page/chart/templates/x.yaml"),
        (
            {"chart/templates/x.yaml": '{{ fail (printf "no %s" .Values.password) }}\n'},
            "helm/page/chart/templates/x.yaml:1:3): no ******",
        ),
        (
            {"chart/templates/x.yaml": "apiVersion: v1\nkind: Nonsense\nmetadata: {name: x}\n"},
            'no matches for kind "Nonsense"',
        ),
        ({"chart/templates/x.yaml": "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: x}\ndta: {a: b}\n"}, '"dta"'),
        ({"chart/Chart.yaml": CHART + "kubeVersion: '>=1.99'\n"}, "incompatible with Kubernetes v"),
        (
            {"chart/Chart.yaml": CHART + "dependencies: [{name: x, version: 1.0.0, repository: ''}]\n"},
            "missing in charts/ directory: x",
        ),
        ({"values.yaml": f"password: [{POISON}\n"}, "failed to parse helm/page/values.yaml: "),
        ({"chart/values.schema.json": '{"properties": {"password": {"type": "integer"}}}'}, "got string, want integer"),
    ],
)
async def test_what_does_not_render_is_reported_by_the_repos_names(lab: Lab, files: dict[str, str], words: str) -> None:
    lab.set(password=POISON)
    lab.write(files)
    with pytest.raises(RenderFailed) as caught:
        await lab.helm.upgrade(lab.release(), lab.tree)
    assert words in str(caught.value) and str(caught.value).startswith("helm/page: ")
    assert str(caught.value).endswith("\nnext: fix helm/page/chart or its values, and push again")
    assert POISON not in str(caught.value) and str(lab.tree) not in str(caught.value)
    assert await lab.helm.current(lab.release()) is None


@both
async def test_a_chart_does_not_see_the_cluster(lab: Lab) -> None:
    await lab.cluster.post("/api/v1/namespaces", {"metadata": {"name": f"{lab.namespace}-other"}})
    secret = {"metadata": {"name": "theirs"}, "stringData": {"password": POISON}}
    await lab.cluster.post(f"/api/v1/namespaces/{lab.namespace}-other/secrets", secret)
    lab.write(
        {
            "chart/templates/spy.yaml": f"""
apiVersion: v1
kind: ConfigMap
metadata: {{name: spy}}
data:
  seen: {{{{ toJson (lookup "v1" "Secret" "{lab.namespace}-other" "theirs") | quote }}}}
  can: {{{{ .Capabilities.APIVersions.Has "apps/v1/Deployment" | quote }}}}
  braces: '{{{{ "{{{{" }}}} $labels }}}}'
"""
        }
    )
    await lab.upgrade()
    assert (await lab.get("configmaps", "spy"))["data"] == {"seen": "{}", "can": "true", "braces": "{{ $labels }}"}


async def test_a_schema_fetches_nothing(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text('{"type": "object"}')
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            for where in (f"http://127.0.0.1:{server.server_port}/x.json", f"file://{tmp_path}/schema.json"):
                lab.write({"chart/values.schema.json": json.dumps({"$ref": where})})
                with pytest.raises(RenderFailed):
                    await lab.helm.render_alone(lab.release(), lab.tree)
        finally:
            server.shutdown()
            thread.join()
    assert asked == []


def crd(name: str, **about: object) -> dict[str, Any]:
    kind = {"plural": f"{name}s", "singular": name, "kind": name.capitalize()}
    version = {"name": "v1", "served": True, "storage": True}
    schema = {"type": "object", "properties": {"size": {"type": "integer"}}, **about}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{name}s.example.org"},
        "spec": {
            "group": "example.org",
            "scope": "Namespaced",
            "names": kind,
            "versions": [version | {"schema": {"openAPIV3Schema": schema}}],
        },
    }


def one_of(name: str) -> str:
    return f"apiVersion: example.org/v1\nkind: {name.capitalize()}\nmetadata: {{name: one}}\nsize: 1\n"


async def description(lab: Lab, name: str) -> Any:
    """What the cluster's CRD says of itself; None where there is none."""
    found = await lab.cluster.get(f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{name}s.example.org")
    return found and found["spec"]["versions"][0]["schema"]["openAPIV3Schema"].get("description", "")


@both
async def test_crds_of_a_chart_are_told_and_applied_where_that_is_wanted(lab: Lab) -> None:
    """Helm only brings what is new of them with a new release."""
    old, new = (f"{letter}{uuid.uuid4().hex[:8]}" for letter in "pq")
    lab.write({"chart/crds/crd.yaml": json.dumps(crd(old, description="{{ not a template }}"))})
    first = await lab.helm.difference(lab.release(), lab.tree)
    assert f"+ CustomResourceDefinition {old}s.example.org" in first.lines()
    await lab.upgrade()
    assert await description(lab, old) == "{{ not a template }}"
    assert (await lab.helm.difference(lab.release(), lab.tree)).crds == ()

    lab.write(
        {"chart/crds/crd.yaml": json.dumps(crd(old, description="changed")), "chart/crds/b.yaml": json.dumps(crd(new))}
    )
    told = await lab.helm.difference(lab.release(), lab.tree)
    names = tuple(f"CustomResourceDefinition {each}s.example.org" for each in (new, old))
    assert told.empty and told.left_out == names
    assert told.summary == f"nothing to change; not applied: {', '.join(names)}"
    for name in names:
        assert f"! NOT APPLIED (`crds: apply` in release.yaml does): {name}" in told.lines()
    assert any(line.endswith("description: {{ not a template }} → changed") for line in told.lines()), told.lines()
    await lab.upgrade()
    assert await description(lab, old) == "{{ not a template }}" and await description(lab, new) is None

    release = lab.release(crds="apply")
    found = await lab.helm.difference(release, lab.tree)
    assert not found.empty and found.left_out == () and found.summary == "2 to apply (CRDs)"
    await lab.upgrade(release)
    assert await description(lab, old) == "changed" and await description(lab, new) == ""
    assert (await lab.helm.difference(release, lab.tree)).empty
    lab.write({"chart/crds/crd.yaml": json.dumps(crd(old, description="again"))})
    await lab.upgrade(release)
    assert await description(lab, old) == "again"
    everywhere = [lab.helm.binary, "list", "--all-namespaces", "--output", "json"]
    releases = json.loads((await process.run(everywhere, env=lab.cluster.environment)).stdout)
    assert not [each for each in releases if each["name"].startswith("toto-crds")]
    await lab.helm.uninstall(release)
    assert await description(lab, old) == "again"


@both
async def test_resources_of_a_crd_come_with_it(lab: Lab) -> None:
    old, new = (f"{letter}{uuid.uuid4().hex[:8]}" for letter in "pq")
    lab.write({"chart/crds/crd.yaml": json.dumps(crd(old)), "chart/templates/one.yaml": one_of(old)})
    assert f"+ {old.capitalize()} one" in (await lab.helm.difference(lab.release(), lab.tree)).lines()
    await lab.upgrade()
    assert (await lab.get(f"{old}s", "one", "apis/example.org/v1"))["size"] == 1
    lab.write({"chart/crds/b.yaml": json.dumps(crd(new)), "chart/templates/two.yaml": one_of(new)})
    with pytest.raises(RenderFailed, match=r"next: fix .*; if its crds/ has that kind: `crds: apply` in helm/page"):
        await lab.upgrade()
    release = lab.release(crds="apply")
    assert (await lab.helm.difference(release, lab.tree)).summary == "1 to add, 1 to apply (CRDs)"
    await lab.upgrade(release)
    for each in (old, new):
        assert (await lab.get(f"{each}s", "one", "apis/example.org/v1"))["size"] == 1


@both
@pytest.mark.parametrize(
    ("depends", "charts", "words"),
    [
        ("{name: x, version: 1.0.0, repository: ''}", {}, "x 1.0.0 (missing)"),
        ("{name: x, version: ^2.0.0, repository: ''}", {"x": "1.9.0"}, "x ^2.0.0 (wrong version)"),
        ("{name: x, version: 2.0.0, repository: ''}", {"x": "1.9.0", "x/charts/y": "1.0.0"}, "x 2.0.0 (wrong version)"),
        ("{name: x, version: ^1.0.0, repository: ''}", {"x": "1.9.0"}, ""),
        (
            "{name: x, version: 1.9.0, repository: ''}",
            {"x": "1.9.0 y"},
            "helm/page/chart/charts/x/charts/ does not have",
        ),
    ],
)
async def test_a_chart_without_what_it_depends_on_is_refused(
    lab: Lab, depends: str, charts: dict[str, str], words: str
) -> None:
    """(Helm itself renders a chart with a dependency of a wrong version, and says nothing.)"""
    lab.write({"chart/Chart.yaml": f"{CHART}dependencies: [{depends}]\n"})
    for name, version in charts.items():
        number, _, needs = version.partition(" ")
        more = f"dependencies: [{{name: {needs}, version: 1.0.0, repository: ''}}]\n" if needs else ""
        lab.write({f"chart/charts/{name}/Chart.yaml": f"apiVersion: v2\nname: {name[-1]}\nversion: {number}\n{more}"})
    if not words:
        return await lab.helm.check_dependencies(lab.release(), lab.tree)
    with pytest.raises(RenderFailed) as caught:
        await lab.helm.check_dependencies(lab.release(), lab.tree)
    assert words in str(caught.value) and "\nnext: run `helm dependency update helm/page/chart" in str(caught.value)


async def test_lint_warns_and_refuses(lab: Lab) -> None:
    lab.write({"chart/Chart.yaml": CHART + "dependencies: [{name: x}]\n"})
    (warning,) = await lab.helm.lint(lab.release(), lab.tree)
    assert warning == "[WARNING] helm/page/chart: chart directory is missing these dependencies: x"
    lab.write({"chart/templates/x.yaml": "a: {{ .Values.x.y.z }}\n"})
    with pytest.raises(RenderFailed, match=r"\[ERROR\] templates/: .*helm/page/chart/templates/x.yaml:1:1"):
        await lab.helm.lint(lab.release(), lab.tree)


async def test_no_secret_is_shown_anywhere(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    said: list[object] = []

    async def hear(action: Awaitable[object]) -> None:
        try:
            said.append(await action)
        except (HelmError, InputError) as error:
            said.append((str(error), repr(error), error.__dict__, error.__cause__, error.__context__))

    lab.write(
        {
            "chart/templates/url.yaml": """
apiVersion: v1
kind: ConfigMap
metadata: {name: url}
data: {url: "postgres://me:{{ .Values.password }}@db"}
""",
            "chart/templates/NOTES.txt": "The password is {{ .Values.password }}\n",
        }
    )
    for number, more in enumerate(({"check": "failed"}, {"fate": "stuck"})):
        lab.set(password=f"{POISON}-{number}", **more)
        release = lab.release(timeout=2 if "fate" in more else 120)
        for verb in (lab.helm.difference, lab.helm.lint, lab.helm.upgrade):
            await hear(verb(release, lab.tree))
        for read in (lab.helm.current, lab.helm.history, lab.helm.drift, lab.helm.test):
            await hear(read(release))
    # The API server's own words on a Secret that is none quote it, and not from its beginning.
    lab.write(
        {
            "chart/templates/bad.yaml": "apiVersion: v1\nkind: Secret\nmetadata: {name: bad}\n"
            "data: {p: '{{ .Values.password }}!!'}\n"
        }
    )
    await hear(lab.helm.upgrade(release, lab.tree))
    for read in (lab.helm.current, lab.helm.history, lab.helm.drift):
        await hear(read(release))
    await hear(lab.helm.rollback(release, 99))
    everything = f"{said}\n{caplog.text}"
    assert "data.password: ****** → ******" in everything and "base64" in everything
    assert "postgres://me:******@db" in everything
    assert "poison" not in everything and "son-4d1c" not in everything and "cG9pc29u" not in everything
    token = lab.cluster.token
    assert token not in everything


async def test_helm_gets_nothing_of_totos_own_environment(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PREFECT_API_AUTH_STRING", "TOTO_SECRET", "HELM_KUBETOKEN", "GIT_DIR", "AWS_PROFILE"):
        monkeypatch.setenv(name, POISON)
    spy = tmp_path / "helm"
    spy.write_text(f'#!/bin/sh\nenv > {tmp_path}/env\nexec {lab.helm.binary} "$@"\n')
    spy.chmod(0o755)
    helm = Helm(str(spy), lab.helm.kubeconfig, lab.helm.state)
    assert await helm.current(lab.release()) is None
    env = (tmp_path / "env").read_text().splitlines()
    assert [line for line in env if POISON in line] == [f"AWS_PROFILE={POISON}"]
    assert f"KUBECONFIG={lab.cluster.kubeconfig}" in env
    assert f"HELM_CACHE_HOME={tmp_path}/state/cache" in env
    assert f"KUBECACHEDIR={tmp_path}/state/cache/kube" in env  # and not below the home folder


async def test_cluster_that_cannot_be_reached_is_reported_quickly(lab: Lab, tmp_path: Path) -> None:
    def helm(name: str, change: Callable[[str], str]) -> Helm:
        path = tmp_path / name
        path.write_text(change(lab.cluster.kubeconfig.read_text()))
        return Helm(lab.helm.binary, path, lab.helm.state)

    release = lab.release()
    await lab.upgrade()
    with socket.socket() as silent, socket.socket() as closed:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        closed.bind(("127.0.0.1", 0))
        nobody, hanging = (f"https://127.0.0.1:{each.getsockname()[1]}" for each in (closed, silent))
        refused = helm("refused", lambda text: text.replace(lab.cluster.url, nobody))
        for read in (refused.current, refused.history, refused.drift, refused.test, refused.uninstall, refused.repair):
            with pytest.raises(ClusterUnreachable, match="connection refused\nnext: is the cluster up"):
                await read(release)
        for verb in (refused.difference, refused.upgrade):
            with pytest.raises(ClusterUnreachable):
                await verb(release, lab.tree)
        assert "kind: ConfigMap" in await refused.render(release, lab.tree)
        slow = helm("slow", lambda text: text.replace(lab.cluster.url, hanging))
        slow.patience = 1
        with pytest.raises(ClusterUnreachable, match="did not end within 1 s"):
            await slow.current(release)
    wrong = helm("wrong", lambda text: text.replace(lab.cluster.token, POISON))
    stranger = helm("stranger", lambda text: text.replace(str(lab.cluster.ca), str(other_ca(tmp_path)[0])))
    garbage = helm("garbage", lambda text: f"token: {POISON}: [")
    for each in (wrong, stranger, garbage):
        with pytest.raises(AccessRefused, match="check the kubeconfig") as caught:
            await each.current(release)
        assert POISON not in str(caught.value)
    with pytest.raises(ClusterUnreachable, match="there is no kubeconfig"):
        await Helm(lab.helm.binary, tmp_path / "nothing").current(release)


def other_ca(directory: Path) -> tuple[Path, Path]:
    """A certificate of 127.0.0.1's own, and its key."""
    certificate, key = directory / "tls.crt", directory / "tls.key"
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-nodes",
            "-days",
            "2",
            "-subj",
            "/CN=lab",
            "-addext",
            "subjectAltName=IP:127.0.0.1",
            "-keyout",
            key,
            "-out",
            certificate,
        ],
        check=True,
        capture_output=True,
    )
    return certificate, key


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A chart repository on https with the test's chart in it, in version 0.1.0."""
    (tmp_path / "chart/templates").mkdir(parents=True)
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    helm = os.environ["TOTO_HELM4"]
    subprocess.run(
        [helm, "package", tmp_path / "chart", "--destination", tmp_path / "repo"], check=True, capture_output=True
    )
    subprocess.run([helm, "repo", "index", tmp_path / "repo"], check=True)
    certificate, key = other_ca(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "repo"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("TOTO_CELL_ENDPOINTS", f"127.0.0.1:{server.server_port}")
        yield f"https://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


async def test_remote_chart_is_fetched_once(lab: Lab, repository: str, tmp_path: Path) -> None:
    release = lab.release(chart="page", repo=repository, version="0.1.0")
    lab.set(text="remote")
    assert (await lab.helm.difference(release, lab.tree)).added
    (tmp_path / "repo/index.yaml").unlink()  # what was rehearsed is deployed, whatever became of the repository
    assert (await lab.helm.upgrade(release, lab.tree)).chart == "page-0.1.0"
    assert await lab.text() == "remote"
    with pytest.raises(ChartUnavailable, match="helm/page: "):
        await lab.helm.render(lab.release(chart="page", repo=repository, version="0.2.0"), lab.tree)


async def test_a_chart_of_a_private_network_is_not_fetched(
    lab: Lab, repository: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TOTO_CELL_ENDPOINTS")
    release = lab.release(chart="page", repo=repository, version="0.1.0")
    with pytest.raises(ChartUnavailable, match="connection refused"):
        await lab.helm.render_alone(release, lab.tree)


async def test_helm_that_is_too_old_or_absent_is_reported(tmp_path: Path) -> None:
    old = tmp_path / "helm"
    old.write_text("#!/bin/sh\necho v3.9.0\n")
    old.chmod(0o755)
    with pytest.raises(HelmError, match=r"is of version v3\.9\.0\nnext: toto needs helm 3\.13 or newer"):
        await Helm(str(old), state=tmp_path).major()
    with pytest.raises(process.CommandNotFound, match="no-such-helm"):
        await Helm("no-such-helm", state=tmp_path).major()
