"""A run of a job: what it is, its place among the others, what its page shows of it, and what follows it."""

import asyncio
import contextlib
import itertools
import os
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import httpx
from prefect import get_client
from prefect.artifacts import acreate_table_artifact
from prefect.client.schemas.objects import State as FlowState
from prefect.logging import get_run_logger
from prefect.settings import PREFECT_UI_URL
from prefect.states import Completed, Failed

from blocks import venues
from tasks import shell
from tasks.ask import ask
from tasks.job_access import Access, access_of
from tasks.limits import locked, room_in_context
from toto.base import process, runs
from toto.base.errors import InputError, TotoError
from toto.base.moment import moment
from toto.base.prefect_api import ServerError
from toto.fleet import artifacts
from toto.infra_repo import git
from toto.infra_repo import settings as settings_of
from toto.jobs import folder, log, queue, registered
from toto.jobs.conf import LONGEST, Event
from toto.jobs.folder import Context, Job, Jobs
from toto.jobs.history import History, Run, State
from toto.jobs.registered import Registered
from toto.jobs.run import Given
from toto.jobs.run import run as run_job
from toto.ledger import approvals
from toto.report.message import Message, Problem

HEAD: Final = 64_000  # bytes of a log's beginning that the run's page shows as they come
TAIL: Final = 16_000  # bytes of its end
_EVERY: Final = 1.0  # seconds between two records of the page's log
_SHOWN: Final = 500  # files of an archive
_DAY: Final = 86_400.0


@dataclass
class Work:
    """One run of a job: the exported commit, the job as it is there, its record, and what it may use."""

    repo: Path
    tree: Path
    jobs: Jobs
    job: Job
    run: Run
    access: Access

    @property
    def history(self) -> History:
        return History(self.repo)


async def call(method: str, path: str, body: object) -> Any:
    """Ask Prefect's API. Raises `ServerError`."""
    async with get_client() as client:
        try:
            answer = await client.request(method, path, json=body)  # type: ignore[arg-type]
        except httpx.HTTPStatusError as error:
            said = process.shorten(error.response.text, 500)
            status = error.response.status_code
            raise ServerError(f"{method} {path} was answered with {status}: {said}", status=status) from None
        except httpx.HTTPError as error:
            raise ServerError(f"no answer: {error or type(error).__name__}", hint="start `toto serve`") from None
    return answer.json() if answer.content else None


class Instead(Exception):
    """The run that was started is no run of the job; the message says what is in its place."""


@asynccontextmanager
async def begun(
    repo: Path, name: str, commit: str, parameters: Mapping[str, str], flow_run: str, number: int | None, **about: str
) -> AsyncIterator[Work]:
    """A new run of a job, with its number; or the one that was given the `number` when it was queued.

    One that has not ended when the block does, ends with it. Raises `Instead` when others stand for it, `InputError`.
    """
    history = History(repo)
    with contextlib.suppress(ServerError):
        await queue.settle(call, repo)
    run = history.claim(name, number, flow_run) if number is not None else None
    end, why = State.ABORTED, "it was cancelled before it began"
    try:
        tree = runs.run_directory(repo, flow_run) / "tree"
        await git.checkout(repo, commit, tree)
        jobs = folder.read(tree, settings_of.load(tree, deployed=True).jobs.path)
        job = jobs.job(name)
        if run is None:
            values = await _only(repo, history, job, parameters, **about)
            run = history.queue(name, parameters=values, **about)
        else:
            values = job.values(parameters)
        run = history.change(run, parameters=values, commit=commit, flow_run=flow_run, owner=process.owner())
        get_run_logger().info("%s is run %d; it waits for a free place", name, run.number)
        access = await access_of(repo, tree, commit, flow_run, job)
        yield Work(repo, tree, jobs, job, run, access)
    except Exception as error:
        end, why = State.FAILED, str(error).partition("\n")[0]
        raise
    finally:
        if run is not None:
            with contextlib.suppress(InputError):  # its record was removed, as one of the old ones
                history.end(run, end, why)  # (unless it has ended)


async def _only(repo: Path, history: History, job: Job, given: Mapping[str, str], **about: str) -> dict[str, str]:
    """The parameters of a run that was not queued by toto. Raises `Instead` when it stands for several, or is one too
    many."""
    values, *others = job.runs(given)
    if others:
        queued = await queue.queue(call, repo, job, given, reason=about["reason"], parent=about["parent"])
        raise Instead(f"{', '.join(each.label for each in queued)}: a run for each combination")
    if (waiting := queue.same(history, job, values)) is not None:
        raise Instead(f"{waiting.label} is queued already, and not twice")
    return values


async def approve(work: Work) -> None:
    """Wait until a person has approved the run, where its job needs that. Raises `NotApproved`."""
    if seconds := work.job.conf.approve:
        run = work.run
        given = "".join(f"\n  {name}={value}" for name, value in sorted(run.parameters.items()))
        script = work.job.conf.command or f"{run.job}.run"
        plan = f"{script} of {run.commit[:8]}{f', {run.reason}' if run.reason else ''}{given}"
        try:
            answer = await ask(work.repo, run.flow_run, {run.label: plan}, seconds)
            get_run_logger().info("approved by %s at %s", answer.by, answer.at)
        finally:
            await approvals.withdraw(work.repo, run.flow_run)


@asynccontextmanager
async def place(work: Work) -> AsyncIterator[Context]:
    """Hold the job's locks, and a place in the first context with a free one of those that take it.

    Of the runs that wait for a context, the one that was queued first is the next.
    """
    contexts = {each.name: each for each in work.jobs.contexts_of(work.job)}
    executors = {name: each.conf.executors for name, each in contexts.items()}
    async with locked(work.repo, work.run.flow_run, work.job.conf.locks):
        work.run = work.history.change(work.run, wants=tuple(contexts))
        async with room_in_context(work.repo, work.run.flow_run, executors, partial(_ahead, work)) as name:
            yield contexts[name]


def _ahead(work: Work) -> list[str]:
    """The contexts that those runs wait for which were queued before this one."""
    found: list[str] = []
    for each in work.history.open():
        if each.label == work.run.label:
            break
        if each.wants and each.state is State.QUEUED and process.lives(each.owner):
            found += each.wants
    return found


async def carry_out(work: Work, context: Context) -> Run:
    """Run the job's scripts, show their output on the run's page, and return how that ended."""
    with _Page() as page:
        showing = asyncio.create_task(page.show())
        try:
            given = Given(work.tree, context, call=call, shell=shell.started, **vars(work.access))
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
    """Begin the jobs that come after this one, when it was a success; try it again when not; tell who wants to know;
    remove its old runs."""
    await notify(work, ended)
    if ended.state is State.SUCCESS:
        for each in work.jobs.jobs.values():
            if work.job.name in each.conf.after:
                await _queue(work, ended, each, {}, f"after {ended.label}")
    elif ended.state is State.FAILED and ended.attempt < work.job.conf.retry:
        again, wait = ended.attempt + 1, min(work.job.conf.retry_wait * 2**ended.attempt, LONGEST)
        reason = f"try {again + 1} of {work.job.conf.retry + 1}, after {ended.label}"
        await _queue(work, ended, work.job, ended.parameters, reason, attempt=again, wait=wait)
    work.history.prune(work.job.name, work.job.conf.keep, work.job.conf.keep_days * _DAY)


async def notify(work: Work, ended: Run) -> None:
    """Notify the job's venues when it has failed and did not before, or succeeds again. An aborted run is no news."""
    others = [each for each in work.history.runs(ended.job) if each.state in (State.SUCCESS, State.FAILED)]
    failed = list(
        itertools.takewhile(lambda run: run.state is State.FAILED, (each for each in others if each != ended))
    )
    now, fine = ended.state, State.SUCCESS
    if not work.job.conf.venues or now is State.ABORTED or (now is fine) == (not failed):
        return
    name = f"job {ended.job}"
    message = Message(
        repo=work.repo.name.removesuffix(".git"),
        state="recovered" if now is fine else "failed",
        summary=f"{ended.label} succeeded" if now is fine else f"{ended.label} failed: {ended.why}",
        commit=await git.describe(work.repo, ended.commit),
        link=f"{PREFECT_UI_URL.value()}/runs/flow-run/{ended.flow_run}",
        problems=() if now is fine else (Problem.of(name, "failed", f"{ended.why}\n{_last_lines(work, ended)}"),),
        recovered={name: moment(failed[-1].ended)} if now is fine else {},
    )
    for each in work.job.conf.venues:
        try:
            await asyncio.gather(*(venue.send(message) for venue in await venues.named(each, work.repo)))
        except Exception as error:  # (one that is not toto's own may have a secret in it)
            why = str(error) if isinstance(error, TotoError) else f"unexpected {type(error).__name__}"
            get_run_logger().warning("%s was not notified: %s", each, why)


def _last_lines(work: Work, ended: Run) -> str:
    return log.tail(work.history.folder(ended), TAIL).decode(errors="replace")


async def _queue(
    work: Work, ended: Run, job: Job, given: Mapping[str, str], reason: str, attempt: int = 0, wait: float = 0
) -> None:
    """Queue what follows a run. That it cannot be queued is told, and changes nothing of how the run ended."""
    try:
        for each in await queue.queue(
            call, work.repo, job, given, reason=reason, parent=ended.label, attempt=attempt, wait=wait
        ):
            get_run_logger().info("%s is queued%s", each.label, f", in {wait:g} s" if wait else "")
    except TotoError as error:
        get_run_logger().warning("%s could not be queued: %s", job.name, error)


def state_of(ended: Run) -> FlowState[None]:
    """The state of the flow run, by how its job ended."""
    if ended.state is State.SUCCESS:
        return Completed(message=f"{ended.label} succeeded in {ended.seconds:.0f} s")
    name = "Aborted" if ended.state is State.ABORTED else "Failed"
    return Failed(name=name, message=f"{ended.label} {ended.state}: {ended.why}")


async def follow_roll_out(repo: Path, commit: str, ended: Mapping[Event, Collection[str]]) -> None:
    """Begin the jobs that follow a deployment: those of the commit that is deployed now.

    `ended` says to which targets what has happened, by their labels. An error is told, and changes nothing.
    """
    happened = [event for event, labels in ended.items() if labels]
    parameters = {f"TOTO_{event.upper()}": " ".join(sorted(labels)) for event, labels in ended.items()}
    try:
        names = {name for event in happened for name in await queue.deployed(call, repo, f"{registered.ON}{event}")}
        if not names:
            return
        async with queue.jobs_of(call, repo) as jobs:
            for name in sorted(names & jobs.jobs.keys()):
                for each in await queue.queue(
                    call,
                    repo,
                    jobs.job(name),
                    {**parameters, "TOTO_COMMIT": commit},
                    reason=f"{', '.join(each for each in happened if each in jobs.job(name).conf.on)}: {commit[:8]}",
                ):
                    get_run_logger().info("%s is queued", each.label)
    except TotoError as error:
        get_run_logger().warning("the jobs that follow a deployment could not be queued: %s", error)


async def register(repo: Path, commit: str, jobs: Jobs) -> Registered:
    """Make the deployments of the repo's jobs those of a commit, which was just deployed."""
    done = await registered.register(call, repo, commit, jobs)
    History(repo).register(
        {name: {"description": job.conf.description, "public": job.conf.public} for name, job in jobs.jobs.items()}
    )
    if str(done):
        get_run_logger().info("jobs %s", done)
    return done
