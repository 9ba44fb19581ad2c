"""Queueing runs of jobs by Prefect's deployments, and aborting them: for the command line, for jobs, for what follows.

A run that is queued here has its number at once.
"""

import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

from toto.base import owned
from toto.base.errors import InputError
from toto.base.prefect_api import ServerError
from toto.infra_repo import git
from toto.infra_repo import settings as settings_of
from toto.jobs import folder, registered
from toto.jobs.folder import Job, Jobs
from toto.jobs.history import History, Run, State
from toto.jobs.registered import Call

MOST: Final = 1000  # runs of a repo that have not ended
_BETWEEN: Final = 600.0  # seconds after which a run that Prefect has not heard of will not be taken any more
_PAGE: Final = 200  # runs that are asked for at once
_ENDED: Final = ("COMPLETED", "FAILED", "CANCELLED", "CRASHED")


async def queue(
    call: Call,
    repo: Path,
    job: Job,
    given: Mapping[str, str],
    *,
    reason: str = "",
    parent: str = "",
    first: bool = False,
    attempt: int = 0,
    wait: float = 0,
) -> list[Run]:
    """Queue the runs of a job that are meant, in `wait` seconds, and return them.

    It is one, but for a job with a `MATRIX`. Of a job that is queued `ONCE`, it may be one that waits already. With
    `first` their turn is before that of those that wait. `attempt` says how many runs before it have failed.
    Raises `InputError`, `ServerError`.
    """
    history, found, deployment = History(repo), list[Run](), ""
    room = MOST - len(history.open())
    for values in job.runs(given):
        if (waiting := same(history, job, values)) is not None:
            found.append(waiting)
            continue
        if room <= 0:
            raise InputError(f"{MOST} runs wait or run already", target=job.name, hint="`toto job abort` ends them")
        deployment = deployment or await _deployment(call, repo, job)
        about = {"reason": reason, "parent": parent, "first": first, "attempt": attempt}
        run = history.queue(job.name, parameters=values, **about)
        asked = {"parameters": values, "reason": reason, "number": run.number, "parent": parent}
        body: dict[str, object] = {"parameters": asked}
        if wait:
            at = (datetime.now(UTC) + timedelta(seconds=wait)).isoformat()
            body["state"] = {"type": "SCHEDULED", "state_details": {"scheduled_time": at}}
        try:
            made = await call("POST", f"/deployments/{deployment}/create_flow_run", body)
        except BaseException:
            history.end(run, State.FAILED, "Prefect did not take it")
            raise
        found.append(history.change(run, flow_run=str(made["id"])))
        room -= 1
    return found


async def _deployment(call: Call, repo: Path, job: Job) -> str:
    """The id of a job's deployment. Raises `InputError` when it has none, `ServerError`."""
    try:
        found = await call("GET", f"/deployments/name/{registered.FLOW}/{registered.name_of(repo, job.name)}", None)
    except ServerError as error:
        if error.status != 404:
            raise
        raise InputError("is not registered", target=job.name, hint="deploy a commit that has it") from None
    return str(found["id"])


def same(history: History, job: Job, values: Mapping[str, str]) -> Run | None:
    """The run that waits and stands for a new one with these parameters, for a job that is queued `ONCE`."""
    if not job.conf.once:
        return None
    waiting = (each for each in history.open() if each.job == job.name and each.state is State.QUEUED)
    return next((each for each in waiting if each.parameters == dict(values)), None)


async def abort(call: Call, repo: Path, run: Run) -> None:
    """Abort a run; one that waits will not begin. Raises `InputError` for one that has ended, `ServerError`."""
    history = History(repo)
    run = history.get(run.job, run.number)
    if run.state.ended:
        raise InputError(f"{run.label} is {run.state} already", target=run.job)
    if run.flow_run:
        # (Prefect makes it Cancelled at once when no process has taken it.)
        await call("POST", f"/flow_runs/{run.flow_run}/set_state", {"state": {"type": "CANCELLING"}})
    await settle(call, repo)


async def deployed(call: Call, repo: Path, *tags: str) -> dict[str, Mapping[str, Any]]:
    """The deployments of a repo's jobs that have these tags, by the names of the jobs. Raises `ServerError`."""
    found = await call("POST", "/deployments/filter", registered.filter_of(repo, *tags))
    prefix = registered.name_of(repo, "")
    return {each["name"].removeprefix(prefix): each for each in sorted(found, key=lambda each: str(each["name"]))}


@asynccontextmanager
async def jobs_of(call: Call, repo: Path) -> AsyncIterator[Jobs]:
    """The jobs of the commit that was deployed last, as long as the block lasts.

    Raises `InputError` when none are registered, `ServerError`.
    """
    there = await deployed(call, repo)
    if not there:
        raise InputError("has no jobs", target=repo.name.removesuffix(".git"), hint="deploy a commit that has `jobs/`")
    commit = next(iter(there.values()))["parameters"]["commit"]
    with owned.folder("jobs", Path(tempfile.gettempdir())) as folder_:
        tree = folder_ / "tree"
        await git.checkout(repo, commit, tree)
        yield folder.read(tree, settings_of.load(tree, deployed=True).jobs.path)


async def settle(call: Call, repo: Path) -> list[Run]:
    """End the runs whose process has died, or that were cancelled while they waited; return them.

    Raises `ServerError`.
    """
    history = History(repo)
    dead, now = history.settle(), time.time()
    waiting = [each for each in history.open() if each.state is State.QUEUED and not each.owner]
    asked = [each.flow_run for each in waiting if each.flow_run]
    going: set[str] = set()
    for first in range(0, len(asked), _PAGE):
        wanted = {"id": {"any_": asked[first : first + _PAGE]}, "state": {"type": {"not_any_": _ENDED}}}
        found = await call("POST", "/flow_runs/filter", {"flow_runs": wanted, "limit": _PAGE})
        going |= {str(each["id"]) for each in found}
    for run in waiting:
        if run.flow_run and run.flow_run not in going:
            dead.append(history.end(run, State.ABORTED, "it was cancelled while it waited"))
        elif not run.flow_run and now - run.queued > _BETWEEN:
            dead.append(history.end(run, State.ABORTED, "toto was killed while it was queued"))
    return dead
