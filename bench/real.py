"""Hosts such as people have, evaluated with a real nixpkgs: what their VM is, and what the evaluation takes.

    python bench/real.py /path/of/nixpkgs [CASE…]

Each case is a host of a few lines that once stood in a rehearsal's way. A case fails when toto could not log in to its
VM, or when the VM could not be built on this machine. (Nothing is built: only the derivations are made.)
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[1]
KEY: Final = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGr2d1b6cs9o1bfVn2dP7Wt6zD0mQyAqH1xS5dOJ1k2f sandbox"
HEAD: Final = f"{'host':<34}{'time':>8}{'memory':>10}   verdict"

# A host's module, by what it is.
CASES: Final[dict[str, str]] = {
    "plain": "",
    "root's keys by mkForce": f'users.users.root.openssh.authorizedKeys.keys = lib.mkForce [ "{KEY} of-mine" ];',
    "no sshd by mkForce": "services.openssh.enable = lib.mkForce false;",
    "sshd on demand by mkForce": "services.openssh = { enable = true; startWhenNeeded = lib.mkForce true; };",
    "sshd for some users": (
        'services.openssh = { enable = true; settings = { AllowUsers = [ "alice" ]; PermitRootLogin = "no"; }; };'
    ),
    "sshd at another port": "services.openssh = { enable = true; ports = [ 2222 ]; };",
    "sshd at one address": (
        'services.openssh = { enable = true; listenAddresses = lib.mkForce [ { addr = "10.9.9.9"; port = 22; } ]; };'
    ),
    "host keys of its own by mkForce": (
        "services.openssh = { enable = true;"
        ' hostKeys = lib.mkForce [ { type = "rsa"; path = "/persist/ssh_host_rsa_key"; bits = 4096; } ]; };'
    ),
    "sshd in the initrd": (
        "boot.initrd.network = { enable = true; ssh = { enable = true; port = 2222;"
        f' authorizedKeys = [ "{KEY}" ]; hostKeys = [ "/etc/secrets/initrd/ssh_host_ed25519_key" ]; }}; }};'
    ),
    "systemd in the initrd": "boot.initrd.systemd.enable = true;",
    "encrypted disk": 'boot.initrd.luks.devices.root.device = "/dev/disk/by-uuid/x";',
    "a container": "boot.isContainer = true;",
    "LXC": 'imports = [ "${modulesPath}/virtualisation/lxc-container.nix" ];',
    "Proxmox's LXC": 'imports = [ "${modulesPath}/virtualisation/proxmox-lxc.nix" ];',
    "nftables rules of its own": (
        "networking.firewall.enable = false; networking.nftables = { enable = true;"
        " ruleset = ''table inet filter { chain input { type filter hook input priority 0; policy drop; } }''; };"
    ),
    "nftables behind the firewall": "networking.nftables.enable = true;",
    "nftables rules beside the firewall": (
        "networking.nftables = { enable = true;"
        " ruleset = ''table inet mine { chain input { type filter hook input priority 0; policy drop; } }''; };"
    ),
    "nftables table of its own": (
        'networking.nftables = { enable = true; tables.mine = { family = "inet";'
        " content = ''chain out { type filter hook output priority 0; policy drop; }''; }; };"
    ),
    "networkd, nothing by DHCP": (
        "networking = { useNetworkd = true; useDHCP = false; };"
        ' systemd.network.networks."10-lan" = { matchConfig.Name = "en*"; address = [ "10.1.2.3/24" ]; };'
    ),
    "NetworkManager": "networking.networkmanager.enable = true;",
    "static addresses by mkForce": (
        "networking = { useDHCP = lib.mkForce false; dhcpcd.enable = lib.mkForce false; interfaces.eth0.ipv4.addresses"
        ' = [ { address = "10.1.2.3"; prefixLength = 24; } ]; };'
    ),
    "a desktop": "services.xserver.enable = true; virtualisation.vmVariant.virtualisation.graphics = lib.mkForce true;",
    "ports by mkForce": (
        "virtualisation.vmVariant.virtualisation.forwardPorts ="
        ' lib.mkForce [ { from = "host"; host.port = 2222; guest.port = 22; } ];'
    ),
    "ZFS": 'boot.supportedFilesystems.zfs = true; networking.hostId = "8425e349";',
    "users that nobody adds by hand": (
        'users.mutableUsers = false; users.users.root = { hashedPassword = "!";'
        f' openssh.authorizedKeys.keys = [ "{KEY} of-mine" ]; }};'
    ),
    "sudo for wheel alone": "security.sudo.execWheelOnly = true;",
    "sudo-rs for wheel alone": "security.sudo-rs = { enable = true; execWheelOnly = true; };",
    "a system that does not switch": "system.switch.enable = false;",
    "containers within": "containers.web = { autoStart = true; config.services.nginx.enable = true; };",
    "a container with nftables": (
        "boot.isContainer = true; networking.firewall.enable = false; networking.nftables = { enable = true;"
        " ruleset = ''table inet filter { chain input { type filter hook input priority 0; policy drop; } }''; };"
    ),
    "aarch64 container": 'boot.isContainer = lib.mkForce true; nixpkgs.hostPlatform = lib.mkForce "aarch64-linux";',
    "aarch64": 'nixpkgs.hostPlatform = lib.mkForce "aarch64-linux";',
}

# The user that docs/machines.md has for toto, on a machine that lets nobody outside of wheel run sudo.
_DOCUMENTED: Final = (ROOT / "docs/machines.md").read_text().partition("```nix\n")[2].partition("```")[0]
CASES["toto's user, hardened"] = f"{_DOCUMENTED}{CASES['sudo for wheel alone']}"

_FACTS: Final = """
let
  nixpkgs = %(nixpkgs)s;
  rehearsal = import %(root)s/nix/rehearsal.nix { sandboxKey = "%(key)s"; ports = [ 8080 ]; builder = "x86_64-linux"; };
  host = { lib, modulesPath, ... }: {
    imports = [ ({ lib, modulesPath, ... }: { %(module)s }) ];
    boot.loader.grub.device = lib.mkDefault "nodev";
    fileSystems."/" = lib.mkDefault { device = "/dev/vda"; fsType = "ext4"; };
    system.stateVersion = lib.mkDefault "24.11";
  };
  of = modules: (import (nixpkgs + "/nixos") { configuration = { imports = modules; }; system = null; }).config;
  plain = (import (nixpkgs + "/nixos/lib/eval-config.nix") {
    modules = [ host { nixpkgs.hostPlatform = plain.lib.mkDefault "x86_64-linux"; } ]; system = null; });
  rehearsed = (plain.extendModules { modules = [ rehearsal ]; }).config;
  vm = rehearsed.virtualisation.vmVariant;
in {
  drv = rehearsed.system.build.vm.drvPath;
  builder = rehearsed.system.build.vm.system or "?";
  same = (rehearsed.system.build.toplevel.drvPath or "?") == (plain.config.system.build.toplevel.drvPath or "?");
  sshd = vm.services.openssh.enable && !vm.services.openssh.startWhenNeeded;
  addresses = vm.services.openssh.listenAddresses;
  hostKeys = map (key: key.path) vm.services.openssh.hostKeys;
  key = vm.environment.etc."ssh/toto_sandbox_keys".text;
  match = builtins.match ".*AuthorizedKeysFile /etc/ssh/toto_sandbox_keys.*" vm.services.openssh.extraConfig != null;
  initrd = vm.boot.initrd.network.ssh.enable;
  container = vm.boot.isContainer;
  graphics = vm.virtualisation.graphics;
  forwarded = vm.virtualisation.forwardPorts;
  sudo = builtins.elem "wheel" (vm.users.users.toto.extraGroups or [ ])
    && builtins.match ".*\ntoto ALL=.*NOPASSWD: ALL.*" vm.security.sudo.configFile != null;
  opens = vm.systemd.services ? toto-mgmt-open;
}
"""


@dataclass(frozen=True)
class Seen:
    """What came of a case: its time in seconds, its memory in MB, and what is wrong, or "" for nothing."""

    seconds: float
    memory: float
    wrong: str


def see(nixpkgs: str, name: str) -> Seen:
    """Evaluate a case."""
    text = _FACTS % {"nixpkgs": nixpkgs, "root": ROOT, "key": KEY, "module": CASES[name]}
    began = time.monotonic()
    argv = ["nix-instantiate", "--eval", "--strict", "--json", "--readonly-mode", "--expr", text]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        nix = subprocess.Popen(argv, stdout=out, stderr=err)
        _, status, used = os.wait4(nix.pid, 0)
        nix.returncode = status
        for each in (out, err):
            each.seek(0)
        said, words = out.read(), err.read()
    seconds, memory = time.monotonic() - began, used.ru_maxrss / 1000
    if status != 0:
        lines = [line.strip() for line in words.splitlines() if line.strip()]
        why = next((line for line in reversed(lines) if line.startswith("error:")), lines[-1] if lines else "no words")
        return Seen(seconds, memory, f"does not evaluate: {why}")
    return Seen(seconds, memory, "; ".join(_judge(name, json.loads(said))))


def _judge(name: str, facts: dict[str, Any]) -> list[str]:
    wrong = []
    for what, right in (
        ("its sshd does not run", facts["sshd"]),
        ("sshd listens elsewhere", facts["addresses"] == []),
        ("sshd has host keys that the VM has not", facts["hostKeys"] == ["/etc/ssh/ssh_host_ed25519_key"]),
        ("toto's key is not let in", facts["key"] == KEY + "\n" and facts["match"]),
        ("its initrd has secrets of the real machine", not facts["initrd"]),
        ("it is a container", not facts["container"]),
        ("it opens a window", not facts["graphics"]),
        ("its ports clash", facts["forwarded"] == []),
        ("its VM is not built for this machine", facts["builder"] == "x86_64-linux"),
        ("its own system has changed", facts["same"]),
        ("toto may not run sudo", facts["sudo"] or "users.users.toto" not in CASES[name]),
        ("its firewall may not let toto in", facts["opens"] == (" hook " in CASES[name])),
    ):
        if not right:
            wrong.append(what)
    return wrong


def main() -> None:
    """Print a line for each case; exit status 1 when one is wrong."""
    nixpkgs, *names = sys.argv[1:] or sys.exit(__doc__)
    os.environ.pop("NIX_PATH", None)
    print(HEAD)
    failed = 0
    for name in names or CASES:
        seen = see(nixpkgs, name)
        failed += bool(seen.wrong)
        print(f"{name:<34}{seen.seconds:7.1f}s{seen.memory:7.0f} MB   {seen.wrong or 'fine'}", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
