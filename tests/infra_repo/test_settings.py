"""toto.toml: what is accepted, and how mistakes are reported."""

import re
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from toto.infra_repo.settings import Settings, SettingsError, load


def read(tree: Path, text: str | bytes) -> Settings:
    (tree / "toto.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return load(tree)


def test_without_a_file_everything_is_default(tmp_path: Path) -> None:
    assert load(tmp_path) == Settings()
    assert read(tmp_path, "") == Settings()


def test_settings_are_read(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        '[nix]\nnixpkgs = "nix/lab/nixpkgs.nix"\nbuild_timeout = 0.5\n'
        '[sandbox]\nmemory = 512\n[roll_out]\nmethod = "nixos-rebuild"\n'
        '[venues]\nfleet = ["ops-slack"]\nmail_pusher = ["Example.org", "ada@example.net"]\n',
    )
    assert (found.venues.fleet, found.venues.mail_pusher) == (("ops-slack",), ("example.org", "ada@example.net"))
    assert (found.nix.nixpkgs, found.nix.build_timeout) == ("nix/lab/nixpkgs.nix", 0.5)
    assert (found.sandbox.memory, found.roll_out.method) == (512, "nixos-rebuild")
    assert found.sandbox.test_timeout == 300


FLAKES = ("../x", "/etc", "a b?x", "nixos/..", "-")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sandboxes = 1", "toto.toml:1: sandboxes: is not a known field; did you mean 'sandbox'?"),
        ("[sandbox]\nmemroy = 1", "toto.toml:2: sandbox.memroy: is not a known field; did you mean 'memory'?"),
        ("[nix]\nbuild_timeout = true", "toto.toml:2: nix.build_timeout: should be a number, not true"),
        ("[nix]\nbuild_timeout = -1", "toto.toml:2: nix.build_timeout: should be more than 0, not -1"),
        (
            "[terraform.roots.'a..b']",
            "toto.toml:1: terraform.roots.'a..b': should be 1 to 63 letters, digits, '-', '_' and "
            "single dots, begin with a letter or digit and not end in a dot, not 'a..b'",
        ),
        (
            "[terraform.roots.a]\nwathc = 1",
            "toto.toml:2: terraform.roots.a.wathc: is not a known field; did you mean 'watch'?",
        ),
        (
            "[terraform]\nprevent = ['all']",
            "toto.toml:2: terraform.prevent.0: should be 'destroy' or 'replace', not 'all'",
        ),
        (
            "[terraform.roots.a]\nvar_files = ['../x']",
            "toto.toml:2: terraform.roots.a.var_files.0: should be a path in the repo, without '..', not '../x'",
        ),
        (
            "[terraform.roots.a]\nbackend_config = ['k=v v', 'a/b.hcl', '/etc/x']",
            "toto.toml:2: terraform.roots.a.backend_config.2: should be a path in the repo, without '..', not '/etc/x'",
        ),
        ("[roll_out]\ncompliance = 'yes'", "toto.toml:2: roll_out.compliance: should be 'none' or 'gate', not 'yes'"),
        (
            "[compliance.checks.ssh]\ncontrol = ['a']",
            "toto.toml:2: compliance.checks.ssh.control: is not a known field; did you mean 'controls'?",
        ),
        ("[compliance]\ntags = 'web'", "toto.toml:2: compliance.tags: should be a list, not 'web'"),
        ("nix = 5", "toto.toml:1: nix: should be a mapping of fields, not 5"),
        ("[roll_out]\npolicy = 'some'", "toto.toml:2: roll_out.policy: should be 'all' or 'partial', not 'some'"),
        (
            "[nix]\nnixpkgs = '../x'",
            "toto.toml:2: nix.nixpkgs: should be like '<nixpkgs>', 'npins', or the path of an expression in the repo, "
            "not '../x'",
        ),
        *(
            (
                f"[nix]\nflake = {text}",
                f"toto.toml:2: nix.flake: should be a folder in the repo like 'nixos', or {said}",
            )
            for text, said in [
                ("true", "false, not true"),
                ("'../x'", "false, not '../x'"),
                ("'/etc'", "false, not '/etc'"),
                ("'a b?x'", "false, not 'a b?x'"),
                ("[]", "false, not a list"),
            ]
        ),
        (
            "[venues]\nfleet = ['Ops Room']",
            "toto.toml:2: venues.fleet.0: should be a venue's name of lower-case letters, digits and '-', "
            "not 'Ops Room'",
        ),
        (
            "[venues]\nmail_pusher = ['a@b@c']",
            "toto.toml:2: venues.mail_pusher.0: should be a mail address or a domain like 'example.org', not 'a@b@c'",
        ),
        ("[venues]\nfleet = 'ops'", "toto.toml:2: venues.fleet: should be a list, not 'ops'"),
        ("a = 1\nb = = 2", "toto.toml:2: is not TOML: invalid value"),
        ("a = 1\na = 2", "toto.toml:2: is not TOML: cannot overwrite a value"),
        ("a = [", "toto.toml:1: is not TOML: invalid value"),
        (b"a = 1\nb = '\xff'", "toto.toml:2: is not UTF-8 from here on"),
        ("a = " + "[" * 5000, "toto.toml: is nested too deeply"),
        ("#" * ((1 << 20) + 1), "toto.toml: is larger than 1 MiB"),
        (
            "'a\\nb' = 1\n",
            "toto.toml:1: 'a\\\\nb': is not a known field; known are tree, nix, sandbox, roll_out, compliance, "
            "terraform, jobs, venues",
        ),
    ],
)
def test_a_mistake_is_reported_with_its_key(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read(tmp_path, text)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "text",
    [
        "[nix]\nbuild_timeout = nan",
        "[nix]\nbuild_timeout = inf",
        "[nix]\nbuild_timeout = 1e9",
        "[nix]\nsigning_key = ''",
        "[nix]\nsigning_key = '-x'",
        "[sandbox]\nmemory = 1.5",
        "[sandbox]\nmemory = '512'",
        "x = " + "9" * 5000,
        "x = 2024-01-01",
        "[sandbox]\ntest_output = 0",
    ],
)
def test_a_wrong_value_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(SettingsError, match=r"^toto\.toml:"):
        read(tmp_path, text)


def test_a_key_is_named_and_not_its_file(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        read(tmp_path, "# ours\n\n[nix]\nsigning_key = '/root/cache \\x1b'\n[sandbox]\nmemory = 512\n")
    assert str(caught.value) == (
        "toto.toml:4: nix.signing_key: names a key that this repository has on toto, not a file: "
        r"run `toto key REPO NAME --import '/root/cache \\x1b'` there, and write NAME here"
    )
    # What was deployed with such a setting can be reverted.
    assert load(tmp_path, deployed=True) == read(tmp_path, "[sandbox]\nmemory = 512\n")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[sandbox]\nmemory = 'a'", 2),
        ("sandbox.memory = 'a'\r\n", 1),
        ("\nsandbox = { boot_timeout = 1, memory = 'a' }", 2),
        ("#memory = 'a'\nx = ' memory '\n[sandbox] # memory\n'memory'='a'", 4),
        ("[nix]\nnixpkgs = '''\n[sandbox]\nmemory = 'b'\n'''\n[sandbox]\n\"mem\\u006fry\" = 'a'", None),
        ("[sandbox]\nmemory = [\n1]", None),
        ("#" * 30_000 + "\n[sandbox]\nmemory = 'a'", None),
    ],
)
def test_a_mistake_is_told_with_its_line_where_it_has_one(tmp_path: Path, text: str, line: int | None) -> None:
    with pytest.raises(SettingsError) as caught:
        read(tmp_path, text)
    where = "toto.toml: " if line is None else f"toto.toml:{line}: "
    assert [each for each in caught.value.problems if each.startswith(f"{where}sandbox.memory: should be")]


def test_a_file_full_of_mistakes_is_told_within_a_minute(tmp_path: Path) -> None:
    text = "".join(f"x{number} = 1\n" for number in range(1_500))
    with pytest.raises(SettingsError) as caught:
        read(tmp_path, text)
    assert len(caught.value.problems) == 1_500


def test_all_mistakes_are_reported_at_once(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        read(tmp_path, "x = 1\n[nix]\ny = 2\nbuild_timeout = 'z'\n")
    assert len(caught.value.problems) == 3


def test_a_folder_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "toto.toml").mkdir()
    with pytest.raises(SettingsError, match="not a file"):
        load(tmp_path)


def test_docs_and_model_agree() -> None:
    text = (Path(__file__).parents[2] / "docs" / "settings.md").read_text()
    documented = {row[0]: row[1:] for row in re.findall(r"^\| `([\w.]+)` \| (\S+) \| (.*) \|$", text, re.MULTILINE)}

    def rows(model: type[BaseModel], prefix: str = "") -> dict[str, tuple[str, str]]:
        found: dict[str, tuple[str, str]] = {}
        for name, field in model.model_fields.items():
            default = field.get_default(call_default_factory=True)
            if isinstance(default, BaseModel):
                found |= rows(type(default), f"{name}.")
                continue
            if isinstance(default, dict):
                found |= rows(get_args(field.annotation)[1], f"{prefix}{name}.NAME.")
            shown = (
                "none"
                if default is None
                else f'`"{default}"`'
                if isinstance(default, str)
                else "`[]`"
                if default == ()
                else f"`{default}`"
            )
            found[prefix + name] = (shown, field.description or "")
        return found

    assert documented == rows(Settings)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.binary()
    | st.text().map(lambda text: text.encode("utf-8", "surrogatepass"))
    | st.text(alphabet="ab=[].'\"\n 1-{},#\\u").map(str.encode)
)
def test_anything_is_read_or_refused(tmp_path: Path, data: bytes) -> None:
    try:
        read(tmp_path, data)
    except SettingsError as error:
        assert all(problem.startswith("toto.toml") and "\n" not in problem for problem in error.problems)
