"""nix/monitoring.nix and examples/btg.nix, evaluated against a real nixpkgs: as tests/nix/test_module.py."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from tests.nix.test_module import NIXPKGS, ROOT, evaluated, pytestmark, settings
from toto.metrics.dashboards import dashboards

__all__ = ["pytestmark"]

OPTIONS: Final = """
  url = "https://toto.example.org"; tokenFile = "/etc/toto-metrics"; grafana.passwordFile = "/etc/password";
"""


def of_host(what: str, options: str = OPTIONS) -> Any:
    """An expression of `config` of a host that has the module with these options."""
    host = f"""{{ config, pkgs, ... }}: {{
      imports = [ {ROOT}/nix/monitoring.nix ];
      boot.loader.grub.device = "nodev";
      fileSystems."/" = {{ device = "/dev/vda"; fsType = "ext4"; }};
      system.stateVersion = "24.11";
      services.toto-monitoring = {{ enable = true; {options} }};
    }}"""
    return evaluated(f"let inherit (import {NIXPKGS}/nixos {{ configuration = {host}; }}) config; in {what}")


def said(found: Any) -> Any:
    """What options say, without those that say nothing."""
    if isinstance(found, dict):
        return {name: said(value) for name, value in found.items() if value not in (None, {}) and name != "_module"}
    return [said(each) for each in found] if isinstance(found, list) else found


def written(name: str) -> Any:
    return yaml.safe_load((ROOT / "monitoring" / name).read_text())


def by_job(jobs: list[dict[str, Any]]) -> dict[str, Any]:
    text = json.dumps(jobs).replace("/run/credentials/prometheus.service/toto", "/etc/prometheus/toto.token")
    return {job["job_name"]: job for job in json.loads(text)}


def test_it_scrapes_and_tells_as_the_files_for_debian_say() -> None:
    found = said(
        of_host(
            "{ jobs = config.services.prometheus.scrapeConfigs; global = config.services.prometheus.globalConfig; "
            "alertmanager = config.services.prometheus.alertmanager.configuration; }"
        )
    )
    prometheus, alertmanager = written("prometheus.yml"), written("alertmanager.yml")
    assert by_job(found["jobs"]) == by_job(prometheus["scrape_configs"]) and found["global"] == prometheus["global"]
    for part in ("route", "inhibit_rules"):
        assert found["alertmanager"][part] == alertmanager[part]
    names = [{each["name"] for each in of["receivers"]} for of in (found["alertmanager"], alertmanager)]
    assert names == [{"page", "ticket"}] * 2


def test_nothing_listens_for_strangers_and_secrets_are_credentials() -> None:
    found = of_host(
        "{ units = map (name: config.systemd.units.${name}.text) "
        '[ "prometheus.service" "alertmanager.service" "grafana.service" ]; '
        "grafana = config.services.grafana.settings.server.http_addr; failed = builtins.filter (each: !each.assertion) "
        "config.assertions; open = config.networking.firewall.allowedTCPPorts; }",
        OPTIONS + 'secrets.slack = "/etc/slack";',
    )
    prometheus, alertmanager, grafana = map(settings, found["units"])
    assert "--web.listen-address=127.0.0.1:9090" in found["units"][0]
    assert "--web.listen-address 127.0.0.1:9093" in found["units"][1] and found["grafana"] == "127.0.0.1"
    assert prometheus["LoadCredential"] == ["toto:/etc/toto-metrics"]
    assert alertmanager["LoadCredential"] == ["slack:/etc/slack"] and grafana["LoadCredential"] == [
        "password:/etc/password"
    ]
    assert found["failed"] == found["open"] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ('grafana.passwordFile = "/x";', "tokenFile is missing"),
        ('tokenFile = "/x";', "grafana.passwordFile is missing"),
        (OPTIONS + 'secrets.x = "${pkgs.writeText "x" "x"}";', "a secret is there"),
    ],
)
def test_what_is_missing_or_open_to_all_is_refused(options: str, message: str) -> None:
    failed = of_host("map (each: each.message) (builtins.filter (each: !each.assertion) config.assertions)", options)
    assert len(failed) == 1 and message in failed[0]


@pytest.mark.parametrize("url", ["http://toto.example.org", "https://toto.example.org/x", "toto"])
def test_the_password_crosses_no_network_as_it_is(url: str) -> None:
    with pytest.raises(AssertionError, match="is not of type"):
        of_host("config.services.toto-monitoring.url", f'url = "{url}";')


def test_the_example_tells_somebody(tmp_path: Path) -> None:
    if (amtool := shutil.which("amtool")) is None:
        pytest.skip("WHAT examples/btg.nix SAYS TO ALERTMANAGER IS NOT CHECKED: there is no amtool")
    host = f"(import {NIXPKGS}/nixos {{ configuration = {ROOT}/examples/btg.nix; }})"
    found = evaluated(f"{host}.config.services.prometheus.alertmanager.configuration")
    (tmp_path / "alertmanager.yml").write_text(json.dumps(found))
    subprocess.run([amtool, "check-config", tmp_path / "alertmanager.yml"], check=True, capture_output=True)
    assert any("slack_configs" in each for each in found["receivers"])


def test_grafana_has_the_dashboards_of_the_generator(tmp_path: Path) -> None:
    found = of_host(
        "let inherit (config.services.grafana) provision; in { sources = provision.datasources.settings.datasources; "
        "made = (builtins.head provision.dashboards.settings.providers).options.path.buildCommand; }"
    )
    assert found["sources"][0]["url"] == "http://127.0.0.1:9090" and found["sources"][0]["isDefault"]
    program, folder = found["made"].split()[0], tmp_path / "out"
    assert program.endswith("/bin/python3")
    script = found["made"].replace(program, "python3").replace("$out", str(folder))
    subprocess.run(["sh", "-euc", script.replace(script.split()[1], f"{ROOT}/toto/metrics/dashboards.py")], check=True)
    assert {each.name for each in folder.iterdir()} == {f"{name}.json" for name in dashboards()}
