"""A run of a job: what it is, its place among the others, what its page shows of it, and what follows it."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from prefect import get_client
from prefect.artifacts import acreate_table_artifact
from prefect.client.schemas.objects import State as FlowState
from prefect.logging import get_run_logger
from prefect.states import Completed, Failed

from tasks.limits import room_in_context
from toto.base import process, runs
from toto.base.errors import InputError
from toto.fleet import artifacts
from toto.infra_repo import git
from toto.infra_repo import settings as settings_of
from toto.jobs import folder, log, registered
from toto.jobs.folder import Context, Job, Jobs
from toto.jobs.history import History, Run, State
from toto.jobs.registered import Registered
from toto.jobs.run import Given
from toto.jobs.run import run as run_job

HEAD: Final = 64_000  # bytes of a log's beginning that the run's page shows as they come
TAIL: Final = 16_000  # bytes of its end
_EVERY: Final = 1.0  # seconds between two records of the page's log
_SHOWN: Final = 500  # files of an archive
_DAY: Final = 86_400.0


@dataclass
class Work:
    """One run of a job: the exported commit, the job as it is there, and its record."""

    repo: Path
    tree: Path
    jobs: Jobs
    job: Job
    run: Run

    @property
    def history(self) -> History:
        return History(self.repo)


async def call(method: str, path: str, body: object) -> Any:
    """Ask Prefect's API."""
    async with get_client() as client:
        answer = await client.request(method, path, json=body)  # type: ignore[arg-type]
    return answer.json() if answer.content else None


@asynccontextmanager
async def begun(
    repo: Path, name: str, commit: str, parameters: Mapping[str, str], flow_run: str, number: int | None, **about: str
) -> AsyncIterator[Work]:
    """A new run of a job, with its number; or the one that was given the `number` when it was queued.

    One that has not ended when the block does, ends with it. Raises `InputError`.
    """
    history = History(repo)
    history.settle()
    run = history.get(name, number) if number is not None else None
    if run is not None and run.state is not State.QUEUED:
        raise InputError(f"{run.label} is {run.state} already", target=name, hint="start a new run")
    end, why = State.ABORTED, "it was cancelled before it began"
    try:
        tree = runs.run_directory(repo, flow_run) / "tree"
        await git.checkout(repo, commit, tree)
        jobs = folder.read(tree, settings_of.load(tree, deployed=True).jobs.path)
        job = jobs.job(name)
        values = job.values(parameters)
        if run is None:
            run = history.queue(name, parameters=values, **about)
        run = history.change(run, parameters=values, commit=commit, flow_run=flow_run, owner=process.owner())
        get_run_logger().info("%s is run %d; it waits for a free place", name, run.number)
        yield Work(repo, tree, jobs, job, run)
    except Exception as error:
        end, why = State.FAILED, str(error).partition("\n")[0]
        raise
    finally:
        if run is not None:
            history.end(run, end, why)  # (unless it has ended)


@asynccontextmanager
async def place(work: Work) -> AsyncIterator[Context]:
    """Hold a place in the first context with a free one of those that take the job."""
    contexts = {each.name: each for each in work.jobs.contexts_of(work.job)}
    executors = {name: each.conf.executors for name, each in contexts.items()}
    async with room_in_context(work.repo, work.run.flow_run, executors) as name:
        yield contexts[name]


async def carry_out(work: Work, context: Context) -> Run:
    """Run the job's scripts, show their output on the run's page, and return how that ended."""
    with _Page() as page:
        showing = asyncio.create_task(page.show())
        try:
            given = Given(work.tree, context)
            return await run_job(work.jobs, work.job, work.run, work.history, given, page.hear)
        finally:
            showing.cancel()
            await asyncio.gather(showing, return_exceptions=True)
            page.end(log.tail(work.history.folder(work.run), TAIL))


class _Page:
    """Shows a log on the run's page: its beginning as it comes, in few records, and its end."""

    def __init__(self) -> None:
        self._logger, self._waiting, self._heard = get_run_logger(), bytearray(), 0

    def __enter__(self) -> "_Page":
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()

    def hear(self, chunk: bytes) -> None:
        """Take a piece of the output."""
        if self._heard < HEAD:
            self._waiting += chunk[: HEAD - self._heard]
        self._heard += len(chunk)

    async def show(self) -> None:
        """Write what has come, now and then, until this is cancelled."""
        while True:
            await asyncio.sleep(_EVERY)
            self._flush()

    def end(self, tail: bytes) -> None:
        """Write the end of a log of which more was heard than shown."""
        self._flush()
        if self._heard > HEAD:
            self._logger.info(
                "… the log goes on in its file, and ends with:\n%s", tail.decode(errors="replace").rstrip()
            )

    def _flush(self) -> None:
        if text := self._waiting.decode(errors="replace").rstrip():
            self._logger.info("%s", text)
        self._waiting.clear()


async def show_archive(work: Work) -> None:
    """Show what the run has kept, with sizes."""
    rows = await asyncio.to_thread(_kept, work.history.archive(work.run))
    if rows:
        with contextlib.suppress(Exception):  # an artifact that cannot be written fails no job
            await acreate_table_artifact(
                key=artifacts.of_repo(f"job-{work.repo.name.removesuffix('.git').lower()}", work.job.name),
                table=rows,
                description=f"{work.run.label}: what it has kept, in {work.history.archive(work.run)}",
            )


def _kept(archive: Path) -> list[dict[str, str]]:
    rows: list[dict[str, str]] = []
    for place, _, names, opened in os.fwalk(archive, follow_symlinks=False):
        for name in sorted(names):
            size = os.stat(name, dir_fd=opened, follow_symlinks=False).st_size
            rows.append({"file": ascii(str(Path(place, name).relative_to(archive)))[1:-1], "bytes": str(size)})
            if len(rows) == _SHOWN:
                return [*rows, {"file": "… and more", "bytes": ""}]
    return rows


async def follow(work: Work, ended: Run) -> None:
    """Begin the jobs that come after this one, when it was a success; remove its old runs."""
    if ended.state is State.SUCCESS:
        for each in work.jobs.jobs.values():
            if work.job.name in each.conf.after:
                queued = await queue(work.repo, each, {}, f"after {ended.label}", ended.label)
                get_run_logger().info("%s is queued", queued.label)
    work.history.prune(work.job.name, work.job.conf.keep, work.job.conf.keep_days * _DAY)


async def queue(repo: Path, job: Job, parameters: Mapping[str, str], reason: str, parent: str) -> Run:
    """Queue a run of a job, which has its number from now on. Raises `InputError`."""
    history = History(repo)
    values = job.values(parameters)
    deployment = await call("GET", f"/deployments/name/{registered.FLOW}/{registered.name_of(repo, job.name)}", None)
    run = history.queue(job.name, parameters=values, reason=reason, parent=parent)
    asked = {"parameters": values, "reason": reason, "number": run.number, "parent": parent}
    try:
        await call("POST", f"/deployments/{deployment['id']}/create_flow_run", {"parameters": asked})
    except BaseException:
        history.end(run, State.FAILED, "Prefect did not take it")
        raise
    return run


def state_of(ended: Run) -> FlowState[None]:
    """The state of the flow run, by how its job ended."""
    if ended.state is State.SUCCESS:
        return Completed(message=f"{ended.label} succeeded in {ended.seconds:.0f} s")
    name = "Aborted" if ended.state is State.ABORTED else "Failed"
    return Failed(name=name, message=f"{ended.label} {ended.state}: {ended.why}")


async def register(repo: Path, commit: str, jobs: Jobs) -> Registered:
    """Make the deployments of the repo's jobs those of a commit, which was just deployed."""
    done = await registered.register(call, repo, commit, jobs)
    if str(done):
        get_run_logger().info("jobs %s", done)
    return done
