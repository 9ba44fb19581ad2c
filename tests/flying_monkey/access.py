"""Toto's locked-down user on a Debian with real systemd, sshd, sudo and nix daemon, as the NixOS module makes it."""

import asyncio
import json
import subprocess
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, Self

import flying_monkey
from flying_monkey.desired import Deadlines, Desired, Machine, Phase, System
from flying_monkey.signature import NAMESPACE, seal
from tests.lab.debian import DebianMachine
from tests.lab.machine import Answer

PLACE: Final = "/usr/lib/flying-monkey"
_MAIN: Final = f"""#!/usr/bin/python3 -IS
import sys
sys.path.insert(0, {PLACE!r})
from flying_monkey.%s import main
main()
"""
SSHD: Final = """Match User toto
  ForceCommand flying-monkey
  AuthorizedKeysFile /etc/ssh/authorized_keys.d/toto
  PasswordAuthentication no
  DisableForwarding yes
  PermitTTY no
  PermitUserRC no
Match all
"""
SUDO: Final = f'toto ALL=(root:root) NOPASSWD: {PLACE}/helper ""\n'
SLICE: Final = "[Slice]\nMemoryMax=1G\nTasksMax=256\n"
# A system that notes each activation, and is then what runs.
_SYSTEM: Final = """
  export PATH=/usr/bin:/bin
  mkdir -p $out/bin $out/sw/bin
  { echo '#!/bin/sh'
    echo "echo NAME \\$1 >> /var/log/activations"
    echo 'SCRIPT'
    echo "case \\$1 in test | switch) ln -sfn $out /run/current-system ;; esac"
  } > $out/bin/switch-to-configuration
  chmod 755 $out/bin/switch-to-configuration
"""


def expression(name: str, script: str = ":", once: str = "", kernel: str = "") -> str:
    """The derivation of a system that notes each activation and runs `script`; a new one for each `once`."""
    text = _SYSTEM.replace("NAME", name).replace("SCRIPT", script)
    if kernel:
        text += f"  ln -s {kernel} $out/kernel\n"
    again = f'once = "{once}"; ' if once else ""
    return (
        f'derivation {{ name = "nixos-system-{name}"; system = "x86_64-linux"; builder = "/bin/sh"; {again}'
        f"args = [ \"-c\" ''{text}'' ]; }}"
    )


class Locked:
    """The machine, and toto's side of it: the key that logs in, and the key that signs."""

    def __init__(self, machine: DebianMachine, signer: Path) -> None:
        self.machine, self.signer, self.serial = machine, signer, 0

    @staticmethod
    def files(key: str, signer: Path, **more: object) -> dict[str, tuple[str, int]]:
        """What the module writes."""
        package = Path(flying_monkey.__file__).parent
        found = {
            f"{PLACE}/flying_monkey/{each.name}": (each.read_text(), 0o644)
            for each in package.iterdir()
            if each.suffix in (".py", ".sh")
        }
        public = " ".join(signer.with_suffix(".pub").read_text().split()[:2])
        configuration = {
            "repo": "infra",
            "name": "web1",
            "signers": "/etc/flying-monkey/signers",
            "helper": f"{PLACE}/helper",
            "writable_store": True,
        }
        return found | {
            f"{PLACE}/gate": (_MAIN % "gate", 0o755),
            f"{PLACE}/helper": (_MAIN % "helper", 0o755),
            f"{PLACE}/update": (_MAIN % "update", 0o755),
            "/etc/flying-monkey/config.json": (json.dumps(configuration | more), 0o644),
            "/etc/flying-monkey/signers": (f'infra namespaces="{NAMESPACE}" {public}\n', 0o644),
            "/etc/ssh/authorized_keys.d/toto": (f"{key}\n", 0o644),
            "/etc/ssh/sshd_config.d/20-toto.conf": (SSHD, 0o644),
            "/etc/sudoers.d/toto": (SUDO, 0o440),
            "/etc/systemd/system/flying-monkey-tests.slice": (SLICE, 0o644),
            "/etc/nix/nix.conf": (
                "max-jobs = 0\nsubstituters =\nbuild-users-group = nixbld\n!include keys.conf\n",
                0o644,
            ),
        }

    async def prepare(self) -> None:
        """The user, a signing key of the store's, and a system that runs."""
        lines = [
            f"python3 -m compileall -q {PLACE}",  # as the package is
            "useradd --system --home-dir /var/empty --no-create-home --shell /usr/lib/flying-monkey/gate toto",
            "usermod --append --groups nix-users toto",
            "mkdir -p /nix/var/nix/profiles /var/empty",
            "nix-store --generate-binary-cache-key lab /root/secret /root/public",
            'echo "trusted-public-keys = $(cat /root/public)" > /etc/nix/keys.conf; chmod 644 /etc/nix/keys.conf',
            "systemctl stop nix-daemon.service nix-daemon.socket; systemctl start nix-daemon.socket",
        ]
        await self.machine.check("set -e; " + "; ".join(lines))
        self.good = await self.system("good")
        await self.machine.check(
            f"ln -sfn {self.good.path} /run/current-system; nix-env -p {PROFILE} --set {self.good.path}"
        )

    async def again(self) -> Self:
        """The same as it was at the snapshot `ready`."""
        await self.machine.restore("ready")
        self.serial = 0
        return self

    async def system(self, name: str, script: str = ":", *, signed: bool = True, kernel: str = "") -> System:
        """A system in the machine's store, which root built there; `kernel` is what it boots."""
        built = "nix-build --option sandbox false --option max-jobs 1 --option build-users-group '' --no-out-link"
        text = expression(name, script, kernel=kernel)
        await self.machine.check(
            f"cat > /root/x.nix <<'EOF'\n{text}\nEOF\nNIX_REMOTE= {built} /root/x.nix > /root/built"
        )
        nix = "nix --extra-experimental-features nix-command"
        sign = f"{nix} store sign --recursive --key-file /root/secret $(cat /root/built)"
        said = await self.machine.check(
            f"{sign if signed else 'true'}; cat /root/built; nix-store -q --hash $(cat /root/built)"
        )
        return System(*said.split())

    def document(self, system: System, phase: Phase = "try", **more: Any) -> Desired:
        """A new document for this machine."""
        self.serial += 1
        now = datetime.now(UTC).replace(microsecond=0)
        kind, key = self.machine.host_key.split()[:2]
        made = Desired(
            repo="infra",
            machine=Machine("web1", f"{kind} {key}"),
            serial=self.serial,
            issued=now,
            expires=now + timedelta(days=7),
            phase="try",
            activation="switch",
            system=system,
            good=self.good,
            deadlines=Deadlines(confirm=300),
        )
        return replace(made, phase=phase, **more)

    async def ssh(self, command: str, stdin: bytes = b"", options: tuple[str, ...] = ()) -> Answer:
        """What toto's user is answered. Without `options` by a login that is shared: each takes a while."""
        shared = (
            "-o",
            "ControlMaster=auto",
            "-o",
            "ControlPath=toto",
            "-o",
            "ControlPersist=20",
            "-o",
            "ServerAliveInterval=5",
        )
        words = ["ssh", *self.machine.ssh_options, *(options or shared), f"toto@{self.machine.address}"]
        process = await asyncio.create_subprocess_exec(
            *words,
            *(["--", command] if command else []),
            cwd=self.machine.directory,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        out, err = await asyncio.wait_for(process.communicate(stdin), 300)
        return Answer(
            process.returncode or 0, out.decode(errors="replace").strip(), err.decode(errors="replace").strip()
        )

    async def ask(self, command: str, document: Desired | bytes = b"") -> dict[str, Any]:
        """The helper's answer to a verb, with a document where it takes one."""
        stdin = seal(document.write(), self.signer) if isinstance(document, Desired) else document
        answer = await self.ssh(command, stdin)
        assert answer.status == 0, answer
        found: dict[str, Any] = json.loads(answer.out)
        return found

    async def ended(self) -> str:
        """How the newest activation ended."""
        while (found := await self.ask("status 30"))["state"] == "running":
            pass
        return str(found["state"])

    async def activations(self) -> list[str]:
        return (await self.machine.check("cat /var/log/activations 2>/dev/null || true")).splitlines()


PROFILE: Final = "/nix/var/nix/profiles/system"
