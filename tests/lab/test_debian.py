"""The machine with real systemd: what the tests of access and of the agent rest on."""

import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.lab.debian import DebianMachine

pytestmark = pytest.mark.minutes(1)


@pytest.fixture
def key(tmp_path: Path) -> Path:
    file = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", file], check=True)
    return file


@pytest.fixture
async def machine(tmp_path: Path, key: Path) -> AsyncIterator[DebianMachine]:
    files = {"/etc/motd": ("of the lab\n", 0o644)}
    async with DebianMachine("debian", tmp_path / "debian", key, address="127.0.8.1", files=files) as machine:
        yield machine


async def test_systemd_sshd_sudo_and_the_nix_daemon_are_real_and_a_snapshot_brings_all_back(
    machine: DebianMachine,
) -> None:
    assert await machine.check("systemctl is-system-running --wait; cat /etc/motd") == "running\nof the lab"
    assert await machine.check("nix-store --version >/dev/null && sudo -l -U nobody && id -nG nobody")
    await machine.check("useradd --create-home --groups nix-users someone")
    asked = "runuser -u someone -- env NIX_REMOTE=daemon nix-store --add /etc/motd"
    added = await machine.check(asked)
    assert added.startswith("/nix/store/") and added.endswith("-motd")
    boot = await machine.check("cat /proc/sys/kernel/random/boot_id")
    await machine.snapshot("here")
    await machine.check(f"echo x > /x && sync && test -e {added} && systemctl stop dbus.socket dbus")
    await machine.restore("here")
    state = f"test ! -e /x && systemctl is-active dbus && test -e {added} && cat /proc/sys/kernel/random/boot_id"
    assert await machine.check(state) == f"active\n{boot}"
    (key,) = (machine.directory / "known_hosts").read_text().splitlines()
    assert key.endswith(machine.host_key)
    await machine.check("echo y > /y && sync")
    await machine.power_cut()
    await machine.start()
    await machine.wait_ssh()
    assert await machine.check("cat /y; systemctl is-active nix-daemon.socket") == "y\nactive"
