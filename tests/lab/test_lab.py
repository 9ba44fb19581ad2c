"""The lab is what the other tests stand on: its modules, its machines, and that they behave as NixOS does."""

import asyncio
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.lab import nix
from tests.lab.machine import Machine
from tests.lab.setup import nixpkgs, setup

pytestmark = [pytest.mark.lab, pytest.mark.minutes(2)]


@pytest.fixture(scope="session", autouse=True)
def lab() -> Path:
    if shutil.which("nix-build") is None or shutil.which("apt-get") is None:
        pytest.skip("the lab needs nix and apt")
    return setup()


async def comes_to_be(machine: Machine, path: str) -> None:
    """Returns when there is such a file on the machine; however long a busy one takes (the test's own time ends it)."""
    while (await machine.ssh("test", "-e", path)).status != 0:
        await asyncio.sleep(0.2)


async def value(modules: str, expression: str) -> str:
    """`expression` over `config` of a host made of `modules` (the elements of a nix list)."""
    host = f"import <nixpkgs/nixos> {{ configuration = {{ imports = [ {modules} ]; }}; }}"
    text = f"let config = ({host}).config; in {expression}"
    return await nix.nix("nix-instantiate", "--eval", "--strict", "--json", "-E", text)


MERGES = {
    "lists are concatenated": (
        "{ networking.firewall.allowedTCPPorts = [ 80 ]; } { networking.firewall.allowedTCPPorts = [ 443 ]; }",
        "config.networking.firewall.allowedTCPPorts",
        "[80,443]",
    ),
    "mkForce wins": (
        '{ networking.hostName = "a"; } ({ lib, ... }: { networking.hostName = lib.mkForce "b"; })',
        "config.networking.hostName",
        '"b"',
    ),
    "mkDefault yields": (
        '({ lib, ... }: { networking.hostName = lib.mkDefault "a"; }) { networking.hostName = "b"; }',
        "config.networking.hostName",
        '"b"',
    ),
    "mkIf on a whole module": (
        "({ config, lib, ... }: {"
        ' config = lib.mkIf config.services.openssh.enable { networking.hostName = "ssh"; }; })'
        " { services.openssh.enable = true; }",
        "config.networking.hostName",
        '"ssh"',
    ),
    "mkIf that does not hold": (
        '({ lib, ... }: { environment.etc.gone = lib.mkIf false { text = "x"; }; })',
        "config.environment.etc ? gone",
        "false",
    ),
    "mkMerge": (
        '({ lib, ... }: { environment.etc = lib.mkMerge [ { a.text = "1"; } { b.text = "2"; } ]; })',
        "config.environment.etc.a.text + config.environment.etc.b.text",
        '"12"',
    ),
    "mkOrder orders lines": (
        "({ lib, ... }: { services.openssh.extraConfig ="
        ' lib.mkMerge [ (lib.mkAfter "last") "mid" (lib.mkBefore "first") ]; })',
        "config.services.openssh.extraConfig",
        r'"first\nmid\nlast"',
    ),
    "options of one's own": (
        "({ lib, ... }: { options.my.n = lib.mkOption { type = lib.types.int; default = 1; }; config.my.n = 2; })",
        "config.my.n",
        "2",
    ),
    "what only real hardware has is accepted": (
        '{ boot.loader.grub.device = "/dev/sda"; hardware.cpu.intel.updateMicrocode = true; }',
        "config.boot.loader.grub.device",
        '"/dev/sda"',
    ),
}


@pytest.mark.parametrize(("modules", "expression", "expected"), MERGES.values(), ids=MERGES)
async def test_modules_merge(modules: str, expression: str, expected: str) -> None:
    assert await value(modules, expression) == expected


async def test_a_conflict_names_the_option_and_both_files(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.nix").write_text(f'{{ networking.hostName = "{name}"; }}')
    with pytest.raises(nix.NixFailed) as failure:
        await value(f"{tmp_path}/one.nix {tmp_path}/two.nix", "config.networking.hostName")
    for expected in ("conflicting definition values", "networking.hostName", "one.nix", "two.nix"):
        assert expected in str(failure.value)


async def test_an_unknown_option_is_an_error_with_its_file(tmp_path: Path) -> None:
    (tmp_path / "host.nix").write_text("{ services.nginx.enable = true; }")
    with pytest.raises(nix.NixFailed, match=r"The option `services\.nginx' does not exist(.|\n)*host\.nix"):
        await value(f"{tmp_path}/host.nix", "config.networking.hostName")


async def test_a_wrong_type_is_an_error() -> None:
    with pytest.raises(nix.NixFailed, match=r"networking\.hostName' is not of type `string'"):
        await value("{ networking.hostName = 3; }", "config.networking.hostName")


async def test_the_vm_variant_changes_the_vm_and_never_the_toplevel() -> None:
    plain = '{ networking.hostName = "h"; services.openssh.enable = true; }'
    variant = (
        '{ networking.hostName = "h"; services.openssh.enable = true; virtualisation.vmVariant = '
        '{ environment.etc.sandbox.text = "yes"; virtualisation.memorySize = 512; }; }'
    )
    assert await nix.drv(plain, "system") == await nix.drv(variant, "system")
    assert await nix.drv(plain, "vm") != await nix.drv(variant, "vm")


async def test_a_flake_evaluates_to_the_same_derivation(tmp_path: Path) -> None:
    (tmp_path / "host.nix").write_text('{ networking.hostName = "h"; services.openssh.enable = true; }')
    (tmp_path / "flake.nix").write_text(f"""{{
      inputs.nixpkgs.url = "path:{nixpkgs()}";
      outputs = {{ nixpkgs, ... }}: {{
        nixosConfigurations.h = nixpkgs.lib.nixosSystem {{ system = "x86_64-linux"; modules = [ ./host.nix ]; }};
      }};
    }}""")
    toplevel = "nixosConfigurations.h.config.system.build.toplevel.drvPath"
    from_flake = await nix.nix("nix", "eval", "--raw", f"path:{tmp_path}#{toplevel}")
    assert from_flake == await nix.drv(f"{tmp_path}/host.nix", "system")


# Machines


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("key") / "id"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", file], check=True)
    return file


@pytest.fixture
async def machine(tmp_path: Path, key: Path) -> AsyncIterator[Machine]:
    async with Machine("box", tmp_path / "box", key, address="127.0.1.91") as machine:
        yield machine


def changed(key: Path, more: str) -> str:
    """The bootstrap host and something more."""
    keys = [key.with_name("id.pub").read_text().strip()]
    return f"{{ imports = [ ({nix.bootstrap('box', keys)}) ({more}) ]; }}"


async def test_test_is_lost_in_a_power_cut_and_switch_is_not(machine: Machine, key: Path) -> None:
    """One machine and its whole life, since a boot is what these tests cost."""
    first = await machine.current_system()
    assert await machine.profile() == first == await machine.booted_system()

    # `test`: a new service runs, the boot default and the profile stay.
    page = (
        '{ pkgs, ... }: { systemd.services.page = { wantedBy = [ "multi-user.target" ]; '
        'script = "exec httpd -f -p 8080 -h /etc/page"; }; environment.etc."page/index.html".text = "hello"; }'
    )
    second = await nix.build(changed(key, page), "system")
    await machine.copy(second)
    daemon = await machine.check("sudo", "cat", "/run/service/nix-daemon/supervise/pid")
    dry = await machine.switch(second, "dry-activate")
    assert "would start the following units: page" in dry.out
    assert await machine.current_system() == first
    answer = await machine.switch(second, "test")
    assert answer.status == 0, answer
    assert await machine.current_system() == str(second)
    assert await machine.profile() == first
    assert await machine.check("systemctl", "is-active", "page") == "active"
    assert await machine.check("wget", "-q", "-O", "-", "http://127.0.0.1:8080/") == "hello"
    assert await machine.check("sudo", "cat", "/run/service/nix-daemon/supervise/pid") == daemon  # untouched

    await machine.power_cut()
    await machine.start()
    await machine.wait_ssh()
    assert await machine.current_system() == first
    assert (await machine.ssh("systemctl", "is-active", "page")).out == "inactive"

    # `switch`: the machine boots it ever after.
    assert (await machine.switch(second)).status == 0
    await machine.power_cut()
    await machine.start()
    await machine.wait_ssh()
    assert await machine.current_system() == str(second) == await machine.profile() == await machine.booted_system()
    assert await machine.check("wget", "-q", "-O", "-", "http://127.0.0.1:8080/") == "hello"

    # Back to the first: the service goes with its files. `boot` changes nothing that runs.
    assert (await machine.switch(first, "boot")).status == 0
    assert await machine.current_system() == str(second)
    assert (await machine.switch(first, "test")).status == 0
    assert (await machine.ssh("test -e /etc/page/index.html || systemctl is-active page")).out == "inactive"


async def test_failures_have_the_exit_status_of_nixos(machine: Machine, key: Path) -> None:
    crash = '{ systemd.services.crash = { wantedBy = [ "multi-user.target" ]; script = "exit 7"; }; }'
    snippet = '{ system.activationScripts.broken.text = "echo no >&2; false"; }'
    for more, status, said in ((crash, 4, "crash.service"), (snippet, 2, "snippet 'broken' failed")):
        system = await nix.build(changed(key, more), "system")
        await machine.copy(system)
        answer = await machine.switch(system, "test")
        assert answer.status == status, answer
        assert said in answer.err
    # A oneshot that succeeds is active.
    system = await nix.build(
        changed(
            key,
            '{ systemd.services.once = { wantedBy = [ "multi-user.target" ]; '
            'script = "true"; serviceConfig.Type = "oneshot"; }; }',
        ),
        "system",
    )
    await machine.copy(system)
    assert (await machine.switch(system, "test")).status == 0
    assert await machine.check("systemctl", "is-active", "once") == "active"

    # A configuration that locks everybody out is a lock-out; what runs goes on, and a power cut ends it.
    locked = await nix.build(changed(key, '{ services.openssh.extraConfig = "AllowUsers nobody"; }'), "system")
    await machine.copy(locked)
    assert (await machine.switch(locked, "test")).status == 0  # its own session lived through the restart of sshd
    assert (await machine.ssh("true")).status == 255
    await machine.power_cut()
    await machine.start()
    await machine.wait_ssh()

    # An activation survives the loss of the connection over which it was asked for.
    slow = "touch /began; while [ ! -e /run/go-on ]; do sleep 0.2; done; touch /survived"
    lost = asyncio.create_task(machine.ssh(f"sudo systemd-run --unit=slow --pipe sh -c '{slow}'", timeout=600))
    await comes_to_be(machine, "/began")
    await machine.network(False)
    assert (await machine.ssh("true", timeout=4)).status == 255
    lost.cancel()  # (its ssh is ended with it: the connection is gone for good)
    await asyncio.wait([lost])
    await machine.network(True)
    await machine.wait_ssh()
    assert (await machine.ssh("sudo", "touch", "/run/go-on")).status == 0
    await comes_to_be(machine, "/survived")

    # A full disk is an error of the copy; nothing is half there.
    await machine.fill_disk(leave_bytes=100_000)
    assert (await machine.ssh("dd if=/dev/zero of=big bs=1M count=5")).status != 0
    await machine.free_disk()
    assert (await machine.ssh("dd if=/dev/zero of=big bs=1M count=5")).status == 0

    await machine.reboot()
    await machine.stop()
    assert not machine.running
