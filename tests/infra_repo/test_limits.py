"""What a pushed commit may ask for, by the rules of the server."""

from pathlib import Path

import pytest

from toto.base import paths, server_rules
from toto.base.errors import InputError
from toto.infra_repo import limits, manifest
from toto.infra_repo.manifest import ManifestError
from toto.infra_repo.settings import Settings, SettingsError


@pytest.fixture
def rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TOTO_STATE", str(tmp_path / "state"))
    return paths.state_home() / server_rules.FILE


def test_the_defaults_of_the_settings_are_within_the_defaults_of_the_server(rules: Path) -> None:
    assert limits.within(Settings()) == Settings()
    named = {f"{section}.{key}" for section, part in Settings() for key in type(part).model_fields}
    assert {name for name in limits.MOST if not name.startswith(("machine.", "vm."))} <= named


def test_a_value_that_is_too_high_is_an_error_and_a_default_is_lowered(rules: Path) -> None:
    rules.write_text('[most]\n"nix.build_timeout" = 3600\n"nix.evaluate_memory" = 1000\n')
    lowered = limits.within(Settings())
    assert (lowered.nix.build_timeout, lowered.nix.evaluate_memory) == (3600, 1000)
    with pytest.raises(SettingsError) as wrong:
        limits.within(Settings.model_validate({"nix": {"build_timeout": 3601, "evaluate_memory": 2000}}))
    assert set(wrong.value.problems) == {
        "toto.toml: nix.build_timeout: 3601 is more than the 3600 that this server allows "
        "(most.nix.build_timeout in its server.toml)",
        "toto.toml: nix.evaluate_memory: 2000 is more than the 1000 that this server allows "
        "(most.nix.evaluate_memory in its server.toml)",
    }


def test_a_machine_that_asks_for_too_much_is_an_error(rules: Path) -> None:
    fleet = manifest.parse("machines:\n  a: {address: x, memory: 16384}\n  b: {address: y, memory: 16385, cores: 33}\n")
    with pytest.raises(ManifestError) as wrong:
        limits.check_machines(fleet)
    assert [each.split(": ")[1:3] for each in wrong.value.problems] == [["b", "memory"], ["b", "cores"]]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("resume_buton = true", "server.toml: resume_buton: is not a known field; did you mean 'resume_button'?"),
        ("[runs]\nper_repo = 0", "server.toml: runs.per_repo: should be at least 1, not 0"),
        ("[runs", "server.toml: cannot be read: "),
        ("[most]\n'nix.nixpkgs' = 1", "server.toml: most: nix.nixpkgs is not known; known are nix.evaluate_timeout"),
        ("[most]\n'nix.build_timeout' = nan", "server.toml: most.nix.build_timeout"),
    ],
)
def test_mistakes_in_the_rules_are_reported(rules: Path, text: str, complaint: str) -> None:
    rules.write_text(text)
    with pytest.raises(InputError) as wrong:
        limits.load()
    assert complaint in str(wrong.value)


def test_docs_name_every_rule_and_every_limit_with_its_default() -> None:
    text = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
    for name, limit in limits.MOST.items():
        assert f"| `{name}` | {limit:.15g} |" in text, name
    for key, field in server_rules.ServerRules.model_fields.items():
        inside = [f"{key}.{each}" for each in getattr(field.annotation, "model_fields", {})]
        assert all(
            f"| `{name}` |" in text for name in inside or [key] if name not in ("builders", "fleet_builders", "most")
        ), key
