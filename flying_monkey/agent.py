"""The agent of a machine that pulls: it asks toto what the machine should be, has it done, and reports.

It is one loop of root's that sleeps in a long poll. What reads the network is a child without rights, one for each
request (`flying_monkey.exchange`); what is read is nothing until its signature has been checked. What is done with a
document is the helper's affair, as for a machine that is pushed to.

    python -m flying_monkey.agent
"""

import json
import os
import random
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from flying_monkey import apart, ask, helper, machine, metrics, signature
from flying_monkey.apart import Failed
from flying_monkey.desired import BadDocument, Desired
from flying_monkey.exchange import BadUrl, Server
from flying_monkey.fetch import Fetcher
from flying_monkey.machine import Configuration, Misconfigured, NotReady
from flying_monkey.memory import Lost, Memory, Refused
from flying_monkey.outbox import Outbox
from flying_monkey.report import LOG, BadReport, Report

WAIT: Final = (200.0, 280.0)  # seconds that a long poll waits, at random between these
_SOON: Final = 10.0  # seconds between two looks at an update that is under way
FIRST: Final = 1.0  # seconds of the first pause while toto is away; each is twice the one before
_LAST: Final = 300.0  # seconds
_STATUS: Final = 20  # seconds that the helper waits for a change
_FETCH: Final = 4 * 3_600.0  # seconds for a closure
_TRIES: Final = 3  # to fetch one, each by a new session
AGAIN: Final = 600.0  # seconds after which what the machine was not ready for is begun once more, while it is valid
_SETTLING: Final = 900.0  # seconds after a change in which more of them are expected
_ASKED: Final = 2.0  # seconds between two reports that toto asks for
_ERROR: Final = 4_000  # characters
_TOLD: Final = ("hooks", "checks", "failed_units", "reboot_needed", "drift", "signers", "has_hooks")
_SAID: Final = ("serial", "step", "state", "system", "boots", "error", "kind")
_VERBS: Final = {"try": "arm", "back": "arm", "keep": "confirm"}

Answerer = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass
class Agent:
    """The agent of one machine. `helper` obeys documents, and says how the machine is."""

    configuration: Configuration
    toto: ask.Toto
    outbox: Outbox
    fetcher: Fetcher
    helper: Answerer = helper.answer
    wait: tuple[float, float] = WAIT
    first_pause: float = FIRST
    again: float = AGAIN
    state: dict[str, Any] = field(default_factory=dict)
    """for the metrics: see `flying_monkey.metrics.text`"""
    _tag: str = ""
    _asked: str = ""
    _told: str = ""
    _pause: float = 0
    _again: float | None = None
    _changed: float = 0
    _reported: float = 0
    _failed: tuple[int, str] = (0, "")
    _document: Desired | None = None

    def run(self) -> None:
        """Ask and obey, until the agent itself is a newer one."""
        itself = _itself(self.configuration)
        print(f"asking {self.toto.server.url} as {self.configuration.name} of {self.configuration.repo}", flush=True)
        while True:
            self.turn()
            if not self._settling and itself != _itself(self.configuration):
                print("this agent has been replaced: the new one goes on", flush=True)
                return

    def turn(self) -> None:
        """Report what is new, and ask once; or pause, when toto does not answer."""
        try:
            self._observe()
            self._deliver()
            if self._again is not None and time.monotonic() > self._again:
                self._again, self._tag = None, ""
            said = self.toto.document(self._tag, self._asked, self._longest)
            self._answered()
            if said.asked and said.asked != self._asked:
                self._report_asked(said.asked)
            if said.envelope is not None:
                self._obey(said.envelope, said.tag)
        except Failed as error:
            self._away(error)
        except (OSError, signature.CannotSign) as error:
            self._away(Failed(str(error)))
        self._measure()

    @property
    def _settling(self) -> bool:
        """Whether something is under way, of which toto should hear soon."""
        step = self.state.get("step")
        if self.state.get("state") == "running" or step in ("accepted", "fetched", "prepared", "tried"):
            return True
        return step != "finished" and time.monotonic() < self._changed + _SETTLING

    @property
    def _longest(self) -> float:
        return min(_SOON, self.wait[0]) if self._settling else random.uniform(*self.wait)  # noqa: S311

    def _answered(self) -> None:
        if self._pause:
            print("toto answers again", flush=True)
        self._pause = 0
        self.state["contact"] = time.time()

    def _away(self, error: Failed) -> None:
        """Toto cannot be asked: wait, longer each time, and never for as long as all the others."""
        if self._pause < 2 * self.first_pause or isinstance(error, ask.TurnedAway):
            print(f"toto cannot be asked: {error}", flush=True)
        self._pause = min(self._pause * 2 or self.first_pause, _LAST)
        pause = self._pause * random.uniform(0.5, 1.5)  # noqa: S311
        time.sleep(min(pause, _SOON) if self._settling else pause)

    # --- what toto wants

    def _obey(self, envelope: bytes, tag: str) -> None:
        """Have a document obeyed, if it is genuine, for this machine, and new."""
        try:
            document, is_new = self._checked(envelope)
        except (signature.NotGenuine, BadDocument) as error:  # nobody's word: not even its serial is said back
            self._refuse(0, "", error)
            self._tag = tag
            return
        self._document, self._again = document, None
        self.state |= {"desired": document.serial, "wanted": document.system.path}
        if not is_new:
            self._tag = tag
            return
        try:
            self._accept(document)
            self._fetch(document)
            self._have_done(document, envelope)
        except (Refused, Lost) as error:
            self._refuse(document.serial, document.phase, error)
        except NotReady as error:
            self._refuse(document.serial, document.phase, error)
            self._again = time.monotonic() + self.again
        self._tag = tag

    def _checked(self, envelope: bytes) -> tuple[Desired, bool]:
        """A document that is genuine, and whether it is new to this machine."""
        configuration = self.configuration
        memory, now = self._memory_and_now()
        revoked = None if configuration.revoked is None else Path(configuration.revoked)
        text = signature.opened(envelope, configuration.repo, Path(configuration.signers), now, revoked)
        document = Desired.read(text)
        return document, document.serial != memory.serial or memory.step == "accepted"

    def _accept(self, document: Desired) -> None:
        """Raise `Refused` for a document that the helper would not accept: it is not worth a download."""
        configuration = self.configuration
        memory, now = self._memory_and_now()
        memory.accept(document, configuration.repo, configuration.name, configuration.public_keys(), now)

    def _memory_and_now(self) -> tuple[Memory, datetime]:
        try:
            memory = Memory.load(Path(self.configuration.memory))
        except Lost:  # the helper says so, when it is asked
            return Memory(), datetime.now(UTC)
        return memory, memory.now(time.time(), self.configuration.built)

    def _fetch(self, document: Desired) -> None:
        """Fetch what a document is about. Raises `NotReady`, `Failed`."""
        began = time.monotonic()
        for left in reversed(range(_TRIES)):
            if not self.toto.token:
                self.toto.prove()
            try:
                self.fetcher.fetch(document.system.path, self.toto.token, longest=_FETCH)
                break
            except NotReady:
                if not left:
                    raise
                self.toto.forget()
        self.state["durations"] = {"fetched": time.monotonic() - began}
        self._observe(serial=document.serial, phase=document.phase, step="fetched", state="running")
        self._deliver(patience=False)

    def _have_done(self, document: Desired, envelope: bytes) -> None:
        """Hand a document to the helper, and report each step of what it does."""
        answer = self.helper({"verb": _VERBS[document.phase], "envelope": envelope.decode()})
        if "error" in answer:
            again = answer.get("kind") in ("NotReady", "Broken")
            raise (NotReady if again else Refused)(str(answer["error"]))
        self.toto.forget()  # toto is asked anew, whatever held before
        began, step = time.monotonic(), ""
        while True:
            status = self._observe()
            if status.get("step") != step:
                step, took = str(status.get("step")), time.monotonic() - began
                self.state.setdefault("durations", {})[step] = took
                self._deliver(patience=False)
            if status.get("state") != "running":
                return
            self._measure()
            self.helper({"verb": "status", "wait": _STATUS})
            time.sleep(0.2)

    # --- what toto hears

    def _observe(self, **more: Any) -> Mapping[str, Any]:
        """How the machine is; what differs from the last time is reported."""
        status = self.helper({"verb": "status", "wait": 0})
        document = self._document
        self.state |= {key: status[key] for key in ("step", "state", *_TOLD) if key in status}
        self.state |= {
            "current": status.get("serial", 0),
            "running": status.get("system", ""),
            "boots": status.get("boots", ""),
            "error": status.get("error", ""),
        }
        words = {
            key: status.get(key) for key in ("serial", "step", "state", "system", "boots", "error", "kind", *_TOLD)
        }
        now = json.dumps(words, sort_keys=True)
        if now == self._told and not more:
            return status
        if now != self._told:
            self._changed = time.monotonic()
        phase = status.get("phase") or (document.phase if document and document.serial == status.get("serial") else "")
        self._queue(words | {"phase": phase} | more)
        self._told = now
        return status

    def _queue(self, words: Mapping[str, Any]) -> None:
        """Queue a report in these words, as far as they are fit for one."""
        state, error = str(words.get("state") or "unknown"), str(words.get("error") or "")
        log = ""
        if error or state.startswith("back") or (state.startswith("done") and state != "done 0"):
            log = str(self.helper({"verb": "log"}).get("log", ""))
        details = {key: words[key] for key in _TOLD if words.get(key) is not None}
        made: dict[str, Any] = {
            "repo": self.configuration.repo,
            "machine": self.configuration.name,
            "serial": words.get("serial") or 0,
            "phase": words.get("phase") or "",
            "step": words.get("step") or "",
            "state": state,
            "system": words.get("system") or machine.running(),
            "boots": words.get("boots") or machine.boots(),
            "at": int(time.time()),
            "number": 0,
            "error": _shown(error)[:_ERROR],
            "kind": words.get("kind") or "",
            "log": _shown(log)[-LOG:],
            "asked": words.get("asked") or "",
            "nar_hash": words.get("nar_hash") or "",
        }
        try:
            report = Report(**made, details=details)
        except BadReport as wrong:
            known = {key: details[key] for key in ("has_hooks",) if key in details}
            report = Report(**made | {"error": f"{wrong}"[:_ERROR]}, details=known)
        self.outbox.add(report, self.toto.key or ask.host_keys(self.configuration)[0])

    def _refuse(self, serial: int, phase: str, error: Exception) -> None:
        """Report once that a document is not obeyed."""
        print(f"document {serial or '?'} is not obeyed: {apart.plain(str(error))}", flush=True)
        if (serial, str(error)) == self._failed:
            return
        self._failed = (serial, str(error))
        more = {"serial": serial, "phase": phase} if serial else {}
        self._observe(error=str(error), kind=type(error).__name__, **more)
        self._deliver(patience=False)

    def _report_asked(self, word: str) -> None:
        pause = self._reported + _ASKED - time.monotonic()
        if pause > 0 and self._reported:
            time.sleep(pause)
        self._reported = time.monotonic()
        facts = self.helper({"verb": "facts"})
        self._observe(asked=word, nar_hash=str(facts.get("nar_hash", "")))
        self._asked = word
        self._deliver()

    def _deliver(self, *, patience: bool = True) -> None:
        """Send the reports that wait. Without `patience` it does not matter now whether that works."""
        try:
            if self.outbox.send(self.toto.report):
                self._answered()
        except Failed:
            if patience:
                raise

    def _measure(self) -> None:
        self.state["waiting"] = len(self.outbox.waiting())
        if file := metrics.place(self.configuration):
            try:
                metrics.write(file, self.state)
            except OSError as error:
                print(f"{file}: {error}", flush=True)


def _shown(text: str) -> str:
    """A text as far as it is printable: what a report holds may be shown on a terminal."""
    return "".join(each if " " <= each <= "~" or each in "\n\t" else "?" for each in text)


def _itself(configuration: Configuration) -> tuple[object, ...]:
    """What this agent is made of: its programs, as the running system has them, and its configuration."""
    try:
        return Path(configuration.helper).resolve(strict=True), Configuration.load()
    except (OSError, Misconfigured):  # between two systems: not now
        return ()


def at(configuration: Configuration) -> Agent:
    """The agent that a configuration describes. Raises `BadUrl`, `Failed`, OSError."""
    server = Server.at(configuration.url, configuration.ca, apart.user(configuration.user))
    folder = Path(configuration.memory).parent / "reports"
    return Agent(configuration, ask.Toto(configuration, server), Outbox(folder), Fetcher(server))


def main() -> None:
    """Run the agent of this machine."""
    if len(sys.argv) > 1 or os.geteuid() != 0:
        raise SystemExit("it takes no arguments, and is root's")
    os.umask(0o077)
    os.environ.clear()
    os.environ.update(machine.environment())
    os.chdir("/")
    try:
        configuration = Configuration.load()
        agent = at(configuration)
        if configuration.metrics_port:
            metrics.serve(configuration, agent.toto.server.who)
    except (Misconfigured, BadUrl, Failed, OSError) as error:
        raise SystemExit(f"flying-monkey: {error}") from None
    agent.run()


if __name__ == "__main__":
    main()
