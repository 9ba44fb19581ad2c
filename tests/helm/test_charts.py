"""What real charts do, each in an invented chart of about ten lines, on a real cluster with helm 4 and helm 3."""

import json
import uuid

import pytest

from tests.helm.test_cluster import Lab, both, crd, lab, one_of
from toto.helm.command import ReleaseFailed, RenderFailed
from toto.helm.release import Release, discover

__all__ = ["lab"]

pytestmark = pytest.mark.minutes(2)

NOTHING = {
    "values.yaml": "{}",
    "chart/values.yaml": "{}",
    "chart/templates/all.yaml": "",
    "chart/templates/test.yaml": "",
}


def config(name: str, data: str = "{a: x}", **annotations: str) -> str:
    return (
        f"---\napiVersion: v1\nkind: ConfigMap\nmetadata: {{name: {name}, annotations: {json.dumps(annotations)}}}\n"
        f"data: {data}\n"
    )


def hook(kind: str, name: str, event: str, fate: str = "") -> str:
    about = json.dumps({"helm.sh/hook": event, "lab/fate": fate})
    pod = "{restartPolicy: Never, containers: [{name: c, image: c}]}"
    spec = {"Pod": f"spec: {pod}", "Job": f"spec: {{template: {{metadata: {{annotations: {about}}}, spec: {pod}}}}}"}
    version = "batch/v1" if kind == "Job" else "v1"
    about = f"metadata: {{name: {name}, annotations: {about}}}"
    return f"---\napiVersion: {version}\nkind: {kind}\n{about}\n{spec.get(kind, 'data: {}')}\n"


def chart(lab: Lab, text: str, **fields: object) -> Release:
    lab.write(NOTHING | {"chart/templates/all.yaml": text})
    return lab.release(**fields)


@both
async def test_a_chart_may_render_to_nothing_or_to_hooks_alone(lab: Lab) -> None:
    release = chart(lab, "")
    assert (await lab.helm.difference(release, lab.tree)).lines() == []
    assert (await lab.helm.upgrade(release, lab.tree)).number == 1
    assert (await lab.helm.difference(release, lab.tree)).empty
    assert (await lab.helm.drift(release)).empty and await lab.helm.test(release) == ()
    release = chart(lab, hook("Job", "j", "post-install,post-upgrade"))
    assert (await lab.helm.difference(release, lab.tree)).lines() == ["+ Job j"]
    assert (await lab.helm.upgrade(release, lab.tree)).number == 2
    assert (await lab.helm.difference(release, lab.tree)).empty
    assert (await lab.helm.drift(release)).empty
    assert (await lab.helm.rollback(release, 1)).number == 3


@both
async def test_each_test_of_a_chart_must_have_succeeded_by_kind_and_name(lab: Lab) -> None:
    release = chart(lab, hook("ConfigMap", "check", "test") + hook("Pod", "check", "test", "failed"), timeout=20)
    assert (await lab.helm.upgrade(release, lab.tree)).tests == ("ConfigMap check", "Pod check")
    results = {each.name: each.passed for each in await lab.helm.test(release)}
    assert results == {"ConfigMap check": True, "Pod check": False}
    release = chart(lab, hook("ConfigMap", "check", "test") + hook("Pod", "check", "test", "stuck"), timeout=3)
    await lab.helm.upgrade(release, lab.tree)
    (_, stuck) = await lab.helm.test(release)
    assert not stuck.passed and "pod check: c runs but is not ready" in stuck.said, stuck.said


async def test_a_hook_that_hangs_is_named_with_its_pod(lab: Lab) -> None:
    release = chart(lab, hook("Job", "migrate", "pre-install", "stuck"), timeout=3)
    with pytest.raises(ReleaseFailed, match=r"\npod migrate-\w+: c runs but is not ready\n"):
        await lab.helm.upgrade(release, lab.tree)


async def test_what_is_waited_for_is_named_when_no_pod_is_to_blame(lab: Lab) -> None:
    text = (
        "apiVersion: v1\nkind: Service\nmetadata: {name: door}\n"
        "spec: {type: LoadBalancer, ports: [{port: 80, protocol: TCP}], selector: {a: b}}\n"
        "---\napiVersion: v1\nkind: PersistentVolumeClaim\nmetadata: {name: disk}\n"
        "spec: {accessModes: [ReadWriteOnce], storageClassName: none, resources: {requests: {storage: 1Gi}}}\n"
    )
    release = chart(lab, text, timeout=3)
    with pytest.raises(ReleaseFailed) as caught:
        await lab.helm.upgrade(release, lab.tree)
    assert "\nService door: no load balancer has given it an address (does the cluster have one?)" in str(caught.value)
    assert "\nPersistentVolumeClaim disk: it is Pending: no volume is bound to it" in str(caught.value)


async def test_only_the_order_or_a_type_is_a_change_that_is_deployed(lab: Lab) -> None:
    text = """
apiVersion: apps/v1
kind: Deployment
metadata: {name: d, annotations: {a: "1"}}
spec:
  replicas: 0
  selector: {matchLabels: {app: d}}
  template:
    metadata: {labels: {app: d}}
    spec:
      containers: [{name: c, image: c, env: [{name: A, value: x}, {name: B, value: $(A)}]}]
"""
    release = chart(lab, text)
    await lab.helm.upgrade(release, lab.tree)
    chart(
        lab,
        text.replace("[{name: A, value: x}, {name: B, value: $(A)}]", "[{name: B, value: $(A)}, {name: A, value: x}]"),
    )
    found = await lab.helm.difference(release, lab.tree)
    assert not found.empty and found.lines()[1:] == [
        "    spec.template.spec.containers[c].env: the order is A, B → B, A"
    ]
    assert (await lab.helm.upgrade(release, lab.tree)).number == 2
    assert (await lab.helm.difference(release, lab.tree)).empty


@both
async def test_a_rollback_that_is_refused_once_is_repeated(lab: Lab) -> None:
    """Helm does not find what the chart had it keep; it does on the second try."""
    release = chart(lab, config("page") + config("kept", **{"helm.sh/resource-policy": "keep"}))
    first = await lab.helm.upgrade(release, lab.tree)
    chart(lab, config("page"))
    found = await lab.helm.difference(release, lab.tree)
    assert found.removed == () and found.kept == ("ConfigMap kept",)
    await lab.helm.upgrade(release, lab.tree)
    assert (await lab.helm.rollback(release, first.number)).status == "deployed"
    assert await lab.get("configmaps", "kept") is not None


@both
async def test_a_new_chart_finds_what_it_defines_itself(lab: Lab) -> None:
    name = f"p{uuid.uuid4().hex[:8]}"
    kind = f"example.org/v1/{name.capitalize()}"
    text = f'{{{{ if .Capabilities.APIVersions.Has "{kind}" }}}}\n{one_of(name)}{{{{ end }}}}\n'
    release = chart(lab, text)
    lab.write({"chart/crds/crd.yaml": json.dumps(crd(name))})
    assert f"+ {name.capitalize()} one" in (await lab.helm.difference(release, lab.tree)).lines()
    await lab.helm.upgrade(release, lab.tree)
    assert (await lab.get(f"{name}s", "one", "apis/example.org/v1"))["size"] == 1
    assert (await lab.helm.difference(release, lab.tree)).empty
    where = f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{name}s.example.org"
    lab.write({"chart/templates/more.yaml": config("page")})
    await lab.helm.upgrade(release, lab.tree)
    await lab.cluster.delete(f"/api/v1/namespaces/{lab.namespace}/configmaps/page")
    await lab.cluster.delete(where)
    while await lab.cluster.get(f"/apis/example.org/v1/namespaces/{lab.namespace}/{name}s") is not None:
        pass
    assert (await lab.helm.drift(release)).lines() == [
        "- ConfigMap page",
        f"- {name.capitalize()} one: there is no such kind in the cluster any more",
    ]


async def test_a_kind_that_another_release_brings_first_is_told_and_stops_nothing(lab: Lab) -> None:
    name = f"p{uuid.uuid4().hex[:8]}"
    user = chart(lab, one_of(name) + config("page"))
    with pytest.raises(
        RenderFailed, match=r"if a different release brings that kind: `after` in helm/page/release.yaml"
    ):
        await lab.helm.difference(user, lab.tree)
    operator = {
        "release.yaml": f"namespace: {lab.namespace}",
        "Chart.yaml": "apiVersion: v2\nname: op\nversion: 1.0.0\n",
    }
    for file, text in {**operator, "templates/crd.yaml": json.dumps(crd(name))}.items():
        path = lab.tree / "helm/operator" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    first, user = discover(lab.tree)
    found = await lab.helm.difference(user, lab.tree, before=[first])
    words = (
        f"{name.capitalize()} one cannot be checked yet: the cluster has no example.org/v1/{name.capitalize()}, which "
        "helm/operator, rolled out before, is to bring"
    )
    assert found.unchecked == (words,) and f"? {words}" in found.lines() and "+ ConfigMap page" in found.lines()
    lab.write({"chart/templates/all.yaml": one_of(name) + config("page", "[]")})
    with pytest.raises(RenderFailed, match="ConfigMap"):  # the others are checked
        await lab.helm.difference(user, lab.tree, before=[first])
    lab.write({"chart/templates/all.yaml": one_of(name)})
    await lab.helm.upgrade(first, lab.tree)
    assert (await lab.helm.upgrade(user, lab.tree)).status == "deployed"


async def test_what_the_cluster_sets_itself_is_no_drift(lab: Lab) -> None:
    text = """
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: NAME}
aggregationRule: {clusterRoleSelectors: [{matchLabels: {rbac: NAME}}]}
rules: []
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: NAME-part, labels: {rbac: NAME}}
rules: [{apiGroups: [""], resources: [pods], verbs: [get]}]
---
apiVersion: v1
kind: Service
metadata: {name: s, labels: null}
spec: {clusterIP: "", type: "", ports: [{port: 80, protocol: TCP, targetPort: 0}], selector: {}, externalIPs: []}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: d}
spec:
  replicas: 0
  unknown-to-this-server: {a: b}
  selector: {matchLabels: {app: d}}
  template:
    metadata: {labels: {app: d}, annotations: null}
    spec:
      securityContext: {runAsUser: null}
      dnsPolicy: ""
      volumes: [{name: v, configMap: {name: page, defaultMode: 0644}}]
      containers:
        - {name: c, image: c, env: [{name: A, value: ""}], resources: {limits: {cpu: 1000m, memory: 1024Mi}}, ports: []}
""".replace("NAME", lab.namespace)
    release = chart(lab, text.replace("  unknown-to-this-server: {a: b}\n", ""))
    await lab.helm.upgrade(release, lab.tree)
    assert (await lab.helm.drift(release)).lines() == ["~ Service s", "    spec.ports[80].targetPort: 0 → 80"]
    known = await lab.helm.baseline(release)
    assert len(known) == 1 and (await lab.helm.drift(release, known=known)).empty
    path = f"/apis/apps/v1/namespaces/{lab.namespace}/deployments/d"
    await lab.cluster.patch(path, {"spec": {"paused": True, "replicas": 1}})
    assert (await lab.helm.drift(release, known=known)).lines() == ["~ Deployment d", "    spec.replicas: 0 → 1"]


async def test_a_secret_of_the_values_is_masked_in_every_kind_before_and_after(lab: Lab) -> None:
    text = """
apiVersion: v1
kind: ConfigMap
metadata: {name: page}
data:
  url: "db://me:{{ .Values.db.password }}@db"
  name: {{ .Values.auth.existingSecret }}
  job: prometheus create
---
apiVersion: v1
kind: Pod
metadata: {name: p}
spec:
  containers:
    - {name: c, image: "prometheus:{{ .Values.version }}", args: ["--token={{ .Values.token }}"]}
"""
    release = chart(lab, text, wait=False)
    first = {"db": {"password": "older-pass-1"}, "token": "older-token-1", "version": 1}
    named = {"auth": {"existingSecret": "prometheus"}, "secrets": {"create": "create"}}
    lab.set(**first, **named)
    await lab.helm.upgrade(lab.release(wait=False), lab.tree)
    before = await lab.helm.secrets(release, lab.tree)
    lab.set(**{"db": {"password": "newer-pass-2"}, "token": "newer-token-2", "version": 2}, **named)
    lab.write({"chart/templates/gone.yaml": ""})
    found = await lab.helm.difference(lab.release(), lab.tree, masks=before)
    assert found.lines() == [
        "~ ConfigMap page",
        "    data.url: db://me:******@db → db://me:******@db",
        "~ Pod p",
        "    spec.containers[c].args[0]: --token=****** → --token=******",
        "    spec.containers[c].image: prometheus:1 → prometheus:2",
    ]
    lab.write({"chart/templates/bad.yaml": '{{ fail (printf "cannot create %s" .Values.token) }}'})
    with pytest.raises(RenderFailed, match=r"cannot create \*{6}"):
        await lab.helm.difference(lab.release(), lab.tree)


async def test_four_hundred_resources_are_compared_within_their_time(lab: Lab) -> None:
    release = chart(lab, "{{ range until 400 }}" + config("c-{{ . }}") + "{{ end }}")
    assert len((await lab.helm.difference(release, lab.tree)).lines()) == 400
    chart(lab, "{{ range until 6 }}" + config("c-{{ . }}") + "{{ end }}")
    await lab.helm.upgrade(release, lab.tree)
    await lab.cluster.delete(f"/api/v1/namespaces/{lab.namespace}/configmaps/c-3")
    assert (await lab.helm.drift(release)).lines() == ["- ConfigMap c-3"]
