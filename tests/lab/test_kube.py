"""The lab's cluster, real and stand-in, as both helms see it: what the tests of toto's own helm rest on."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import background
from tests.lab.kube import SETUP, Cluster, ClusterError, cluster_or_stand_in, stand_in
from toto.base import process
from toto.cell.namespace import own_addresses

pytestmark = pytest.mark.minutes(1)

CHART = {
    "Chart.yaml": "apiVersion: v2\nname: page\nversion: 0.1.0\n",
    "values.yaml": 'text: hello\nsidecar: false\nfate: ""\ncheck: ""\n',
    "templates/all.yaml": """
apiVersion: v1
kind: ConfigMap
metadata: {name: {{ .Release.Name }}}
data: {text: {{ .Values.text | quote }}}
---
apiVersion: v1
kind: Service
metadata: {name: {{ .Release.Name }}}
spec:
  selector: {app: {{ .Release.Name }}}
  ports: [{port: 80, protocol: TCP}]
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: {{ .Release.Name }}}
spec:
  replicas: 2
  selector: {matchLabels: {app: {{ .Release.Name }}}}
  template:
    metadata:
      labels: {app: {{ .Release.Name }}}
      annotations: {lab/fate: {{ .Values.fate | quote }}, text: {{ .Values.text | quote }}}
    spec:
      containers:
        {{- if .Values.sidecar }}
        - {name: sidecar, image: sidecar}
        {{- end }}
        - {name: page, image: page, env: [{name: TEXT, value: {{ .Values.text | quote }}}]}
""",
    "templates/test.yaml": """
apiVersion: v1
kind: Pod
metadata:
  name: {{ .Release.Name }}-test
  annotations: {helm.sh/hook: test, lab/fate: {{ .Values.check | quote }}}
spec:
  restartPolicy: Never
  containers: [{name: test, image: test}]
""",
}


@dataclass
class Helm:
    """One helm, one cluster, one namespace, one chart."""

    program: str
    cluster: Cluster
    chart: Path
    namespace: str

    async def __call__(self, *words: str, check: bool = True) -> process.Completed:
        return await process.run(
            [self.program, *words, "--namespace", self.namespace],
            check=check,
            timeout=300,
            env=self.cluster.environment,
        )

    async def upgrade(self, *sets: str, wait: str = "120s", check: bool = True) -> process.Completed:
        values = [word for each in sets for word in ("--set", each)]
        return await self(
            "upgrade",
            "--install",
            "page",
            str(self.chart),
            "--create-namespace",
            "--wait",
            "--timeout",
            wait,
            *values,
            check=check,
        )

    async def text(self) -> str | None:
        """What the live ConfigMap says."""
        found = await self.cluster.get(f"/api/v1/namespaces/{self.namespace}/configmaps/page")
        return None if found is None else str(found["data"]["text"])

    async def deployment(self) -> Any:
        return await self.cluster.get(f"/apis/apps/v1/namespaces/{self.namespace}/deployments/page")

    async def containers(self) -> dict[str, str | None]:
        """The live Deployment's containers, each with the value of its variable."""
        found = (await self.deployment())["spec"]["template"]["spec"]["containers"]
        return {each["name"]: each["env"][0]["value"] if "env" in each else None for each in found}

    async def ready(self, replicas: int) -> None:
        """Wait until so many pods are ready."""
        async with asyncio.timeout(120):
            while (await self.deployment())["status"].get("readyReplicas", 0) != replicas:
                await asyncio.sleep(0.1)

    async def history(self) -> list[str]:
        return [each["status"] for each in json.loads((await self("history", "page", "--output", "json")).stdout)]


@pytest.fixture(scope="session")
def stand_in_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made: list[Cluster] = []

    async def until(stop: asyncio.Event, ready: Callable[[], None]) -> None:
        async with stand_in(tmp_path_factory.mktemp("stand-in")) as each:
            made.append(each)
            ready()
            await stop.wait()

    with background(until):
        yield made[0]


@pytest.fixture(params=["3 cluster", "4 cluster", "3 stand_in_cluster", "4 stand_in_cluster"])
def helm(request: pytest.FixtureRequest, tmp_path: Path) -> Helm:
    version, _, where = request.param.partition(" ")
    for name, text in CHART.items():
        (tmp_path / "chart" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "chart" / name).write_text(text)
    return Helm(
        os.environ[f"TOTO_HELM{version}"],
        request.getfixturevalue(where),
        tmp_path / "chart",
        f"page-{uuid.uuid4().hex[:8]}",
    )


def test_each_helm_is_the_one_it_is_called_and_is_fetched_once() -> None:
    for major in ("3", "4"):
        said = subprocess.run(
            [os.environ[f"TOTO_HELM{major}"], "version", "--short"], capture_output=True, text=True, check=True
        ).stdout
        assert said.startswith(f"v{major}.")
    again = subprocess.run([SETUP.with_name("helm")], capture_output=True, text=True, check=True)
    assert again.stdout + again.stderr == ""


async def test_release_is_installed_tested_upgraded_rolled_back_and_uninstalled(helm: Helm) -> None:
    await helm.upgrade()
    assert await helm.text() == "hello"
    assert (await helm.deployment())["status"]["readyReplicas"] == 2
    assert await helm.containers() == {"page": "hello"}
    passed = await helm("test", "page", "--timeout", "120s")
    assert "Phase:          Succeeded" in passed.stdout
    await helm.upgrade("text=again", "sidecar=true", "check=failed")
    assert await helm.text() == "again"
    assert await helm.containers() == {"sidecar": None, "page": "again"}
    failed = await helm("test", "page", "--timeout", "120s", check=False)
    assert failed.status == 1
    assert "Phase:          Failed" in failed.stdout
    await helm("rollback", "page", "1", "--wait", "--timeout", "120s")
    assert await helm.text() == "hello"
    assert await helm.containers() == {"page": "hello"}
    assert await helm.history() == ["superseded", "superseded", "deployed"]
    [listed] = json.loads((await helm("list", "--output", "json")).stdout)
    assert (listed["name"], listed["revision"]) == ("page", "3")
    await helm("uninstall", "page", "--wait", "--timeout", "120s")
    assert await helm.text() is None
    assert await helm.deployment() is None
    assert (await helm("list", "--output", "json")).stdout.strip() == "[]"


@pytest.mark.parametrize("helm", ["3 cluster", "4 cluster", "4 stand_in_cluster"], indirect=True)
async def test_pod_that_never_becomes_ready_makes_the_wait_fail(helm: Helm) -> None:
    failed = await helm.upgrade("fate=stuck", wait="2s", check=False)
    assert failed.status == 1
    assert "deadline exceeded" in failed.stderr or "timed out" in failed.stderr
    assert await helm.history() == ["failed"]
    await helm.upgrade("fate=")
    assert (await helm.deployment())["status"]["readyReplicas"] == 2


@pytest.mark.parametrize("helm", ["4 cluster"], indirect=True)
async def test_fate_given_from_outside_holds_for_pods_that_run(helm: Helm) -> None:
    await helm.upgrade()
    helm.cluster.fates[f"{helm.namespace}/page-"] = "stuck"
    try:
        await helm.ready(0)
        assert (await helm("test", "page", "--timeout", "1s", check=False)).status == 1
    finally:
        del helm.cluster.fates[f"{helm.namespace}/page-"]
    await helm.ready(2)


async def test_job_completes_and_daemon_is_scheduled(cluster: Cluster) -> None:
    namespace = f"plain-{uuid.uuid4().hex[:8]}"
    containers = [{"name": "x", "image": "x"}]
    job, daemon = (
        f"/apis/{group}/namespaces/{namespace}/{kind}"
        for group, kind in (("batch/v1", "jobs"), ("apps/v1", "daemonsets"))
    )
    await cluster.post("/api/v1/namespaces", {"metadata": {"name": namespace}})
    await cluster.post(
        job,
        {
            "metadata": {"name": "x"},
            "spec": {"template": {"spec": {"containers": containers, "restartPolicy": "Never"}}},
        },
    )
    await cluster.post(
        daemon,
        {
            "metadata": {"name": "x"},
            "spec": {
                "selector": {"matchLabels": {"app": "x"}},
                "template": {"metadata": {"labels": {"app": "x"}}, "spec": {"containers": containers}},
            },
        },
    )
    async with asyncio.timeout(120):
        while (await cluster.get(f"{job}/x"))["status"].get("succeeded") != 1:
            await asyncio.sleep(0.1)
        while (await cluster.get(f"{daemon}/x"))["status"].get("numberReady") != 1:
            await asyncio.sleep(0.1)
    await cluster.delete(f"/api/v1/namespaces/{namespace}")


LIVES = """
import asyncio, sys
from pathlib import Path
from tests.lab.kube import cluster

async def main() -> None:
    async with cluster(Path(sys.argv[1])):
        print("ready", flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


def test_nothing_is_left_of_a_cluster_whose_owner_was_killed(cluster: Cluster, tmp_path: Path) -> None:
    """(`cluster` is asked for its skip, where there is none, and for two at once.)"""
    owner = subprocess.Popen([sys.executable, "-c", LIVES, tmp_path / "kube"], stdout=subprocess.PIPE, text=True)
    assert owner.stdout
    try:
        assert owner.stdout.readline() == "ready\n"
        assert len(processes_of(tmp_path)) == 4
    finally:
        owner.kill()
        owner.wait()
        owner.stdout.close()
    deadline = time.monotonic() + 60
    while left := processes_of(tmp_path):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
    assert cluster.parts["etcd"].status is None


def processes_of(folder: Path) -> list[str]:
    return subprocess.run(
        ["pgrep", "--full", folder], stdout=subprocess.PIPE, text=True, check=False
    ).stdout.splitlines()


async def test_hanging_api_server_goes_on_where_it_was(cluster: Cluster) -> None:
    cluster.signal(signal.SIGSTOP)
    try:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await cluster.get("/version")
    finally:
        cluster.signal(signal.SIGCONT)
    assert (await cluster.get("/version"))["gitVersion"]
    with pytest.raises(ClusterError, match="422"):
        await cluster.post("/api/v1/namespaces", {"metadata": {"name": "not/a name"}})


async def test_a_webhook_is_not_looked_for_on_the_machines_network(cluster: Cluster) -> None:
    name = f"hook-{uuid.uuid4().hex[:8]}"
    with socket.create_server((own_addresses()[0], 0)) as listening:
        listening.setblocking(False)
        address, port = listening.getsockname()
        webhooks = "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations"
        await cluster.post("/api/v1/namespaces", {"metadata": {"name": name, "labels": {"hook": name}}})
        await cluster.post(
            webhooks,
            {
                "metadata": {"name": name},
                "webhooks": [
                    {
                        "name": "x.example.org",
                        "clientConfig": {"url": f"https://{address}:{port}/"},
                        "namespaceSelector": {"matchLabels": {"hook": name}},
                        "rules": [
                            {"apiGroups": [""], "apiVersions": ["v1"], "operations": ["*"], "resources": ["secrets"]}
                        ],
                        "sideEffects": "None",
                        "admissionReviewVersions": ["v1"],
                    }
                ],
            },
        )
        try:
            async with asyncio.timeout(60):
                while True:  # (until the API server knows of the webhook)
                    each = {"metadata": {"generateName": "x-"}}
                    try:
                        await cluster.post(f"/api/v1/namespaces/{name}/secrets", each)
                    except ClusterError as error:
                        assert "network is unreachable" in error.message, error
                        break
            with pytest.raises(BlockingIOError):
                listening.accept()
        finally:
            await cluster.delete(f"{webhooks}/{name}")
            await cluster.delete(f"/api/v1/namespaces/{name}")


async def test_stand_in_wants_the_token_and_refuses_what_it_has_not(stand_in_cluster: Cluster) -> None:
    with pytest.raises(ClusterError, match="401"):
        await replace(stand_in_cluster, token="another").get("/api/v1/namespaces")
    assert "stand-in" in (await stand_in_cluster.get("/version"))["gitVersion"]
    assert await stand_in_cluster.get("/apis/example.org/v1/things") is None
    secret = {"metadata": {"name": "one"}, "stringData": {"key": "value"}}
    secrets = "/api/v1/namespaces/default/secrets"
    assert (await stand_in_cluster.post(secrets, secret))["data"] == {"key": "dmFsdWU="}
    with pytest.raises(ClusterError, match="409"):
        await stand_in_cluster.post(secrets, secret)
    await stand_in_cluster.patch(f"{secrets}/one", {"data": {"key": None}, "metadata": {"labels": {"a": "b"}}})
    found = await stand_in_cluster.get(f"{secrets}?labelSelector=a%3Db")
    assert [(each["metadata"]["name"], each["data"]) for each in found["items"]] == [("one", {})]
    await stand_in_cluster.delete(f"{secrets}/one")
    assert await stand_in_cluster.get(f"{secrets}/one") is None


async def test_demo_says_that_a_stand_in_answers_where_there_is_no_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOTO_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TOTO_KUBE_ASSETS", raising=False)
    said: list[str] = []
    async with cluster_or_stand_in(tmp_path / "kube", said.append) as made:
        assert "stand-in" in (await made.get("/version"))["gitVersion"]
    assert "STAND-IN" in said[0]
    with pytest.raises(httpx.ConnectError):
        await made.get("/version")


def unpack(cache: Path, source: Path | None) -> subprocess.CompletedProcess[str]:
    # (setup/env must find the Python environment that is in use in this cache too.)
    cache.mkdir(exist_ok=True)
    env = os.environ | {"TOTO_CACHE": str(cache), "TOTO_KUBE_ASSETS": str(source or "")}
    return subprocess.run([SETUP, "unpack"], env=env, capture_output=True, text=True, check=False)


def test_programs_are_taken_unpacked_too_and_only_with_their_sums(tmp_path: Path) -> None:
    source, cache = tmp_path / "a folder", tmp_path / "cache"
    assert "make kube" in unpack(cache, None).stderr
    assert "not a folder" in unpack(cache, source).stderr
    source.mkdir()
    assert unpack(cache, source).returncode != 0
    for name in ("kube-apiserver", "kube-controller-manager"):
        (source / name).write_text("#!/bin/sh\n")
    (source / "kube-controller-manager.xz").write_bytes(b"someone else's")
    refused = unpack(cache, source)
    assert "not the one that setup/kube.sha256 names" in refused.stderr
    assert list((cache / "kube").iterdir()) == []
    (source / "kube-controller-manager.xz").unlink()
    taken = unpack(cache, source)
    assert taken.stdout == f"{cache}/kube\n"
    assert os.access(cache / "kube/kube-apiserver", os.X_OK)
    assert unpack(cache, None).stdout == taken.stdout
    assert {each.name for each in (cache / "kube").iterdir()} == {"kube-apiserver", "kube-controller-manager", "sha256"}
    (cache / "kube/sha256").write_text("of an older version\n")
    assert "make kube" in unpack(cache, None).stderr
