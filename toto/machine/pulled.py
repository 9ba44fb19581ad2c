"""Activating on a machine that pulls: documents are published for it, and what it reports says how they are obeyed.

toto connects to nothing. The machine asks (`flying_monkey.agent`), fetches what a document is about, has it done, and
reports each step, signed by its host key. A machine that does not ask is unreachable; what was published for it stays
there, so that one which comes back later goes where the last word of toto's sends it.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

import anyio

from flying_monkey.desired import Desired, Phase
from flying_monkey.report import Report
from flying_monkey.signature import unsealed
from toto.base import process
from toto.base.errors import TotoError
from toto.infra_repo.manifest import Machine
from toto.ledger.ledger import Ledger
from toto.ledger.target import HOST, Target
from toto.machine import activation, documents, login_shell, owners, renewal, signer
from toto.machine.activation import ActivationFailed, MachineState, NotWhatItShouldBe, Verb, WentBack
from toto.machine.by_document import HINTS, ByDocument, NotBack
from toto.machine.condition import Condition
from toto.machine.documents import Reports
from toto.machine.ssh import Unreachable
from toto.store import grants

log = logging.getLogger(__name__)

PATIENCE: Final = 60.0  # seconds without a word after which a machine is unreachable; idle ones answer within 2
_LOOK: Final = 0.25  # seconds between two looks
_FETCH: Final = 4 * 3_600.0  # seconds for a closure, as the agent has it
_NOBODYS: Final = ("NotGenuine", "BadDocument")  # a refusal of what is nobody's word, so without its serial
_CLOCK: Final = 300.0  # seconds that a machine's clock may be behind
_STEP: Final = 660.0  # seconds for a step besides an activation: hooks have ten minutes


class NotHeardFrom(Unreachable):
    """A machine that pulls does not ask, or says nothing."""

    def __init__(self, words: str, *, target: str | None = None, hint: str | None = None) -> None:
        TotoError.__init__(self, words, target=target, hint=hint)
        self.words = words


@dataclass
class PullActivator(ByDocument):
    """A machine that pulls, for one run of a repo. `ip` is where its address has been found to be.

    What it may fetch is signed by the secret `key`. `patience` is how many seconds it may say nothing, before it has
    begun to obey.
    """

    machine: Machine
    repo: Path
    run: str
    key: Path
    ip: str = ""
    patience: float = PATIENCE
    _reports: Reports | None = None
    _heard: Report | None = None

    @property
    def name(self) -> str:
        return self.machine.name

    @property
    def connection(self) -> None:
        """None: the machine connects to toto."""

    @property
    def host_keys(self) -> list[str]:
        """That of the manifest, by which it proves itself."""
        return [owners.plain_key(self.machine.ssh.host_key or "")]

    def command(self, words: Sequence[str]) -> str:
        """As for any shell; there is no connection to give it to."""
        return login_shell.line(words)

    async def facts(self, *, fresh: bool = False) -> MachineState:
        """What the machine runs and boots, by its newest report of this run, or by one that it is asked for.

        Raises `Unreachable`, `NotWhatItShouldBe`.
        """
        return _state(await self._asked() if fresh or self._heard is None else self._heard)

    async def copy(
        self, path: str, *, signed: Path | None = None, timeout: float, on_line: process.LineSink | None = None
    ) -> None:
        """Let the machine fetch a closure, and its last good; nothing is sent. Raises `CopyFailed`, `CommandTimeout`.

        What it fetches is signed by this activator's key, whatever is in `signed`.
        """
        await grants.grant(
            self.repo, self.name, [path, *await grants.good(self.repo, self.name)], self.key, timeout=timeout
        )

    async def may_lack(self, path: str) -> bool:
        """Always: it can fetch only what it is granted."""
        return True

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
        """Have `path` tried, and hear of it over a new connection; or, for a `switch`, have it kept.

        The machine goes back by itself unless it is told within `confirm` seconds to keep it.
        Raises `ActivationFailed`, `WentBack`, `Unreachable`, `NotWhatItShouldBe`.
        """
        if verb == "switch":
            return await self.keep(verb, path, finish=finish)
        report = await self._have_done("try", finish, confirm)
        self._expect(report, f"activation `{verb}`")
        await self.check(path, profile=verb != "test", running=verb != "boot")

    async def keep(self, verb: Verb, path: str, *, finish: float) -> None:
        """Have kept what is tried: the machine's watchdog stops, and a `switch` follows where a roll-out ends so."""
        self._expect(await self._have_done("keep", finish, 0), "keeping it")
        await self.check(path, profile=verb != "test", running=verb != "boot")

    async def take_charge(self, run: str, *, patience: float) -> None:
        """Wait until nothing that was begun on the machine goes on, and nothing that is tried may yet go back."""
        deadline = time.monotonic() + patience
        while (await self._asked()).step != "finished":
            if time.monotonic() > deadline:
                raise ActivationFailed(
                    "an earlier activation has not ended",
                    target=self.name,
                    hint="on the machine: journalctl -u flying-monkey",
                )
            await anyio.sleep(1)

    async def condition(self) -> Condition:
        """How the machine is, by its newest report."""
        report = self._heard or await self._asked()
        return Condition.of(report.details, report=report.number)

    async def clean_up(self, run: str = "") -> None:
        """Nothing on the machine. It may fetch its last good and the one before, and is led to the first."""
        closures, place = await grants.good(self.repo, self.name), self._place
        if not closures or Ledger(self.repo).get(self._target).intent is not None:
            return
        await grants.grant(self.repo, self.name, closures, self.key, timeout=_STEP)
        if (envelope := documents.published(place)) is not None:
            old = Desired.read(unsealed(envelope)[0])
            documents.publish(self.repo, self.name, await signer.ask(renewal.resting(self.repo, old)))

    @property
    def ends_with(self) -> Verb:
        return self.machine.activation

    async def _back(self, verb: Verb, path: str, finish: float) -> None:
        report = await self._have_done("back", finish, 0, verb, path)
        self._expect(report, "going back", also=activation.UNITS_FAILED)

    async def _have_done(
        self, phase: Phase, finish: float, confirm: float, verb: Verb | None = None, path: str = ""
    ) -> Report:
        """Publish a document, and wait until the machine has done what it says, or cannot. Raises `Unreachable`."""
        reports = self._read()
        heard = self._heard or reports.newest
        reboot = self.machine.reboots(datetime.now()) if phase == "keep" else None
        asked = signer.Request.of(
            self.repo,
            self.name,
            phase,
            verb or self.machine.activation,
            reported=reports.serial,
            finish=finish,
            confirm=confirm,
            has_hooks=heard.details.get("has_hooks") if heard else None,
            reboot=reboot,
            path=path,
        )
        envelope = await signer.ask(asked)
        serial = Desired.read(unsealed(envelope)[0]).serial
        documents.publish(self.repo, self.name, envelope)
        # (It goes down, and its checks pass, in time.)
        longest = max(finish, _STEP) + (2 * finish if reboot else 0)
        return await self._done(serial, longest, 0 if phase == "keep" else _FETCH, reboot=reboot is not None)

    async def _done(self, serial: int, longest: float, fetch: float, *, reboot: bool) -> Report:
        """The report of how the document `serial` has been obeyed, once that is decided.

        A step takes `longest` seconds, and the first one `fetch` more.
        """
        published, last = time.time(), None
        deadline = time.monotonic() + longest + fetch
        while True:
            for report in self._fresh():
                if report.serial == serial:
                    last, deadline = report, time.monotonic() + longest
                    if report.kind or report.state.startswith("back"):  # refused, or gone back
                        return report
                    if report.state.startswith("done") and report.step in ("tried", "finished"):
                        return report
                elif report.kind in _NOBODYS and report.at > published - _CLOCK:  # (it has no serial of its own)
                    return report
                elif report.serial > serial:
                    raise ActivationFailed("obeys a newer document than this run's", target=self.name)
            silent = time.time() - max(published, documents.contact(self._place))
            if last is None and silent > self.patience:
                raise self._not_heard_from()
            if time.monotonic() > deadline:
                if reboot and last is not None and last.step == "kept" and silent > self.patience:
                    raise NotBack(longest, target=self.name)
                step = f"more since `{last.step}`" if last else "of what it is told"
                raise NotHeardFrom(
                    f"has said nothing {step}, for {longest if last else longest + fetch:.0f} s",
                    target=self.name,
                    hint="on the machine: journalctl -u flying-monkey",
                )
            await anyio.sleep(_LOOK)

    def _expect(self, report: Report, what: str, also: int = 0) -> None:
        """Raise `WentBack` or `ActivationFailed` unless a document was obeyed well, or with the exit status `also`."""
        said = process.tail("\n".join(filter(None, (report.log, report.error))))
        word, _, code = report.state.partition(" ")
        if word == "back" and report.phase != "back":
            raise WentBack(f"went back by itself:\n{said}", target=self.name)
        if report.kind:
            raise ActivationFailed(
                f"{what}: {report.error}", target=self.name, hint=HINTS.get(report.kind, "see its journal")
            )
        if int(code or 0) not in (0, also):
            raise ActivationFailed(f"{what} exited with status {code}:\n{said}", target=self.name)
        if report.error:  # such as a hook of `finish.d`
            log.warning("%s: %s", self.name, report.error)

    async def _asked(self) -> Report:
        """A report that the machine is asked for now. Raises `Unreachable`."""
        self._read()
        word, began = documents.ask(self.repo, self.name), time.monotonic()
        while time.monotonic() < began + self.patience:
            for report in self._fresh():
                if report.asked in documents.answers(self._place, word):
                    return report
            await anyio.sleep(_LOOK)
        raise self._not_heard_from()

    def _not_heard_from(self) -> NotHeardFrom:
        seen = documents.contact(self._place)
        ago = f"asked last {time.time() - seen:.0f} s ago" if seen else "has never asked"
        return NotHeardFrom(
            f"does not ask what it should be: it {ago}",
            target=self.name,
            hint="on the machine: systemctl status flying-monkey",
        )

    def _read(self) -> Reports:
        """The machine's reports, with all that came before this."""
        if self._reports is None:
            owner = owners.read().machines.get(self.name)
            keys = owner.host_keys if owner and owner.repo == self.repo.resolve() else ()
            self._reports = Reports(self.repo, self.name, keys)
            self._reports.read()
        return self._reports

    def _fresh(self) -> list[Report]:
        """The reports since the last look."""
        found = self._read().read()
        self._heard = found[-1] if found else self._heard
        return found

    @property
    def _place(self) -> documents.Place:
        return documents.Place.of(self.repo, self.name)

    @property
    def _target(self) -> Target:
        return Target(HOST, self.name)


def _state(report: Report) -> MachineState:
    if not report.system:
        raise NotWhatItShouldBe("has no /run/current-system in the nix store", target=report.machine)
    return MachineState(system=report.system, profile=report.boots, nar_hash=report.nar_hash or None)
