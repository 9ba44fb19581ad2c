"""Runs the units that nix/toto.nix makes on a machine with real systemd: the server of toto, and its nix daemon.

    TOTO_NIXPKGS=/path/of/nixpkgs python -m tests.lab.units_of_toto

The units' text is the module's, evaluated against that nixpkgs; only paths of the nix store, of which nothing is built
here, are those of Debian's programs and of a package like nix/package.nix's instead. Not a part of `make test`: on an
emulated machine Prefect's server alone takes minutes to start, and all of it half an hour.
"""

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from tests.lab.debian import DebianMachine, NoDebian, image
from tests.lab.machine import MachineError
from tests.lab.setup import ROOT, cache, setup

UNITS: Final = ("toto.service", "toto-nix-daemon.service")
PLACE: Final = "/opt/toto"  # where the package is on the machine
# What the module's programs are on Debian; the rest of them is on each of these machines.
PACKAGES: Final = (
    *("bubblewrap", "slirp4netns", "nftables", "git", "curl", "busybox-static", "postgresql", "kmod"),
    *("ssl-cert", "libjson-perl"),  # (debootstrap does not see that they are needed)
)
_PATH: Final = "/usr/lib/postgresql/15/bin:/usr/bin:/usr/sbin"
_MINUTES: Final = 40
_HOST: Final = """
{ ... }: {
  imports = [ %s ];
  boot.loader.grub.device = "nodev";
  fileSystems."/" = { device = "/dev/vda"; fsType = "ext4"; };
  system.stateVersion = "24.11";
  services.openssh.enable = true;
  services.toto = { enable = true; firstAdmin = { name = "alice"; key = "%s"; }; };
}"""
_FSTAB: Final = f"""\
/dev/vdb {PLACE} squashfs ro 0 0
{PLACE}/modules /usr/lib/modules none bind 0 0
"""
_BUILD: Final = (
    'derivation { name = "built"; system = builtins.currentSystem; builder = "/bin/sh"; '
    'args = [ "-c" "echo $(( 6 * 7 )) > $out" ]; }'
)


def of_module(nixpkgs: str, key: str) -> dict[str, Any]:
    """What the module says: the texts of its units, what is run before toto, and the kernel's modules."""
    configuration = _HOST % (ROOT / "nix/toto.nix", key)
    asked = f"""
      let inherit (import {nixpkgs}/nixos {{ configuration = {configuration}; }}) config pkgs; in {{
        units = pkgs.lib.genAttrs [ {" ".join(map(json.dumps, UNITS))} ] (name: config.systemd.units.${{name}}.text);
        before = config.systemd.services.toto.preStart;
        modules = config.boot.kernelModules;
      }}"""
    words = ["nix-instantiate", "--eval", "--strict", "--json", "--readonly-mode", "--expr", asked]
    plain = {name: value for name, value in os.environ.items() if not name.startswith("NIX_")}
    said: dict[str, Any] = json.loads(
        subprocess.run(words, env=plain, capture_output=True, text=True, check=True).stdout
    )
    return said


def on_debian(text: str) -> str:
    """A unit's text, or a script's, with Debian's programs."""
    text = re.sub(r'^Environment="(PATH=).*$', rf'Environment="\1{_PATH}"', text, flags=re.M)
    text = re.sub(r'^Environment="(TOTO_TOOLS|LOCALE_ARCHIVE|TZDIR)=.*\n', "", text, flags=re.M)
    text = re.sub(r"/nix/store/[^/\s]*-toto-pre-start(?=$|\n)", "/etc/toto-before", text)
    text = re.sub(r"/nix/store/[^/\s]*-unit-script-toto-pre-start/bin/toto-pre-start", "/etc/toto-before", text)
    text = re.sub(r"/nix/store/[^/\s]*-toto-[0-9.]+/bin/", f"{PLACE}/bin/", text)
    text = re.sub(r"/nix/store/[^/\s]*-key\.pub", "/etc/toto-key.pub", text)
    text = re.sub(r"/nix/store/[^/\s]*-coreutils-[^/\s]*/bin/", "/usr/bin/", text)
    if left := re.search(r"/nix/store/.*-.*", text):
        raise SystemExit(f"the module names a program that is not known here: {left[0]}")
    return text


def package(folder: Path) -> Path:
    """An image with toto as nix/package.nix lays it out, an environment, and the modules of the lab's kernel."""
    tree, made = folder / "tree", folder / "toto.squashfs"
    code = tree / "share/toto"
    keep = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in ("blocks", "flows", "flying_monkey", "tasks", "toto"):
        shutil.copytree(ROOT / name, code / name, ignore=keep)
    (code / "nix").mkdir()
    for name in ("prefect.yaml", "nix/evaluate.nix", "nix/rehearsal.nix"):
        shutil.copyfile(ROOT / name, code / name)
    compiled = ["-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash"]
    subprocess.run([sys.executable, *compiled, code], check=True)
    (tree / "bin").mkdir()
    for name, module in (("toto", "toto.cli"), ("toto-git-shell", "toto.git_host.shell")):
        run = f'PYTHONPATH={PLACE}/share/toto PYTHONNOUSERSITE=1 exec {PLACE}/env/bin/python3 -P -m {module} "$@"'
        (tree / "bin" / name).write_text(f"#!/bin/sh\n{run}\n")
        (tree / "bin" / name).chmod(0o755)
    (tree / "env/bin").mkdir(parents=True)
    (tree / "env/bin/python3").symlink_to("/usr/bin/python3")
    (tree / "env/pyvenv.cfg").write_text("home = /usr/bin\ninclude-system-site-packages = false\n")
    python = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    shutil.copytree(Path(sys.prefix) / "lib" / python, tree / "env/lib" / python, symlinks=True)
    # What this Python has no need of, and Debian's, which is a little older, has.
    older = re.findall(
        r"^(\S+==\S+) ; python_full_version < '3\.11\.3'", (ROOT / "requirements.lock").read_text(), re.M
    )
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    subprocess.run([*pip, tree / "env/lib" / python / "site-packages", *older], check=True)
    (deb,) = (cache() / "debs").glob(f"linux-image-{_release()}_*.deb")
    subprocess.run(["dpkg-deb", "-x", deb, folder / "kernel"], check=True)
    (modules,) = (folder / "kernel").glob("**/lib/modules")
    subprocess.run(["depmod", "-b", modules.parent.parent, _release()], check=True)
    modules.rename(tree / "modules")
    # (The compression that is the least work to undo.)
    words = ["mksquashfs", str(tree), str(made), "-quiet", "-no-progress", "-all-root", "-comp", "lz4"]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(tree)
    return made


def _release() -> str:
    (modules,) = (cache() / "roots/lab-kernel/lib/modules").iterdir()
    return modules.name


async def tried(machine: DebianMachine) -> None:
    """Start the units, and have each do what it is for. Raises `MachineError` with what the journal says."""
    said = 0  # lines

    async def ready(since: float, times: int) -> None:
        """Until toto has said so that often; prints what it says meanwhile."""
        nonlocal said
        journal = "journalctl -u toto -o cat --no-pager | grep -E '^toto: |^Traceback|Error'"
        asked = f"{journal}; systemctl show toto -P NRestarts"
        while True:
            *lines, restarts = (await machine.ssh(asked, login=False)).out.splitlines() or ["0"]
            for line in lines[said:]:
                print(f"{time.monotonic() - since:6.0f} s  {line}", flush=True)
            said = max(said, len(lines))
            if sum(line.startswith("toto: ready at") for line in lines) >= times:
                return
            if restarts.isdigit() and int(restarts) > times:
                raise MachineError(f"toto.service was started {restarts} times anew: see above")
            await asyncio.sleep(5)

    async def told() -> None:
        """Until toto has told the daemon of the fleet's builders, of which there are none, in the folder for that."""
        file = "/run/toto-nix/asked/fleet.json"
        waited = (
            f"rm -f {file}; for _ in $(seq 600); do [ ! -e {file} ] || exec stat -c %U {file}; sleep 1; done; exit 1"
        )
        assert await machine.check(waited, timeout=1200) == "toto"

    async def figures(name: str) -> str:
        said = await machine.check(
            f"systemctl show {name} -P CPUUsageNSec; systemctl show {name} -P MemoryCurrent", login=False
        )
        cpu, memory = said.split()
        return f"{int(cpu) / 1e9:.0f} s of CPU, {int(memory) / 2**20:.0f} MB with its files"

    await machine.check("systemctl restart systemd-modules-load && lsmod | grep -w -e tun -e nft_ct -e nft_reject_inet")
    await machine.check(
        "nix-store --init; useradd --system --user-group --home-dir /var/lib/toto --shell /bin/bash toto"
    )
    began = time.monotonic()
    await machine.check("systemctl start toto-nix-daemon")
    print(f"{time.monotonic() - began:6.0f} s  toto-nix-daemon has said that it is ready", flush=True)
    await machine.check("systemctl start --no-block toto")
    await ready(began, 1)
    print(f"        toto: {await figures('toto')}; its daemon: {await figures('toto-nix-daemon')}", flush=True)
    # (It asks the server three times a second: on an emulated machine that leaves nothing for anybody else.)
    worker = "pkill --signal %s -u toto -f 'prefect worker start'"
    await machine.check(worker % "STOP")
    as_toto = "runuser -u toto -- env HOME=/var/lib/toto TOTO_STATE=/var/lib/toto"
    socket = "NIX_REMOTE=unix:///run/toto-nix/client/socket"
    built = f"cd /var/lib/toto && {as_toto} {socket} sh -c 'cat $(nix-build --no-out-link -E \"$0\")' '{_BUILD}'"
    assert await machine.check(built, login=False) == "42"
    print(f"{time.monotonic() - began:6.0f} s  the daemon has built as a client's nix asked", flush=True)
    state = "/var/lib/toto"
    # (Its start is a second of work elsewhere, and here a minute or more.)
    made = f"{as_toto} {PLACE}/bin/toto repo create infra && ls {state}/server/repos"
    repos = await machine.check(made, timeout=600)
    assert {"toto-admin.git", "infra.git"} <= set(repos.split()), repos
    print(f"{time.monotonic() - began:6.0f} s  the first admin's repo is there, and a new one", flush=True)
    await told()
    await machine.check(
        "systemctl stop toto-nix-daemon && ls /run/toto-nix && systemctl start toto-nix-daemon", timeout=900
    )
    await told()
    print(
        f"{time.monotonic() - began:6.0f} s  toto tells the daemon of builders, also one that is started after it",
        flush=True,
    )
    await machine.check(worker % "CONT")
    again = time.monotonic()
    await machine.check("systemctl reload toto")
    await ready(again, 2)
    print(f"        reloaded, it ended when idle and was started anew: {await figures('toto')}", flush=True)
    await machine.check("systemctl stop toto toto-nix-daemon", timeout=400)
    failed = await machine.check("systemctl list-units --failed --no-legend --plain", login=False)
    assert "toto" not in failed, failed
    left = await machine.ssh("pgrep -u toto -a || ls /sys/fs/cgroup/system.slice/toto*.service", login=False)
    assert "toto" not in left.out, left.out
    print(f"{time.monotonic() - began:6.0f} s  both are stopped, and nothing of them is left", flush=True)


async def main() -> int:
    """The exit status: 0 when both units did all of it."""
    nixpkgs = os.environ.get("TOTO_NIXPKGS")
    if not nixpkgs or shutil.which("nix-instantiate") is None:
        print("TOTO_NIXPKGS names no checkout of nixpkgs (24.11 or newer), or there is no nix", file=sys.stderr)
        return 1
    await asyncio.to_thread(setup)
    with tempfile.TemporaryDirectory(prefix="toto-units-", dir="/var/tmp") as name:
        folder = Path(name)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "key"], check=True)
        public = (folder / "key.pub").read_text().strip()
        said = of_module(nixpkgs, public)
        files = {f"/etc/systemd/system/{unit}": (on_debian(text), 0o644) for unit, text in said["units"].items()}
        files |= {
            # (What is empty is masked: Debian's own server, and what waits for a network that is there.)
            "/etc/systemd/system/postgresql.service": ("", 0o644),
            "/etc/systemd/system/systemd-networkd-wait-online.service": ("", 0o644),
            "/etc/toto-before": (f"#!/bin/sh -e\n{on_debian(said['before'])}", 0o755),
            "/etc/toto-key.pub": (f"{public}\n", 0o644),
            "/etc/modules-load.d/toto.conf": ("\n".join(said["modules"]), 0o644),
            "/etc/fstab": (_FSTAB, 0o644),
            "/etc/nix/nix.conf": ("experimental-features = nix-command flakes\n", 0o644),
            f"{PLACE}/mounted-here": ("", 0o644),
            "/usr/lib/modules/mounted-here": ("", 0o644),
        }
        try:
            await asyncio.to_thread(image, PACKAGES)
        except NoDebian as error:
            print(error, file=sys.stderr)
            return 1
        tree = await asyncio.to_thread(package, folder)
        where = folder / "machine"
        machine = DebianMachine(
            "toto",
            where,
            folder / "key",
            address="127.0.8.7",
            files=files,
            packages=PACKAGES,
            tree=tree,
            memory=2048,
            cores=2,
        )
        async with asyncio.timeout(60 * _MINUTES), machine:
            try:
                await tried(machine)
            except (AssertionError, MachineError) as error:
                logs = "tail -n 20 /var/lib/toto/server/logs/*; systemctl status toto toto-nix-daemon --no-pager -n 30"
                print(error, (await machine.ssh(logs)).out, sep="\n", file=sys.stderr)
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
