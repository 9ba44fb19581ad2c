"""The runs of an infra repo's jobs: their numbers, records, logs, archives and workspaces, in toto's state.

jobs/.registered.json  what is told of the jobs that are registered
jobs/.open/NAME:N      says that a run has not ended
jobs/NAME/number       the last number that was given; none is given twice
jobs/NAME/last         how the run that ended last ended
jobs/NAME/workspace/   kept from run to run
jobs/NAME/work/N/      what a run works in; removed at its end
jobs/NAME/runs/N/      its record `run.json`, its `log`, and its `archive/`
"""

import fcntl
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from pydantic import Field, ValidationError

from toto.base import files, owned, paths, process
from toto.base.errors import InputError
from toto.base.model import Model, shown
from toto.infra_repo.fields import check_name
from toto.jobs.log import LOG

RECORD: Final = "run.json"
UNKNOWN: Final = "unknown"  # LAST_RESULT of a job's first run
_NEVER: Final = 0.0


class State(StrEnum):
    """How far a run is, and how it ended, in laminar's words."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCESS = "success"
    FAILED = "failed"
    ABORTED = "aborted"

    @property
    def ended(self) -> bool:
        return self not in (State.QUEUED, State.RUNNING)


class Run(Model):
    """The record of a run. Times are seconds since 1970, 0 for one that has not come."""

    job: str
    number: int
    state: State = State.QUEUED
    reason: str = ""
    """why it was started, in the words of whoever did"""
    parent: str = ""
    """`JOB:NUMBER` of the run that queued it"""
    parameters: dict[str, str] = Field(default_factory=dict)
    commit: str = ""
    context: str = ""
    wants: tuple[str, ...] = ()
    """the contexts that it waits for, once it has nothing else to wait for"""
    queued: float = _NEVER
    started: float = _NEVER
    ended: float = _NEVER
    owner: str = ""
    """the process that it runs in; "" while it waits for one"""
    flow_run: str = ""
    """Prefect's id of it"""
    why: str = ""
    """what made it fail, in a line"""
    first: bool = False
    """whether its turn is before that of those that were queued earlier"""
    attempt: int = 0
    """how many runs before it failed, whose `RETRY` it is"""

    @property
    def label(self) -> str:
        return f"{self.job}:{self.number}"

    @property
    def seconds(self) -> float:
        """How long it took, or has taken so far."""
        return (self.ended or time.time()) - self.started if self.started else 0.0

    @classmethod
    def parse(cls, label: str) -> tuple[str, int]:
        """The job and the number of a label such as `backup:7`. Raises `InputError`."""
        job, _, number = label.rpartition(":")
        if not job or not number.isascii() or not number.isdecimal() or len(number) > 9:
            raise InputError(f"{shown(label)} is no run", hint="write JOB:NUMBER, such as backup:7")
        return job, int(number)


class History:
    """The runs of the jobs of one infra repo."""

    def __init__(self, repo: Path) -> None:
        self.repo, self.home = repo, paths.repo_state_of(repo) / "jobs"

    def jobs(self) -> list[str]:
        """The jobs that have runs, also those that the repo no longer has."""
        return sorted(each.name for each in self.home.glob("*") if (each / "number").exists())

    def register(self, jobs: Mapping[str, Mapping[str, object]]) -> None:
        """Record what is told of each of the jobs that are registered now."""
        self.home.mkdir(mode=0o700, parents=True, exist_ok=True)
        files.write(self._registered, json.dumps(jobs))

    def registered(self) -> dict[str, dict[str, Any]]:
        """What `register` has recorded."""
        try:
            found: dict[str, dict[str, Any]] = json.loads(self._registered.read_text())
        except (OSError, ValueError):
            return {}
        return found

    @property
    def _registered(self) -> Path:
        return self.home / ".registered.json"

    def queue(self, job: str, **about: object) -> Run:
        """A new run of a job, with the next number. `about` are fields of `Run`. Raises `InputError`, OSError."""
        home = self._of(job)
        with self._locked(job):
            number = _number(home) + 1
            while (home / "runs" / str(number)).exists():  # (the disk has lost the number's file)
                number += 1
            files.write(home / "number", f"{number}\n")
            (home / "runs" / str(number)).mkdir(mode=0o700, parents=True)
            run = Run.model_validate({"job": job, "number": number, "queued": time.time(), **about})
            self._open.mkdir(mode=0o700, exist_ok=True)
            files.write(self._open / run.label, "")
            self._write(run)
        return run

    def change(self, run: Run, **fields: object) -> Run:
        """Record other values of these fields, and return the run as it is then. Raises `InputError`."""
        with self._locked(run.job):
            return self._change(self.get(run.job, run.number), **fields)

    def _change(self, run: Run, **fields: object) -> Run:
        changed = Run.model_validate(run.model_dump() | fields)
        self._write(changed)
        return changed

    def claim(self, job: str, number: int, flow_run: str) -> Run:
        """A run that waits, for this process to take it on. Raises `InputError` when it has begun, or a different
        process has it."""
        with self._locked(job):
            run = self.get(job, number)
            if run.state is not State.QUEUED:
                raise InputError(f"{run.label} is {run.state} already", target=job, hint="start a new run")
            if run.owner not in ("", process.owner()) and process.lives(run.owner):
                raise InputError(f"{run.label} waits for its turn already", target=job, hint="start a new run")
            return self._change(run, owner=process.owner(), flow_run=flow_run)

    def begin(self, run: Run, context: str) -> Run:
        """Record that this process begins a run. Raises `InputError` for one that has begun already, or ended."""
        with self._locked(run.job):
            if (now := self.get(run.job, run.number)).state is not State.QUEUED:
                raise InputError(f"{run.label} is {now.state} already", target=run.job, hint="start a new run")
            return self._change(now, state=State.RUNNING, context=context, started=time.time(), owner=process.owner())

    def end(self, run: Run, state: State, why: str = "") -> Run:
        """Record how a run ended, and remove what it worked in. Only the first end of a run counts."""
        with self._locked(run.job):
            now = self.get(run.job, run.number)
            if not now.state.ended:
                now = self._change(now, state=state, why=why, ended=time.time())
                files.write(self._of(run.job) / "last", f"{state}\n")
            (self._open / run.label).unlink(missing_ok=True)
        owned.remove(self.work(run))
        return now

    def get(self, job: str, number: int) -> Run:
        """A run. Raises `InputError` when there is none."""
        try:
            return Run.model_validate_json((self._of(job) / "runs" / str(number) / RECORD).read_bytes())
        except (OSError, ValidationError):
            hint = f"its last number is {_number(self._of(job))}"
            raise InputError(f"there is no run {number} of {job}", target=job, hint=hint) from None

    def runs(self, job: str) -> Iterator[Run]:
        """The runs of a job that are kept, newest first."""
        for number in self._numbers(job):
            try:
                yield self.get(job, number)
            except InputError:  # it was removed just now
                continue

    def all(self) -> Iterator[Run]:
        """The runs of all jobs."""
        for job in self.jobs():
            yield from self.runs(job)

    def open(self) -> list[Run]:
        """The runs of all jobs that have not ended, in the order of their turns."""
        found: list[Run] = []
        for label in (each.name for each in self._open.glob("*:*")):
            job, _, number = label.rpartition(":")
            try:
                run = self.get(job, int(number))
            except (InputError, ValueError):  # it was removed just now, or is no run at all
                continue
            if not run.state.ended:
                found.append(run)
        return sorted(found, key=lambda run: (not run.first, run.queued, run.job, run.number))

    def last_result(self, job: str) -> str:
        """How the run of a job that ended last ended, or `UNKNOWN`."""
        try:
            return (self._of(job) / "last").read_text().strip()
        except FileNotFoundError:
            return UNKNOWN

    def folder(self, run: Run) -> Path:
        """The folder with the run's log."""
        return self._of(run.job) / "runs" / str(run.number)

    def archive(self, run: Run) -> Path:
        """The folder of the run's own files, which a cell writes: read them as a stranger's."""
        return self.folder(run) / "archive"

    def log(self, run: Run) -> Path:
        """The file of the run's log."""
        return self.folder(run) / LOG

    def work(self, run: Run) -> Path:
        """The folder that a run works in."""
        return self._of(run.job) / "work" / str(run.number)

    def workspace(self, job: str) -> Path:
        """The folder that the runs of a job share."""
        return self._of(job) / "workspace"

    def settle(self) -> list[Run]:
        """End the runs whose process has died, and return them. Their scripts died with it; none is run again."""
        dead = [each for each in self.open() if each.owner and not process.lives(each.owner)]
        return [self.end(each, State.ABORTED, "toto was killed while it ran") for each in dead]

    def prune(self, job: str, keep: int, seconds: float) -> list[Run]:
        """Remove all but the newest `keep` runs of a job, and those that ended longer ago; return what was removed.

        The newest one stays in any case, and so does one that has not ended.
        """
        oldest = time.time() - seconds
        gone = [
            each
            for place, each in enumerate(self.runs(job))
            if place and each.state.ended and (place >= keep or each.ended < oldest)
        ]
        return [each for each in gone if owned.remove(self.folder(each))]

    @property
    def _open(self) -> Path:
        return self.home / ".open"

    def _of(self, job: str) -> Path:
        try:
            return self.home / check_name(job)
        except ValueError:
            raise InputError(f"there is no job {shown(job)}", hint="`toto job list` lists them") from None

    def _numbers(self, job: str) -> list[int]:
        names = (each.name for each in (self._of(job) / "runs").glob("*"))
        return sorted((int(name) for name in names if name.isdecimal()), reverse=True)

    def _write(self, run: Run) -> None:
        files.write(self.folder(run) / RECORD, run.model_dump_json())

    @contextmanager
    def _locked(self, job: str) -> Iterator[None]:
        self._of(job).mkdir(mode=0o700, parents=True, exist_ok=True)
        with files.lock(self._of(job) / "lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _number(home: Path) -> int:
    try:
        return int((home / "number").read_text())
    except (FileNotFoundError, ValueError):
        return 0
