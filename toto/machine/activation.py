"""Activating a closure on a machine, and going back: the verbs of `activate.sh`, which runs there.

An activation goes on when the connection that asked for it dies. A watchdog on the machine goes back to
the recorded store path unless toto confirms over a new connection; so a configuration that breaks sshd
or the network heals without anyone.
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
UNITS_FAILED: Final = 4  # the exit status of switch-to-configuration when the system is there but a unit is not
_ON_MACHINE: Final = "/run/toto/activate.sh"


class ActivationFailed(TotoError):
    """The machine's switch-to-configuration failed; the message ends with its own last lines."""


class WentBack(TotoError):
    """The machine went back by itself: it was not reached in time after an activation, or it rebooted."""


class NotWhatItShouldBe(TotoError):
    """The machine runs another system than the one it was just told to run."""


@dataclass(frozen=True)
class Facts:
    """What a machine runs, and boots next: store paths, "" where it has none."""

    system: str
    profile: str

    @property
    def before(self) -> Before:
        return Before(system=self.system, profile=self.profile)


@dataclass(frozen=True)
class Activator:
    """The activation verbs on one machine, for one run (`run` names the state that it keeps there)."""

    connection: Connection
    run: str
    connect_timeout: float = 15

    async def install(self) -> None:
        """Put the script on the machine. Raises `Unreachable`, or `ActivationFailed` when sudo refuses."""
        await self._root(["/bin/sh", "-c", f"mkdir -p -m 700 /run/toto && cat > {_ON_MACHINE}.new && "
                          f"mv {_ON_MACHINE}.new {_ON_MACHINE}"], stdin=_SCRIPT.read_bytes())

    async def facts(self) -> Facts:
        """What the machine runs now. Raises `Unreachable`, `NotWhatItShouldBe` when it is no NixOS."""
        done = await self._verb("facts")
        told = dict(line.partition("=")[::2] for line in done.lines)
        if not told.get("system", "").startswith("/nix/store/"):
            raise NotWhatItShouldBe("has no /run/current-system in the nix store", target=self.connection.target.name,
                                    hint="is it a NixOS machine? role: other in machines.yaml leaves it alone")
        return Facts(told["system"], told.get("profile", ""))

    async def activate(self, verb: Verb, path: str, before: Before, *, finish: float, confirm: float) -> None:
        """Activate `path`, then confirm over a new connection. `finish` and `confirm` are seconds.

        `switch` and `boot` set the system profile first. When the activation itself fails the machine is
        confirmed all the same (toto reaches it, and decides what comes next).
        Raises `ActivationFailed`, `WentBack`, `Unreachable`, `NotWhatItShouldBe`.
        """
        name = self._new_name(verb)
        await self._verb("begin", name, verb, path, before.system, before.profile, f"{finish:.0f}", f"{confirm:.0f}")
        deadline = time.monotonic() + finish + confirm
        code, log = await self._ended(name, deadline)
        await self._confirm(name, deadline)
        if code != 0:
            raise ActivationFailed(f"activation `{verb}` exited with status {code}:\n{process.tail(log)}",
                                   target=self.connection.target.name)
        await self.check(path, profile=verb != "test", running=verb != "boot")

    async def nixos_rebuild(self, verb: Verb, path: str, *, timeout: float,
                            on_line: process.LineSink | None = None) -> None:
        """Activate by the stock tool (nixos-rebuild-ng) instead: no watchdog, and no way back but toto's revert.

        It is ended after `timeout` seconds, and what it began on the machine goes on: see `take_charge`.
        Raises `ActivationFailed`, `CommandTimeout`, `CommandNotFound`, `NotWhatItShouldBe`.
        """
        name = self.connection.target.name
        sudo = [] if self.connection.target.user == "root" else ["--sudo"]
        try:
            # Interrupted, it removes its temporary files; ended in another way it leaves them.
            await process.run(
                ["nixos-rebuild", verb, "--no-reexec", "--store-path", path, "--target-host", name, *sudo],
                env=nix.environment() | {"NIX_SSHOPTS": f"-F {self.connection.config}"}, timeout=timeout,
                on_line=on_line, on_error_line=on_line, target=name, signals=(signal.SIGINT, signal.SIGTERM))
        except process.CommandFailed as error:
            hint = "toto needs one that knows --store-path: of NixOS 26.05, or newer"
            raise ActivationFailed(f"`nixos-rebuild {verb}` exited with status {error.status}:\n{error.tail}",
                                   target=name, hint=hint if "--store-path" in error.tail else None) from None
        await self.check(path, profile=verb != "test", running=verb != "boot")

    async def take_charge(self, *, patience: float) -> None:
        """Bring every activation of this run to its end: no watchdog of it is armed, and none is under way.

        One that is already going back is waited for, as is one that a dead toto had begun: `patience` seconds.
        So is one by another tool, as nixos-rebuild's when toto gave up on it: until that has ended it holds the lock
        of the configuration, and shows the old one still. Raises `ActivationFailed` when it does not end.
        """
        deadline = time.monotonic() + patience
        for name in (await self._verb("names", self.run)).lines:
            said = (await self._verb("confirm", name)).stdout.strip()
            while said != "unknown":
                word = ((await self._verb("result", name, "20")).lines or ["unknown"])[0].split()[0]
                if word in ("back", "unknown") or (word == "done" and said == "confirmed"):
                    break
                if time.monotonic() > deadline:
                    raise ActivationFailed("an earlier activation does not end", target=self.connection.target.name,
                                           hint=f"see /run/toto/{name}/log on the machine")
                await anyio.sleep(0.5)
        while (await self._verb("quiet", "20")).stdout.strip() != "quiet":
            if time.monotonic() > deadline:
                raise ActivationFailed("an activation that toto does not watch does not end",
                                       target=self.connection.target.name,
                                       hint="on the machine: systemctl status nixos-rebuild-switch-to-configuration")

    async def go_back(self, to: Before, *, finish: float, boot: bool) -> None:
        """Make the machine run and boot what is recorded: profile and activation, then look whether it does.

        With "" as profile the machine's profile stays as it is (it had none, or toto never set it). `boot` also
        writes the boot default again where the profile is right: power may have been lost between the two.
        A unit that fails in the old system does not make it another system: that is told as a warning.
        Raises `ActivationFailed`, `Unreachable`, `NotWhatItShouldBe`.
        """
        facts = await self.facts()
        if to.profile and (boot or facts.profile != to.profile):
            await self._back("switch" if to.profile == to.system != facts.system else "boot", to.profile, finish)
        if (await self.facts()).system != to.system:
            await self._back("test", to.system, finish)
        await self.check(to.system)
        if to.profile:
            await self.check(to.profile, profile=True, running=False)

    async def check(self, path: str, *, profile: bool = False, running: bool = True) -> None:
        """Whether the machine runs (and, with `profile`, boots next) `path`. Raises `NotWhatItShouldBe`."""
        facts = await self.facts()
        for wanted, what, found in ((running, "runs", facts.system), (profile, "boots next", facts.profile)):
            if wanted and found != path:
                raise NotWhatItShouldBe(f"{what} {found or 'nothing'}, not {path}",
                                        target=self.connection.target.name,
                                        hint="someone else may be deploying to it; look with `nixos-version`")

    async def forget(self) -> None:
        """Remove this run's state from the machine, once no activation is under way."""
        await self._verb("forget", self.run)

    async def _back(self, verb: Verb, path: str, finish: float) -> None:
        """An activation without a watchdog: there is nothing further to go back to."""
        name = self._new_name("back")
        await self._verb("begin", name, verb, path, path, "", f"{finish:.0f}", "0")
        code, log = await self._ended(name, time.monotonic() + finish + 60)
        if code == UNITS_FAILED:
            logging.getLogger(__name__).warning("%s: units failed while it went back:\n%s", self.connection.target.name,
                                                process.tail(log))
        elif code != 0:
            raise ActivationFailed(f"going back (`{verb}`) exited with status {code}:\n{process.tail(log)}",
                                   target=self.connection.target.name)

    async def _ended(self, name: str, deadline: float) -> tuple[int, str]:
        """Wait, over as many connections as it takes, until the activation ended; its status and log."""
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
                raise WentBack(f"went back by itself, as it should:\n{process.tail(log)}", target=host)
            if word != "running":
                raise WentBack("lost track of the activation", target=host)
            if time.monotonic() > deadline:
                raise ActivationFailed("did not end in time", target=host)

    async def _confirm(self, name: str, deadline: float) -> None:
        """Over a new connection: an old one may live on where no new one would be let in."""
        while True:
            try:
                answer = (await self._verb("confirm", name, fresh=True)).stdout.strip()
                break
            except Unreachable:
                if time.monotonic() > deadline:
                    raise
                await anyio.sleep(1)
        if answer != "confirmed":
            raise WentBack("was reached too late after the activation, and had begun to go back by itself",
                           target=self.connection.target.name)

    def _new_name(self, verb: str) -> str:
        return f"{self.run}.{verb}.{secrets.token_hex(4)}"

    async def _verb(self, *words: str, fresh: bool = False) -> process.Completed:
        return await self._root(["/bin/sh", _ON_MACHINE, *words], fresh=fresh)

    async def _root(self, argv: Sequence[str], *, stdin: bytes | None = None,
                    fresh: bool = False) -> process.Completed:
        sudo = [] if self.connection.target.user == "root" else ["sudo", "-n"]
        try:
            return await self.connection.run([*sudo, *argv], stdin=stdin, fresh=fresh,
                                             timeout=self.connect_timeout + 60)
        except process.CommandFailed as error:
            raise self._explained(error) from None

    def _explained(self, error: process.CommandFailed) -> TotoError:
        name, said = self.connection.target.name, error.tail.strip().splitlines() or ["nothing"]
        if _ON_MACHINE in error.tail and f"{_ON_MACHINE}.new" not in error.tail:  # /run is empty after a boot
            return WentBack("has rebooted meanwhile, into its boot default", target=name,
                            hint="find out why; push again, or start the run again, to deploy it")
        if said[-1].startswith("sudo:"):
            return ActivationFailed(f"{self.connection.target.user} may not become root: {said[-1]}", target=name,
                                    hint="security.sudo.wheelNeedsPassword = false, and the user in wheel")
        return ActivationFailed(f"its side of the activation failed: {said[-1]}\n{error.message}", target=name)
