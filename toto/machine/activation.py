"""Activating a closure on a machine, and reverting it, by the verbs of `activate.sh`, which runs on the machine.

An activation goes on when the connection that asked for it dies. A watchdog on the machine reverts it to the recorded
store path unless toto confirms over a new connection. So a machine whose new configuration breaks sshd or the network
recovers by itself.
"""

import logging
import secrets
import signal
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final, Literal, Protocol, TypeAlias

import anyio

import flying_monkey
from toto.base import process
from toto.base.errors import TotoError
from toto.ledger.ledger import Before
from toto.machine import login_shell, owners, way_in
from toto.machine.condition import Condition
from toto.machine.ssh import AuthenticationFailed, Connection, HostKeyChanged, Unreachable
from toto.nix import commands as nix

Verb: TypeAlias = Literal["test", "switch", "boot"]
Prove: TypeAlias = Callable[[], Awaitable[None]]

_SCRIPT: Final = Path(flying_monkey.__file__).with_name("activate.sh")
UNITS_FAILED: Final = 4  # the exit status of switch-to-configuration when it worked, but units failed
_SSH_FAILED: Final = 255  # the exit status of ssh when the connection is lost
_ON_MACHINE: Final = "/run/toto/activate.sh"
# What an exit status of switch-to-configuration calls for.
_HINTS: Final[Mapping[int, str]] = {
    100: "NixOS holds that the change needs a reboot (a switch inhibitor): set `activation: boot` for this machine"
}
_RESTART: Final = 20.0  # seconds that sshd and the network may take to be there again after an activation
_GRACE: Final = 60.0  # seconds that activate.sh may take besides the activation


class ActivationFailed(TotoError):
    """switch-to-configuration failed on the machine; the message ends with its last lines."""


async def copy(
    connection: Connection,
    path: str,
    *,
    signed: Path | None,
    timeout: float,
    on_line: process.LineSink | None = None,
    probe: str = "true",
    substitute: bool = False,
) -> None:
    """Copy a closure over a connection. Raises `CopyFailed`, or `Unreachable` when that was why: `probe` tells it.

    With `substitute` the machine fetches what it can by itself, and has what toto has, or it is an error.
    """
    name, config = connection.target.name, connection.config
    try:
        await nix.copy(
            path, name, config, timeout=timeout, target=name, signed=signed, substitute=substitute, on_line=on_line
        )
        if substitute:
            await nix.compare(path, name, config, timeout=timeout, target=name)
    except nix.CopyFailed:
        await connection.run([probe], fresh=True, timeout=_GRACE, check=False)
        raise


def rebuild_failed(verb: str, status: int, said: str, target: str) -> ActivationFailed:
    """The error of a nixos-rebuild that ended with `status`, without its advice on options that toto does not pass."""
    lines = [line for line in said.splitlines() if "--ask-sudo-password" not in line]
    what, hint = f"`nixos-rebuild {verb}` exited with status {status}", _HINTS.get(status)
    if status == _SSH_FAILED:
        what = f"the connection was lost during `nixos-rebuild {verb}`, which goes on on the machine"
        hint = "on the machine: journalctl -u nixos-rebuild-switch-to-configuration"
    elif "--store-path" in said:
        hint = "toto needs a nixos-rebuild with --store-path: that of NixOS 26.05 or newer"
    return ActivationFailed(":\n".join(filter(None, (what, "\n".join(lines)))), target=target, hint=hint)


class WentBack(TotoError):
    """The machine reverted by itself: toto did not connect in time after an activation, or the machine rebooted."""


class WayChanged(ActivationFailed):
    """The machine answers as the other way in does (see `toto.machine.access`): connect anew, by that one."""


class LockedOut(WentBack):
    """The activation shut toto out: no new connection was let in, so it was reverted over the old one."""


class NotWhatItShouldBe(TotoError):
    """The machine does not run or boot the system that it should."""


class MachineState(Before):
    """What a machine runs, and what it boots next: store paths, or "" for none.

    `nar_hash` and `profile_hash` are those of the two, by its own account, where it gives them.
    """

    system: str = ""
    profile: str = ""
    nar_hash: str | None = None
    profile_hash: str | None = None


def compare(facts: MachineState, path: str, *, profile: bool, running: bool, target: str) -> None:
    """Raise `NotWhatItShouldBe` unless a machine runs `path`, and, with `profile`, boots it next."""
    for wanted, what, found in ((running, "runs", facts.system), (profile, "boots next", facts.profile)):
        if wanted and found != path:
            raise NotWhatItShouldBe(
                f"{what} {found or 'nothing'}, not {path}",
                target=target,
                hint="someone else may be deploying to it; see `nixos-version` there",
            )


class Activator(Protocol):
    """What a roll-out does on one machine, for one run, whichever way toto reaches it. `name` is the machine's.

    Times are in seconds; `finish` is how long one activation may take. All raise `Unreachable`, `ActivationFailed`,
    `WentBack` and `NotWhatItShouldBe`. `SudoActivator` has the meaning of each in full.
    """

    @property
    def name(self) -> str: ...

    @property
    def run(self) -> str: ...

    @property
    def connection(self) -> Connection | None:
        """That by which toto reaches the machine now; None where the machine asks toto."""

    @property
    def ip(self) -> str:
        """Where the machine's address has been found to be."""
        ...

    @property
    def host_keys(self) -> list[str]:
        """Those by which toto knows the machine."""
        ...

    def command(self, words: Sequence[str]) -> str:
        """The line for the machine's login shell that runs words in a test."""
        ...

    async def prepare(self) -> None:
        """Do what has to be done before anything else."""

    async def facts(self, *, fresh: bool = False) -> MachineState:
        """What the machine runs, and what it boots next; `fresh` asks over a new connection."""
        ...

    async def copy(
        self, path: str, *, signed: Path | None, timeout: float, on_line: process.LineSink | None = None
    ) -> None:
        """Let the machine have a closure; `signed` is the folder that `nix.sign` has filled. Raises `CopyFailed`."""

    async def may_lack(self, path: str) -> bool:
        """Whether a closure to go back to may have to be copied to the machine again."""
        ...

    async def try_way_in(self, path: str, running: str, *, address: bool) -> None:
        """Log in as `path` would let toto in, where that can be tried (see `way_in.check`). Raises `WouldLockOut`."""

    async def activate(
        self,
        verb: Verb,
        path: str,
        before: MachineState,
        *,
        finish: float,
        confirm: float,
        on_line: process.LineSink | None = None,
        stays: bool = True,
    ) -> None:
        """Activate `path`; without a word of toto's within `confirm` seconds the machine goes back to `before`.

        Unless it `stays`, toto says no such word: it is only tried.
        """

    async def keep(self, verb: Verb, path: str, *, finish: float) -> None:
        """Keep what was activated by `verb`, when that does not end with a `switch`, which keeps it."""

    async def check(self, path: str, *, profile: bool = False, running: bool = True, fresh: bool = False) -> None:
        """Check that the machine runs `path`; with `profile`, that it boots it next."""

    async def take_charge(self, run: str, *, patience: float) -> None:
        """Wait for what a run has begun on the machine, so that nothing there acts by itself any more."""

    async def interrupt(self, run: str, *, patience: float) -> None:
        """See that what a run has begun on the machine does not get in the way of a revert."""

    async def revert(self, to: MachineState, *, finish: float, boot: bool) -> None:
        """Make the machine run and boot `to`."""

    async def condition(self) -> Condition | None:
        """How the machine says that it is; None where it says nothing by itself."""
        ...

    async def clean_up(self, run: str = "") -> None:
        """Remove what a run has left on the machine, this run or a different one."""


class Connected:
    """A part of an `Activator`: what follows from the connection by which toto reaches the machine."""

    connection: Connection

    @property
    def name(self) -> str:
        """The machine's name."""
        return self.connection.target.name

    @property
    def ip(self) -> str:
        """Where its address has been found to be."""
        return self.connection.target.ip or ""

    @property
    def host_keys(self) -> list[str]:
        """Those by which toto knows the machine."""
        return owners.host_keys(self.connection.target)


@dataclass(frozen=True)
class SudoActivator(Connected):
    """The activation verbs on one machine, by sudo, for one run: its files there have `run` in their names.

    With `rebuild` nixos-rebuild activates; with `substitute` the machine fetches what it can by itself.
    `connect_timeout` is in seconds.
    """

    connection: Connection
    run: str
    connect_timeout: float = 15
    rebuild: bool = False
    substitute: bool = False
    _refusals: dict[str, float] = field(default_factory=dict)

    async def prepare(self) -> None:
        """Copy the script to the machine. Raises `Unreachable`, or `ActivationFailed` when sudo refuses."""
        await self._run(
            [
                *self._sudo,
                "/bin/sh",
                "-c",
                f"mkdir -p -m 700 /run/toto && cat > {_ON_MACHINE}.new && mv {_ON_MACHINE}.new {_ON_MACHINE}",
            ],
            stdin=_SCRIPT.read_bytes(),
        )

    async def copy(
        self, path: str, *, signed: Path | None, timeout: float, on_line: process.LineSink | None = None
    ) -> None:
        """Copy a closure to the machine over ssh, as in `nix.copy`. Raises `CopyFailed`, `Unreachable`."""
        await copy(self.connection, path, signed=signed, timeout=timeout, on_line=on_line, substitute=self.substitute)

    async def may_lack(self, path: str) -> bool:
        """Unless it runs that."""
        return (await self.facts()).system != path

    async def try_way_in(self, path: str, running: str, *, address: bool) -> None:
        """Log in as `path` would let toto in: see `way_in.check`. Raises `WouldLockOut`, `Unreachable`."""
        await way_in.check(self, path, running, address=address)

    def command(self, words: Sequence[str]) -> str:
        """The line for its login shell that runs words in a test."""
        return login_shell.line(words)

    async def facts(self, *, fresh: bool = False) -> MachineState:
        """What the machine runs now; `fresh` is as in `Connection.run`.

        Raises `Unreachable`, or `NotWhatItShouldBe` when it is not NixOS.
        """
        done = await self._verb("facts", fresh=fresh)
        facts = dict(line.partition("=")[::2] for line in done.lines)
        if not facts.get("system", "").startswith("/nix/store/"):
            raise NotWhatItShouldBe(
                "has no /run/current-system in the nix store",
                target=self.connection.target.name,
                hint="is it a NixOS machine? if not, set role: other in machines.yaml",
            )
        return MachineState(system=facts["system"], profile=facts.get("profile", ""))

    async def activate(
        self,
        verb: Verb,
        path: str,
        before: MachineState,
        *,
        finish: float,
        confirm: float,
        on_line: process.LineSink | None = None,
        stays: bool = True,
        prove: Prove | None = None,
    ) -> None:
        """Activate `path`, then confirm over a new connection; or have nixos-rebuild do it, which prints to `on_line`.

        An activation by another tool is waited for first, for up to `finish` seconds. Then the activation may take as
        long; `confirm` seconds after it the watchdog reverts the machine to `before`. `switch` and `boot` set the
        system profile first. toto also confirms an activation that fails, since it can connect and decides itself what
        comes next. When the machine lets in no new connection, it is reverted over the old one, at once.
        With `prove`, that is how toto connects from now on, and the watchdog stays armed: something else disarms it. It
        stays armed too where the system is only tried, and not to stay.
        Raises `ActivationFailed`, `WentBack`, `Unreachable`, `NotWhatItShouldBe`.
        """
        if not stays:
            prove = prove or partial(self.check, path, running=verb != "boot", fresh=True)
        if self.rebuild and prove is None:
            return await self.nixos_rebuild(verb, path, before, timeout=finish, on_line=on_line)
        name = self._new_name(verb)
        if prove is None:
            await self._begin(name, verb, path, before, finish, confirm)
            deadline = time.monotonic() + finish + _GRACE + confirm
            code, log = await self._ended(name, deadline)
        else:
            code, log = await self._begun_and_ended(name, verb, path, before, finish, confirm)
            deadline = time.monotonic() + _GRACE + confirm
        await self._proven(name, deadline, prove or partial(self._confirm, name))
        self._judge(verb, code, log)
        if prove is None:
            await self.check(path, profile=verb != "test", running=verb != "boot", fresh=True)

    async def take_over(self, run: str, verb: Verb, *, patience: float) -> None:
        """Confirm what a run, or the machine's agent, has activated, and judge that as `activate` does.

        Its end is read first: when it is confirmed, its files may go. Raises `ActivationFailed`, `WentBack`,
        `Unreachable`.
        """
        deadline = time.monotonic() + patience
        for name in (await self._verb("names", run)).lines:
            code, log = await self._ended(name, deadline)
            await self._confirm(name)
            self._judge(verb, code, log)

    def _judge(self, verb: Verb, code: int, log: str) -> None:
        if code != 0:
            raise ActivationFailed(
                f"activation `{verb}` exited with status {code}:\n{process.tail(log)}",
                target=self.connection.target.name,
                hint=_HINTS.get(code),
            )

    async def keep(self, verb: Verb, path: str, *, finish: float) -> None:
        """Nothing: a confirmed activation is kept already."""

    async def nixos_rebuild(
        self, verb: Verb, path: str, before: MachineState, *, timeout: float, on_line: process.LineSink | None = None
    ) -> None:
        """Activate with nixos-rebuild-ng instead, without a watchdog: only toto can revert the machine then.

        nixos-rebuild is ended after `timeout` seconds; what it began on the machine goes on: see `take_charge`. When
        the machine lets in no new connection afterwards, toto reverts it to `before` over the old one.
        Raises `ActivationFailed`, `WentBack`, `CommandTimeout`, `CommandNotFound`, `NotWhatItShouldBe`.
        """
        name = self.connection.target.name
        sudo = [] if self.connection.target.user == "root" else ["--sudo"]
        broken, failed = (await self._verb("broken")).lines, None
        try:
            # It removes its temporary files after SIGINT, and leaves them after SIGTERM.
            await process.run(
                ["nixos-rebuild", verb, "--no-reexec", "--store-path", path, "--target-host", name, *sudo],
                env=nix.environment() | {"NIX_SSHOPTS": f"-F {self.connection.config.name}"},  # split at blanks
                cwd=self.connection.config.parent,
                timeout=timeout,
                on_line=on_line,
                on_error_line=on_line,
                target=name,
                signals=(signal.SIGINT, signal.SIGTERM),
            )
        except process.CommandFailed as error:
            failed = rebuild_failed(verb, error.status, error.tail, name)
            if error.status != UNITS_FAILED:
                raise failed from None
        ended = time.monotonic()
        while True:
            try:
                await self.check(path, profile=verb != "test", running=verb != "boot", fresh=True)
                break
            except Unreachable as error:
                if await self._old_lives() and self._shut_out(error, ended):
                    await self._revert_by_old(verb, before, timeout)
                    raise self._locked_out(error) from None
                if time.monotonic() > ended + _RESTART:
                    raise
            await anyio.sleep(1)
        if failed is not None:
            now = (await self._verb("broken")).lines
            if not now or set(now) - set(broken):
                raise failed
            logging.getLogger(__name__).warning("%s: units that failed were broken before: %s", name, " ".join(now))

    async def take_charge(self, run: str, *, patience: float) -> None:
        """Wait for every activation of a run to end, and disarm their watchdogs, within `patience` seconds.

        A watchdog that has begun to revert is waited for, and so is an activation that a dead toto began, and one by
        a different tool, such as a nixos-rebuild that toto gave up on: it holds the lock of the configuration until
        it ends, and until then the machine still shows the old one. Raises `ActivationFailed` if one does not end,
        `Unreachable`.
        """
        deadline = time.monotonic() + patience
        for name in (await self._verb("names", run)).lines:
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
                raise self._busy()

    async def interrupt(self, run: str, *, patience: float) -> None:
        """A watchdog that is still armed would undo the revert: see `take_charge`."""
        await self.take_charge(run, patience=patience)

    async def revert(self, to: MachineState, *, finish: float, boot: bool) -> None:
        """Make the machine run and boot `to`, by profile and activation, and check that it does.

        Each activation may take `finish` seconds. With "" as its profile the machine's profile stays as it is (it had
        none, or toto never set it). `boot` writes the boot default even if the profile is right: power may have been
        lost between the two. Units that fail in the old system are logged as a warning: the machine is reverted.
        Raises `ActivationFailed`, `Unreachable`, `NotWhatItShouldBe`.
        """
        facts = await self.facts()
        # What runs goes back first: a boot loader that fails must not leave the rejected system running.
        if facts.system != to.system:
            await self._revert_to("test", to.system, finish)
        if to.profile and (boot or facts.profile != to.profile):
            await self._revert_to("boot", to.profile, finish)
        await self.check(to.system)
        if to.profile:
            await self.check(to.profile, profile=True, running=False)

    async def check(self, path: str, *, profile: bool = False, running: bool = True, fresh: bool = False) -> None:
        """Check that the machine runs `path`; with `profile`, that it boots it next. `fresh` is as in `facts`.

        Raises `NotWhatItShouldBe`, `Unreachable`.
        """
        compare(await self.facts(fresh=fresh), path, profile=profile, running=running, target=self.name)

    async def condition(self) -> None:
        """Nothing: it has no agent that toto would hear."""

    async def clean_up(self, run: str = "") -> None:
        """Remove a run's files from the machine, this run's or a different one's, once no activation is under way."""
        await self._verb("clean-up", run or self.run)

    async def _revert_to(self, verb: Verb, path: str, finish: float) -> None:
        """Activate without a watchdog, which would have nothing to revert to."""
        name = self._new_name("back")
        await self._begin(name, verb, path, MachineState(system=path), finish, 0)
        code, log = await self._ended(name, time.monotonic() + finish + _GRACE)
        if code == UNITS_FAILED:
            logging.getLogger(__name__).warning(
                "%s: units failed while it was reverted:\n%s", self.connection.target.name, process.tail(log)
            )
        elif code != 0:
            raise ActivationFailed(
                f"reverting it (`{verb}`) exited with status {code}:\n{process.tail(log)}",
                target=self.connection.target.name,
            )

    async def _begin(
        self, name: str, verb: Verb, path: str, before: MachineState, finish: float, confirm: float
    ) -> None:
        """Begin an activation, once no other tool activates."""
        words = ("begin", name, verb, path, before.system, before.profile, f"{finish:.0f}", f"{confirm:.0f}")
        deadline = time.monotonic() + finish
        while (await self._verb(*words)).stdout.strip() == "busy":
            if time.monotonic() > deadline:
                raise self._busy()
            await anyio.sleep(1)

    async def _begun_and_ended(
        self, name: str, verb: Verb, path: str, before: MachineState, finish: float, confirm: float
    ) -> tuple[int, str]:
        """Begin an activation and wait for its end by one command: it may take away toto's right to a second one.

        When the connection is lost, the exit status is not known, and 0 here: the new way in tells how it ended.
        """
        words = ("begin", name, verb, path, before.system, before.profile, f"{finish:.0f}", f"{confirm:.0f}")
        command, deadline = self.words(*words, f"{finish + _GRACE:.0f}"), time.monotonic() + finish
        try:
            while True:
                done = await self.connection.run(command, timeout=finish + 3 * _GRACE, check=False)
                if done.stdout.strip() != "busy" or time.monotonic() > deadline:
                    break
                await anyio.sleep(1)
        except Unreachable:
            return 0, ""
        word, _, code = done.lines[0].partition(" ") if done.lines else ("unknown", "", "")
        if word == "done":
            return int(code), "\n".join(done.lines[1:])
        raise (
            self._busy()
            if word == "busy"
            else ActivationFailed(
                f"the activation did not end as it should: {process.tail(done.stdout + done.stderr)}", target=self.name
            )
        )

    async def _ended(self, name: str, deadline: float) -> tuple[int, str]:
        """Wait until the activation has ended, over several connections if need be; return its status and log."""
        host = self.connection.target.name
        while True:
            try:
                done = await self._verb("result", name, "20", fresh=True)
            except Unreachable as error:
                await self._unreachable(name, error, deadline)
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

    async def _proven(self, name: str, deadline: float, prove: Prove) -> None:
        """Connect anew by `prove`: an old connection may live on where a new one is refused."""
        while True:
            try:
                return await prove()
            except Unreachable as error:
                await self._unreachable(name, error, deadline)

    async def _confirm(self, name: str) -> None:
        """Confirm over a new connection."""
        answer = (await self._verb("confirm", name, fresh=True)).stdout.strip()
        if answer != "confirmed":
            raise WentBack(
                "answered too late after the activation: its watchdog had begun to revert it",
                target=self.connection.target.name,
            )

    async def _unreachable(self, name: str, error: Unreachable, deadline: float) -> None:
        """No new connection is let in: wait a moment, since the network may be restarting.

        When the activation has ended and the old connection lives, have the machine revert itself over that one; raise
        `LockedOut` when it has. Raises `error` after the deadline: then the watchdog has reverted it, or will.
        """
        said = await self._by_old("result", name, "0")
        if said and said[0].startswith("done") and self._shut_out(error, self._first_refusal(name)):
            logging.getLogger(__name__).warning("%s; reverting it over the connection from before", error)
            await self._by_old("back", name)
            while (said := await self._by_old("result", name, "20")) and said[0].startswith("done"):
                if time.monotonic() > deadline + _GRACE:
                    break
                await anyio.sleep(0.5)
            raise self._locked_out(error) from None
        if time.monotonic() > deadline:
            raise error
        await anyio.sleep(1)

    def _first_refusal(self, name: str) -> float:
        """When an activation that has ended first let in no new connection."""
        return self._refusals.setdefault(name, time.monotonic())

    @staticmethod
    def _shut_out(error: Unreachable, since: float) -> bool:
        """Whether an error will stay: a refused key does at once, no answer when sshd had the time to restart."""
        return isinstance(error, AuthenticationFailed | HostKeyChanged) or time.monotonic() > since + _RESTART

    def _locked_out(self, error: Unreachable) -> LockedOut:
        return LockedOut(
            f"let in no new connection after the activation, and was reverted over the old one: {error.words}",
            target=self.connection.target.name,
            hint=error.hint or "see that sshd runs in the new configuration, and lets toto in",
        )

    async def _old_lives(self) -> bool:
        """Whether the connection from before the activation still carries commands."""
        return await self._by_old("facts") is not None

    async def _by_old(self, *words: str) -> list[str] | None:
        """The lines that a verb prints over the connection from before; None when that does not live."""
        master = self.connection.master
        if master is None or master.status is not None:
            return None
        try:
            return (await self._verb(*words)).lines
        except (TotoError, OSError):
            return None

    async def _revert_by_old(self, verb: Verb, before: MachineState, finish: float) -> None:
        """Revert over the connection from before what `verb` has done."""
        steps: list[tuple[Verb, str]] = [("test", before.system)] if verb != "boot" else []
        steps += [("boot", before.profile)] if verb != "test" and before.profile else []
        for action, path in steps:
            name = self._new_name("back")
            await self._begin(name, action, path, MachineState(system=path), finish, 0)
            deadline = time.monotonic() + finish + _GRACE
            while (said := await self._by_old("result", name, "20")) and said[0] == "running":
                if time.monotonic() > deadline:
                    break

    def _busy(self) -> ActivationFailed:
        return ActivationFailed(
            "an activation that toto did not start has not ended",
            target=self.connection.target.name,
            hint="on the machine: systemctl status nixos-rebuild-switch-to-configuration",
        )

    def _new_name(self, verb: str) -> str:
        return f"{self.run}.{verb}.{secrets.token_hex(4)}"

    def words(self, *verb: str) -> list[str]:
        """The command on the machine for a verb of `activate.sh`."""
        return [*self._sudo, "/bin/sh", _ON_MACHINE, *verb]

    @property
    def _sudo(self) -> list[str]:
        return [] if self.connection.target.user == "root" else ["sudo", "-n"]

    async def _verb(self, *words: str, fresh: bool = False) -> process.Completed:
        return await self._run(self.words(*words), fresh=fresh)

    async def _run(self, argv: Sequence[str], *, stdin: bytes | None = None, fresh: bool = False) -> process.Completed:
        try:
            return await self.connection.run(argv, stdin=stdin, fresh=fresh, timeout=self.connect_timeout + 60)
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
        if said[-1].startswith("flying-monkey:"):
            return WayChanged(f"a gate answers now: {said[-1]}", target=name)
        if said[-1].startswith("sudo:"):
            return ActivationFailed(
                f"{self.connection.target.user} may not become root: {said[-1]}",
                target=name,
                hint="set security.sudo.wheelNeedsPassword = false, and put the user into wheel",
            )
        return ActivationFailed(f"a command of the activation failed on it: {said[-1]}\n{error.message}", target=name)
