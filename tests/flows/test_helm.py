"""Whole runs that deploy a release to a real cluster: what they say, and what a failed one leaves."""

import json
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings

from flows.reconcile import reconcile
from tasks.helm import find_drift
from tests.conftest import PrefectServer
from tests.helm.test_cluster import FILES, crd, one_of
from tests.lab.kube import Cluster
from tests.repos import InfraRepo
from toto.base import process
from toto.ledger.ledger import Entry, Ledger
from toto.ledger.target import Target
from toto.plan.release import DeployedRelease

pytestmark = pytest.mark.minutes(2)


class World:
    """An infra repo with a release `page`, a cluster, and a namespace of its own in it."""

    def __init__(self, folder: Path, cluster: Cluster) -> None:
        self.repo, self.cluster, self.namespace = InfraRepo(folder / "repo"), cluster, f"page-{uuid.uuid4().hex[:8]}"
        files = {f"helm/page/{name}": text for name, text in FILES.items()}
        self.repo.commit({"machines.yaml": "machines: []\n", **files, **self.release()})

    def release(self, **fields: object) -> dict[str, str | None]:
        said = {"namespace": self.namespace, "timeout": 60} | fields
        return {"helm/page/release.yaml": "".join(f"{key}: {value}\n" for key, value in said.items())}

    async def push(self, values: str = "{}", more: dict[str, str | None] | None = None, **parameters: Any) -> str:
        """Commit values and more, deploy them, and return the run's last words."""
        self.repo.commit({"helm/page/values.yaml": values, **(more or {})})
        state = await reconcile(self.repo.bare, return_state=True, **parameters)
        return str(state.message)

    async def by_hand(self, *words: str) -> None:
        chart = str(self.repo.work / "helm/page/chart")
        argv = ["helm", *(chart if word == "CHART" else word for word in words), "--namespace", self.namespace]
        await process.run(argv, timeout=120, env=self.cluster.environment, check=False)

    async def text(self, namespace: str | None = None) -> str | None:
        found = await self.cluster.get(f"/api/v1/namespaces/{namespace or self.namespace}/configmaps/page")
        return None if found is None else str(found["data"]["text"])

    @property
    def entry(self) -> Entry:
        return Ledger(self.repo.bare).read().get(Target("helm", "page"))

    @property
    def good(self) -> tuple[str, int] | None:
        good = DeployedRelease.of(self.entry.good)
        return None if good is None else (good.namespace, good.revision)


@pytest.fixture
async def world(
    prefect_server: PrefectServer, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[World]:
    monkeypatch.setenv("TOTO_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig))
    with temporary_settings({PREFECT_API_URL: prefect_server.api_url, PREFECT_HOME: tmp_path / "prefect"}):
        yield World(tmp_path, cluster)


RED = "{text: ours, check: failed}"


async def test_what_a_failed_run_has_installed_goes_and_what_it_has_changed_goes_back(world: World) -> None:
    assert "helm/page: roll-out failed" in (said := await world.push(RED)) and said.endswith("; helm/page reverted")
    assert await world.text() is None and world.entry.good is None and world.entry.intent is None
    assert (await world.push("{text: first}")).endswith("helm/page deployed")
    assert world.good == (world.namespace, 1)
    assert (await world.push(RED)).endswith("; helm/page reverted")
    assert await world.text() == "first" and world.good == (world.namespace, 3)
    await world.by_hand("upgrade", "page", "CHART", "--set", "text=theirs")
    assert (await world.push(RED)).endswith("; helm/page reverted")
    assert await world.text() == "theirs"  # the run takes back what it did itself
    assert world.good == (world.namespace, 3)  # and that is still not what toto deployed
    await world.by_hand("uninstall", "page", "--wait")
    assert (await world.push(RED)).endswith("; helm/page reverted")
    assert await world.text() is None
    assert (await world.push("{text: second}")).endswith("helm/page deployed")
    assert await world.text() == "second" and world.good == (world.namespace, 1)


async def test_a_release_that_somebody_else_could_not_install_is_not_removed(world: World) -> None:
    theirs = ("install", "page", "CHART", "--create-namespace", "--set", "text=theirs,fate=stuck")
    await world.by_hand(*theirs, "--wait", "--timeout", "1s")
    assert (await world.push("{text: ours, fate: stuck}", world.release(timeout=2))).endswith("; helm/page reverted")
    assert await world.text() == "theirs" and world.entry.good is None


async def test_a_crd_that_is_left_out_is_not_called_recorded(world: World) -> None:
    name = f"p{uuid.uuid4().hex[:8]}"
    await world.push("{text: first}")
    more: dict[str, str | None] = {"helm/page/chart/crds/a.yaml": str(crd(name))}
    assert (await world.push("{text: first}", more)).endswith("helm/page recorded without its CRDs")
    where = f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{name}s.example.org"
    assert await world.cluster.get(where) is None
    assert (await world.push("{text: first}", world.release(crds="apply"))).endswith("helm/page deployed")
    assert await world.cluster.get(where) is not None
    assert (await world.push("{ text: first }")).endswith("helm/page recorded")


SERVICE = """
apiVersion: v1
kind: Service
metadata: {name: page}
spec: {ports: [{name: a, port: 80, protocol: TCP, targetPort: 0}, {name: b, port: 81, protocol: TCP}]}
"""


async def test_what_the_cluster_sets_itself_is_no_drift_and_the_order_of_a_list_is_deployed(world: World) -> None:
    more: dict[str, str | None] = {"helm/page/chart/templates/service.yaml": SERVICE}
    assert (await world.push("{}", more)).endswith("helm/page deployed")
    good = DeployedRelease.of(world.entry.good)
    assert good is not None and len(good.baseline) == 1  # the port 0 became 80
    assert await find_drift(world.repo.bare, str(uuid.uuid4()), Target("helm", "page"), good) == []
    assert (await world.push("{ }")).endswith("helm/page recorded")
    again = DeployedRelease.of(world.entry.good)
    assert again is not None and again.baseline == good.baseline
    a, b = "{name: a, port: 80, protocol: TCP, targetPort: 0}", "{name: b, port: 81, protocol: TCP}"
    more = {"helm/page/chart/templates/service.yaml": SERVICE.replace(f"{a}, {b}", f"{b}, {a}")}
    assert (await world.push("{ }", more)).endswith("helm/page deployed")


async def test_a_kind_that_comes_with_an_other_release_of_the_push_stops_nothing(world: World) -> None:
    name = f"p{uuid.uuid4().hex[:8]}"
    more: dict[str, str | None] = {
        "helm/operator/release.yaml": f"namespace: {world.namespace}\n",
        "helm/operator/Chart.yaml": "apiVersion: v2\nname: operator\nversion: 1.0.0\n",
        "helm/operator/templates/crd.yaml": json.dumps(crd(name)),
        "helm/page/chart/templates/one.yaml": one_of(name),
    }
    assert (await world.push("{}", more)).endswith("helm/operator, helm/page deployed")
    assert await world.cluster.get(f"/apis/example.org/v1/namespaces/{world.namespace}/{name}s/one") is not None


async def test_a_release_that_moves_by_its_word_leaves_the_old_one_alone(world: World) -> None:
    await world.push("{text: old}")
    new = f"{world.namespace}-new"
    said = await world.push("{text: new}", world.release(namespace=new))
    assert f"its place changed from {world.namespace}/page to {new}/page" in said
    moved = world.release(namespace=new, was=f"{world.namespace}/page")
    assert (await world.push(RED, moved)).endswith("; helm/page reverted")
    assert (await world.text(), await world.text(new)) == ("old", None) and world.good == (world.namespace, 1)
    assert (await world.push("{text: new}")).endswith("helm/page deployed")
    assert (await world.text(), await world.text(new)) == ("old", "new") and world.good == (new, 1)
