"""The jobs of an infra repo: what there is, starting one, its log, aborting it."""

import asyncio
import contextlib
import re
import sys
from typing import Annotated, Final

from typer import Argument, Option

from toto.base.errors import InputError
from toto.base.moment import moment
from toto.cli.common import By, Repo, Repos, infra, of_user, who
from toto.cli.output import AsJson, emit, say
from toto.cli.verbs import Verbs
from toto.git_host import host as git_host
from toto.jobs import queue
from toto.jobs.history import History, Run, State
from toto.jobs.log import Follower
from toto.plan.changes import table
from toto.report.message import clean, one_line

verbs = Verbs()
job = verbs.group("job")

_PAUSE: Final = 0.3  # seconds between two looks at a log
_LINE: Final = 1 << 16  # bytes of a line that are looked at at once

Job = Annotated[str, Argument(metavar="JOB", help="its name, such as backup for jobs/backup.run")]
Label = Annotated[str, Argument(metavar="JOB[:NUMBER]", help="a run, such as backup:7; the newest when left out")]


@job.verb("list")
async def list_(
    repos: Repos,
    name: Annotated[str | None, Argument(metavar="JOB", help="list the runs of this one (default: all jobs)")] = None,
    repo: Repo = None,
    as_json: AsJson = False,
    by: By = None,
) -> int:
    """List the jobs of the commit that was deployed last, and how each ended; or the runs of one, newest first."""
    path = await of_user(repos, repo, by, "read")
    api, history = await git_host.api_of(path), History(path)
    await queue.settle(api.call, path)
    there = await queue.deployed(api.call, path)
    if name is None:
        rows = [_row(next(history.runs(each), None), each, about["description"]) for each, about in there.items()]
    elif name in there or name in history.jobs():
        rows = [_row(each, each.label, each.reason) for each in history.runs(name)]
    else:
        raise InputError(f"there is no job {name[:60]!a}", hint=f"known are {', '.join(there) or 'none'}")
    none = "it has not run yet" if name else "no jobs are registered: deploy a commit that has `jobs/`"
    text = table(rows, ("job", "state", "when", "seconds", "about")) if rows else none
    emit("jobs" if name is None else "job runs", rows, text, as_json=as_json)
    return 0


def _row(run: Run | None, name: str, about: str | None) -> dict[str, str]:
    """A line of a table."""
    if run is None:
        return {"job": name, "state": "", "when": "", "seconds": "", "about": about or ""}
    said = f"{run.state}: {run.why}" if run.why and run.state is not State.SUCCESS else str(run.state)
    at, seconds = moment(run.started or run.queued), f"{run.seconds:.0f}" if run.started else ""
    return {"job": name, "state": said, "when": at, "seconds": seconds, "about": one_line(about or "")}


@job.verb("run")
async def run(
    name: Job,
    repos: Repos,
    values: Annotated[list[str] | None, Argument(metavar="NAME=VALUE", help="its parameters")] = None,
    repo: Repo = None,
    reason: Annotated[str, Option(metavar="WHY", help="it is recorded", show_default=False)] = "",
    wait: Annotated[bool, Option("--wait", help="print its log, and wait until it ends")] = False,
    by: By = None,
) -> int:
    """Queue a run of a job, and print its number.

    With --wait the exit status is 0 for a success, and 1 when it failed or was aborted. A job with a MATRIX has several
    runs.
    """
    path = await of_user(repos, repo, by, "deploy")
    api, history = await git_host.api_of(path), History(path)
    given = dict(_parameter(each) for each in values or ())
    async with queue.jobs_of(api.call, path) as jobs:
        found = jobs.job(name)
        why = f"{one_line(reason)} (by {who(by)})" if reason else f"by {who(by)}"
        queued = await queue.queue(api.call, path, found, given, reason=why)
    for each in queued:
        print(each.label, flush=True)
    if not wait:
        return 0
    ended = [await _follow(history, each, by) for each in queued]
    return 0 if all(each.state is State.SUCCESS for each in ended) else 1


def _parameter(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise InputError(f"{text[:60]!a} is no NAME=VALUE", hint="a parameter, such as LEVEL=high")
    return name, value


@job.verb("log")
async def log(
    label: Label,
    repos: Repos,
    repo: Repo = None,
    following: Annotated[bool, Option("-f", "--follow", help="go on until the run ends")] = False,
    by: By = None,
) -> int:
    """Print the log of a run.

    With --follow the exit status is 0 when the run is a success, and 1 when it failed or was aborted.
    """
    history = History(await of_user(repos, repo, by, "read"))
    of = _run(history, label)
    if following:
        return 0 if (await _follow(history, of, by)).state is State.SUCCESS else 1
    with Follower(history.folder(of)) as reading:
        for chunk in reading.read():
            _print(chunk, by)
    return 0


@job.verb("abort")
async def abort(label: Label, repos: Repos, repo: Repo = None, by: By = None) -> int:
    """Abort a run; one that waits will not begin. Without a number, the newest that has not ended.

    Its scripts get SIGTERM, and what comes after them still runs.
    """
    path = await of_user(repos, repo, by, "deploy")
    api, history = await git_host.api_of(path), History(path)
    if ":" in label:
        of = _run(history, label)
    else:
        going = [each for each in history.open() if each.job == label]
        if not going:
            raise InputError("has no run that waits or runs", target=label, hint="see `toto job list`")
        of = going[-1]
    await queue.abort(api.call, path, of)
    print(f"{of.label} is aborted")
    return 0


@job.verb("search")
def search(
    pattern: Annotated[str, Argument(metavar="REGEX", help="what to look for, as Python's re has it")],
    only: Annotated[list[str] | None, Argument(metavar="JOB", help="in these jobs (default: all)")] = None,
    repo: Repo = None,
    ignore: Annotated[bool, Option("-i", "--ignore-case", help="take capital and small letters as the same")] = False,
) -> int:
    """Print the lines of the logs that are kept in which a pattern is found, newest run first.

    The exit status is 0 when there are any, else 1.
    """
    history, found = History(infra(repo)), False
    try:
        wanted = re.compile(pattern.encode(), re.IGNORECASE if ignore else 0)
    except re.error as error:
        raise InputError(f"{pattern[:60]!a} is no regular expression: {error}") from None
    for name in only or history.jobs():
        for each in history.runs(name):
            with contextlib.suppress(OSError), history.log(each).open("rb") as file:
                for number, line in enumerate(iter(lambda: file.readline(_LINE), b""), 1):
                    if wanted.search(line):
                        found = True
                        print(f"{each.label}:{number}: {clean(line.decode(errors='replace')).rstrip()}")
    return 0 if found else 1


def _run(history: History, label: str) -> Run:
    """The run that is meant; the newest of a job without a number."""
    if ":" in label:
        return history.get(*Run.parse(label))
    if (newest := next(history.runs(label), None)) is None:
        raise InputError("it has no runs", target=label, hint="see `toto job list`")
    return newest


async def _follow(history: History, of: Run, by: str | None) -> Run:
    """Print the log of a run until it ends, and return it as it is then."""
    waits = False
    with Follower(history.folder(of)) as reading:
        while True:
            of = history.get(of.job, of.number)
            for chunk in reading.read():
                _print(chunk, by)
            if of.state.ended:
                break
            if of.state is State.QUEUED and not waits:
                say(f"{of.label} waits for its turn")
                waits = True
            await asyncio.sleep(_PAUSE)
    say(f"{of.label} {of.state}{f': {of.why}' if of.why else ''}")
    return of


def _print(chunk: bytes, by: str | None) -> None:
    """Print what a job has said. A terminal gets no control characters of it, be it here or at the end of ssh."""
    if by is not None or sys.stdout.isatty():
        print(clean(chunk.decode(errors="replace")), end="", flush=True)
    else:
        sys.stdout.buffer.write(chunk)
        sys.stdout.buffer.flush()
