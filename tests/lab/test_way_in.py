"""A configuration that would lock toto out is found out on the machine, before it is activated."""

import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.lab import nix
from tests.lab.machine import SSH_PORT, Machine
from tests.lab.setup import setup
from tests.lab.test_lab import changed, key  # noqa: F401
from toto.machine import ssh, way_in
from toto.machine.activation import SudoActivator
from toto.machine.way_in import WouldLockOut

pytestmark = [pytest.mark.lab, pytest.mark.asyncio(loop_scope="module"), pytest.mark.minutes(2)]

REFUSED = {
    "a user who is not among those that may": (
        '{ services.openssh.settings.AllowUsers = "somebody"; }',
        "not allowed because not listed in AllowUsers",
    ),
    "a rule for one user": (
        '{ services.openssh.extraConfig = "Match User toto\\n  PubkeyAuthentication no"; }',
        "toto",
    ),
    "the key of a different toto": (
        "({ lib, ... }: { users.users.toto.openssh.authorizedKeys.keys ="
        ' lib.mkForce [ "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIDuGVzHmQXWGSk3FgJTyXQ1J4CNgtYLKqlfOi7oOPrkX x" ]; })',
        "Permission denied",
    ),
    "settings that sshd does not read": ('{ services.openssh.extraConfig = "Nonsense yes"; }', "Nonsense"),
    "a different port": ("({ lib, ... }: { services.openssh.ports = lib.mkForce [ 2222 ]; })", "2222"),
    "an address that it has not": ('{ services.openssh.extraConfig = "ListenAddress 10.9.9.9"; }', "10.9.9.9"),
    "no sshd": ("({ lib, ... }: { services.openssh.enable = lib.mkForce false; })", "it has no sshd"),
    "a password for sudo": (
        "({ lib, ... }: { security.sudo.wheelNeedsPassword = lib.mkForce true; })",
        "a password is required",
    ),
}


@contextlib.asynccontextmanager
async def activating(folder: Path, key: Path, address: str) -> AsyncIterator[tuple[Machine, SudoActivator]]:  # noqa: F811
    """A machine at an address, and toto's way to activate on it."""
    setup()
    async with Machine("box", folder / "box", key, address=address) as machine:
        target = ssh.SshTarget("box", machine.address, SSH_PORT, machine.user, key, known_hosts=folder / "known")
        async with ssh.connection(target, folder / "ssh") as connection:
            made = SudoActivator(connection, "a-run")
            await made.prepare()
            yield machine, made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def activator(
    tmp_path_factory: pytest.TempPathFactory,
    key: Path,  # noqa: F811
) -> AsyncIterator[tuple[Machine, SudoActivator]]:
    async with activating(tmp_path_factory.mktemp("way-in"), key, "127.0.1.92") as made:
        yield made


async def on_the_machine(machine: Machine, key: Path, more: str) -> str:  # noqa: F811
    """The store path of the bootstrap host with `more`, built and copied to the machine."""
    system = await nix.build(changed(key, more), "system")
    await machine.copy(system)
    return str(system)


async def test_what_would_lock_toto_out_is_not_activated(activator: tuple[Machine, SudoActivator], key: Path) -> None:  # noqa: F811
    machine, made = activator
    before = await made.facts()
    etc = await machine.check(
        "sudo", "sh", "-c", "cat /etc/ssh/authorized_keys.d/* /etc/sudoers; ls -R /etc/ssh; mount"
    )
    for name, (more, words) in REFUSED.items():
        system = await on_the_machine(machine, key, more)
        with pytest.raises(WouldLockOut) as refused:  # (each is told by its words)
            await way_in.check(made, system, before.system)
        assert words in str(refused.value), (name, str(refused.value))
        assert refused.value.hint

    # What lets it in is let through, and trying leaves nothing behind.
    fine = await on_the_machine(machine, key, '{ environment.etc."fine".text = "yes"; }')
    await way_in.check(made, fine, before.system)
    assert await made.facts() == before
    left = await machine.check(
        "sudo", "sh", "-c", "cat /etc/ssh/authorized_keys.d/* /etc/sudoers; ls -R /etc/ssh; mount"
    )
    assert left == etc


async def test_where_the_present_configuration_cannot_be_tried_either_a_warning_is_all(
    activator: tuple[Machine, SudoActivator],
    key: Path,  # noqa: F811
    caplog: pytest.LogCaptureFixture,
) -> None:
    machine, made = activator
    shy = '{ services.openssh.settings.AllowUsers = "toto@10.0.2.* root@10.0.2.*"; }'
    system = await on_the_machine(machine, key, shy)
    await way_in.check(made, system, system)
    assert "could not be tried" in caplog.text


async def test_the_address_is_one_that_the_configuration_sets_when_that_is_asked_for(
    activator: tuple[Machine, SudoActivator],
    key: Path,  # noqa: F811
) -> None:
    machine, made = activator
    before = await made.facts()

    def with_address(address: str) -> str:
        text = f"[Match]\\nName=eth0\\n[Network]\\nAddress={address}/24\\n"
        return f'{{ environment.etc."systemd/network/10-eth0.network".text = "{text}"; }}'

    for address, judge in ((machine.address, None), ("10.1.2.3", "10.1.2.3/24")):
        system = await on_the_machine(machine, key, with_address(address))
        if judge is None:
            await way_in.check(made, system, before.system, address=True)
        else:
            with pytest.raises(WouldLockOut, match=judge):
                await way_in.check(made, system, before.system, address=True)
        await way_in.check(made, system, before.system)


async def test_a_user_whom_the_configuration_no_longer_has_is_missed(
    activator: tuple[Machine, SudoActivator],
    key: Path,  # noqa: F811
) -> None:
    """NixOS writes such a file into its activation script; the lab's does not, so this adds it."""
    machine, made = activator
    before = await made.facts()

    def with_users(*names: str, mutable: bool) -> str:
        said = json.dumps({"users": [{"name": each} for each in names], "groups": [], "mutableUsers": mutable})
        file = f'pkgs.writeText "users-groups.json" {nix.nix_string(said)}'
        return f'({{ pkgs, ... }}: {{ system.activationScripts.zz.text = ": ${{{file}}}"; }})'

    async def judged(*names: str, mutable: bool) -> None:
        system = await on_the_machine(machine, key, with_users(*names, mutable=mutable))
        await way_in.check(made, system, before.system)

    await judged("root", "toto", mutable=False)
    await judged("root", mutable=True)  # a user whom somebody has added by hand stays
    with pytest.raises(WouldLockOut, match="no user toto"):
        await judged("root", mutable=False)
    await machine.check("sudo", "sh", "-c", "printf 'alice\ntoto\n' > /var/lib/nixos/declarative-users")
    with pytest.raises(WouldLockOut, match="no user toto"):
        await judged("root", mutable=True)
