"""What is drift, and what is only the API server's way to write it."""

import pytest

from tests.helm.test_diff import POISON, config, deployment, secret
from toto.helm.drift import drift
from toto.helm.manifest import parse


def drifted(stated: str, live: str, *, known: tuple[str, ...] = ()) -> list[str]:
    return drift(parse(stated), parse(live), known=known).difference.lines()


@pytest.mark.parametrize(
    ("stated", "live"),
    [
        (
            "{containers: [{name: a, resources: {limits: {cpu: 1000m, memory: 1024Mi}}}]}",
            "{containers: [{name: a, resources: {limits: {cpu: '1', memory: 1Gi}}}]}",
        ),
        (
            "{containers: [{name: a, resources: {limits: {cpu: 0.5, x: 1e3}}}]}",
            "{containers: [{name: a, resources: {limits: {cpu: 500m, x: 1k}}}]}",
        ),
        ("{containers: [{name: a}]}", "{containers: [{name: a, image: x}, {name: injected}], dnsPolicy: ClusterFirst}"),
        ("{containers: [], hostname: '', env: [], x: null, y: {}, z: 0, f: false}", "{}"),
        ("{x: null}", "{x: 5}"),
        ("{started: 2020-01-01, sign: =}", "{started: '2020-01-01', sign: '='}"),
    ],
)
def test_what_is_only_written_differently_or_not_stated_is_no_drift(stated: str, live: str) -> None:
    assert drifted(deployment(stated), deployment(live) + "status: {x: 1}\n") == []


def test_drift_is_shown_from_what_is_stated_to_what_is_live() -> None:
    stated = (
        deployment("{containers: [{name: a, image: 'x:1', args: [b], env: [{name: E, value: '1'}]}]}")
        + config("", "gone")
        + secret(password=POISON)
    )
    live = (
        deployment("{containers: [{name: a, image: 'x:2', args: [b, c]}]}", "3")
        + secret(password="by hand")
        + config("", "another's")
    )
    assert drifted(stated, live) == [
        "- ConfigMap gone",
        "~ Secret s",
        "    data.password: ****** → ******",
        "~ Deployment d",
        "    spec.replicas: 1 → 3",
        '    spec.template.spec.containers[a].args: ["b"] → ["b", "c"]',
        '    - spec.template.spec.containers[a].env: [{"name": "E", "value": "1"}]',
        "    spec.template.spec.containers[a].image: x:1 → x:2",
    ]


@pytest.mark.parametrize(
    ("stated", "live"),
    [
        ("{volumes: [{name: v, x: {defaultMode: 0644}}]}", "{volumes: [{name: v, x: {defaultMode: 420}}]}"),
        ("{volumes: [{name: v, x: {defaultMode: 0o644}}]}", "{volumes: [{name: v, x: {defaultMode: 420}}]}"),
        ("{volumes: [{name: v, mode: '0644'}]}", "{volumes: [{name: v, mode: 420}]}"),
        ("{clusterIP: '', type: '', x: {}}", "{clusterIP: 10.0.0.1, type: ClusterIP, x: [1]}"),
        ("{securityContext: {runAsUser: null, x: {y: ''}}, env: [{name: A, value: ''}]}", "{env: [{name: A}]}"),
        (
            "{ports: [{port: 80}, {port: 53, protocol: UDP}]}",
            "{ports: [{port: 80, protocol: TCP}, {port: 53, protocol: UDP}]}",
        ),
        (
            "{webhooks: [{name: w, clientConfig: {caBundle: Cg==}}]}",
            "{webhooks: [{name: w, clientConfig: {caBundle: x}}]}",
        ),
        ("{replicas: 1.0}", "{replicas: 1}"),
        ("{rules: [], x: {}, y: false}", "{rules: null, x: null, y: null}"),
    ],
)
def test_what_the_server_writes_its_own_way_is_no_drift(stated: str, live: str) -> None:
    assert drifted(deployment(stated), deployment(live)) == []


@pytest.mark.parametrize(
    ("stated", "live"),
    [
        (config("data: {a: 1000m, b: ''}"), config("data: {a: '1', b: x}")),
        (deployment("{env: [{name: A, value: 1000m}]}"), deployment("{env: [{name: A, value: '1'}]}")),
        (deployment("{args: ['1024Mi']}"), deployment("{args: ['1Gi']}")),
        (deployment("{x: true}"), deployment("{x: 1}")),
        (deployment("{x: false}"), deployment("{x: true}")),
        (deployment("{x: 0}"), deployment("{x: 5}")),
        (deployment("{mode: '0644'}"), deployment("{mode: 644}")),
    ],
)
def test_what_means_something_else_is_drift(stated: str, live: str) -> None:
    assert len(drifted(stated, live)) > 1


def test_the_rules_of_an_aggregated_role_are_those_of_others() -> None:
    role = "apiVersion: rbac.authorization.k8s.io/v1\nkind: ClusterRole\nmetadata: {name: r}\n"
    live = role + "rules: [{verbs: [get]}]\n"
    assert drifted(role + "aggregationRule: {x: []}\nrules: []\n", live + "aggregationRule: {x: []}\n") == []
    assert len(drifted(role + "rules: []\n", live)) == 2


def test_what_differed_just_after_the_roll_out_is_known_and_only_that() -> None:
    stated = deployment("{x: dropped, y: 1}") + secret(password=POISON)
    then = drift(parse(stated), parse(deployment("{y: 1}") + secret(password="another-1")))
    assert len(then.difference.changed) == 2 and len(then.marks) == 1  # what a Secret holds leaves no mark
    assert drifted(stated, deployment("{y: 1}") + secret(password=POISON), known=then.marks) == []
    lines = drifted(stated, deployment("{y: 2}") + secret(password="another-2"), known=then.marks)
    assert lines == [
        "~ Secret s",
        "    data.password: ****** → ******",
        "~ Deployment d",
        "    spec.template.spec.y: 1 → 2",
    ]
    assert drifted(stated, deployment("{x: by hand, y: 1}") + secret(password=POISON), known=then.marks) != []


def test_what_is_to_come_is_said_from_what_is_live() -> None:
    stated, live = parse(deployment("{x: new, y: 1}")), parse(deployment("{x: old}"))
    assert drift(stated, live, to_come=True).difference.lines()[1:] == [
        "    spec.template.spec.x: old → new",
        "    + spec.template.spec.y: 1",
    ]


def test_a_kind_that_is_gone_is_told_and_hides_no_other() -> None:
    stated = parse(config("data: {a: x}") + "---\napiVersion: example.org/v1\nkind: Thing\nmetadata: {name: t}\n")
    (thing,) = (key for key in stated if key.kind == "Thing")
    found = drift(stated, parse(config("data: {a: z}")), absent={thing})
    assert found.difference.lines() == [
        "- Thing t: there is no such kind in the cluster any more",
        "~ ConfigMap c",
        "    data.a: x → z",
    ]
