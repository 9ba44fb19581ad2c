"""Activating a closure on a machine, and reverting it, by the verbs of `activate.sh`, which runs on the machine.

An activation goes on when the connection that asked for it dies. A watchdog on the machine reverts it to the recorded
store path unless toto confirms over a new connection. So a machine whose new configuration breaks sshd or the network
recovers by itself.
"""

import logging
import secrets
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeAlias

import anyio

from toto.base import process
from toto.base.errors import TotoError
from toto.ledger.ledger import Before
from toto.machine.ssh import Connection, Unreachable
from toto.nix import commands as nix

Verb: TypeAlias = Literal["test", "switch", "boot"]

_SCRIPT: Final = Path(__file__).with_name("activate.sh")
UNITS_FAILED: Final = 4  # the exit status of switch-to-configuration when it worked, but units failed
_ON_MACHINE: Final = "/run/toto/activate.sh"


class ActivationFailed(TotoError):
    """switch-to-configuration failed on the machine; the message ends with its last lines."""


class WentBack(TotoError):
    """The machine reverted by itself: toto did not connect in time after an activation, or the machine rebooted."""


class NotWhatItShouldBe(TotoError):
    """The machine does not run or boot the system that it should."""


class MachineState(Before):
    """What a machine runs, and what it boots next: store paths, or "" for none."""

    system: str = ""
    profile: str = ""


@dataclass(frozen=True)
class Activator:
    """The activation verbs on one machine, for one run: its files there have `run` in their names.

    `connect_timeout` is in seconds.
    """

    connection: Connection
    run: str
    connect_timeout: float = 15

    async def install(self) -> None:
        """Copy the script to the machine. Raises `Unreachable`, or `ActivationFailed` when sudo refuses."""
        await self._root(
            [
                "/bin/sh",
                "-c",
                f"mkdir -p -m 700 /run/toto && cat > {_ON_MACHINE}.new && mv {_ON_MACHINE}.new {_ON_MACHINE}",
            ],
            stdin=_SCRIPT.read_bytes(),
        )

    async def facts(self) -> MachineState:
        """What the machine runs now. Raises `Unreachable`, or `NotWhatItShouldBe` when it is not NixOS."""
        done = await self._verb("facts")
        facts = dict(line.partition("=")[::2] for line in done.lines)
        if not facts.get("system", "").startswith("/nix/store/"):
            raise NotWhatItShouldBe(
                "has no /run/current-system in the nix store",
                target=self.connection.target.name,
                hint="is it a NixOS machine? if not, set role: other in machines.yaml",
            )
        return MachineState(system=facts["system"], profile=facts.get("profile", ""))

    async def activate(self, verb: Verb, path: str, before: MachineState, *, finish: float, confirm: float) -> None:
        """Activate `path`, then confirm over a new connection.

        The activation may take `finish` seconds; `confirm` seconds after it the watchdog reverts the machine to
        `before`. `switch` and `boot` set the system profile first. toto also confirms an activation that fails, since
        it can connect and decides itself what comes next.
        Raises `ActivationFailed`, `WentBack`, `Unreachable`, `NotWhatItShouldBe`.
        """
        name = self._new_name(verb)
        await self._verb("begin", name, verb, path, before.system, before.profile, f"{finish:.0f}", f"{confirm:.0f}")
        deadline = time.monotonic() + finish + confirm
        code, log = await self._ended(name, deadline)
        await self._confirm(name, deadline)
        if code != 0:
            raise ActivationFailed(
                f"activation `{verb}` exited with status {code}:\n{process.tail(log)}",
                target=self.connection.target.name,
            )
        await self.check(path, profile=verb != "test", running=verb != "boot")

    async def nixos_rebuild(
        self, verb: Verb, path: str, *, timeout: float, on_line: process.LineSink | None = None
    ) -> None:
        """Activate with nixos-rebuild-ng instead, without a watchdog: only toto can revert the machine then.

        nixos-rebuild is ended after `timeout` seconds; what it began on the machine goes on: see `take_charge`.
        Raises `ActivationFailed`, `CommandTimeout`, `CommandNotFound`, `NotWhatItShouldBe`.
        """
        name = self.connection.target.name
        sudo = [] if self.connection.target.user == "root" else ["--sudo"]
        try:
            # It removes its temporary files after SIGINT, and leaves them after SIGTERM.
            await process.run(
                ["nixos-rebuild", verb, "--no-reexec", "--store-path", path, "--target-host", name, *sudo],
                env=nix.environment() | {"NIX_SSHOPTS": f"-F {self.connection.config}"},
                timeout=timeout,
                on_line=on_line,
                on_error_line=on_line,
                target=name,
                signals=(signal.SIGINT, signal.SIGTERM),
            )
        except process.CommandFailed as error:
            hint = "toto needs a nixos-rebuild with --store-path: that of NixOS 26.05 or newer"
            raise ActivationFailed(
                f"`nixos-rebuild {verb}` exited with status {error.status}:\n{error.tail}",
                target=name,
                hint=hint if "--store-path" in error.tail else None,
            ) from None
        await self.check(path, profile=verb != "test", running=verb != "boot")

    async def take_charge(self, *, patience: float) -> None:
        """Wait for every activation of this run to end, and disarm their watchdogs, within `patience` seconds.

        A watchdog that has begun to revert is waited for, and so is an activation that a dead toto began, and one by
        a different tool, such as a nixos-rebuild that toto gave up on: it holds the lock of the configuration until
        it ends, and until then the machine still shows the old one. Raises `ActivationFailed` if one does not end,
        `Unreachable`.
        """
        deadline = time.monotonic() + patience
        for name in (await self._verb("names", self.run)).lines:
            said = (await self._verb("confirm", name)).stdout.strip()
            while said != "unknown":
                word = ((await self._verb("result", name, "20")).lines or ["unknown"])[0].split()[0]
                if word in ("back", "unknown") or (word == "done" and said == "confirmed"):
                    break
                if time.monotonic() > deadline:
                    raise ActivationFailed(
                        "an earlier activation has not ended",
                        target=self.connection.target.name,
                        hint=f"read /run/toto/{name}/log on the machine",
                    )
                await anyio.sleep(0.5)
        while (await self._verb("quiet", "20")).stdout.strip() != "quiet":
            if time.monotonic() > deadline:
                raise ActivationFailed(
                    "an activation that toto did not start has not ended",
                    target=self.connection.target.name,
                    hint="on the machine: systemctl status nixos-rebuild-switch-to-configuration",
                )

    async def revert(self, to: MachineState, *, finish: float, boot: bool) -> None:
        """Make the machine run and boot `to`, by profile and activation, and check that it does.

        Each activation may take `finish` seconds. With "" as its profile the machine's profile stays as it is (it had
        none, or toto never set it). `boot` writes the boot default even if the profile is right: power may have been
        lost between the two. Units that fail in the old system are logged as a warning: the machine is reverted.
        Raises `ActivationFailed`, `Unreachable`, `NotWhatItShouldBe`.
        """
        facts = await self.facts()
        if to.profile and (boot or facts.profile != to.profile):
            await self._revert_to("switch" if to.profile == to.system != facts.system else "boot", to.profile, finish)
        if (await self.facts()).system != to.system:
            await self._revert_to("test", to.system, finish)
        await self.check(to.system)
        if to.profile:
            await self.check(to.profile, profile=True, running=False)

    async def check(self, path: str, *, profile: bool = False, running: bool = True) -> None:
        """Check that the machine runs `path`; with `profile`, that it boots it next. Raises `NotWhatItShouldBe`."""
        facts = await self.facts()
        for wanted, what, found in ((running, "runs", facts.system), (profile, "boots next", facts.profile)):
            if wanted and found != path:
                raise NotWhatItShouldBe(
                    f"{what} {found or 'nothing'}, not {path}",
                    target=self.connection.target.name,
                    hint="someone else may be deploying to it; see `nixos-version` there",
                )

    async def clean_up(self) -> None:
        """Remove this run's files from the machine, once no activation is under way."""
        await self._verb("clean-up", self.run)

    async def _revert_to(self, verb: Verb, path: str, finish: float) -> None:
        """Activate without a watchdog, which would have nothing to revert to."""
        name = self._new_name("back")
        await self._verb("begin", name, verb, path, path, "", f"{finish:.0f}", "0")
        code, log = await self._ended(name, time.monotonic() + finish + 60)
        if code == UNITS_FAILED:
            logging.getLogger(__name__).warning(
                "%s: units failed while it was reverted:\n%s", self.connection.target.name, process.tail(log)
            )
        elif code != 0:
            raise ActivationFailed(
                f"reverting it (`{verb}`) exited with status {code}:\n{process.tail(log)}",
                target=self.connection.target.name,
            )

    async def _ended(self, name: str, deadline: float) -> tuple[int, str]:
        """Wait until the activation has ended, over several connections if need be; return its status and log."""
        host = self.connection.target.name
        while True:
            try:
                done = await self._verb("result", name, "20", fresh=True)
            except Unreachable:
                if time.monotonic() > deadline:
                    raise
                await anyio.sleep(1)  # its network may be restarting
                continue
            word, _, code = done.lines[0].partition(" ") if done.lines else ("unknown", "", "")
            log = "\n".join(done.lines[1:])
            if word == "done":
                return int(code), log
            if word == "back":
                raise WentBack(f"was reverted by its watchdog, as it should be:\n{process.tail(log)}", target=host)
            if word != "running":
                raise WentBack("has lost the files of the activation", target=host)
            if time.monotonic() > deadline:
                raise ActivationFailed("the activation did not end in time", target=host)

    async def _confirm(self, name: str, deadline: float) -> None:
        """Confirm over a new connection: an old one may live on where a new one is refused."""
        while True:
            try:
                answer = (await self._verb("confirm", name, fresh=True)).stdout.strip()
                break
            except Unreachable:
                if time.monotonic() > deadline:
                    raise
                await anyio.sleep(1)
        if answer != "confirmed":
            raise WentBack(
                "answered too late after the activation: its watchdog had begun to revert it",
                target=self.connection.target.name,
            )

    def _new_name(self, verb: str) -> str:
        return f"{self.run}.{verb}.{secrets.token_hex(4)}"

    async def _verb(self, *words: str, fresh: bool = False) -> process.Completed:
        return await self._root(["/bin/sh", _ON_MACHINE, *words], fresh=fresh)

    async def _root(self, argv: Sequence[str], *, stdin: bytes | None = None, fresh: bool = False) -> process.Completed:
        sudo = [] if self.connection.target.user == "root" else ["sudo", "-n"]
        try:
            return await self.connection.run(
                [*sudo, *argv], stdin=stdin, fresh=fresh, timeout=self.connect_timeout + 60
            )
        except process.CommandFailed as error:
            raise self._explained(error) from None

    def _explained(self, error: process.CommandFailed) -> TotoError:
        name, said = self.connection.target.name, error.tail.strip().splitlines() or ["no output"]
        if _ON_MACHINE in error.tail and f"{_ON_MACHINE}.new" not in error.tail:  # /run is empty after a boot
            return WentBack(
                "has rebooted meanwhile, into its boot default",
                target=name,
                hint="find out why; to deploy it, push again, or retry the run",
            )
        if said[-1].startswith("sudo:"):
            return ActivationFailed(
                f"{self.connection.target.user} may not become root: {said[-1]}",
                target=name,
                hint="set security.sudo.wheelNeedsPassword = false, and put the user into wheel",
            )
        return ActivationFailed(f"a command of the activation failed on it: {said[-1]}\n{error.message}", target=name)
