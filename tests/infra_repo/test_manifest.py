"""machines.yaml: what is accepted, and how mistakes are reported."""

import json
import pickle
import re
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from toto.infra_repo.manifest import (
    SSH,
    Machine,
    Manifest,
    ManifestError,
    Reboot,
    check_distinct,
    json_schema,
    load,
    parse,
)
from toto.infra_repo.window import Window

DOCS = Path(__file__).parents[2] / "docs"
quickly = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read(tmp_path: Path, text: str | bytes) -> Manifest:
    path = tmp_path / "machines.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load(path)


def problems(tmp_path: Path, text: str | bytes) -> tuple[str, ...]:
    with pytest.raises(ManifestError) as caught:
        read(tmp_path, text)
    assert str(caught.value).count("\n") >= min(len(caught.value.problems), 100) - 1
    return caught.value.problems


def fleet(**after: str) -> Manifest:
    return Manifest(
        machines={name: Machine(name=name, address=name, after=tuple(others.split())) for name, others in after.items()}
    )


def test_a_machine_needs_a_name_and_an_address_only(tmp_path: Path) -> None:
    machine = read(tmp_path, "machines:\n- {name: web1, address: 10.0.0.1}\n").machines["web1"]
    assert machine == Machine(name="web1", address="10.0.0.1")
    assert (machine.system, machine.role, machine.deploy, machine.activation) == (
        "x86_64-linux",
        "nixos",
        "push",
        "switch",
    )
    assert machine.ssh == SSH(user="toto", port=22, identity=None, host_key=None)
    assert machine.deployed and not machine.freeze


def test_list_and_mapping_are_the_same_manifest_in_file_order(tmp_path: Path) -> None:
    as_list = read(tmp_path, "machines:\n- {name: b, address: x}\n- {name: a, address: y, ports: [80]}\n")
    as_mapping = read(tmp_path, "machines:\n  b: {address: x}\n  a: {address: y, ports: [80]}\n")
    assert as_list == as_mapping
    assert list(as_list.machines) == ["b", "a"]


def test_every_field_is_read(tmp_path: Path) -> None:
    machine = read(
        tmp_path,
        """\
        machines:
          - &hv {name: hv, address: "::1"}
          - name: toto.canon
            address: fe80::1%eth0
            system: aarch64-linux
            role: nixos
            after: [hv]
            wave: 3
            deploy: pull
            activation: test
            ssh: {user: root, port: 2222, identity: attic, host_key: ssh-ed25519 AAAAC3Nza me@there}
            ports: [80, 443]
            tags: [edge]
            venues: [slack]
            freeze: until the move
            window: Sat-Sun 22:00-06:00
            memory: 2048
            cores: 2
        """,
    ).machines["toto.canon"]
    assert machine.ssh.host_key == "ssh-ed25519 AAAAC3Nza me@there"
    assert machine.freeze == "until the move"
    assert machine.window is not None and str(machine.window) == "Sat-Sun 22:00-06:00"
    assert Machine.model_validate_json(machine.model_dump_json()) == machine
    assert pickle.loads(pickle.dumps(machine)) == machine


def test_a_field_with_nothing_after_its_colon_has_its_default(tmp_path: Path) -> None:
    assert read(tmp_path, "machines:\n- name: a\n  address: x\n  tags:\n  ssh:\n    port:\n").machines["a"].tags == ()


def test_an_empty_list_is_a_fleet_without_machines(tmp_path: Path) -> None:
    assert read(tmp_path, "machines: []\n").machines == {}
    assert problems(tmp_path, "machines:\n") == (
        "machines.yaml:1: machines: should be a list of machines, or a mapping by their names, not nothing",
    )


def test_all_mistakes_are_reported_at_once(tmp_path: Path) -> None:
    assert problems(
        tmp_path,
        """\
machines:
  - name: web1
    address: 10.0
    deploy: psh
    ssh: {usr: x, port: 99999}
    ports: [80, x,
      70000]
  - name: -rf
    address: -oProxyCommand=x
    freeze: "no"
  - address: x
  - name: WEB1
    address: a b
    deploy: no
    after: web1
foo: 1
""",
    ) == (
        "machines.yaml:3: web1: address: should be text, not 10.0: put it in quotes",
        "machines.yaml:4: web1: deploy: should be 'push', 'pull' or 'none', not 'psh'",
        "machines.yaml:5: web1: ssh.port: should be at most 65535, not 99999",
        "machines.yaml:5: web1: ssh.usr: is not a known field; did you mean 'user'?",
        "machines.yaml:6: web1: ports: should be a whole number, not 'x'",
        "machines.yaml:7: web1: ports: should be at most 65535, not 70000",
        "machines.yaml:8: '-rf': name: should be 1 to 63 letters, digits, '-', '_' and single dots, begin with a "
        "letter or digit and not end in a dot, not '-rf'",
        "machines.yaml:9: '-rf': address: should be a host name or an IP address, not '-oProxyCommand=x'",
        "machines.yaml:10: '-rf': freeze: should be true, false or the reason in one line of text, not 'no'",
        "machines.yaml:11: machine 3: name: is missing",
        "machines.yaml:12: WEB1: name: is taken by the machine on line 2 (upper and lower case count as one)",
        "machines.yaml:13: WEB1: address: should be a host name or an IP address, not 'a b'",
        "machines.yaml:14: WEB1: deploy: should be 'push', 'pull' or 'none', not false",
        "machines.yaml:15: WEB1: after: should be a list, not 'web1'",
        "machines.yaml:16: foo: is not a known field; known is machines",
    )


@pytest.mark.parametrize(
    "field",
    [
        "address: '-oProxyCommand=id'",
        "address: 'a b'",
        'address: "a\\nb"',
        "address: 'a;b'",
        "address: u@h",
        "address: ''",
        "address: '$(id)'",
        "address: 22:22",
        "ssh: {user: -l}",
        "ssh: {user: 'a b'}",
        'ssh: {user: "a\\n"}',
        "ssh: {port: 0}",
        "ssh: {port: 65536}",
        "ssh: {port: '22'}",
        "ssh: {identity: -F}",
        "ssh: {host_key: AAAA}",
        'ssh: {host_key: "ssh-rsa AAAA a\\nb"}',
        "ports: [0]",
        "ports: [80, 80]",
        "ports: 80",
        "ports: [true]",
        "wave: -1",
        "wave: 1.5",
        "wave: true",
        "role: nas",
        "activation: reboot",
        "system: 'x86 linux'",
        "tags: [1]",
        "tags: ['']",
        "freeze: 'false'",
        "freeze: 1",
        "freeze: []",
        "window: 25:00-26:00",
        "window: Sat",
        "window: 22:00",
        "window: [1]",
        "window: Foo-Sun 22:00-23:00",
        "memory: 1",
        "memory: 1e3",
        "cores: 0",
        "after: [nobody]",
        "after: [m]",
        "name: other",
        "nmae: x",
        "ssh: [a]",
        "ssh: root",
        "wave: !!python/object:os.system x",
        "wave: !x 1",
        "wave: 0b_",
        "[a]: b",
        "1: b",
        "<<: {a: b}",
        'tags: ["\\ud800"]',
    ],
)
def test_a_wrong_field_is_refused_with_its_line(tmp_path: Path, field: str) -> None:
    text = f"machines:\n  m:\n    {field}\n" + ("" if field.startswith("address") else "    address: x\n")
    found = problems(tmp_path, text)
    assert found[0].startswith("machines.yaml:3: ")


@pytest.mark.parametrize("name", ["a", "A1", "toto.canon", "web-1_b", "9", "x" * 63])
def test_a_good_name_is_taken(name: str) -> None:
    assert Machine(name=name, address="x").name == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a..b", "a.", ".a", "-a", "a/b", "../a", "a b", "a\n", "é", "x" * 64, "a\0"]
)
def test_a_name_that_is_a_path_or_an_option_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="letters, digits"):
        Machine(name=name, address="x")


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("", 1, "is empty"),
        ("# nothing\n", 1, "is empty"),
        ("\n---\n...\n", 1, "mapping"),
        ("hello", 1, "mapping"),
        ("- a\n- b\n", 1, "mapping"),
        ("{}", 1, "machines: is missing"),
        ("machines: 5", 1, "should be a list"),
        ("machines:\n\t- name: a\n", 2, "a tab"),
        ("machines:\n- name: a\0b\n", 2, "U+0000"),
        (b"machines:\n- name: \xff\n", 2, "not UTF-8"),
        ("a: [\n", 2, "not YAML"),
        ("a: 'x\n\n", 3, "not YAML"),
        ("machines: []\nmachines: []\n", 2, "given twice, first on line 1"),
        ("---\na: b\n---\nc: d\n", 3, "not YAML"),
        ("machines:\n- name: a\n  name: b\n  address: x\n", 3, "given twice, first on line 2"),
        ("[" * 5000, 1, "nested"),
        ("machines: *a\n", 1, "undefined alias"),
        ("machines: &a [*a]\n", 1, "nested"),
        ("machines: &a\n  x: *a\n", 1, "nested"),
        ("x" * ((1 << 20) + 1), 1, "larger than 1 MiB"),
        ('machines:\n- name: "\\x', 2, "not YAML"),
        ("\ufeff", 1, "is empty"),
        ("machines:\n- 5\n", 2, "should be a mapping"),
        ("machines: [[]]", 1, "should be a mapping"),
        ("%YAML 9\n---\na", 1, "not"),
        ('machines: "\\UFFFFFFFF"', 1, "not YAML"),
    ],
)
def test_a_file_that_is_no_manifest_is_refused_with_its_line(
    tmp_path: Path, text: str | bytes, line: int, what: str
) -> None:
    found = problems(tmp_path, text)
    assert found[0].startswith(f"machines.yaml:{line}: ")
    assert what in found[0]


def test_an_alias_bomb_costs_little(tmp_path: Path) -> None:
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9)
    )
    assert "aliases count each time" in problems(tmp_path, bomb)[0]


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path, what in (
        (tmp_path / "machines.yaml", "no such file"),
        (tmp_path, "not a file"),
        (Path("/dev/zero"), "not a file"),
    ):
        with pytest.raises(ManifestError, match=what):
            load(path)


def test_circles_are_reported_with_their_members(tmp_path: Path) -> None:
    lines = problems(
        tmp_path,
        """\
machines:
  a: {address: x, after: [b]}
  b: {address: x, after: [c]}
  c:
    address: x
    after: [a]
  d: {address: x, after: [e]}
  e: {address: x, after: [d]}
""",
    )
    circle = re.compile(r"machines\.yaml:\d: (\w): after: this goes round in a circle: (\1 after .* after \1)")
    found = [circle.fullmatch(each) for each in lines]
    assert {frozenset(each[2].split(" after ")) for each in found if each} == {frozenset("abc"), frozenset("de")}


def test_a_machine_after_one_of_a_later_wave_is_refused(tmp_path: Path) -> None:
    text = "machines:\n  a: {address: x, wave: 2}\n  b:\n    address: x\n    after:\n      - a\n"
    assert problems(tmp_path, text) == (
        "machines.yaml:6: b: after: a is in wave 2, which comes after this machine's wave 0",
    )


def test_two_names_of_one_machine_are_refused() -> None:
    fleet = parse(
        "machines:\n  a: {address: X.example.org}\n  b: {address: x.example.org., ssh: {port: 22}}\n"
        "  c: {address: x.example.org, ssh: {port: 2222}}\n  d: {address: x.example.org, role: other}\n"
        "  e: {address: '2001:db8::1'}\n  f: {address: '2001:DB8:0:0::0001'}\n"
        "  g: {address: 192.0.2.1}\n  h: {address: '::ffff:192.0.2.1'}\n"
    )
    with pytest.raises(ManifestError) as wrong:
        check_distinct(fleet)
    assert wrong.value.problems == (
        "machines.yaml: b: address: x.example.org., port 22, is a's: one machine has one name",
        "machines.yaml: f: address: 2001:DB8:0:0::0001, port 22, is e's: one machine has one name",
        "machines.yaml: h: address: ::ffff:192.0.2.1, port 22, is g's: one machine has one name",
    )


def test_order_is_by_wave_then_by_after_and_stable() -> None:
    manifest = Manifest(
        machines={
            "late": Machine(name="late", address="x", wave=1),
            "hv": Machine(name="hv", address="x"),
            "guest": Machine(name="guest", address="x", after=("hv",)),
            "other": Machine(name="other", address="x"),
        }
    )
    assert manifest.order(["guest", "late", "other", "hv"]) == [["hv", "other"], ["guest"], ["late"]]
    assert manifest.order(["late"]) == [["late"]]
    assert manifest.order([]) == []
    with pytest.raises(ManifestError, match="nobody: there is no such machine"):
        manifest.order(["nobody"])


def test_order_keeps_what_comes_after_through_unchosen_machines() -> None:
    manifest = fleet(a="", b="a", c="b", d="")
    assert manifest.order(["c", "a", "d"]) == [["a", "d"], ["c"]]
    assert manifest.order(["c", "d"]) == [["c", "d"]]


def test_a_long_chain_works() -> None:
    names = [f"m{n}" for n in range(1500)]
    manifest = fleet(**{name: names[n - 1] if n else "" for n, name in enumerate(names)})
    assert len(manifest.order(names)) == 1500


@pytest.mark.parametrize(
    ("window", "moment", "is_open"),
    [
        ("22:00-06:00", "2024-01-03T23:00", True),
        ("22:00-06:00", "2024-01-03T05:59", True),
        ("22:00-06:00", "2024-01-03T06:00", False),
        ("Sat-Sun 22:00-06:00", "2024-01-06T22:00", True),
        ("Sat-Sun 22:00-06:00", "2024-01-08T05:00", True),
        ("Sat-Sun 22:00-06:00", "2024-01-06T05:00", False),
        ("Sat-Sun 22:00-06:00", "2024-01-08T22:00", False),
        ("Mon,wed 01:00-02:00", "2024-01-03T01:30", True),
        ("Mon,Wed 01:00-02:00", "2024-01-02T01:30", False),
        ("Fri-Mon 00:00-24:00", "2024-01-07T23:59", True),
        ("Fri-Mon 00:00-24:00", "2024-01-09T00:00", False),
    ],
)
def test_a_window_is_open_when_it_says(window: str, moment: str, is_open: bool) -> None:
    assert Window.parse(window).contains(datetime.fromisoformat(moment)) is is_open


BERLIN = ZoneInfo("Europe/Berlin")


@pytest.mark.parametrize(
    ("window", "opens", "closes"),
    [
        # Summer ends on 2024-10-27: at 01:00 UTC the clock goes from 03:00 back to 02:00.
        ("Sun 02:00-03:00", "2024-10-27T00:00", "2024-10-27T02:00"),
        ("Sun 01:00-02:30", "2024-10-26T23:00", "2024-10-27T00:30"),
        ("Sun 02:30-03:30", "2024-10-27T00:30", "2024-10-27T02:30"),
        ("Sun 02:15-02:45", "2024-10-27T00:15", "2024-10-27T00:45"),
        ("Sat 22:00-06:00", "2024-10-26T20:00", "2024-10-27T05:00"),
        ("Sat 22:00-02:30", "2024-10-26T20:00", "2024-10-27T00:30"),
        # It begins on 2024-03-31: at 01:00 UTC the clock goes from 02:00 to 03:00.
        ("Sun 02:00-03:00", "", ""),
        ("Sun 02:30-02:45", "", ""),
        ("Sun 02:30-04:00", "2024-03-31T01:00", "2024-03-31T02:00"),
        ("Sun 01:00-02:30", "2024-03-31T00:00", "2024-03-31T01:00"),
        ("Sat 22:00-06:00", "2024-03-30T21:00", "2024-03-31T04:00"),
    ],
)
@pytest.mark.parametrize("zone", [BERLIN, None], ids=["of a zone", "of this machine"])
def test_a_window_opens_once_in_the_night_when_clocks_are_set(
    window: str, opens: str, closes: str, zone: ZoneInfo | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        month = opens[5:7] if opens else "03"
        first = datetime(2024, 10, 25, tzinfo=UTC) if month == "10" else datetime(2024, 3, 29, tzinfo=UTC)
        minutes = [first + timedelta(minutes=5 * number) for number in range(4 * 24 * 12)]
        is_open = [
            each for each in minutes if Window.parse(window).contains(datetime.fromtimestamp(each.timestamp(), zone))
        ]
        expected = [each for each in minutes if opens <= each.isoformat() < closes]
        assert is_open == expected
    finally:
        monkeypatch.undo()
        time.tzset()


def test_the_committed_schema_is_current() -> None:
    assert json.loads((DOCS / "machines.schema.json").read_text()) == json_schema(), (
        "run: python -m toto.infra_repo.manifest > docs/machines.schema.json"
    )


def test_the_docs_name_every_field() -> None:
    documented = set(re.findall(r"^\| `([\w.]+)` \|", (DOCS / "manifest.md").read_text(), re.MULTILINE))
    assert documented == (Machine.model_fields.keys() - {"ssh"}) | {f"ssh.{name}" for name in SSH.model_fields}


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(["push", "nixos", "a", "b", "10.0.0.1", "Sat 01:00-02:00"])
)
keys = st.sampled_from(["machines", *Machine.model_fields, *SSH.model_fields, "x"]) | st.text(max_size=4)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=6), max_leaves=20
)
fleets = st.lists(
    max_size=4,
    elements=st.fixed_dictionaries(
        {"name": st.sampled_from("abcd"), "address": st.just("x")},
        optional={"after": st.lists(st.sampled_from("abcd"), max_size=2, unique=True), "wave": st.integers(0, 1)},
    ),
)


def judge(tmp_path: Path, data: bytes) -> None:
    try:
        manifest = read(tmp_path, data)
    except ManifestError as error:
        assert error.problems
        for problem in error.problems:
            assert re.match(r"machines\.yaml:\d+: \S", problem)
            assert "\n" not in problem and problem.encode()
    else:
        manifest.order(manifest.machines)


@quickly
@given(machines=values | fleets)
def test_any_structure_is_read_or_refused(tmp_path: Path, machines: Any) -> None:
    judge(tmp_path, yaml.safe_dump({"machines": machines}).encode("utf-8", "surrogatepass"))


@quickly
@given(text=st.text() | st.text(alphabet="machines: \n-[]{}&*!|>'\"#,?ab0\t%@`\\xu"))
def test_any_text_is_read_or_refused(tmp_path: Path, text: str) -> None:
    judge(tmp_path, text.encode("utf-8", "surrogatepass"))
    judge(tmp_path, b"machines:\n  - " + text.encode("utf-8", "surrogatepass"))


def test_all_mistakes_are_told_at_once_also_those_between_machines() -> None:
    with pytest.raises(ManifestError) as caught:
        parse(
            """\
machines:
  - {name: web1, address: 192.0.2.1, after: [db1, webb2]}
  - {name: web2, address: 192.0.2.2, adress: x}
  - {name: db1, address: 192.0.2.3, after: [web2, web1]}
fleet: 1
"""
        )
    assert (
        str(caught.value)
        == """\
machines.yaml:2: web1: after: there is no machine 'webb2'; did you mean 'web2'?
machines.yaml:2: web1: after: this goes round in a circle: web1 after db1 after web1
machines.yaml:3: web2: adress: is not a known field; did you mean 'address'?
machines.yaml:5: fleet: is not a known field; known is machines"""
    )


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ("deploy: pull", "a machine that pulls proves itself by its host key: write it as ssh.host_key"),
        ("access: locked\n    reboot: window", "reboot: window needs a window"),
        ("builds: {jobs: 2}", "builds is for machines with role: builder"),
        ("role: builder", "a builder is known by its host key: write it as ssh.host_key"),
        (
            "role: builder\n    access: locked\n    ssh: {host_key: ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIFf0}",
            "a builder takes builds of toto's: it cannot have access: locked, or deploy: pull",
        ),
        ("reboot: now", "reboot is for machines with access: locked or deploy: pull; others only tell"),
        ("drift: mend", "drift is for machines with access: locked or deploy: pull; others tell nothing by themselves"),
    ],
)
def test_what_does_not_go_together_is_said(tmp_path: Path, fields: str, says: str) -> None:
    found = problems(tmp_path, f"machines:\n  - name: web1\n    address: 10.0.0.1\n    {fields}\n")
    assert len(found) == 1 and found[0].startswith("machines.yaml:2: web1: ") and found[0].endswith(says), found


def test_a_machine_reboots_by_its_policy(tmp_path: Path) -> None:
    inside, outside = datetime(2026, 3, 7, 23), datetime(2026, 3, 9, 12)
    listed = "machines:\n" + "".join(
        f"  - {{name: {name}, address: 10.0.0.{number}, access: locked, window: Sat 22:00-06:00, reboot: {name}}}\n"
        for number, name in enumerate(("never", "window", "now"), 1)
    )
    machines = read(tmp_path, listed).machines
    ends = datetime(2026, 3, 8, 6).astimezone(UTC)
    assert [(each.reboots(inside), each.reboots(outside)) for each in machines.values()] == [
        (None, None),
        (Reboot(ends), None),
        (Reboot(), Reboot()),
    ]
