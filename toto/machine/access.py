"""The way in to a machine: by sudo for everything, or by the locked-down user, who can only hand over documents.

The manifest says which it should be (`access`). What a machine has by now may differ: then its roll-out is also the
move. It begins by the way that is there, and goes on by the one that the new configuration brings, whose first
connection is the proof that toto is not locked out.
"""

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Final, Literal, TypeAlias

from toto.base import paths, process, runs
from toto.infra_repo.manifest import Machine
from toto.infra_repo.settings import Settings
from toto.machine import keys, owners, ssh
from toto.machine.activation import ActivationFailed, Activator, Connected, MachineState, SudoActivator, Verb
from toto.machine.condition import Condition
from toto.machine.locked import USER, LockedActivator, answer_of
from toto.machine.pulled import PATIENCE, PullActivator
from toto.machine.ssh import AuthenticationFailed, Connection, SshTarget

Access: TypeAlias = Literal["sudo", "locked"]

_MONKEY: Final = "monkey"  # how the names of the helper's activations begin
_PROBE: Final = 60.0  # seconds for an answer


@dataclass
class Moving(Connected):
    """A machine that has one way in, `old`, and is to have the other: its next activation brings that.

    `enter` connects by the new way. Only after that has worked it is used.
    """

    old: SudoActivator | LockedActivator
    enter: Callable[[], Awaitable[SudoActivator | LockedActivator]]
    new: SudoActivator | LockedActivator | None = None
    connection: Connection = field(init=False)
    """that by which the machine is reached now"""

    def __post_init__(self) -> None:
        self.connection = self.old.connection

    @property
    def _now(self) -> SudoActivator | LockedActivator:
        return self.new or self.old

    @property
    def run(self) -> str:
        return self.old.run

    def command(self, words: Sequence[str]) -> str:
        """The line for its login shell that runs words in a test."""
        return self._now.command(words)

    async def prepare(self) -> None:
        """As the old way does."""
        await self.old.prepare()

    async def facts(self, *, fresh: bool = False) -> MachineState:
        """What the machine runs and boots; before it has moved to documents, with the hashes that these need."""
        found = await self._now.facts(fresh=fresh)
        if self.new is not None or isinstance(self.old, LockedActivator):
            return found
        hashes = {path: await self._hash(path) for path in {found.system, found.profile}}
        return found.model_copy(update={"nar_hash": hashes[found.system], "profile_hash": hashes[found.profile]})

    async def _hash(self, path: str) -> str | None:
        if not path:
            return None
        asked = ["nix-store", "--query", "--hash", path]
        return (await self.connection.run(asked, check=False, timeout=_PROBE)).stdout.strip() or None

    async def copy(
        self, path: str, *, signed: Path | None, timeout: float, on_line: process.LineSink | None = None
    ) -> None:
        """As the old way does."""
        await self._now.copy(path, signed=signed, timeout=timeout, on_line=on_line)

    async def may_lack(self, path: str) -> bool:
        """As the way says that is there by now."""
        return await self._now.may_lack(path)

    async def try_way_in(self, path: str, running: str, *, address: bool) -> None:
        """Nothing: the new way is not there yet."""

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
        """Activate by the old way, and connect by the new one; from then on by that."""
        if not stays:
            raise ActivationFailed(
                "toto's way in changes with it, so it cannot be only tried", target=self.name, hint="deploy it"
            )
        if self.new is not None:
            return await self.new.activate(verb, path, before, finish=finish, confirm=confirm, on_line=on_line)
        began = time.monotonic()
        await self.old.activate(verb, path, before, finish=finish, confirm=confirm, prove=self._enter)
        # The new way judges the activation: who asked for it may have lost its connection.
        patience = finish + confirm - (time.monotonic() - began)
        if isinstance(self.new, SudoActivator):  # The watchdog that the document set up is sudo's to stop now.
            await self.new.take_over(_MONKEY, verb, patience=patience)
        elif self.new is not None:
            await self.new.take_over(path, verb, patience=patience)
        await self._now.check(path, profile=verb != "test", running=verb != "boot")

    async def _enter(self) -> None:
        self.new = await self.enter()
        self.connection = self.new.connection

    async def keep(self, verb: Verb, path: str, *, finish: float) -> None:
        """As the way does that is there by now."""
        await self._now.keep(verb, path, finish=finish)

    async def check(self, path: str, *, profile: bool = False, running: bool = True, fresh: bool = False) -> None:
        """Check what the machine runs and boots."""
        await self._now.check(path, profile=profile, running=running, fresh=fresh)

    async def take_charge(self, run: str, *, patience: float) -> None:
        """As the way does that is there by now."""
        await self._now.take_charge(run, patience=patience)

    async def interrupt(self, run: str, *, patience: float) -> None:
        """As the way does that is there by now."""
        await self._now.interrupt(run, patience=patience)

    async def revert(self, to: MachineState, *, finish: float, boot: bool) -> None:
        """As the way does that is there by now."""
        await self._now.revert(to, finish=finish, boot=boot)

    async def condition(self) -> Condition | None:
        """As the way says that is there by now."""
        return await self._now.condition()

    async def clean_up(self, run: str = "") -> None:
        """As the way does that is there by now."""
        await self._now.clean_up(run)


@asynccontextmanager
async def connect(
    machine: Machine, repo: Path, run: str, settings: Settings, identity: Path | None
) -> AsyncIterator[Activator]:
    """Reach a machine, where toto logs in by the key `identity` unless it pulls; the result has the activation verbs.

    Raises `Unreachable` after `roll_out.connect_timeout` s, `NotOwned` for an address that the repo may not deploy.
    """
    connect_timeout = settings.roll_out.connect_timeout
    ip = await owners.located(repo, machine, connect_timeout)
    if machine.deploy == "pull":
        key = await keys.for_closures(repo, settings.nix.signing_key)
        yield PullActivator(machine, repo, run, key, ip, patience=max(connect_timeout, PATIENCE))
        return
    target = SshTarget(
        name=machine.name,
        address=machine.address,
        port=machine.ssh.port,
        user=machine.ssh.user,
        identity=identity,
        host_key=machine.ssh.host_key,
        known_hosts=paths.repo_state(repo) / "known_hosts",
        connect_timeout=max(1, round(connect_timeout)),
        ip=ip,
    )
    folder = runs.run_directory(repo, run) / "ssh" / f"{machine.name}@machine"
    rebuild = settings.roll_out.method == "nixos-rebuild"
    async with over_ssh(target, folder, machine, repo, run, connect_timeout, rebuild=rebuild) as activator:
        yield activator


OverSsh: TypeAlias = SudoActivator | LockedActivator | Moving


@asynccontextmanager
async def over_ssh(
    target: SshTarget,
    folder: Path,
    machine: Machine,
    repo: Path,
    run: str,
    connect_timeout: float,
    *,
    rebuild: bool = False,
) -> AsyncIterator[OverSsh]:
    """Connect to a machine by the way in that it has; its files are below `folder`.

    `target` is for the user of the manifest; the locked-down one is always called `toto`. By sudo, `rebuild` has
    nixos-rebuild activate. Raises `Unreachable`.
    """
    async with AsyncExitStack() as stack:

        async def enter(access: Access, place: str = "") -> tuple[Access, Connection]:
            """A connection for the user of a way in, and the way that this user has in fact."""
            user = USER if access == "locked" else target.user
            entered = ssh.connection(replace(target, user=user), folder / (place or access))
            connection = await stack.enter_async_context(entered)
            answer = answer_of(await connection.run(["facts"], check=False, timeout=_PROBE))
            if answer is None and access == "sudo" and user not in ("root", USER):
                sudo = await connection.run(["sudo", "-n", "true"], check=False, timeout=_PROBE)
                if sudo.status != 0:
                    raise AuthenticationFailed(f"{user} may not become root: {sudo.stderr.strip()}", target=target.name)
            return "sudo" if answer is None else "locked", connection

        def activator(access: Access, connection: Connection) -> SudoActivator | LockedActivator:
            if access == "locked":
                return LockedActivator(
                    connection,
                    repo,
                    run,
                    machine.activation,
                    connect_timeout,
                    lambda: machine.reboots(datetime.now()),  # (its window may have ended by then)
                    machine.substitute,
                )
            return SudoActivator(connection, run, connect_timeout, rebuild, machine.substitute)

        wanted: Access = machine.access
        try:
            found, connection = await enter(wanted)
            if found != wanted and target.user != USER:  # a user toto with a shell is none that toto has use for
                found, connection = await enter(found)
        except AuthenticationFailed:
            if target.user == USER:
                raise
            found, connection = await enter("sudo" if wanted == "locked" else "locked")
        old = activator(found, connection)

        async def enter_new() -> SudoActivator | LockedActivator:
            reached, connection = await enter(wanted, "new")
            if reached != wanted:
                raise AuthenticationFailed(_other_way(reached), target=machine.name)
            made = activator(wanted, connection)
            await made.prepare()
            return made

        yield old if found == wanted else Moving(old, enter_new)


def _other_way(found: Access) -> str:
    if found == "locked":
        return "machines.yaml says `access: sudo`, and its user toto can only hand over documents"
    return "machines.yaml says `access: locked`, and its user toto has a shell: enable services.flying-monkey"
