"""Activating on a machine whose user `toto` can do nothing else: by signed documents, over the verbs of its gate.

The machine's helper obeys a document and no word of toto's (see `flying_monkey.helper`). It tries a system under a
watchdog, which only a newer document that says `keep` stops: the signer writes that after toto's own tests. So the ssh
key alone changes nothing on the machine.
"""

import base64
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import anyio

from flying_monkey.desired import Phase
from toto.base import process
from toto.base.errors import TotoError
from toto.infra_repo.manifest import Reboot
from toto.machine import activation, signer
from toto.machine.activation import (
    ActivationFailed,
    Connected,
    LockedOut,
    MachineState,
    NotWhatItShouldBe,
    Prove,
    Verb,
    WayChanged,
    WentBack,
)
from toto.machine.by_document import HINTS, ByDocument, NotBack
from toto.machine.condition import Condition
from toto.machine.ssh import AuthenticationFailed, Connection, HostKeyChanged, Unreachable

USER: Final = "toto"  # whose login shell the gate is
_WAIT: Final = 20  # seconds that a machine is asked to wait for a change
_GRACE: Final = 60.0  # seconds for an answer
_HOOKS: Final = 660.0  # seconds that an update may take besides its activation: hooks have ten minutes
_RESTART: Final = 20.0  # seconds that sshd and the network may take to be there again


def _never() -> None:
    """A machine that may not reboot."""


@dataclass
class LockedActivator(Connected, ByDocument):
    """A locked-down machine, for one run of a repo. `activation` is what a roll-out ends with on it.

    When `reboots` says so, a system with a different kernel is rebooted into when it is kept. With `substitute` it
    fetches what it can by itself.
    """

    connection: Connection
    repo: Path
    run: str
    activation: Verb
    connect_timeout: float = 15
    reboots: Callable[[], Reboot | None] = _never
    substitute: bool = False
    _refused_since: float = 0

    async def facts(self, *, fresh: bool = False) -> MachineState:
        """What the machine runs and boots, by its helper's account."""
        found = await self._facts(fresh=fresh)
        system, profile = found.get("system"), found.get("profile")
        if not (isinstance(system, str) and isinstance(profile, str) and system.startswith("/nix/store/")):
            raise NotWhatItShouldBe("has no /run/current-system in the nix store", target=self.name)
        nar_hash, profile_hash = (str(found.get(name) or "") or None for name in ("nar_hash", "profile_hash"))
        return MachineState(system=system, profile=profile, nar_hash=nar_hash, profile_hash=profile_hash)

    async def copy(
        self, path: str, *, signed: Path | None, timeout: float, on_line: process.LineSink | None = None
    ) -> None:
        """Copy a closure over ssh: the gate lets nix's own protocol through where the machine's store is writable."""
        await activation.copy(
            self.connection,
            path,
            signed=signed,
            timeout=timeout,
            on_line=on_line,
            probe="facts",
            substitute=self.substitute,
        )

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
        """Have `path` tried, and connect anew, by `prove` if that is given; or, for a `switch`, have it kept.

        When the machine lets in no new connection, it is sent back over the old one, at once.
        """
        if verb == "switch":
            return await self.keep(verb, path, finish=finish)
        await self._hand_over("try", finish, confirm)
        deadline = time.monotonic() + finish + _HOOKS
        try:
            code, said = await self._ended(deadline, finish, fresh=prove is None)
        except WayChanged:  # the new configuration has none, and the new way in tells what became of the machine
            if prove is None:
                raise
            code, said = 0, ""
        self._judge(verb, code, said)
        checked = partial(self.check, path, profile=verb != "test", running=verb != "boot", fresh=True)
        await self._proven(deadline, finish, prove or checked)

    async def take_over(self, path: str, verb: Verb, *, patience: float) -> None:
        """Wait for the end of an activation by sudo that brought this way in, and judge it as `activate` does.

        The connection by which it was asked for may be gone. Raises `ActivationFailed`, `WentBack`, `Unreachable`.
        """
        deadline = time.monotonic() + patience
        while True:
            try:
                found = (await self._facts(fresh=True)).get("activated")
                if not isinstance(found, Mapping) or found.get("path") != path:
                    return  # an older helper does not say
                word, _, code = str(found.get("state", "")).partition(" ")
                said = process.tail(str(found.get("log", "")))
                if word == "back":
                    raise WentBack(f"went back by itself:\n{said}", target=self.name)
                if word == "done":
                    return self._judge(verb, int(code) if code.isdecimal() else 0, said)
                if time.monotonic() > deadline:
                    raise ActivationFailed("the activation did not end in time", target=self.name)
            except Unreachable:
                if time.monotonic() > deadline:
                    raise
            await anyio.sleep(1)

    def _judge(self, verb: Verb, code: int, said: str) -> None:
        if code != 0:
            raise ActivationFailed(f"activation `{verb}` exited with status {code}:\n{said}", target=self.name)

    async def keep(self, verb: Verb, path: str, *, finish: float) -> None:
        """Have kept what is tried: the machine's watchdog stops, and a `switch` follows where a roll-out ends so."""
        reboot = self.reboots()
        await self._hand_over("keep", finish, 0, reboot=reboot)
        longest = finish + _HOOKS + (2 * finish if reboot else 0)  # it goes down, and its checks pass, in time
        try:
            code, said = await self._ended(time.monotonic() + longest, finish)
        except Unreachable as error:
            if not reboot:
                raise
            raise NotBack(longest, target=self.name) from error
        if code != 0:
            raise ActivationFailed(f"keeping it exited with status {code}:\n{said}", target=self.name)
        await self.check(path, profile=verb != "test", running=verb != "boot", fresh=True)

    async def take_charge(self, run: str, *, patience: float) -> None:
        """Wait until nothing that was begun on the machine goes on, and nothing that is tried may yet go back."""
        deadline = time.monotonic() + patience
        while (await self._ask(f"status {_WAIT}")).get("step", "finished") != "finished":
            if time.monotonic() > deadline:
                raise ActivationFailed(
                    "an earlier activation has not ended", target=self.name, hint=f"ssh {USER}@{self.name} log"
                )

    async def condition(self) -> Condition:
        """How the machine is, by its helper's account."""
        return Condition.of(await self._facts())

    async def clean_up(self, run: str = "") -> None:
        """Nothing: the helper tidies up."""

    def command(self, words: Sequence[str]) -> str:
        """The line for the gate that runs `words` in the machine's sandbox for tests; one word is a line for sh."""
        words = ["/bin/sh", "-c", *words] if len(words) == 1 else list(words)
        return f"test {base64.urlsafe_b64encode(json.dumps(words).encode()).decode()}"

    @property
    def ends_with(self) -> Verb:
        return self.activation

    async def _back(self, verb: Verb, path: str, finish: float) -> None:
        await self._hand_over("back", finish, 0, verb, path)
        code, said = await self._ended(time.monotonic() + 2 * finish + _HOOKS, finish)
        if code not in (0, activation.UNITS_FAILED):
            raise ActivationFailed(f"going back exited with status {code}:\n{said}", target=self.name)

    async def _hand_over(
        self,
        phase: Phase,
        finish: float,
        confirm: float,
        verb: Verb | None = None,
        path: str = "",
        *,
        reboot: Reboot | None = None,
    ) -> None:
        """Ask the signer for a document, and hand it over."""
        facts = await self._facts()
        serial = facts.get("serial")
        asked = signer.Request.of(
            self.repo,
            self.name,
            phase,
            verb or self.activation,
            reported=serial if isinstance(serial, int) else 0,
            finish=finish,
            confirm=confirm,
            has_hooks=facts.get("has_hooks"),
            reboot=reboot,
            path=path,
        )
        await self._ask("confirm" if phase == "keep" else "arm", stdin=await signer.ask(asked))

    async def _ended(self, deadline: float, finish: float, *, fresh: bool = True) -> tuple[int, str]:
        """Wait for the newest activation to end, over several connections if need be; its exit status, and its log."""
        while True:
            try:
                word, code, said = await self._status(_WAIT, fresh=fresh)
            except Unreachable as error:
                await self._unreachable(error, deadline, finish)
                continue
            if word == "done":
                return code, said
            if word == "back":
                raise WentBack(f"went back by itself:\n{said}", target=self.name)
            if word != "running":
                raise WentBack("has lost the files of the activation", target=self.name)
            if time.monotonic() > deadline:
                raise ActivationFailed("the activation did not end in time", target=self.name)

    async def _status(self, wait: int, *, fresh: bool = False) -> tuple[str, int, str]:
        """How the newest activation is: a word, its exit status, and the end of its log."""
        found = await self._ask(f"status {wait}", fresh=fresh)
        word, _, code = str(found.get("state", "")).partition(" ")
        said = str(found.get("error") or "")
        if word == "back" or (word == "done" and code != "0"):
            said = "\n".join(filter(None, (said, process.tail(str((await self._ask("log")).get("log", ""))))))
        return word, int(code) if code.isdecimal() else 0, said

    async def _proven(self, deadline: float, finish: float, prove: Prove) -> None:
        while True:
            try:
                await prove()
            except Unreachable as error:
                await self._unreachable(error, deadline, finish)
            else:
                self._refused_since = 0
                return

    async def _unreachable(self, error: Unreachable, deadline: float, finish: float) -> None:
        """No new connection is let in: wait a moment, since the network may be restarting.

        When the activation has ended and the old connection lives, the machine is sent back over that one. Raises
        `LockedOut` when it was, `error` after the deadline: then the watchdog sends it back.
        """
        self._refused_since = self._refused_since or time.monotonic()
        stays = isinstance(error, AuthenticationFailed | HostKeyChanged)
        if (stays or time.monotonic() > self._refused_since + _RESTART) and await self._sent_back(finish):
            raise LockedOut(
                f"let in no new connection after the activation, and was reverted over the old one: {error.words}",
                target=self.name,
                hint=error.hint or "see that sshd runs in the new configuration, and lets toto in",
            ) from None
        if time.monotonic() > deadline:
            raise error
        await anyio.sleep(1)

    async def _sent_back(self, finish: float) -> bool:
        """Send the machine back over the connection from before; whether that worked."""
        master = self.connection.master
        if master is None or master.status is not None:
            return False
        try:
            if (await self._status(0))[0] != "done":
                return False
            logging.getLogger(__name__).warning(
                "%s lets in no new connection; it is sent back over the one from before", self.name
            )
            await self._hand_over("back", finish, 0)
            while (await self._status(_WAIT))[0] == "running":
                pass
        except (TotoError, OSError):
            return False
        return True

    async def _facts(self, *, fresh: bool = False) -> dict[str, Any]:
        return await self._ask("facts", fresh=fresh)

    async def _ask(self, command: str, *, stdin: bytes | None = None, fresh: bool = False) -> dict[str, Any]:
        """The helper's answer to a verb. Raises `ActivationFailed` when it refuses."""
        done = await self.connection.run(
            command.split(), stdin=stdin, fresh=fresh, timeout=self.connect_timeout + _WAIT + _GRACE, check=False
        )
        if (found := answer_of(done)) is None:
            said = process.tail(done.stderr) or process.tail(done.stdout) or f"status {done.status}"
            raise WayChanged(
                f"its flying-monkey has no answer to `{command}`:\n{said}",
                target=self.name,
                hint="is services.flying-monkey enabled on it?",
            )
        if "error" in found and command in ("arm", "confirm"):
            raise ActivationFailed(
                f"refuses the document: {found['error']}", target=self.name, hint=HINTS.get(str(found.get("kind")))
            )
        return found


def answer_of(done: process.Completed) -> dict[str, Any] | None:
    """What a gate's answer says; None when it was no gate that answered."""
    try:
        found = json.loads(done.stdout)
    except (ValueError, RecursionError):
        return None
    return found if done.status == 0 and isinstance(found, dict) else None
