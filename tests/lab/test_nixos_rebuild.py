"""`method = "nixos-rebuild"`: what toto makes of how it ends.

nixos-rebuild itself is in no package registry. In its place is a program that does on the machine what it does: it sets
the profile, runs switch-to-configuration in a session of its own, and ends with that one's exit status.
"""

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from tests.lab.machine import Machine
from tests.lab.test_lab import key  # noqa: F401
from tests.lab.test_way_in import activating, on_the_machine
from toto.machine.activation import ActivationFailed, LockedOut, SudoActivator

pytestmark = [pytest.mark.lab, pytest.mark.asyncio(loop_scope="module"), pytest.mark.minutes(2)]

REBUILD = """#!/bin/sh
# nixos-rebuild VERB --no-reexec --store-path PATH --target-host HOST --sudo
verb=$1 path=$4 host=$6
[ "$verb" = test ] || ssh $NIX_SSHOPTS "$host" sudo nix-env --profile /nix/var/nix/profiles/system --set "$path" || exit
exec ssh $NIX_SSHOPTS "$host" sudo setsid "$path/bin/switch-to-configuration" "$verb" </dev/null
"""


def fails(name: str) -> str:
    """A module with a service that ends as soon as it starts."""
    return f'{{ systemd.services.{name} = {{ wantedBy = [ "multi-user.target" ]; script = "exit 1"; }}; }}'


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def activator(
    tmp_path_factory: pytest.TempPathFactory,
    key: Path,  # noqa: F811
) -> AsyncIterator[tuple[Machine, SudoActivator]]:
    folder = tmp_path_factory.mktemp("rebuild")
    (folder / "bin").mkdir()
    (folder / "bin/nixos-rebuild").write_text(REBUILD)
    (folder / "bin/nixos-rebuild").chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(folder / "bin"), prepend=":")
        async with activating(folder, key, "127.0.1.93") as made:
            yield made


async def test_units_that_were_broken_before_fail_nothing(
    activator: tuple[Machine, SudoActivator],
    key: Path,  # noqa: F811
    caplog: pytest.LogCaptureFixture,
) -> None:
    machine, made = activator
    broken = await on_the_machine(machine, key, fails("old"))
    with pytest.raises(ActivationFailed, match=r"exited with status 4(.|\n)*old\.service"):
        await made.nixos_rebuild("test", broken, await made.facts(), timeout=120)
    assert (await made.facts()).system == broken

    both = await on_the_machine(
        machine, key, f'{{ imports = [ ({fails("old")}) {{ environment.etc."more".text = "x"; }} ]; }}'
    )
    await made.nixos_rebuild("test", both, await made.facts(), timeout=120)
    assert "were broken before: old.service" in caplog.text
    fresh = await on_the_machine(machine, key, f"{{ imports = [ ({fails('old')}) ({fails('new')}) ]; }}")
    with pytest.raises(ActivationFailed, match=r"exited with status 4"):
        await replace(made, rebuild=True).activate("switch", fresh, await made.facts(), finish=120, confirm=60)


async def test_what_locks_toto_out_is_reverted_over_the_old_connection(
    activator: tuple[Machine, SudoActivator],
    key: Path,  # noqa: F811
) -> None:
    machine, made = activator
    before = await made.facts()
    lost = await on_the_machine(
        machine,
        key,
        "({ lib, ... }: { users.users.toto.openssh.authorizedKeys.keys ="
        ' lib.mkForce [ "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIDuGVzHmQXWGSk3FgJTyXQ1J4CNgtYLKqlfOi7oOPrkX x" ]; })',
    )
    with pytest.raises(LockedOut, match="Permission denied"):
        await made.nixos_rebuild("test", lost, before, timeout=120)
    assert await made.facts(fresh=True) == before
