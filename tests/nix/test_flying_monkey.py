"""nix/flying-monkey.nix and its package, evaluated against a real nixpkgs, as tests/nix/test_module.py does.

What it writes is what tests/flying_monkey/test_access.py tries on a machine with real systemd.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from flying_monkey.machine import Configuration
from flying_monkey.sandbox import SLICE
from tests.flying_monkey import access
from tests.nix import test_module as module
from tests.nix.test_module import NIXPKGS, ROOT, evaluated

pytestmark = module.pytestmark

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGr2d1b6cs9o1bfVn2dP7Wt6zD0mQyAqH1xS5dOJ1k2f"
HOST = f"""
{{ config, lib, pkgs, ... }}: {{
  imports = [ {ROOT}/nix/flying-monkey.nix ({{ config, lib, pkgs, ... }}: {{ %s }}) ];
  boot.loader.grub.device = "nodev";
  fileSystems."/" = {{ device = "/dev/vda"; fsType = "ext4"; }};
  system.stateVersion = "24.11";
  networking.hostName = "web1";
  services.openssh.enable = lib.mkDefault true;
  services.flying-monkey = {{ enable = true; repo = "infra"; signers = [ "{KEY}" ]; loginKeys = [ "{KEY} toto" ]; }};
}}"""


def of_host(what: str, options: str = "") -> Any:
    nixos = f"(import {NIXPKGS}/nixos {{ configuration = {HOST % options}; }})"
    return evaluated(f"let inherit ({nixos}) config pkgs; inherit (pkgs) lib; in {what}")


def test_what_it_writes_is_what_was_tried_on_a_real_machine() -> None:
    written = of_host(
        """{
          sshd = config.services.openssh.extraConfig;
          sudo = config.security.sudo.configFile;
          configuration = config.environment.etc."flying-monkey/config.json".text;
          signers = config.environment.etc."flying-monkey/signers".text;
          user = { inherit (config.users.users.toto) isSystemUser home createHome hashedPassword shell; };
          keys = config.users.users.toto.openssh.authorizedKeys.keys;
          groups = config.users.users.toto.extraGroups;
          jobs = config.nix.settings.max-jobs;
        }"""
    )
    assert written["sshd"].endswith(access.SSHD)
    rule = access.SUDO.replace(f"{access.PLACE}/helper", "/run/current-system/sw/bin/flying-monkey-helper")
    assert " ".join(rule.split()) in " ".join(
        written["sudo"].replace(" : ", ":").replace("NOPASSWD: ", "NOPASSWD: ").split()
    )
    found = Configuration(**json.loads(written["configuration"]))
    assert (found.repo, found.name, found.writable_store) == ("infra", "web1", False)
    assert found.helper == "/run/current-system/sw/bin/flying-monkey-helper"
    assert written["signers"] == "".join(
        f'infra {options}namespaces="desired@toto" {KEY}\n' for options in ("", "cert-authority,")
    )
    shell = written["user"].pop("shell")
    assert shell.startswith("/nix/store/") and shell.endswith("/bin/flying-monkey-gate")
    assert written["user"] == {"isSystemUser": True, "home": "/var/empty", "createHome": False, "hashedPassword": "!"}
    assert written["keys"] == [f"{KEY} toto"] and written["groups"] == [] and written["jobs"] == "auto"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("services.openssh.enable = false;", "set services.openssh.enable"),
        ('nix.settings.trusted-users = [ "toto" ];', "lets toto become root"),
        ("security.sudo.execWheelOnly = true;", ""),
        ("services.flying-monkey.loginKeys = lib.mkForce [ ];", "set loginKeys for a machine that is pushed to"),
        ('services.flying-monkey.checks."../x" = "";', "the name of a hook or check"),
        ("security.sudo.enable = false;", "needs security.sudo"),
        ("", ""),
    ],
)
def test_what_would_break_it_is_said(options: str, words: str) -> None:
    said = of_host("map (each: each.message) (lib.filter (each: !each.assertion) config.assertions)", options)
    assert [words in each for each in said] == [True] * bool(words), said


def test_all_that_tests_run_is_bounded_together() -> None:
    found = of_host(f'config.systemd.units."{SLICE}".text')
    assert all(line in found.splitlines() for line in access.SLICE.splitlines())


def test_a_store_that_is_written_to_builds_nothing() -> None:
    found = of_host("config.nix.settings.max-jobs", "services.flying-monkey.writableStore = true;")
    assert found == 0
    revoked = of_host(
        'config.environment.etc."flying-monkey/revoked".text', f'services.flying-monkey.revokedKeys = [ "{KEY}" ];'
    )
    assert revoked == f"{KEY}\n"


def test_a_machine_on_which_only_wheel_starts_sudo_has_a_way_to_it_for_toto_alone() -> None:
    found = of_host(
        """{
          configuration = config.environment.etc."flying-monkey/config.json".text;
          wrappers = lib.mapAttrs (name: each: { inherit (each) owner group setuid permissions source; })
            { inherit (config.security.wrappers) sudo flying-monkey-sudo; };
        }""",
        "security.sudo.execWheelOnly = true;",
    )
    own, sudo = found["wrappers"]["flying-monkey-sudo"], found["wrappers"]["sudo"]
    assert own == {**sudo, "group": "toto"} and (sudo["group"], sudo["permissions"]) == ("wheel", "u+rx,g+x")
    configuration = Configuration(**json.loads(found["configuration"]))
    assert configuration.sudo == "/run/wrappers/bin/flying-monkey-sudo"


PULLED = """
services.flying-monkey = {
  loginKeys = lib.mkForce [ ]; url = "https://toto.example.org:4201"; ca = ./README.md; tests = false;
  prepareHooks."10-drain" = "echo drained"; finishHooks."10-undrain" = "echo here"; checks.page = "echo 1..0";
  metrics = { folder = "/var/lib/node-exporter"; port = 9101; };
  garbage = { at = "weekly"; generations = 3; free = 5000; };
};"""


def test_a_machine_that_pulls_has_an_agent_and_no_user_of_toto_s(tmp_path: Path) -> None:
    options = PULLED.replace("./README.md", str(ROOT / "README.md"))
    written = of_host(
        """{
          users = lib.attrNames (lib.filterAttrs (name: lib.const (lib.elem name [ "toto" "flying-monkey" ]))
            config.users.users);
          sshd = config.services.openssh.extraConfig;
          sudo = config.security.sudo.configFile;
          configuration = config.environment.etc."flying-monkey/config.json".text;
          units = lib.mapAttrs (name: each: each.text)
            (lib.filterAttrs (name: lib.const (lib.hasPrefix "flying-monkey" name)) config.systemd.units);
          hooks = lib.mapAttrs (name: each: toString each.source)
            (lib.filterAttrs (name: each: lib.hasInfix ".d/" name && lib.hasPrefix "flying-monkey/" name)
              config.environment.etc);
          tmp = config.systemd.tmpfiles.rules;
          failed = lib.filter (each: !each.assertion) config.assertions;
        }""",
        options,
    )
    assert written["failed"] == [] and written["users"] == ["flying-monkey"]
    assert "toto" not in written["sshd"] + written["sudo"]
    found = json.loads(written["configuration"])
    assert (found["url"], found["user"]) == ("https://toto.example.org:4201", "flying-monkey")
    assert found["tests"] is False and found["ca"].startswith("/nix/store/")
    assert found["metrics"] == "/var/lib/node-exporter/flying-monkey.prom" and found["metrics_port"] == 9101
    assert {name: Path(source).parent.name for name, source in written["hooks"].items()} == dict.fromkeys(
        [f"flying-monkey/{each}" for each in ("checks.d/page", "finish.d/10-undrain", "prepare.d/10-drain")], "bin"
    )
    assert "d /var/lib/node-exporter 0755 root root -" in written["tmp"]
    units = {name: module.settings(text) for name, text in written["units"].items()}
    assert units["flying-monkey.service"]["ExecStart"][0].endswith("/bin/flying-monkey-agent")
    assert units["flying-monkey.service"]["Restart"] == ["always"]
    assert {each["X-RestartIfChanged"][0] for name, each in units.items() if name.endswith(".service")} == {"false"}
    garbage = units["flying-monkey-garbage.service"]["ExecStart"][0]
    assert garbage.endswith("/bin/flying-monkey-garbage 3 5000000000")
    assert units["flying-monkey-garbage.timer"]["OnCalendar"] == ["weekly"]
    module.verified(written["units"], tmp_path / "units")
