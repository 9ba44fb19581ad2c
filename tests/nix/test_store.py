"""nix/store.nix, evaluated against a real nixpkgs: as tests/nix/test_module.py."""

import subprocess
from pathlib import Path
from typing import Any, Final

import pytest

from tests.nix.test_module import NIXPKGS, ROOT, evaluated, pytestmark, settings
from toto.base import paths
from toto.store import exports

__all__ = ["pytestmark"]

KEY: Final = "A" * 43 + "="
OPTIONS: Final = f"""
  address = "10.100.0.1"; privateKeyFile = "/etc/wireguard.key";
  machines.web1 = {{ repo = "infra"; address = "10.100.0.7"; publicKey = "{KEY}"; }};
  machines.web2 = {{ repo = "infra"; address = "10.100.0.8"; publicKey = "{KEY}"; diskless = true; }};
"""


def of_host(what: str, options: str = OPTIONS, more: str = "") -> Any:
    """An expression of `config` of a host that has both modules, with these options."""
    host = f"""{{ config, pkgs, lib, ... }}: {{
      imports = [ {ROOT}/nix/toto.nix {ROOT}/nix/store.nix {{ {more} }} ];
      boot.loader.grub.device = "nodev";
      fileSystems."/" = {{ device = "/dev/vda"; fsType = "ext4"; }};
      system.stateVersion = "24.11";
      services.openssh.enable = true;
      services.toto.enable = lib.mkDefault true;
      services.toto-store = {{ enable = true; {options} }};
    }}"""
    return evaluated(
        f"let inherit (import {NIXPKGS}/nixos {{ configuration = {host}; }}) config pkgs; inherit (pkgs) lib; in {what}"
    )


def test_machines_reach_nfs_inside_wireguard_alone() -> None:
    found = of_host(
        """{
          failed = map (each: each.message) (builtins.filter (each: !each.assertion) config.assertions);
          wireguard = let it = config.networking.wireguard.interfaces.toto-store; in {
            inherit (it) ips listenPort privateKeyFile;
            peers = map (each: { inherit (each) publicKey allowedIPs; }) it.peers;
          };
          firewall = let it = config.networking.firewall; in {
            all = it.allowedTCPPorts; udp = it.allowedUDPPorts; inside = it.interfaces.toto-store.allowedTCPPorts;
          };
          nfs = let it = config.services.nfs; in {
            inherit (it.server) enable hostName exports; inherit (it.settings) nfsd;
          };
          after = config.systemd.services.nfs-server.after;
          unit = config.systemd.units."toto-store.service".text;
          path = config.systemd.units."toto-store.path".text;
          script = config.systemd.services.toto-store.script;
        }"""
    )
    assert found["failed"] == []
    assert found["wireguard"] == {
        "ips": ["10.100.0.1/32"],
        "listenPort": 51820,
        "privateKeyFile": "/etc/wireguard.key",
        "peers": [{"publicKey": KEY, "allowedIPs": [f"10.100.0.{each}/32"]} for each in (7, 8)],
    }
    assert found["firewall"]["inside"] == [2049] and 2049 not in found["firewall"]["all"]
    assert found["firewall"]["udp"] == [51820]
    assert found["nfs"]["enable"] and found["nfs"]["hostName"] == "10.100.0.1" and found["nfs"]["exports"] == ""
    assert found["nfs"]["nfsd"]["vers3"] is False and "wireguard-toto-store.service" in found["after"]
    unit, path = settings(found["unit"]), settings(found["path"])
    assert unit["BindPaths"] == ["/nix:/run/toto-store/nix:norbind"] and unit["Type"] == ["oneshot"]
    assert path["PathChanged"] == ["/var/lib/toto/store/granted/changed"]
    # The script is what a shell can read, and runs the one file that is root's.
    subprocess.run(["bash", "-n"], input=found["script"], text=True, check=True)
    assert "-exports.py " in found["script"] and "-m toto" not in found["script"]


def test_the_exports_are_made_from_its_settings(tmp_path: Path) -> None:
    file = tmp_path / "toto-store.json"
    file.write_text(of_host('config.environment.etc."toto-store.json".text'))
    found = exports.Configuration.load(file)
    assert (found.granted, found.nix) == (Path("/var/lib/toto/store/granted"), Path("/run/toto-store/nix"))
    folder = paths.repo_folder(Path("/var/lib/toto/server/repos/infra.git"))
    assert found.machines == (
        exports.Machine("web1", folder, "10.100.0.7"),
        exports.Machine("web2", folder, "10.100.0.8", diskless=True),
    )


@pytest.mark.parametrize(
    ("options", "more", "message"),
    [
        (OPTIONS, "services.toto.enable = false;", "services.toto.enable"),
        (OPTIONS.replace("10.100.0.8", "10.100.0.7"), "", "an address of its own"),
        (OPTIONS.replace("machines.web1", 'machines."a b"'), "", "names of machines.yaml"),
        (OPTIONS.replace('"/etc/wireguard.key"', '"${pkgs.writeText "k" "k"}"'), "", "privateKeyFile is there"),
    ],
)
def test_what_cannot_work_is_refused(options: str, more: str, message: str) -> None:
    failed = of_host(
        "map (each: each.message) (builtins.filter (each: !each.assertion) config.assertions)", options, more
    )
    assert any(message in each for each in failed), failed
