"""What differs between manifests, by resource and field, and never with what a Secret holds."""

import base64

import pytest

from toto.base.errors import InputError
from toto.helm.diff import Difference, compare, drift, parse, secrets

POISON = "poison-4d1c"


def secret(*, name: str = "s", **data: str) -> str:
    lines = "".join(f"  {key}: {base64.b64encode(value.encode()).decode()}\n" for key, value in data.items())
    return f"---\napiVersion: v1\nkind: Secret\nmetadata: {{name: {name}}}\ndata:\n{lines}"


def config(text: str, name: str = "c") -> str:
    return f"---\napiVersion: v1\nkind: ConfigMap\nmetadata: {{name: {name}}}\n{text}\n"


def deployment(spec: str, replicas: str = "1") -> str:
    return (
        f"---\napiVersion: apps/v1\nkind: Deployment\nmetadata: {{name: d}}\nspec:\n  replicas: {replicas}\n"
        f"  template: {{spec: {spec}}}\n"
    )


def fields(before: str, after: str) -> list[str]:
    return compare(parse(before), parse(after)).lines()


def drifted(stated: str, live: str) -> list[str]:
    return drift(parse(stated), parse(live)).lines()


def test_resources_added_removed_and_changed_are_shown_by_field() -> None:
    before = (
        config("data: {a: x, b: y}")
        + config("", "old")
        + deployment("{containers: [{name: web, image: 'web:1', args: [a, b]}]}")
    )
    after = (
        config("data: {a: z, c: y}")
        + config("metadata: {name: new, namespace: other}", "x").replace("metadata: {name: x}\n", "")
        + deployment("{containers: [{name: side, image: s}, {name: web, image: 'web:2', args: [a, c]}]}", "2")
    )
    assert fields(before, after) == [
        "+ ConfigMap other/new",
        "- ConfigMap old",
        "~ ConfigMap c",
        "    data.a: x → z",
        "    - data.b: y",
        "    + data.c: y",
        "~ Deployment d",
        "    spec.replicas: 1 → 2",
        '    + spec.template.spec.containers[side]: {"name": "side", "image": "s"}',
        "    spec.template.spec.containers[web].args[1]: b → c",
        "    spec.template.spec.containers[web].image: web:1 → web:2",
    ]


def test_form_order_and_comments_are_no_difference() -> None:
    listed = "kind: List\nitems:\n- {apiVersion: v1, kind: ConfigMap, metadata: {name: c}, data: {b: '2', a: '1'}}\n"
    same = compare(parse(config("data:\n  a: '1' # one\n  b: '2'")), parse("# Source: x\n---\n" + listed))
    assert same.empty and str(same) == "nothing in the manifests"


def test_several_lines_of_text_are_shown_as_a_diff() -> None:
    assert fields(config('data: {f: "a\\nb\\nc\\n"}'), config('data: {f: "a\\nb\\nX\\n"}')) == [
        "~ ConfigMap c",
        "    data.f:",
        "      @@ -2,2 +2,2 @@",
        "       b",
        "      -c",
        "      +X",
    ]


def test_what_a_secret_holds_is_never_shown() -> None:
    before = secret(password="old-" + POISON, gone=POISON * 2)
    after = secret(password=POISON, more="more\n" + POISON + "-line\n") + config(
        f"data: {{url: 'postgres://me:{POISON}@db', b64: {base64.b64encode(POISON.encode()).decode()}, "
        f"long: '{'x' * 290} {POISON}'}}"
    )
    lines = compare(parse(before + config("data: {long: x}")), parse(after)).lines()
    assert lines[:4] == [
        "~ ConfigMap c",
        "    + data.b64: ******",
        f"    data.long: x → {'x' * 135} … {'x' * 143} ******",
        "    + data.url: postgres://me:******@db",
    ]
    assert lines[4:] == [
        "~ Secret s",
        "    - data.gone: ******",
        "    + data.more: ******",
        "    data.password: ****** → ******",
    ]
    assert POISON[:8] not in "\n".join(lines)


def test_secret_written_the_other_way_is_the_same() -> None:
    assert fields(secret(a=POISON), secret().replace("data:\n", f"stringData: {{a: {POISON}}}\n")) == []


def test_texts_of_secrets_are_known_in_every_form() -> None:
    found = secrets(
        parse(
            secret(key=f"-----BEGIN KEY-----\n{POISON}\n", short="abc")
            + config("data: {a: public}")
            + "---\nkind: Secret\nmetadata: {name: odd}\ndata: [1]\nstringData: {n: 1234567}\n"
        ).values()
    )
    assert {POISON, "-----BEGIN KEY-----", "1234567", "MTIzNDU2Nw=="} <= set(found)
    assert "abc" not in found and "public" not in found
    assert [len(each) for each in found] == sorted(map(len, found), reverse=True)


def test_difference_is_bounded() -> None:
    many = "data: {" + ", ".join(f"k{n}: '{n}'" for n in range(1000)) + "}"
    difference = compare(parse(config("data: {}")), parse(config(many)))
    assert len(difference.changed[0].fields) == 200
    assert difference.lines(3) == ["~ ConfigMap c", "    + data.k0: 0", "    + data.k1: 1", "… and 198 more lines"]
    assert len(str(difference).splitlines()) == 61
    (line,) = compare(parse(config("data: {}")), parse(config(f"data: {{a: {'x' * 100_000}}}"))).changed[0].fields
    assert len(line) < 320


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


def test_resources_of_two_groups_are_two() -> None:
    both = parse(
        "apiVersion: v1\nkind: Service\nmetadata: {name: a}\n---\n"
        "apiVersion: serving.knative.dev/v1\nkind: Service\nmetadata: {name: a}\n"
    )
    assert len(both) == 2


@pytest.mark.parametrize(
    "text",
    [
        "a: [",
        "[" * 200_000,
        "- " * 200_000,
        "[" * 201 + "]" * 201,
        "\0",
        "? {a: 1}: b: c",
        "!!python/object:os.system x",
    ],
)
def test_an_error_about_text_that_is_no_manifest_does_not_quote_it(text: str) -> None:
    with pytest.raises(InputError, match="is not YAML") as caught:
        parse(f"password: {POISON}\n{text}")
    assert POISON not in str(caught.value)


@pytest.mark.parametrize("text", ["", "---\n---\n# nothing\n", "- a\n", "kind: X\n", "kind: X\nmetadata: 5\n", "5\n"])
def test_documents_that_are_no_resources_are_left_out(text: str) -> None:
    assert parse(text) == {}
    assert compare(parse(text), {}) == Difference()
