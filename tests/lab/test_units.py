"""The units of nix/flying-monkey.nix, on a machine with real systemd."""

import asyncio
import json
import re
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import pytest

from tests.flying_monkey.access import _MAIN, PLACE, Locked
from tests.lab.debian import DebianMachine
from tests.lab.setup import environment, setup

pytestmark = pytest.mark.minutes(1)

URL: Final = "https://10.0.2.2:1"  # where nobody answers
HOST: Final = f"""
{{ ... }}: {{
  networking.hostName = "web1";
  services.flying-monkey = {{
    enable = true; repo = "infra"; signers = [ "ssh-ed25519 AAAA" ]; url = "{URL}";
    metrics.folder = "/var/lib/node-exporter";
  }};
}}
"""


def services() -> dict[str, dict[str, Any]]:
    """What the module says of its units, by the lab's small NixOS."""
    expression = (
        f"let inherit (import <nixpkgs/nixos> {{ configuration = {HOST}; }}) config; in "
        "builtins.mapAttrs (name: each: each.serviceConfig) "
        '(removeAttrs config.systemd.services (builtins.filter (name: builtins.substring 0 13 name != "flying-monkey") '
        "(builtins.attrNames config.systemd.services)))"
    )
    setup()
    words = ["nix-instantiate", "--eval", "--strict", "--json", "--readonly-mode", "--expr", expression]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, check=True)
    found: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return found


def unit(service: dict[str, Any]) -> str:
    """The text of a unit, whose program is that of the lab's Debian."""
    lines = ["[Service]"]
    for name, value in service.items():
        each = str(value).lower() if isinstance(value, bool) else str(value)
        lines.append(f"{name}={re.sub(r'^/nix/store/.*/flying-monkey-', PLACE + '/', each)}")
    return "\n".join([*lines, "[Install]", "WantedBy=multi-user.target", ""])


@pytest.fixture
async def machine(tmp_path: Path) -> AsyncIterator[DebianMachine]:
    for name in ("key", "signer"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / name], check=True)
    more = {"url": URL, "user": "flying-monkey", "metrics": "/var/lib/node-exporter/flying-monkey.prom"}
    files = Locked.files((tmp_path / "key.pub").read_text().strip(), tmp_path / "signer", **more)
    names = [name for name in ("agent", "update", "garbage") if f"{PLACE}/flying_monkey/{name}.py" in files]
    files |= {f"{PLACE}/{name}": (_MAIN % name, 0o755) for name in names}
    files |= {f"/etc/systemd/system/{name}.service": (unit(each), 0o644) for name, each in services().items()}
    async with DebianMachine("units", tmp_path / "units", tmp_path / "key", address="127.0.8.5", files=files) as one:
        yield one


async def until(machine: DebianMachine, command: str) -> str:
    async with asyncio.timeout(120):
        while not (said := (await machine.ssh(command, login=False)).out.strip()):
            await asyncio.sleep(1)
    return str(said)


async def test_the_agent_runs_is_started_anew_and_replaced_and_the_gate_has_its_own_sudo(
    machine: DebianMachine,
) -> None:
    await machine.check("useradd --system --user-group flying-monkey; mkdir -p /var/lib/node-exporter")
    await machine.check("nix-store --init")
    await machine.check("systemctl start $(cd /etc/systemd/system && ls flying-monkey*.service)")
    assert URL in await until(machine, "journalctl -u flying-monkey -o cat | grep asking")
    first = await machine.check("systemctl show flying-monkey -p MainPID --value")
    assert "flying_monkey_up" in await until(machine, "grep up /var/lib/node-exporter/flying-monkey.prom")
    assert await machine.check("stat -c %a /run/flying-monkey") == "700"
    await machine.check(f"kill -KILL {first}")
    again = f"systemctl show flying-monkey -p MainPID --value | grep -v -x -e 0 -e {first}"
    second = await until(machine, again)
    assert await until(machine, f"journalctl -u flying-monkey -o cat _PID={second} | grep asking")
    # What it is made of changes by an update: it goes on to be the new one.
    await machine.check("sed -i 's/10.0.2.2:1/10.0.2.2:2/' /etc/flying-monkey/config.json")
    assert await until(machine, f"{again} -e {second}") != second
    assert await until(machine, "journalctl -u flying-monkey -o cat | grep 'asking https://10.0.2.2:2'")
    assert await machine.check("systemctl list-units --failed --no-legend 'flying-monkey*'") == ""
    await gate_reaches_the_helper_where_sudo_is_for_others(machine)


async def gate_reaches_the_helper_where_sudo_is_for_others(machine: DebianMachine) -> None:
    """As on a machine on which only members of wheel may start sudo."""
    await machine.check("useradd --system --user-group --no-create-home toto; chmod 4510 /usr/bin/sudo")
    asked = f"setpriv --reuid=toto --regid=toto --clear-groups {PLACE}/gate -c facts"
    refused = await machine.ssh(asked, timeout=60)
    assert refused.status != 0 and "Permission" in refused.err
    await machine.check(f"install -o root -g toto -m 4510 /usr/bin/sudo {PLACE}/sudo")
    await machine.check(f"""sed -i 's|^{{|{{"sudo": "{PLACE}/sudo", |' /etc/flying-monkey/config.json""")
    assert '"name": "web1"' in await machine.check(asked)
