"""nix/toto.nix, nix/package.nix and examples/toto.nix, evaluated against a real nixpkgs.

    TOTO_NIXPKGS=/path/of/nixpkgs python -m pytest tests/nix/test_module.py

What only a build or a boot would show is not in here: docs/operations.md says so.
"""

import functools
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, Final

import pytest

from bench import real
from toto.base import server_rules

ROOT: Final = Path(__file__).parents[2]
NIXPKGS: Final = os.environ.get("TOTO_NIXPKGS", "")

pytestmark = [
    pytest.mark.minutes(3),
    pytest.mark.skipif(
        not NIXPKGS or shutil.which("nix-instantiate") is None,
        reason="THE NIXOS MODULE IS NOT CHECKED: TOTO_NIXPKGS names no checkout of nixpkgs (24.11 or newer)",
    ),
]

KEY: Final = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGr2d1b6cs9o1bfVn2dP7Wt6zD0mQyAqH1xS5dOJ1k2f alice@laptop"
HOST: Final = f"""
{{ config, lib, pkgs, ... }}: {{
  imports = [ {ROOT}/nix/toto.nix ({{ config, lib, pkgs, ... }}: {{ %s }}) ];
  boot.loader.grub.device = "nodev";
  fileSystems."/" = {{ device = "/dev/vda"; fsType = "ext4"; }};
  system.stateVersion = "24.11";
  services.openssh.enable = lib.mkDefault true;
  services.toto.enable = true;
}}"""
# Every one of these ends cells, or their network; nix/toto.nix says why.
BREAKS_CELLS: Final = {
    *("RestrictNamespaces", "ProtectKernelTunables", "ProtectKernelLogs", "ProtectProc", "ProcSubset"),
    *("ProtectHostname", "PrivateDevices", "PrivateNetwork", "MemoryDenyWriteExecute"),
}


@functools.cache
def evaluated(expression: str, *, writes: Path | None = None) -> Any:
    """What an expression is, as JSON. Derivations are written to the store below `writes`, or nowhere."""
    store = ["--readonly-mode"] if writes is None else ["--read-write-mode", "--store", str(writes)]
    done = subprocess.run(
        ["nix-instantiate", "--eval", "--strict", "--json", *store, "--expr", expression],
        env={name: value for name, value in os.environ.items() if not name.startswith("NIX_")},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def of_host(what: str, options: str = "", **more: Any) -> Any:
    """An expression of `config` and `pkgs` of a host that has the module with `options`."""
    nixos = f"(import {NIXPKGS}/nixos {{ configuration = {HOST % options}; }})"
    return evaluated(f"let inherit ({nixos}) config pkgs; inherit (pkgs) lib; in {what}", **more)


def unit(name: str, options: str = "") -> dict[str, list[str]]:
    """The settings of a unit, by their names: the values of all its sections."""
    return settings(of_host(f'config.systemd.units."{name}".text', options))


def settings(text: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(name, []).append(value)
    return found


def environment(of: dict[str, list[str]]) -> dict[str, str]:
    return dict(each.strip('"').split("=", 1) for each in of["Environment"])


def test_the_server_is_a_user_without_any_right() -> None:
    toto = unit("toto.service")
    assert toto["User"] == toto["Group"] == ["toto"] and toto["SupplementaryGroups"] == ["kvm"]
    assert toto["CapabilityBoundingSet"] == toto["AmbientCapabilities"] == [""]
    assert toto["NoNewPrivileges"] == ["true"] and toto["ProtectSystem"] == ["strict"]
    assert toto["StateDirectory"] == ["toto"] and toto["StateDirectoryMode"] == ["0700"] and toto["UMask"] == ["0077"]
    # It writes to its state, and where it asks the daemon, of which root makes no more than the folder above it.
    assert toto["RuntimeDirectory"] == ["toto-nix/asked"] and toto["RuntimeDirectoryPreserve"] == ["true"]
    assert toto["RuntimeDirectoryMode"] == ["0770"] and "ReadWritePaths" not in toto
    assert toto["DeviceAllow"] == ["/dev/kvm rw", "/dev/net/tun rw"] and toto["DevicePolicy"] == ["closed"]
    assert not BREAKS_CELLS & set(toto)
    assert toto["Restart"] == ["always"] and toto["KillMode"] == ["mixed"] and toto["OOMPolicy"] == ["continue"]
    assert re.fullmatch(r"'/nix/store/\S+-toto-[0-9.]+/bin/toto' 'serve' '--port' '4200'", toto["ExecStart"][0])


def test_it_is_no_user_of_anybody_else() -> None:
    user = of_host("{ inherit (config.users.users.toto) uid group home isSystemUser hashedPassword; }")
    assert user == {"uid": None, "group": "toto", "home": "/var/lib/toto", "isSystemUser": True, "hashedPassword": None}


def test_its_path_has_what_it_starts() -> None:
    path = environment(unit("toto.service"))["PATH"]
    for each in (
        *("bubblewrap", "slirp4netns", "nftables", "iproute2", "util-linux", "qemu", "git", "openssh", "nix", "curl"),
        *("bash", "coreutils", "gnused", "gnugrep", "kubernetes-helm", "terraform", "postgresql-16", "python3-3.12"),
    ):
        assert re.search(rf"/nix/store/[a-z0-9]{{32}}-{re.escape(each)}[^:]*/bin(:|$)", path), each
    without = environment(unit("toto.service", "services.toto = { terraform = null; postgresql = null; };"))["PATH"]
    assert "terraform" not in without and "postgresql" not in without
    assert "'--sqlite'" in unit("toto.service", "services.toto.postgresql = null;")["ExecStart"][0]


def test_cells_see_the_closure_of_its_programs_and_of_the_shell(tmp_path: Path) -> None:
    context = of_host(
        "builtins.attrNames (builtins.getContext config.systemd.services.toto.environment.TOTO_TOOLS)", writes=tmp_path
    )
    (drv,) = context
    text = (tmp_path / drv.removeprefix("/")).read_text().replace("\\\\", "\\").replace('\\"', '"')
    roots = re.search(r'"exportReferencesGraph":\{"graph":\[(.*?)\]', text)
    assert roots is not None
    for each in ("bash-", "coreutils-", "util-linux-", "openssh-", "python3-3.12", "curl-", "toto-links"):
        assert each in roots[1], each
    assert "postgresql" not in roots[1]


def test_the_key_of_blocks_is_a_credential() -> None:
    assert not {"LoadCredential", "LoadCredentialEncrypted"} & set(unit("toto.service"))
    sealed = unit("toto.service", 'services.toto.blockKey.file = "/etc/toto/blocks.cred";')
    assert sealed["LoadCredentialEncrypted"] == ["toto-blocks:/etc/toto/blocks.cred"] and "LoadCredential" not in sealed
    plain = unit("toto.service", 'services.toto.blockKey = { file = "/run/keys/blocks"; encrypted = false; };')
    assert plain["LoadCredential"] == ["toto-blocks:/run/keys/blocks"] and "LoadCredentialEncrypted" not in plain


def test_settings_reach_the_server() -> None:
    options = """services.toto = {
      uiUrl = "https://toto.example.org"; port = 4300; environmentFile = "/etc/toto.env";
      allowedNetworks = [ "192.168.7.0/24" "10.1.0.0/16" ]; environment.TOTO_CELL_MEMORY = "8000";
      nixPath = [ "nixpkgs=/srv/nixpkgs" ]; programs = [ pkgs.jq ];
    };"""
    toto, daemon = unit("toto.service", options), unit("toto-nix-daemon.service", options)
    assert toto["ExecStart"][0].endswith(
        "'serve' '--port' '4300' '--behind-proxy' '--ui-url' 'https://toto.example.org'"
    )
    assert toto["EnvironmentFile"] == ["/etc/toto.env"] and "EnvironmentFile" not in daemon
    said = environment(toto)
    assert said["TOTO_ALLOWED_NETWORKS"] == "192.168.7.0/24,10.1.0.0/16" == environment(daemon)["TOTO_ALLOWED_NETWORKS"]
    assert said["TOTO_CELL_MEMORY"] == "8000" and said["NIX_PATH"] == "nixpkgs=/srv/nixpkgs" and "-jq-" in said["PATH"]
    assert said["TOTO_STATE"] == said["HOME"] == "/var/lib/toto"
    command = of_host(
        '(lib.findFirst (each: each.name == "toto") null config.environment.systemPackages).text', options
    )
    assert re.search(r"^export TOTO_STATE='?/var/lib/toto'?$", command, re.MULTILINE)
    assert re.search(r"^export TOTO_CELL_MEMORY='?8000'?$", command, re.MULTILINE)


PARTS: Final = """
networking.domain = "example.org"; networking.hostName = "toto";
security.acme = { acceptTerms = true; defaults.email = "a@example.org"; };
services.nginx.virtualHosts."toto.example.org".enableACME = true;
services.toto = {
  nginx.enable = true; machines.listen = "10.0.0.2"; backup = { enable = true; at = "hourly"; keep = 3; };
  environmentFile = "/etc/toto.env";
};"""


def test_a_proxy_the_server_for_machines_and_a_backup_are_there_when_they_are_wanted(tmp_path: Path) -> None:
    said = of_host(
        """{
          units = lib.genAttrs [ "toto.service" "toto-backup.service" "toto-backup.timer" ]
            (name: config.systemd.units.${name}.text);
          script = config.systemd.services.toto-backup.script;
          host = { inherit (config.services.nginx.virtualHosts."toto.example.org") forceSSL; }
            // { inherit (config.services.nginx.virtualHosts."toto.example.org".locations."/") extraConfig proxyPass
              proxyWebsockets recommendedProxySettings; };
          failed = map (each: each.message) (builtins.filter (each: !each.assertion) config.assertions);
        }""",
        PARTS,
    )
    assert said["failed"] == []
    assert said["host"]["proxyPass"] == "http://127.0.0.1:4200" and said["host"]["forceSSL"]
    assert said["host"]["proxyWebsockets"] and said["host"]["recommendedProxySettings"]
    units = {name: settings(text) for name, text in said["units"].items()}
    assert units["toto.service"]["ExecStart"][0].endswith(
        "'--behind-proxy' '--ui-url' 'https://toto.example.org' "
        "'--machines' '10.0.0.2:4201' '--machines-name' 'toto.example.org'"
    )
    backup = units["toto-backup.service"]
    assert backup["Type"] == ["oneshot"] and backup["User"] == ["toto"]
    assert backup["StateDirectory"] == ["toto", "toto-backup"] and backup["EnvironmentFile"] == ["/etc/toto.env"]
    assert re.search(r"-postgresql-16[^:]*/bin(:|$)", environment(backup)["PATH"])
    assert units["toto-backup.timer"]["OnCalendar"] == ["hourly"]
    # The script, with a stand-in for toto: the newest are kept, and nothing else is touched.
    names = [f"toto-2026010{day}-000000.tar" for day in range(1, 6)]
    for name in (*names, "mine.tar"):
        (tmp_path / name).write_text("")
    script = said["script"].replace("/var/lib/toto-backup", str(tmp_path))
    script = re.sub(r"/nix/store/\S+/bin/toto backup", "touch", script)
    subprocess.run(["sh", "-euc", script], check=True)
    (new,) = {each.name for each in tmp_path.iterdir()} - {*names, "mine.tar"}
    assert {each.name for each in tmp_path.iterdir()} == {"mine.tar", *names[-2:], new}
    if shutil.which("systemd-analyze") is not None:
        verified(said["units"], tmp_path / "units")


def test_the_configuration_of_nginx_is_the_one_that_is_tried(tmp_path: Path) -> None:
    """tests/fleet/test_page.py runs a real nginx with it."""
    options = """
      networking.domain = "example.org"; networking.hostName = "toto"; services.toto.nginx.enable = true;
      services.nginx.virtualHosts."toto.example.org" = {
        sslCertificate = "/etc/toto/cert.pem"; sslCertificateKey = "/etc/toto/key.pem";
      };"""
    assert of_host("config.systemd.services.nginx.serviceConfig.ExecStart", options, writes=tmp_path)
    said = {}
    for name in ("nginx.conf", "nginx-recommended-proxy-headers.conf"):
        (drv,) = (tmp_path / "nix/store").glob(f"*-{name}.drv")
        found = re.search(r'\("text",("(?:[^"\\]|\\.)*")\)', drv.read_text())
        assert found is not None
        said[name] = json.loads(found[1])
    headers = said["nginx-recommended-proxy-headers.conf"]
    text = re.sub(r"include /nix/store/\S+-nginx-recommended-proxy-headers.conf;", headers, said["nginx.conf"])
    lines = [" ".join(line.split()) for line in text.splitlines()]
    wanted = [line for line in lines if line and not line.startswith(("#", "include /nix/store/"))]
    assert (ROOT / "tests/fleet/nginx.conf").read_text().splitlines() == wanted


def test_the_first_admin_is_made_once() -> None:
    script = of_host(
        "config.systemd.services.toto.preStart", f'services.toto.firstAdmin = {{ name = "alice"; key = "{KEY}"; }};'
    )
    assert re.search(
        r"if \[ ! -e /var/lib/toto/server/repos/toto-admin.git \]; then\n"
        r"\s+/nix/store/\S+/bin/toto repo admin alice /nix/store/\S+\nfi\n",
        script,
    )
    assert of_host("config.systemd.services.toto.preStart") == ""


def test_root_runs_toto_s_nix_daemon_and_nothing_else_of_toto_s() -> None:
    text = of_host(
        "{ units = builtins.mapAttrs (name: unit: if unit.enable then unit.text else null) config.systemd.units; "
        "toto = config.services.toto.package.outPath; }"
    )
    mine = {name for name, unit in text["units"].items() if unit and text["toto"] in unit}
    assert mine == {"toto.service", "toto-nix-daemon.service"}
    daemon = settings(text["units"]["toto-nix-daemon.service"])
    assert daemon["ExecStart"] == [f"{text['toto']}/bin/toto nix-daemon --group toto"]
    assert not {"User", "ExecStartPre", "ExecStartPost", "ExecStop"} & set(daemon)
    assert re.fullmatch(r"/nix/store/\S+/bin/kill -HUP [$]MAINPID", daemon["ExecReload"][0])
    assert daemon["Type"] == ["notify"] and daemon["StateDirectoryMode"] == ["0700"]
    # With these it could not build: they take away a capability, a device, or a part of /proc.
    assert not (BREAKS_CELLS | {"CapabilityBoundingSet", "ProtectClock", "DeviceAllow", "LockPersonality"}) & set(
        daemon
    )
    for each in ("nix", "bubblewrap", "slirp4netns", "nftables", "busybox-static", "openssh"):
        assert re.search(rf"/nix/store/[a-z0-9]{{32}}-{each}[^:]*/bin(:|$)", environment(daemon)["PATH"]), each


def test_sshd_lets_pushers_in_and_nobody_else_differently(tmp_path: Path) -> None:
    said = of_host(
        "{ conf = config.services.openssh.extraConfig; "
        'keys = { inherit (config.environment.etc."ssh/toto-keys") mode text; }; }'
    )
    match = said["conf"][said["conf"].index("Match User toto") :]
    assert said["keys"]["mode"] == "0755"  # (with a mode it is a file of /etc, and no link into the store)
    assert re.search(
        r" TOTO_STATE=/var/lib/toto\nexec \S+/bin/toto-git-shell --repos /var/lib/toto/server/repos keys\n$",
        said["keys"]["text"],
    )
    assert "Match User toto" not in of_host("config.services.openssh.extraConfig", "services.toto.gitHost = false;")
    sshd = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    if sshd is None:
        pytest.skip("THERE IS NO sshd to read what the module writes for it")
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "key"], check=True)
    (tmp_path / "conf").write_text(f"HostKey {tmp_path}/key\n{match}PasswordAuthentication no\n")

    def of(user: str) -> str:
        who = f"user={user},host=h,addr=192.0.2.1,laddr=192.0.2.2,lport=22"
        words = [sshd, "-T", "-f", str(tmp_path / "conf"), "-C", who]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout

    for line in (
        "authorizedkeyscommand /etc/ssh/toto-keys",
        "authorizedkeyscommanduser toto",
        "authorizedkeysfile none",
        "authenticationmethods publickey",
    ):
        assert f"\n{line}\n" in of("toto") and f"\n{line}\n" not in of("alice")
    assert "\npasswordauthentication no\n" in of("alice")  # what comes after the module's lines is not of toto alone


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("services.openssh.enable = false;", "services.openssh.enable"),
        ('services.openssh.settings.AllowUsers = [ "alice" ];', "AllowUsers"),
        ('services.openssh.settings.AllowGroups = [ "wheel" ];', "AllowGroups"),
        ("security.allowUserNamespaces = false;", "cells are user namespaces"),
        ("boot.kernelPackages = pkgs.linuxPackages_hardened;", "security.unprivilegedUsernsClone"),
        ('services.toto.environment.TOTO_AUTH = "admin:x";', "secrets belong into environmentFile"),
        ('services.toto.environment.TOTO_DATABASE_URL = "x";', "secrets belong into environmentFile"),
        ('services.toto.environment.TOTO_STATE = "/x";', "that the module sets"),
        (
            'services.toto.blockKey = { file = "${pkgs.writeText "k" "k"}"; encrypted = false; };',
            "blockKey.file is there",
        ),
        ('services.toto.environmentFile = "${pkgs.writeText "k" "k"}";', "environmentFile is there"),
        ("nix.enable = false;", "nix.enable is false"),
        ("services.toto.nginx.enable = true;", "nginx needs a certificate"),
    ],
)
def test_what_could_not_work_is_refused(options: str, message: str) -> None:
    failed = of_host("map (each: each.message) (builtins.filter (each: !each.assertion) config.assertions)", options)
    assert any("services.toto" in each and message in each for each in failed), failed


def test_builders_are_what_the_daemon_reads_of_them(tmp_path: Path) -> None:
    options = f"""services.toto.builders.pi = {{
      address = "10.0.0.7"; hostKey = "{KEY}"; systems = [ "aarch64-linux" ]; jobs = 4; features = [ "kvm" ];
    }};
    services.toto.fleetBuilders."infra/gate".hostKey = "{KEY}";"""
    files = "config.systemd.tmpfiles.settings.toto-builders"
    file = f'{files}."/var/lib/toto-nix/server.toml"."L+".argument'
    # (A program makes the file of a value. It is not built here: this is the value.)
    (drv,) = of_host(f"builtins.attrNames (builtins.getContext {file})", options, writes=tmp_path)
    value = re.search(r'\("value",("(?:[^"\\]|\\.)*")\)', (tmp_path / drv.removeprefix("/")).read_text())
    assert value is not None
    rules = server_rules.ServerRules.model_validate_json(json.loads(value[1]))
    assert rules.builders == {
        "pi": server_rules.Builder(
            address="10.0.0.7", host_key=KEY, systems=("aarch64-linux",), jobs=4, features=("kvm",)
        )
    }
    assert rules.fleet_builders == {"infra/gate": server_rules.FleetBuilder(host_key=KEY)}
    for right, wrong in ((KEY, "AAAA"), ('"aarch64-linux"', "")):
        with pytest.raises(AssertionError, match="is not of type"):
            of_host(file, options.replace(right, wrong))
    folder = of_host(f'{files}."/var/lib/toto-nix".d')
    assert (folder["mode"], folder["user"], folder["group"]) == ("0700", "root", "root")


def test_what_works_is_not_refused() -> None:
    for options in (
        "",
        'services.openssh.settings.AllowUsers = [ "alice" "toto" ];',
        "services.openssh.enable = false; services.toto.gitHost = false;",
        "boot.kernelPackages = pkgs.linuxPackages_hardened; security.unprivilegedUsernsClone = true;",
        'services.toto.blockKey.file = "${pkgs.writeText "sealed" "sealed"}";',
    ):
        failed = of_host(
            "map (each: each.message) (builtins.filter (each: !each.assertion) config.assertions)", options
        )
        assert not failed, options


@pytest.mark.parametrize(
    "options",
    [
        'blockKey.file = "blocks.cred";',
        'firstAdmin = { name = "a b"; key = "ssh-ed25519 AAAA"; };',
        'firstAdmin = { name = "alice"; key = "AAAA"; };',
        r'firstAdmin = { name = "alice"; key = "ssh-ed25519 AAAA\nssh-ed25519 BBBB"; };',
        'uiUrl = "http://toto.example.org";',
        'allowedNetworks = [ "everything" ];',
    ],
)
def test_what_no_option_means_is_refused(options: str) -> None:
    with pytest.raises(AssertionError, match="is not of type"):
        unit("toto.service", f"services.toto = {{ {options} }};")


@pytest.mark.parametrize("name", ["toto", "pulled", "builder", "btg"])
def test_the_example_is_a_whole_system(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        ["nix-instantiate", f"{NIXPKGS}/nixos", "-A", "system", "--store", tmp_path, "--arg", "configuration",
         ROOT / f"examples/{name}.nix"],
        env={name: value for name, value in os.environ.items() if not name.startswith("NIX_")},
        capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    drv = tmp_path / done.stdout.strip().removeprefix("/")
    assert re.search(r"-nixos-system-\w+-\S+[.]drv$", drv.name) and drv.is_file()
    assert "evaluation warning" not in done.stderr
    for package in (tmp_path / "nix/store").glob("*-toto-0.*.drv"):
        assert str(ROOT) not in package.read_text()
    assert any((tmp_path / "nix/store").glob("*-toto-0.*.drv")) == (name == "toto")
    assert any((tmp_path / "nix/store").glob("*-flying-monkey-0.*.drv")) == (name == "pulled")


@pytest.mark.parametrize("name", ["toto", "flying-monkey"])
def test_the_test_in_virtual_machines_evaluates(name: str, tmp_path: Path) -> None:
    """It is NOT RUN here: that needs a binary cache and /dev/kvm."""
    tests = f"(import {ROOT} {{ pkgs = import {NIXPKGS} {{ }}; }}).tests"
    assert evaluated(f"{tests}.{name}.drvPath", writes=tmp_path).endswith(f"-vm-test-run-{name}.drv")


def test_systemd_knows_every_line_of_the_units(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("THE UNITS ARE NOT VERIFIED: there is no systemd-analyze")
    options = f"""services.toto = {{ firstAdmin = {{ name = "alice"; key = "{KEY}"; }}; blockKey.file = "/etc/x"; }};"""
    names = ("toto.service", "toto-nix-daemon.service")
    texts = of_host(
        " ".join(["map (name: config.systemd.units.${name}.text) [", *map(json.dumps, names), "]"]), options
    )
    verified(dict(zip(names, texts, strict=True)), tmp_path / "units")


def verified(units: dict[str, str], folder: Path) -> None:
    """Have systemd look at units. (Nothing of them was built here: the programs are others.)"""
    folder.mkdir()
    for name, text in units.items():
        runs = re.sub(r"^(Exec\w*)=.*$", r"\1=/bin/true", text, flags=re.MULTILINE)
        (folder / name).write_text(re.sub(r"/nix/store/[^:\"\n]*", "/bin", runs))
    words = ["systemd-analyze", "verify", *units]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_debian_s_units_are_protected_as_those_of_nixos() -> None:
    own = {  # what is different on purpose, or says where things are
        *("Environment", "EnvironmentFile", "ExecStart", "WorkingDirectory", "ProtectHome", "Description"),
        *("RestrictAddressFamilies", "X-StopIfChanged", "X-ReloadIfChanged"),
        *("RestartPreventExitStatus", "ExecReload"),
    }
    for name in ("toto.service", "toto-nix-daemon.service"):
        nixos, debian = unit(name), settings((ROOT / "setup/systemd" / name).read_text())
        assert {key: value for key, value in nixos.items() if key not in own} == {
            key: value for key, value in debian.items() if key not in own
        }
        assert nixos.get("RestrictAddressFamilies", []) == " ".join(debian.get("RestrictAddressFamilies", [])).split()


# Debian's packages, and what they are called in nixpkgs.
NAMES: Final = {
    "nix-bin": "nix",
    "python3-venv": "python3",
    "xz-utils": "xz",
    "qemu-system-x86": "qemu",
    "qemu-utils": "qemu",
    "squashfs-tools": "squashfs",
    "busybox-static": "busybox-alone",
    "openssh-client": "openssh",
    "openssh-server": "openssh",
    "etcd-server": "etcd-3",
    "nginx-light": "nginx",
    "prometheus-alertmanager": "alertmanager",
}


@pytest.mark.parametrize("name", ["LXC", "sshd in the initrd", "aarch64", "toto's user, hardened"])
def test_hosts_such_as_people_have_are_fit_to_be_rehearsed(name: str) -> None:
    """Some of them; `python bench/real.py NIXPKGS` has more, and takes longer."""
    assert real.see(NIXPKGS, name).wrong == ""


def test_the_flake_has_the_module_the_package_and_a_shell_with_every_program() -> None:
    flake = evaluated(f"""
      let outputs = (import {ROOT}/flake.nix).outputs {{
        self = outputs; nixpkgs = {{ outPath = {NIXPKGS}; lib = import {NIXPKGS}/lib; }}; }};
      in {{
        modules = builtins.mapAttrs (name: toString) outputs.nixosModules;
        apps = builtins.mapAttrs (system: each: each.default.program) outputs.apps;
        checks = builtins.attrNames outputs.checks.x86_64-linux;
        packages = builtins.mapAttrs (system: each: [ each.toto.drvPath each.toto.wheels.drvPath ]) outputs.packages;
        shells = builtins.mapAttrs (system: each: map (tool: tool.pname or tool.name) each.default.nativeBuildInputs)
          outputs.devShells;
      }}""")
    assert flake["modules"] == dict.fromkeys(("default", "toto"), f"{ROOT}/nix/toto.nix") | {
        name: f"{ROOT}/nix/{name}.nix" for name in ("flying-monkey", "monitoring")
    }
    assert all(each.endswith("/bin/toto") for each in flake["apps"].values()) and {"toto", "flying-monkey"} <= set(
        flake["checks"]
    )
    assert set(flake["packages"]) == set(flake["shells"]) == {"x86_64-linux", "aarch64-linux"}
    lines = (ROOT / "setup/debian-packages.txt").read_text().splitlines()
    for package in (line.split()[0] for line in lines if line and not line.startswith("#")):
        for tools in flake["shells"].values():
            assert any(each.startswith(NAMES.get(package, package)) for each in tools), package


@pytest.mark.parametrize("system", ["x86_64-linux", "aarch64-linux"])
def test_the_hash_of_the_wheels_is_that_of_what_the_lock_names(system: str, tmp_path: Path) -> None:
    if shutil.which("python3.12") is None or subprocess.run(["python3.12", "-V"], check=False).returncode:
        pytest.skip("THE HASHES OF nix/package.nix ARE NOT CHECKED: there is no python3.12")
    said = evaluated(
        f'let toto = (import {NIXPKGS} {{ system = "{system}"; }}).callPackage {ROOT}/nix/package.nix {{ }}; '
        "in { inherit (toto) download; inherit (toto.wheels) outputHash name; }"
    )
    words = [each if not each.startswith("--requirement=") else f"--requirement={ROOT}/requirements.lock"
             for each in said["download"]]  # fmt: skip
    subprocess.run(["python3.12", "-m", "venv", tmp_path / "tools"], check=True)
    python = tmp_path / "tools/bin/python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "setuptools", "wheel"], check=True, capture_output=True)
    subprocess.run([python, "-m", *words, "--dest", tmp_path / "wheels"], check=True, capture_output=True)
    done = subprocess.run(
        ["nix-hash", "--type", "sha256", "--base32", tmp_path / "wheels"], capture_output=True, text=True, check=True
    )
    right = subprocess.run(
        ["nix", "--extra-experimental-features", "nix-command", "hash", "to-sri", f"sha256:{done.stdout.strip()}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert said["outputHash"] == right.stdout.strip()
