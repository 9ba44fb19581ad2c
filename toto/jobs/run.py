"""One run of a job: its scripts, one after the other, each in a cell. The contract is laminar's.

`.init` (in a new workspace), `before`, `NAME.before`, `NAME.run`, `NAME.after`, `after`: a script that fails stops none
that follows, and the first failure is the run's result. An abort, or the timeout, skips what has not begun, but for the
scripts after.
"""

import asyncio
import json
import os
import shutil
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from signal import SIGKILL, SIGTERM, Signals
from typing import Final, TypeAlias

from toto.base import files as written
from toto.base import process
from toto.base.errors import TotoError
from toto.base.process import Pushed
from toto.cell import folders
from toto.cell.cell import INFRA, Cell, python
from toto.cell.limits import Limits
from toto.cell.namespace import Namespace, namespace
from toto.cell.relay import Endpoint, reach
from toto.cell.tool import internet
from toto.jobs import door
from toto.jobs.conf import DEFAULT
from toto.jobs.door import Door
from toto.jobs.folder import Context, Job, Jobs
from toto.jobs.history import History, Run, State
from toto.jobs.log import Log
from toto.jobs.registered import Call

PLACE: Final = Path("/toto")  # in a job's cell: toto's own files
HOME: Final = Path("/job")  # in a job's cell: the run's folder, the workspace and the archive
_WORK: Final = HOME / "run"
_WORKSPACE: Final = HOME / "workspace"
_ARCHIVE: Final = HOME / "archive"
_KUBECONFIG: Final = "kubeconfig"
_TEMPORARY: Final = Path("/tmp")  # noqa: S108
_IN_CELL: Final = Path(__file__).with_name("in_cell.py")
_LAMINARC: Final = Path(__file__).with_name("laminarc.py")
_CHUNK: Final = 1 << 18  # bytes of output that are read at once


@dataclass(frozen=True)
class Command:
    """A person's own shell command, for whoever starts it.

    `argv` runs it in the `cell`, in its folder `cwd`, once the `text` is in the file `script`. `folder` is a place for
    files of toto's, which is not there yet.
    """

    text: str
    cell: Cell
    argv: Sequence[str]
    cwd: Path
    script: Path
    folder: Path


Shell: TypeAlias = Callable[[Command], AbstractAsyncContextManager[process.Running]]
"""starts a command, which ends with the block"""


Machines: TypeAlias = Callable[[Path, Path, int | None], AbstractAsyncContextManager[None]]
"""serves `on-host` from a folder, which scripts see at a place, for a user of the machine's, while the block lasts"""


@dataclass(frozen=True)
class Given:
    """What a run is given besides its job: the exported commit, the context that it runs in, and `secrets`.

    `secrets` are variables that are masked in the log, `kubeconfig` is the text of one. It reaches the `endpoints`,
    also on private networks, and by `machines` what is served there. `call` asks Prefect's API for what scripts want of
    `laminarc`. `shell` starts the `COMMAND` of a job that has one. `limits` hold each of its scripts.
    """

    tree: Path
    context: Context = field(default_factory=lambda: Context(DEFAULT))
    secrets: Mapping[str, str] = field(default_factory=dict)
    kubeconfig: str = ""
    endpoints: Sequence[Endpoint] = ()
    machines: Machines | None = None
    call: Call | None = None
    shell: Shell | None = None
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class _Script:
    """A script of a run: what it is called, its place in the repo, and whether it runs after an abort as well.

    Or a `command` in its place.
    """

    name: str
    place: PurePosixPath
    cwd: Path = _WORK
    after: bool = False
    command: str = ""


async def run(
    jobs: Jobs, job: Job, begun: Run, history: History, given: Given, heard: Callable[[bytes], None] | None = None
) -> Run:
    """Run a job to its end, and return the record of that. `begun` is its record, which has its number.

    `heard` gets the output, up to the middle of a long one. A cancel aborts the run: it is raised when the scripts
    after have run. Raises nothing else for what the job does: a failure is a result.
    """
    stop = asyncio.Event()
    work = asyncio.create_task(_recorded(jobs, job, begun, history, given, heard, stop))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        stop.set()
        while not work.done():
            try:
                await asyncio.shield(work)
            except asyncio.CancelledError:  # a second cancel changes nothing
                continue
        raise


async def _recorded(
    jobs: Jobs,
    job: Job,
    begun: Run,
    history: History,
    given: Given,
    heard: Callable[[bytes], None] | None,
    stop: asyncio.Event,
) -> Run:
    last = history.last_result(job.name)
    begun = history.begin(begun, given.context.name)
    state, why = State.FAILED, "toto failed"
    try:
        secrets = list(given.secrets.values())
        with Log(history.folder(begun), job.conf.log_limit * 1_000_000, secrets, heard) as log:
            try:
                asked = Door(jobs, begun, history, given.call)
                async with _place(jobs, job, begun, history, given) as place, door.opened(place.control, asked):
                    state, why = await _Scripts(jobs, job, begun, given, place, last, log, stop, asked.set).run()
            except (TotoError, OSError) as error:
                why = str(error).partition("\n")[0]
                log.note(f"the run failed: {error}")
    finally:
        ended = history.end(begun, state, why)
    return ended


@dataclass
class _Place:
    """Where the scripts of a run are run."""

    cell: Cell
    control: Path
    fresh: bool


@asynccontextmanager
async def _place(jobs: Jobs, job: Job, begun: Run, history: History, given: Given) -> AsyncIterator[_Place]:
    work, archive, workspace = history.work(begun), history.archive(begun), history.workspace(job.name)
    control, temporary, cwd = work / "toto", work / "tmp", work / "run"
    for each in (control, temporary, cwd, archive):
        each.mkdir(mode=0o700, parents=True)
    control.chmod(0o755)  # in a folder that only toto may enter
    try:
        workspace.mkdir(mode=0o700)
        fresh = True
    except FileExistsError:
        fresh = False
    user = folders.shared(workspace)
    for each in (_IN_CELL, _LAMINARC):
        shutil.copyfile(each, control / each.name)
        (control / each.name).chmod(0o644)
    words, interpreter = python()
    programs = control / "bin"
    programs.mkdir(mode=0o755)
    laminarc = f'#!/bin/sh\n{" ".join(words)} -I -S {PLACE / _LAMINARC.name} "$@"\n'
    written.write(programs / _LAMINARC.stem, laminarc, 0o755)

    def cell(network: Namespace | None) -> Cell:
        made = Cell(
            read={INFRA: given.tree, PLACE: control, **interpreter},
            write={_WORK: cwd, _WORKSPACE: workspace, _ARCHIVE: archive, _TEMPORARY: temporary},
            network=network,
            limits=given.limits,
            user=user,
        )
        made.give()
        return made

    if given.kubeconfig:
        _give(control / _KUBECONFIG, given.kubeconfig, user)
    async with AsyncExitStack() as stack:
        network = None
        if job.conf.network != "none":
            network = await stack.enter_async_context(internet(given.endpoints, user=user))
        elif given.endpoints:
            network = await stack.enter_async_context(namespace(user))
            await stack.enter_async_context(reach(network, dict.fromkeys(given.endpoints)))
        if given.machines is not None:
            await stack.enter_async_context(given.machines(control, PLACE, user))
        yield _Place(cell(network), control, fresh)


def _give(file: Path, text: str, user: int | None) -> Path:
    """Write a file that only the cell's user may read."""
    written.write(file, text, 0o400)
    if user is not None:
        os.chown(file, user, user)
    return file


class _Scripts:
    """Runs the scripts of a run."""

    def __init__(
        self,
        jobs: Jobs,
        job: Job,
        begun: Run,
        given: Given,
        place: _Place,
        last: str,
        log: Log,
        stop: asyncio.Event,
        set_: Mapping[str, str],
    ) -> None:
        self.jobs, self.job, self.begun, self.given, self.place = jobs, job, begun, given, place
        self.log, self.stop, self.grace = log, stop, job.conf.grace
        self.set = set_  # by `laminarc set`
        self.state, self.why = State.SUCCESS, ""
        self.env = self._environment(last)

    async def run(self) -> tuple[State, str]:
        """Run them all; how the run ended, and why."""
        timer = asyncio.create_task(self._time_out()) if self.job.conf.timeout else None
        try:
            for script in self._scripts():
                if script.after or not self.stop.is_set():
                    self._note(script, *await self._run(script))
                elif self.state is State.SUCCESS:  # what obeyed may have ended well; the run did not
                    self.state, self.why = State.ABORTED, f"it was stopped before {script.name}"
        finally:
            if timer is not None:
                timer.cancel()
        return self.state, self.why

    def _scripts(self) -> list[_Script]:
        name, found = self.job.name, self.jobs.scripts
        listed = [
            *([(f"{name}.init", _WORKSPACE, False)] if self.place.fresh else []),
            *(("before", _WORK, False), (f"{name}.before", _WORK, False), (f"{name}.run", _WORK, False)),
            *((f"{name}.after", _WORK, True), ("after", _WORK, True)),
        ]
        scripts = [_Script(each, found[each], cwd, after) for each, cwd, after in listed if each in found]
        if command := self.job.conf.command:
            place = next((number for number, each in enumerate(scripts) if each.after), len(scripts))
            scripts.insert(place, _Script(f"{name}.run", PurePosixPath("COMMAND"), command=command))
        return scripts

    def _environment(self, last: str) -> dict[str, str]:
        """A run's variables, but for RESULT and those that it sets itself.

        Of two files the more special one wins; a parameter never overrides what is set.
        """
        run, context = self.begun, self.given.context
        files = {**self.jobs.env, **context.env, **self.job.env}
        env = run.parameters | self.place.cell.environment({}) | files | dict(self.given.secrets)
        path = [str(PLACE / "bin"), env["PATH"]]
        if self.jobs.helpers is not None:
            path.insert(0, str(INFRA / self.jobs.helpers))
        env |= {
            "PATH": ":".join(path),
            "RUN": str(run.number),
            "JOB": run.job,
            "CONTEXT": context.name,
            "LAST_RESULT": last,
            "WORKSPACE": str(_WORKSPACE),
            "ARCHIVE": str(_ARCHIVE),
        }
        env |= {"KUBECONFIG": str(PLACE / _KUBECONFIG)} if self.given.kubeconfig else {}
        return env | ({"LAMINAR_REASON": run.reason} if run.reason else {})

    async def _run(self, script: _Script) -> tuple[int, str]:
        """Run one script; its exit status, negative for a signal, and what limit of its cell it has exceeded."""
        self.log.note(str(script.place))
        stopped = self.stop.is_set()
        async with self._started(script) as running:
            reading = asyncio.create_task(self._read(running))
            stopping = asyncio.create_task(self.stop.wait())
            try:
                await asyncio.wait(
                    [reading] if stopped else [reading, stopping],
                    timeout=self.grace if stopped else None,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if not reading.done():
                    # After a stop the scripts after had their time already.
                    await running.end(signals=() if stopped else (SIGTERM,), grace=self.grace)
                await reading
            finally:
                stopping.cancel()
                reading.cancel()
            status = await running.wait()
        return status, running.exceeded or ""

    def _started(self, script: _Script) -> AbstractAsyncContextManager[process.Running]:
        words, _ = python()
        inside = PLACE / self._give_environment()
        begin = ["env", *words, "-I", "-S", str(PLACE / _IN_CELL.name), str(inside)]
        if script.command:
            if self.given.shell is None:
                raise TotoError("nothing is there to start a COMMAND by", target=self.job.name)
            here, there = self.place.control / "command", PLACE / "command"
            argv = [*begin, "bash", "-eo", "pipefail", str(there)]
            folder = self.place.control.with_name("shell")
            return self.given.shell(Command(script.command, self.place.cell, argv, script.cwd, here, folder))
        return process.start(
            [*begin, Pushed(INFRA / script.place)],
            cell=self.place.cell,
            cwd=script.cwd,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )

    async def _read(self, running: process.Running) -> None:
        assert running.process.stdout is not None
        while chunk := await running.process.stdout.read(_CHUNK):
            self.log.write(chunk)

    def _give_environment(self) -> str:
        """Write the variables where the script finds them; the name of that file."""
        said = json.dumps({**self.env, **self.set, "RESULT": str(self.state)})
        return _give(self.place.control / "environment", said, self.place.cell.user).name

    def _note(self, script: _Script, status: int, exceeded: str) -> None:
        """Make the first failure the run's result."""
        why = ""
        if exceeded:
            why = f"{script.place} used more than {exceeded} and was ended"
        elif status:
            ended = f"was ended by {Signals(-status).name}" if status < 0 else f"exited with status {status}"
            why = f"{script.place} {ended}"
        if why:
            self.log.note(why)
        if why and self.state is State.SUCCESS:
            aborted = not exceeded and status in (-SIGTERM, -SIGKILL)
            self.state, self.why = State.ABORTED if aborted else State.FAILED, why

    async def _time_out(self) -> None:
        await asyncio.sleep(self.job.conf.timeout)
        self.log.note(f"the run takes longer than {self.job.conf.timeout:g} s: it is ended")
        self.stop.set()
