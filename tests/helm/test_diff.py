"""What differs between manifests, by resource and field, and never with what a Secret holds."""

import base64

import pytest

from toto.base.errors import InputError
from toto.helm.diff import Difference, compare, masks_of
from toto.helm.manifest import parse

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
    return compare(before, after).lines()


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


def test_form_the_order_of_keys_and_comments_are_no_difference() -> None:
    one = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: c}\ndata: {b: '2', a: '1'}\n"
    same = compare(config("data:\n  a: '1' # one\n  b: \"2\""), "# Source: x\n---\n" + one)
    assert same.empty and same.summary == "nothing to change" and str(same) == "nothing in the manifests"


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (
            "{initContainers: [{name: a, image: x}, {name: b, image: x}]}",
            "{initContainers: [{name: b, image: x}, {name: a, image: x}]}",
            "    spec.template.spec.initContainers: the order is a, b → b, a",
        ),
        (
            "{containers: [{name: a, env: [{name: A, value: x}, {name: B, value: $(A)}]}]}",
            "{containers: [{name: a, env: [{name: B, value: $(A)}, {name: A, value: x}]}]}",
            "    spec.template.spec.containers[a].env: the order is A, B → B, A",
        ),
        ("{x: 1}", "{x: true}", "    spec.template.spec.x: 1 → true"),
        ("{x: 1}", "{x: '1'}", '    spec.template.spec.x: 1 → "1"'),
        ("{x: 1}", "{x: 1.0}", "    spec.template.spec.x: 1 → 1.0"),
        ("{x: 'null'}", "{x: null}", '    spec.template.spec.x: "null" → null'),
        ("{x: [a, b]}", "{x: [b, a]}", "    + spec.template.spec.x[0]: b"),
        ("{x: 1:30}", "{x: 90}", "    spec.template.spec.x: 1:30 → 90"),
        ("{x: &a {y: 1}, z: *a}", "{x: {y: 1}, z: {y: 2}}", "    spec.template.spec.z.y: 1 → 2"),
    ],
)
def test_what_is_not_exactly_the_same_is_deployed(before: str, after: str, words: str) -> None:
    found = compare(deployment(before), deployment(after))
    assert not found.empty and words in found.lines()


JOB = "---\napiVersion: batch/v1\nkind: Job\nmetadata: {name: j, annotations: {helm.sh/hook: EVENT}}\nspec: {a: AAA}\n"


def test_two_hooks_of_one_name_are_two() -> None:
    def hook(event: str, said: int) -> str:
        return JOB.replace("EVENT", event).replace("AAA", str(said))

    before = hook("pre-upgrade", 1) + hook("post-upgrade", 2)
    assert compare(before, before).empty
    assert fields(before, hook("pre-upgrade", 1) + hook("post-upgrade", 3)) == ["~ Job j (2)", "    spec.a: 2 → 3"]
    assert fields(before, hook("pre-upgrade", 3) + hook("post-upgrade", 2)) == ["~ Job j", "    spec.a: 1 → 3"]
    assert fields(before, hook("pre-upgrade", 1)) == ["- Job j (2)"]
    assert fields(hook("pre-upgrade", 1), before) == ["+ Job j (2)"]


def test_what_is_not_shown_is_deployed_all_the_same() -> None:
    one, other = config("data: {a: x}", "a"), config("data: {a: x}", "b")
    found = compare(one + other, other + one)
    assert not found.empty and found.summary == "only its order or form changes"
    assert found.lines() == ["~ only the order of the resources, or how something is written"]
    assert not compare(config("data: {a: yes}"), config("data: {a: true}")).empty


def test_what_the_chart_has_helm_keep_is_told_as_kept() -> None:
    kept = config("", "k").replace("{name: k}", "{name: k, annotations: {helm.sh/resource-policy: keep}}")
    found = compare(kept + config("", "gone"), "")
    assert found.lines() == [
        "- ConfigMap gone",
        "= ConfigMap k stays in the cluster: the chart has helm keep it (helm.sh/resource-policy)",
    ]
    assert found.summary == "1 to remove, 1 to leave in the cluster"


@pytest.mark.parametrize(
    ("before", "after", "lines"),
    [
        (
            "{ports: [{containerPort: 80, name: http}, {containerPort: 443, name: https}]}",
            "{ports: [{containerPort: 443, name: https}, {containerPort: 81, name: http}]}",
            ["ports: the order is http, https → https, http", "ports[http].containerPort: 80 → 81"],
        ),
        (
            "{ports: [{containerPort: 53, protocol: UDP}, {containerPort: 53}]}",
            "{ports: [{containerPort: 53, protocol: UDP, hostPort: 5}]}",
            ['- spec.template.spec.ports[53]: {"containerPort": 53}', "+ spec.template.spec.ports[53/UDP].hostPort: 5"],
        ),
        (
            "{mounts: [{mountPath: /a, name: v}, {mountPath: /b, name: v}]}",
            "{mounts: [{mountPath: /b, name: v, readOnly: true}]}",
            ["mounts[/b].readOnly: true", 'mounts[/a]: {"mountPath": "/a", "name": "v"}'],
        ),
        ("{items: [{key: a, path: x}]}", "{items: [{key: a, path: y}]}", ["items[a].path: x → y"]),
        ("{args: [a, b, c]}", "{args: [a, c]}", ["- spec.template.spec.args[1]: b"]),
        ("{args: [a, c]}", "{args: [a, b, c, d]}", ["args[1]: b", "args[3]: d"]),
    ],
)
def test_items_of_a_list_are_matched_by_what_names_them(before: str, after: str, lines: list[str]) -> None:
    said = fields(deployment(before), deployment(after))
    assert len(said) == 1 + len(lines)
    for line in lines:
        assert any(each.endswith(line) for each in said), said


CHART = """
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: d}
spec: {group: x, description: about VERSION}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: c}
data: {MANY text: "LONG"}
"""
DEPLOYMENT = """
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: d-NUMBER, labels: {helm.sh/chart: c-VERSION, app.kubernetes.io/version: 'VERSION'}}
spec: {replicas: VERSION, template: {spec: {containers: [{name: web, image: 'web:VERSION'}]}}}
"""


def test_every_resource_and_every_image_is_named_however_much_changes() -> None:
    many, long = "".join(f"k{n}: 'VERSION', " for n in range(300)), "".join(f"{n} VERSION\\n" for n in range(100))
    text = CHART.replace("MANY", many).replace("LONG", long)
    text += "".join(DEPLOYMENT.replace("NUMBER", str(n)) for n in range(100))
    found = compare(text.replace("VERSION", "1"), text.replace("VERSION", "2"))
    lines = found.lines()
    assert found.summary == "102 to change"
    assert sum(line.startswith("~ ") for line in lines) == 102
    assert lines.count("    spec.template.spec.containers[web].image: web:1 → web:2") == 100
    assert lines.count("    spec.replicas: 1 → 2") > 90
    assert not any("helm.sh/chart" in line or "about 1" in line for line in lines)
    assert "    … and 2 more fields" in lines and len(lines) < 450


def test_labels_that_only_repeat_the_version_of_the_chart_take_little_room() -> None:
    labels = "{helm.sh/chart: c-VERSION, chart: c-VERSION}"
    text = f"---\napiVersion: v1\nkind: Service\nmetadata: {{name: s-NUMBER, labels: {labels}}}\n"

    def lines(count: int) -> list[str]:
        manifest = "".join(text.replace("NUMBER", str(n)) for n in range(count)) + DEPLOYMENT
        return fields(manifest.replace("VERSION", "1"), manifest.replace("VERSION", "2"))

    assert lines(2)[:3] == [
        "~ Service s-0",
        "    metadata.labels.chart: c-1 → c-2",
        "    metadata.labels.helm.sh/chart: c-1 → c-2",
    ]
    assert lines(40)[:2] == [f"~ Service s-{n} (only labels of the chart, or descriptions)" for n in (0, 1)]
    assert lines(40)[40:] == lines(2)[6:] and len(lines(40)) == 45


def test_an_image_is_named_in_a_container_that_comes_and_in_an_argument() -> None:
    long = ", ".join(f"{{name: E{n}, value: x}}" for n in range(100))
    first = f"{{name: a, args: ['--reloader=quay.io/x/y:v1'], image: 'web@sha256:{'0' * 300}v1'}}"
    more = f"{{name: b, env: [{long}], image: 'b:2'}}"
    lines = fields(
        deployment(f"{{containers: [{first}]}}"), deployment(f"{{containers: [{first.replace('v1', 'v2')}, {more}]}}")
    )
    where = "spec.template.spec.containers"
    assert f"    {where}[a].image: web@sha256:{'0' * 300}v1 → web@sha256:{'0' * 300}v2" in lines
    assert f"    + {where}[b].image: b:2" in lines
    assert f"    {where}[a].args[0]: --reloader=quay.io/x/y:v1 → --reloader=quay.io/x/y:v2" in lines


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
    lines = compare(before + config("data: {long: x}"), after).lines()
    assert lines[:4] == [
        "~ ConfigMap c",
        "    + data.b64: ******",
        f"    data.long: ****** → {'x' * 130} … {'x' * 143} ******",
        "    + data.url: postgres://me:******@db",
    ]
    assert lines[4:] == [
        "~ Secret s",
        "    - data.gone: ******",
        "    + data.more: ******",
        "    data.password: ****** → ******",
    ]
    assert POISON[:8] not in "\n".join(lines)


def test_a_secret_that_is_only_written_the_other_way_shows_no_difference() -> None:
    assert compare(secret(a=POISON), secret().replace("data:\n", f"stringData: {{a: {POISON}}}\n")).changed == ()


def test_texts_of_secrets_are_known_in_every_form() -> None:
    text = (
        secret(key=f"-----BEGIN KEY-----\n{POISON}\nroute:\n", short="abc", job="prometheus", mode="create")
        + config("data: {a: public}", "prometheus")
        + "---\nkind: Secret\nmetadata: {name: odd}\ndata: [1]\nstringData: {n: 1234567}\n"
    )
    found = masks_of(list(parse(text).values())).texts
    assert {POISON, "-----BEGIN KEY-----", "1234567", "MTIzNDU2Nw=="} <= set(found)
    assert {"abc", "public", "prometheus", "create", "route:"}.isdisjoint(found)
    assert [len(each) for each in found] == sorted(map(len, found), reverse=True)


def test_where_a_secret_stands_now_nothing_is_shown_of_what_stood_there_before() -> None:
    """(What was deployed before came from values that nobody has any more.)"""
    before = config("data: {url: 'db://me:older-one@db', whole: older-two, file: \"a: 1\\npass = older-three\\n\"}")
    after = config(f"data: {{url: 'db://me:{POISON}@db', whole: {POISON}, file: \"a: 2\\npass = {POISON}\\n\"}}")
    assert compare(before, after, [POISON]).lines() == [
        "~ ConfigMap c",
        "    data.file:",
        "      @@ -1,2 +1,2 @@",
        "      -a: 1",
        "      -pass = ******",
        "      +a: 2",
        "      +pass = ******",
        "    data.url: db://me:******@db → db://me:******@db",
        "    data.whole: ****** → ******",
    ]


def test_difference_is_bounded() -> None:
    many = "data: {" + ", ".join(f"k{n}: '{n}'" for n in range(1000)) + "}"
    difference = compare(config("data: {}"), config(many))
    assert difference.lines(2) == ["~ ConfigMap c", "    + data.k0: 0", "    + data.k1: 1", "    … and 998 more fields"]
    assert len(str(difference).splitlines()) == 122
    (line,) = compare(config("data: {}"), config(f"data: {{a: {'x' * 100_000}}}")).changed[0].fields[0].lines
    assert len(line) < 320


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
    assert compare(text, "") == Difference(identical=compare(text, "").identical)
