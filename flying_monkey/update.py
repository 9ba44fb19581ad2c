"""What a machine does with a document, once it is accepted.

`arm` accepts one: it is verified and remembered, and the update goes on in a process of its own. To try a system:

    accepted   the closure is checked, and the room on the disk
    prepared   the hooks of `prepare.d` that the document names run; one that fails stops the update
    tried      the system is activated, under a watchdog; the machine's checks run; then a document to keep it is
               waited for, and when none comes in time the machine goes back
    kept       that came: the system becomes the boot default; when its kernel is a different one, and the document says
               so, the machine reboots, and its checks run once more
    back       the machine goes back, by itself or because a document says so
    finished   after the hooks of `finish.d`, which run whenever those of `prepare.d` were begun

Each step is on the disk before it begins. So whenever this process or the power goes, `go_on` brings the machine to a
whole state: what was tried and not kept is over, and what was to be kept, or gone back to, is completed.

    python -m flying_monkey.update resume    at each boot: go on with what was begun
    python -m flying_monkey.update run       the update itself, in the foreground
"""

import contextlib
import fcntl
import os
import secrets
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from flying_monkey import activation, health, hooks, machine, signature
from flying_monkey.desired import Desired, Phase
from flying_monkey.machine import Configuration, NotReady
from flying_monkey.memory import Lost, Memory, Refused, Step, locked

COMPLAINT: Final = activation.STATE / "complaint"  # what the update cannot write to the disk
LATE: Final = "it was not confirmed in time, and the machine has gone back"
NOT_BEGUN: Final = 75  # in place of an exit status: the activation could not begin
NOT_WELL: Final = 69  # the same: what was kept does not do after a reboot, or the machine does not reboot
_TICK: Final = 0.2  # seconds between two looks
_BEGINS: Final = 20.0  # seconds that an activation may take to have a process of its own
_GRACE: Final = 60.0  # seconds that an activation may take besides its own time
_SETTLE: Final = 5.0  # seconds after which a unit that has failed is looked at once more
_RETRY: Final = 2.0  # seconds
_MOST_LOG: Final = 65_536  # bytes
_MOST_SAID: Final = 1_000  # characters of what an activation that failed said last
_MAIN: Final = "import sys; sys.path.insert(0, sys.argv.pop(1)); from flying_monkey.update import main; main()"


class Superseded(Exception):
    """A newer document was accepted."""


class Stopped(Exception):
    """What is tried is not to be kept; the message says why."""


def arm(configuration: Configuration, envelope: bytes, phases: tuple[Phase, ...]) -> Memory:
    """Accept a document of one of `phases`, and begin to obey it. What is then remembered.

    A system to try waits for the end of any update, and one to keep for its checks: until then `NotReady` is raised.
    To go back is accepted at any time. Raises `NotGenuine`, `BadDocument`, `Refused`, `NotReady`, `Lost`.
    """
    file = Path(configuration.memory)
    with locked(file):
        before = Memory.load(file)
        now = before.now(time.time(), configuration.built)
        revoked = None if configuration.revoked is None else Path(configuration.revoked)
        text = signature.opened(envelope, configuration.repo, Path(configuration.signers), now, revoked)
        document = Desired.read(text)
        if document.phase not in phases:
            raise Refused(f"its phase is {document.phase}")
        memory = before.accept(document, configuration.repo, configuration.name, configuration.public_keys(), now)
        is_new = memory != before
        if is_new:
            memory = _accepted(file, before, memory, document)
    if is_new and memory.step != "finished":
        _begin(memory)
    else:
        go_on(configuration)
    return memory


def _accepted(file: Path, before: Memory, memory: Memory, document: Desired) -> Memory:
    """Remember a new document, where it can be obeyed now. Raises `NotReady`, `Lost`."""
    memory = replace(memory, boot=machine.boot())
    finished = before.step == "finished"
    if finished:
        memory = replace(memory, system=machine.running(), profile=machine.boots())
    if document.phase == "try" and not finished:
        raise NotReady(f"the update by document {before.serial} is not finished: it is {before.step}")
    if finished and document.phase != "try" and _is_kept(before, document):
        memory = replace(memory, step="finished", state="done 0")
        memory.save(file)
        return memory
    if document.phase == "keep":
        _may_keep(before, document)
        memory = replace(memory, step="kept", activation="", owed=_owed(memory, document) if memory.prepared else ())
    memory.save(file)
    if document.phase == "keep":
        if not finished and not activation.confirm(before.activation):
            before.save(file)
            raise NotReady(LATE)
        activation.confirm_all(document.system.path)
    if finished:
        with contextlib.suppress(OSError):
            _log_file(file).unlink(missing_ok=True)
    return memory


def _is_kept(before: Memory, document: Desired) -> bool:
    """Whether the system of a document was kept last, all of it done, and is what the machine runs and boots.

    Between two updates that is enough which was kept last: what somebody has changed since by hand is theirs.
    """
    path, activated = document.system.path, document.activation
    return (before.kept == path and document.resting) or (
        before.kept == path
        and before.state in ("done 0", "back 0")
        and (activated == "boot" or machine.running() == path)
        and (activated == "test" or machine.boots() == path)
    )


def _owed(memory: Memory, document: Desired) -> tuple[str, ...]:
    """The hooks of `finish.d` that are to run: those of the update so far, and those of a newer document."""
    return tuple(dict.fromkeys((*memory.owed, *document.hooks.finish)))


def _may_keep(before: Memory, document: Desired) -> None:
    """Check that the system to keep is what is tried, or what runs already. Raises `NotReady`."""
    tried = Desired.read(before.text.encode()) if before.text else None
    path = document.system.path
    is_tried = tried is not None and tried.phase == "try" and tried.system.path == path
    if before.step != "finished":
        if before.boot != machine.boot():
            raise NotReady("the machine has rebooted")
        if before.step != "tried" or not is_tried:
            raise NotReady(f"the update by document {before.serial} is not finished: it is {before.step}")
        if not before.state.startswith("done"):
            raise NotReady("its activation and its checks have not ended")
    does, found = ("boots", machine.boots()) if document.activation == "boot" else ("runs", machine.running())
    if found != path:
        raise NotReady((is_tried and before.error) or f"this machine {does} {found or 'nothing'}, and not {path}")
    machine.check_room()


def go_on(configuration: Configuration) -> None:
    """Begin a process that goes on with what is not finished, unless there is one. Raises `NotReady`, `Lost`."""
    memory = Memory.load(Path(configuration.memory))
    if memory.step == "finished":
        return
    with _lock_file(configuration).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
    _begin(memory)


def _begin(memory: Memory) -> None:
    """Begin a process that goes on with what is not finished. One that is there already comes first."""
    words = [sys.executable, "-IS", "-c", _MAIN, str(Path(__file__).parent.parent), "run"]
    if Path("/run/systemd/system").is_dir():
        name = f"flying-monkey-update-{memory.serial}-{secrets.token_hex(4)}"
        properties = ("Restart=on-failure", f"RestartSec={_RETRY:.0f}", "StartLimitIntervalSec=0", "UMask=0077")
        options = [f"--property={each}" for each in properties]
        begin = ["systemd-run", "--collect", "--no-ask-password", "--quiet", f"--unit={name}", *options, "--"]
        machine.run(*begin, *words)
    else:
        machine.run("/bin/sh", "-c", 'setsid "$@" </dev/null >/dev/null 2>&1 &', "sh", *words)


def run(configuration: Configuration) -> None:
    """Go on until nothing is left to do. Raises `Lost`."""
    file = Path(configuration.memory)
    with _lock_file(configuration).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        while (memory := Memory.load(file)).step != "finished":
            with contextlib.suppress(Superseded):
                Update(file, memory).proceed()


def main() -> None:
    """Do what the one argument says: `resume` or `run`."""
    if os.geteuid() != 0:
        raise SystemExit("it is root's")
    os.umask(0o077)
    os.environ.clear()
    os.environ.update(machine.environment())
    verbs: dict[str, Callable[[Configuration], None]] = {"resume": go_on, "run": run}
    if len(sys.argv) != 2 or sys.argv[1] not in verbs:
        raise SystemExit("resume, or run")
    verbs[sys.argv[1]](Configuration.load())


def log(configuration: Configuration, memory: Memory) -> str:
    """What the newest update has said."""
    try:
        said = _log_file(Path(configuration.memory)).read_bytes()[-_MOST_LOG:].decode(errors="replace")
    except OSError:
        said = ""
    return said + (activation.log(memory.activation) if memory.step != "finished" else "")


class Update:
    """One process's part of an update: it begins where `memory` says that it is."""

    def __init__(self, file: Path, memory: Memory) -> None:
        self.file, self.memory = file, memory
        self.document = Desired.read(memory.text.encode())
        self.rebooted = memory.boot != machine.boot()

    def proceed(self) -> None:
        """Do what is left, to the end. Raises `Superseded`."""
        match self.document.phase:
            case "try":
                self._try()
            case "keep":
                self._complete("kept")
            case "back":
                if self.memory.step != "back":
                    self._prepare_to_go_back()
                self._complete("back")

    # To try

    def _try(self) -> None:
        if self.memory.step == "back":
            self._over(self.memory.error)
            return
        try:
            if self.rebooted:
                raise Stopped("the machine has rebooted before it was kept")
            if self.memory.step == "accepted":
                machine.check(self.document.system)
                machine.check_room()
                owed = self.document.hooks.finish
                self._note(step="prepared", prepared=True, owed=owed, units=activation.broken())
            if self.memory.step == "prepared":
                self._prepare("try")
            if self.memory.state == "running":
                self._activate_on_trial()
                self._check("try")
                self._note(state="done 0")
            self._wait_for_word()
        except (Stopped, NotReady, Lost) as error:
            self._over(str(error))

    def _prepare(self, reason: str) -> None:
        for name in self.document.hooks.prepare:
            if problem := self._hook("prepare", name, reason):
                raise Stopped(f"the hook prepare.d/{name} failed: {problem}")

    def _activate_on_trial(self) -> None:
        good = self.document.good.path if self.document.good else ""
        before = (good or self.memory.system, good or self.memory.profile)
        # What is to be booted only is not activated before.
        verb = "boot" if self.document.activation == "boot" else "test"
        status = self._activated("tried", verb, self.document.system.path, before, self.document.deadlines.confirm)
        if status != 0:
            raise Stopped(self._failed(status))

    def _check(self, reason: str, patience: float = 0) -> None:
        """Raises `Stopped` when the machine is not well, and does not become so within `patience` seconds."""
        end = time.monotonic() + patience
        while problem := self._unwell(reason):
            if time.monotonic() > end:
                raise Stopped(problem)
            self._look()
            time.sleep(_SETTLE)

    def _unwell(self, reason: str) -> str:
        """What is wrong with the machine, by the units that have failed since and by its own checks; or ""."""
        failed = set(activation.broken()) - set(self.memory.units)
        if failed:
            time.sleep(_SETTLE)
            failed &= set(activation.broken())
        if failed:
            return f"units have failed since: {' '.join(sorted(failed))}"
        for name in hooks.names("checks.d"):
            try:
                ran = self._run("check", name, reason, self.document.deadlines.confirm)
                problem = "it printed too much" if ran.cut else health.tap(ran.said, ran.problem)
            except hooks.Unfit as error:
                problem = str(error)
            self._tell(checks={**self.memory.checks, name: problem})
            if problem:
                return f"the check {name} failed: {problem}"
        return ""

    def _wait_for_word(self) -> None:
        """Wait for a newer document, or for root's own word, as when toto moves to sudo on this machine.

        Raises `Superseded` for a newer document, and `Stopped` when nothing comes in time.
        """
        name = self.memory.activation
        while not activation.is_decided(name) and not activation.has_died(name):
            self._look()
            time.sleep(_TICK)
        # Who confirms says that it is decided, and then how: in between it looks as if the machine went back.
        end = time.monotonic() + _SETTLE
        while (
            activation.state(name).startswith("done") and not activation.is_confirmed(name) and time.monotonic() < end
        ):
            time.sleep(_TICK)
        self._look()
        if not activation.is_confirmed(name):
            raise Stopped(LATE)
        self._tell(kept=self.document.system.path)
        self._finish("done 0", "kept")

    def _over(self, why: str) -> None:
        """What was tried is over: go back from as far as it came, unless root has said that it stays."""
        name, status = self.memory.activation, 0
        if activation.is_confirmed(name):
            self._tell(error=why, kept=self.document.system.path)
            return self._finish("done 0", "kept")
        with contextlib.suppress(NotReady):
            activation.back(name)
        self._tell(step="back", state="running", error=why)
        if name:
            status = self._gone_back(name)
            try:
                status = self._restored() or status
            except (NotReady, Stopped) as error:
                self._tell(error=f"{why}; going back: {error}")
                status = NOT_BEGUN
        self._finish(f"back {status}", "back")

    def _gone_back(self, name: str) -> int:
        """The exit status of the watchdog's way back, once it is over; 0 when there is none."""
        while activation.has_begun(name) and not activation.has_died(name):
            self._look()
            time.sleep(_TICK)
        word, _, status = activation.state(name).partition(" ")
        return int(status) if word == "back" else 0

    def _restored(self) -> int:
        """Where neither a watchdog nor a reboot has brought the machine back, do so. The exit status."""
        path, before, status = self.document.system.path, self.memory, 0
        if self.document.activation != "boot" and machine.running() == path and before.system not in ("", path):
            status = self._ended(self._begun("back", "test", before.system, (before.system, ""), 0))
        if machine.boots() == path and before.profile not in ("", path):
            status = self._ended(self._begun("back", "boot", before.profile, (before.profile, ""), 0)) or status
        return status

    # To keep, and to go back because a document says so

    def _prepare_to_go_back(self) -> None:
        """Run the hooks, unless they were. One that fails is told, and does not keep the machine from going back."""
        if self.memory.step == "accepted":
            tried = self.memory.activation
            with contextlib.suppress(NotReady):
                activation.back_all()
            self._write(activation.log(tried))
            step: Step = "back" if self.memory.prepared else "prepared"
            self._insist(step=step, prepared=True, owed=_owed(self.memory, self.document), activation="")
        if self.memory.step == "prepared":
            for name in self.document.hooks.prepare:
                self._hook("prepare", name, "back")
            self._insist(step="back")

    def _complete(self, step: Step) -> None:
        """Make the machine run and boot the document's system, whatever was done of that before."""
        path, status, error = self.document.system.path, 0, ""
        if not (self.rebooted and self._is_there()):
            try:
                machine.check(self.document.system)
                activation.confirm_all(path)
                status = self._activated(step, self.document.activation, path, (machine.running(), ""), 0)
                error = self._failed(status) if status else ""
            except (NotReady, Stopped) as failed:
                status, error = NOT_BEGUN, str(failed)
        self._tell(error=error, kept=self.memory.kept if status else path)
        if step == "kept" and status == 0 and self.document.reboot == "now":
            status = self._reboot()
        self._finish(f"done {status}", step)

    def _reboot(self) -> int:
        """Reboot into the system, once, where its kernel differs; after that check it. The exit status to tell."""
        try:
            # (A power cut before the switch is no reboot into it; and one that did not help is not done again.)
            if health.reboot_needed() and self.memory.reboots in ("", machine.boot()):
                if self._too_late():
                    return 0
                if not self.memory.prepared:
                    owed = _owed(self.memory, self.document)
                    self._insist(prepared=True, owed=owed, units=activation.broken())
                self._prepare("reboot")
                if self._too_late():  # the hooks took long
                    return 0
                self._insist(reboots=machine.boot())
                machine.run("reboot")
                end = time.monotonic() + self.document.deadlines.activate
                while time.monotonic() < end:
                    self._look()
                    time.sleep(_TICK)
                raise Stopped("the machine does not reboot")
            if self.rebooted:
                self._check("reboot", patience=self.document.deadlines.activate)
                if health.reboot_needed():
                    raise Stopped("the machine has rebooted, and not into what it should boot: look at its boot loader")
        except (NotReady, Stopped) as failed:
            self._tell(error=str(failed))
            return NOT_WELL
        return 0

    def _too_late(self) -> bool:
        """Whether the time in which a reboot may begin is over: then only that one is needed is told."""
        until = self.document.reboot_until
        if until is None or self.memory.now(time.time(), 0) < until:
            return False
        self._write(f"it does not reboot: the time for that was over at {until:%Y-%m-%d %H:%M} UTC")
        return True

    def _is_there(self) -> bool:
        """Whether the machine runs and boots what it should."""
        path, activated = self.document.system.path, self.document.activation
        return machine.running() == path and (activated == "test" or machine.boots() == path)

    # Activations

    def _activated(self, step: Step, verb: str, path: str, before: tuple[str, str], confirm: int) -> int:
        """The exit status of an activation, which is begun unless it was. Raises `NotReady`, `Stopped`, `Lost`."""
        name = self.memory.activation
        if activation.state(name) == "unknown" or not self._has_begun(name):
            name = self._begun(step, verb, path, before, confirm)
        return self._ended(name)

    def _has_begun(self, name: str) -> bool:
        end = time.monotonic() + _BEGINS
        while not activation.has_begun(name):
            self._look()
            if time.monotonic() > end:
                return False
            time.sleep(_TICK)
        return True

    def _begun(self, step: Step, verb: str, path: str, before: tuple[str, str], confirm: int) -> str:
        """Begin an activation, once no other tool activates; its name. Raises `NotReady`, and `Lost` to try one."""
        finish = self.document.deadlines.activate
        end = time.monotonic() + finish
        while True:
            name = f"{activation.RUN}.{step}.{self.memory.serial}.{secrets.token_hex(4)}"
            note = self._note if step == "tried" else self._insist
            note(step=step, activation=name, begun=int(time.monotonic()))
            if activation.begin(name, verb, path, before, finish, confirm):
                return name
            if time.monotonic() > end:
                raise NotReady("another tool activates something on this machine just now")
            time.sleep(1)

    def _ended(self, name: str) -> int:
        """The exit status of an activation, once it has ended. Raises `Stopped`, `Superseded`."""
        end = time.monotonic() + self.document.deadlines.activate + _GRACE
        while (state := activation.state(name)) == "running":
            self._look()
            if time.monotonic() > end:
                raise Stopped("its activation did not end in time")
            time.sleep(_TICK)
        if not state.startswith("done"):
            raise Stopped(LATE)
        return int(state.split()[1])

    def _failed(self, status: int) -> str:
        said = activation.log(self.memory.activation).strip()[-_MOST_SAID:]
        return f"its activation exited with status {status}{':' if said else ''}\n{said}".strip()

    # Hooks

    def _finish(self, state: str, reason: str) -> None:
        if self.memory.prepared:
            for name in self.memory.owed:
                self._hook("finish", name, reason)
        self._write(activation.log(self.memory.activation))
        self._insist(step="finished", state=state, prepared=False, owed=())
        with contextlib.suppress(NotReady, OSError):
            activation.clean_up()

    def _hook(self, phase: str, name: str, reason: str) -> str:
        """What went wrong with a hook, which is run unless it was."""
        hook = f"{phase}.d/{name}"
        if hook not in self.memory.hooks:
            try:
                longest = getattr(self.document.deadlines, phase)
                problem = self._run(phase, name, reason, longest).problem
            except hooks.Unfit as error:
                problem = str(error)
            self._tell(hooks={**self.memory.hooks, hook: problem})
        return self.memory.hooks[hook]

    def _run(self, phase: str, name: str, reason: str, longest: float) -> hooks.Ran:
        folder = {"check": "checks.d"}.get(phase, f"{phase}.d")
        environment = {
            "TOTO_PHASE": phase,
            "TOTO_REASON": reason,
            "TOTO_SERIAL": str(self.memory.serial),
            "TOTO_SYSTEM": self.document.system.path,
        }
        # What undoes a preparation is not broken off.
        look = (lambda: None) if phase == "finish" else self._look
        ran = hooks.run(hooks.find(folder, name), environment, longest, look)
        self._write(f"{folder}/{name}: {ran.problem or 'done'}\n{ran.said}")
        return ran

    # Memory

    def _look(self) -> None:
        """Raises `Superseded` when a newer document was accepted."""
        with contextlib.suppress(Lost):
            if Memory.load(self.file).serial != self.memory.serial:
                raise Superseded

    def _note(self, **changes: Any) -> None:
        """Remember what begins now. Raises `Lost`, `Superseded`."""
        with locked(self.file):
            self._look()
            fresh = replace(self.memory, **changes)
            fresh.save(self.file)
        self.memory = fresh
        COMPLAINT.unlink(missing_ok=True)

    def _tell(self, **changes: Any) -> None:
        """Remember it on the disk, or at least in this process: what is done now must not wait for the disk."""
        try:
            self._note(**changes)
        except Lost as error:
            self.memory = replace(self.memory, **changes)
            _complain(error)

    def _insist(self, **changes: Any) -> None:
        """Remember it, however long the disk is full."""
        while True:
            try:
                self._note(**changes)
                return
            except Lost as error:
                _complain(error)
                time.sleep(_RETRY)

    def _write(self, text: str) -> None:
        """Add to the log, where there is room."""
        with contextlib.suppress(OSError), _log_file(self.file).open("ab") as log:
            if log.tell() < 4 * _MOST_LOG:
                log.write(text.rstrip().encode() + b"\n" if text else b"")


def _complain(error: Lost) -> None:
    with contextlib.suppress(OSError):
        COMPLAINT.parent.mkdir(mode=0o700, exist_ok=True)
        COMPLAINT.write_text(str(error))


def _log_file(memory: Path) -> Path:
    return memory.with_name("log")


def _lock_file(configuration: Configuration) -> Path:
    return Path(configuration.memory).with_name("update.lock")


if __name__ == "__main__":
    main()
