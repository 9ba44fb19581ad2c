"""Prints the progress and the end of runs in the terminal of a pusher who waits for them.

The post-receive hook calls `python -m toto.git_host.follow REPO RUN…` for `git push -o wait` and `-o plan`. It only
watches: when the pusher goes away, or the time is up, it ends and the run goes on.
"""

import argparse
import asyncio
import contextlib
import os
import re
import select
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeAlias

from toto.base.errors import TotoError
from toto.base.prefect_api import Api, ServerError
from toto.git_host import host as git_host
from toto.git_host import shell as git_shell

AT_MOST: Final = 3600.0  # seconds
PAUSE: Final = 0.5  # seconds between two checks
LAST_WORDS: Final = 5.0  # seconds to wait for a run's last lines after its end: they come in batches
INFO: Final = 20
_SHOWN: Final = 10  # steps at work, at once
ENDS: Final = {"COMPLETED": "done", "FAILED": "failed", "CANCELLED": "cancelled", "CRASHED": "crashed"}
PARTIAL: Final = "Partial"  # the name of the state of a run that is done only in part
STATUS: Final = {"COMPLETED": 0, PARTIAL: 3}  # of all others 1
_ACCEPTED: Final = "toto: git now says that the push failed, for its exit status: the commits are on toto all the same"
# Prefect's own lines in a run's log.
_CHATTER: Final = re.compile(
    r"(Beginning (sub)?flow run|Created (sub)?flow run|View at |Finished in state |Worker '.*' submitting|"
    r"Flow run '.*' submitted|Completed submission|Running \d+ deployment pull|Executing deployment step|"
    r"Deployment step '|All deployment steps)"
)
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # none may reach the pusher's terminal


def main(arguments: Sequence[str] | None = None) -> int:
    """Follow runs one after the other.

    Status 0: all are done; 1: one failed or was cancelled; 2: that is not known; 3: one is done only in part.
    """
    parser = argparse.ArgumentParser("toto.git_host.follow", description="Print the progress of runs until they end.")
    parser.add_argument("repo", type=Path, help="the bare repo whose hook started them")
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--at-most", type=float, default=AT_MOST, help="seconds (%(default)g)")
    chosen = parser.parse_args(arguments)
    signal.alarm(int(chosen.at_most) + 60)  # in case that printing blocks, because nobody reads
    status = _status(chosen.repo, chosen.runs, chosen.at_most)
    if (pipe := os.environ.get(git_shell.STATUS_VARIABLE)) and status:
        with contextlib.suppress(OSError):  # (toto's shell has gone: nobody waits any more)
            os.write(int(pipe), str(status).encode())
        with contextlib.suppress(BrokenPipeError):
            print(_ACCEPTED, flush=True)
    return status


def _status(repo: Path, runs: Sequence[str], at_most: float) -> int:
    try:
        return asyncio.run(to_the_end(repo, runs, time.monotonic() + at_most))
    except TotoError as error:
        print(f"toto: {error}", flush=True)
        return 2
    except (BrokenPipeError, KeyboardInterrupt):  # nobody reads the output any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2


@dataclass(frozen=True)
class Working:
    """A step of a run that is at work: its name, since when (UTC), and the last line that it logged."""

    name: str
    began: str
    said: str


_SAY: Final = partial(print, flush=True)
Show: TypeAlias = Callable[[Sequence[Working]], None]


async def to_the_end(
    repo: Path,
    runs: Sequence[str],
    deadline: float,
    *,
    steps: bool = False,
    say: Callable[[str], None] = _SAY,
    show: Show | None = None,
) -> int:
    """Print the progress of runs of a repo, one after the other, until `deadline` of the monotonic clock.

    With `steps`, also what their steps log, such as the lines of a build. `show` gets what is at work, at each look.
    Returns the status of `main`.
    """
    api = await git_host.api_of(repo)
    pause = Listener().gone_within
    status = 0
    for run in runs:
        ended = await follow(api, run, say, deadline=deadline, pause=pause, steps=steps, show=show)
        if ended is None:
            return 2
        status = 1 if 1 in (status, STATUS.get(ended, 1)) else status or STATUS[ended]
    return status


async def follow(
    api: Api,
    run: str,
    say: Callable[[str], None],
    *,
    deadline: float,
    pause: Callable[[float], bool],
    steps: bool = False,
    show: Show | None = None,
) -> str | None:
    """Call `say` with what a run and its subflows do; return the type of the state in which it ended, or `PARTIAL`.

    Returns None when `deadline` (of the monotonic clock) came first, or when `pause(seconds)` returned that nobody
    reads any more. While the API does not answer it says so once, and tries again. Raises `ServerError` when there is
    no such run.
    """
    watched = _Watched(api, run, say, steps)
    while time.monotonic() < deadline:
        try:
            if ended := await watched.check():
                return ended
            if show is not None:
                show(await watched.working())
        except ServerError as error:
            if error.status == 404:
                raise
            watched.say_once("Prefect does not answer; the run goes on, and so does the waiting")
        if await asyncio.to_thread(pause, PAUSE):
            return None
    say("toto: the time to wait is up; the run goes on")
    return None


class _Watched:
    """One run, and the lines that were already said about it."""

    def __init__(self, api: Api, run: str, say: Callable[[str], None], steps: bool) -> None:
        self.api, self.run, self.say, self.steps = api, run, say, steps
        self.began = time.monotonic()
        self.stages: list[str] = []
        self.at_work: dict[str, str] = {run: ""}  # the run and its subflows that have not ended, and their names
        self.flows: dict[str, str] = {}
        self.lines: Counter[str] = Counter()
        self.said: set[str] = set()
        self.logged: set[str] = set()
        self.ended: float | None = None
        self.closed = False

    async def check(self) -> str | None:
        """Say what is new; return the type of the final state once everything is said, else None."""
        found = await self.api.call("GET", f"/flow_runs/{self.run}", timeout=5)
        await self._subflows()
        await self._log()
        if found["state_name"] == "Late":
            self.say_once("toto has not started it: it is busy, or its worker does not run")
        if found["state_type"] not in ENDS:
            return None
        self.ended = self.ended or time.monotonic()
        if not self.closed and time.monotonic() < self.ended + LAST_WORDS:
            return None
        message = found["state"].get("message") or ""
        said = clean(message) in self.logged  # (then it is not repeated)
        partial = found["state_name"] == PARTIAL
        end = "done in part" if partial else ENDS[found["state_type"]]
        self.say(f"toto: {end}" + (f": {clean(message)}" if message and not said else ""))
        return PARTIAL if partial else str(found["state_type"])

    def say_once(self, text: str) -> None:
        """Say a line, if it was not said before."""
        if text not in self.said:
            self.said.add(text)
            self.say(f"{time.monotonic() - self.began:5.0f} s  {clean(text)}")

    async def _subflows(self) -> None:
        """The stages of the run, and the targets within them, by the names that the UI shows."""
        self.stages, parents, self.at_work = [], [self.run], {self.run: ""}
        for _ in ("stages", "targets"):
            below = {"flow_runs": {"parent_flow_run_id": {"any_": parents}}, "sort": "START_TIME_ASC"}
            children = await self.api.call("POST", "/flow_runs/filter", below, timeout=5) if parents else []
            for child in children:
                name = f"{await self._flow(child['flow_id'])} / {child['name']}"
                if child["state_type"] in {"RUNNING", *ENDS}:
                    self.say_once(name)
                if child["state_type"] in ENDS:
                    self.say_once(f"{name}: {ENDS[child['state_type']]}")
                if child["state_type"] == "RUNNING":
                    self.at_work[child["id"]] = child["name"]
            parents = [child["id"] for child in children]
            self.stages = self.stages or parents
        working = {child["id"]: child["name"] for child in children if child["state_type"] == "RUNNING"}
        if working:
            await self._steps(working)

    async def _steps(self, targets: Mapping[str, str]) -> None:
        """What is done with the targets that are at work (by the ids of their flow runs), such as a phase's tests."""
        begun = {
            "flow_runs": {"id": {"any_": [*targets]}},
            "task_runs": {"state": {"type": {"any_": ["RUNNING", *ENDS]}}},
            "sort": "EXPECTED_START_TIME_ASC",
        }
        for step in await self.api.call("POST", "/task_runs/filter", begun, timeout=5):
            self.say_once(f"{targets[step['flow_run_id']]}: {step['name']}")

    async def working(self) -> list[Working]:
        """The steps that are at work, the first that began first. Raises `ServerError`."""
        begun = {
            "flow_runs": {"id": {"any_": [*self.at_work]}},
            "task_runs": {"state": {"type": {"any_": ["RUNNING"]}}, "subflow_runs": {"exists_": False}},
            "sort": "EXPECTED_START_TIME_ASC",
            "limit": _SHOWN,
        }
        found = []
        for step in await self.api.call("POST", "/task_runs/filter", begun, timeout=5):
            of = {"task_run_id": {"any_": [step["id"]]}}
            last = await self.api.call(
                "POST", "/logs/filter", {"logs": of, "sort": "TIMESTAMP_DESC", "limit": 1}, timeout=5
            )
            said = last[0]["message"].rpartition("\n")[2] if last else await self._progress(step["id"])
            target = self.at_work.get(step["flow_run_id"], "")
            name = ": ".join(filter(None, [target, step["name"]]))
            found.append(Working(clean(name), step["start_time"] or step["expected_start_time"], clean(said)))
        return found

    async def _progress(self, step: str) -> str:
        """What the progress bar of a step says, such as how many hosts are evaluated."""
        asked = {"task_run_id": {"any_": [step]}, "type": {"any_": ["progress"]}}
        found = await self.api.call("POST", "/artifacts/filter", {"artifacts": asked, "limit": 1}, timeout=5)
        return (found[0]["description"] or "") if found else ""

    async def _flow(self, id: str) -> str:
        """The name of a flow."""
        if id not in self.flows:
            self.flows[id] = (await self.api.call("GET", f"/flows/{id}", timeout=5))["name"]
        return self.flows[id]

    async def _log(self) -> None:
        """The lines that the run and its stages logged; those of targets, and by default of steps, are in the UI."""
        for run in (*self.stages, self.run):
            await self._log_of(run)

    async def _log_of(self, run: str) -> None:
        while True:
            lines: dict[str, Any] = {"flow_run_id": {"any_": [run]}, "level": {"ge_": INFO}}
            wanted: dict[str, Any] = {
                "logs": lines if self.steps else {**lines, "task_run_id": {"is_null_": True}},
                "sort": "TIMESTAMP_ASC",
                "offset": self.lines[run],
                "limit": 200,
            }
            fresh = await self.api.call("POST", "/logs/filter", wanted, timeout=5)
            self.lines[run] += len(fresh)
            for line in fresh:
                self.closed |= run == self.run and line["message"].startswith("Finished in state ")
                if not is_chatter(line["message"]):
                    self.logged.add(clean(line["message"]))
                    self.say(clean(line["message"]))
            if len(fresh) < 200:
                return


def is_chatter(message: str) -> bool:
    """Whether a line of a log is one of Prefect's own, of no use to people."""
    return _CHATTER.match(message) is not None


def clean(text: str) -> str:
    """`text` without what a terminal would obey."""
    return _CONTROL.sub("�", text.rstrip())


class Listener:
    """The reader of standard output, at the other end of a pipe and perhaps of an ssh connection behind it.

    git goes on reading from a hook when git's own reader has gone, so the pipe alone is no sign. But then the session
    that sshd started for git has lost its parent, which `toto.git_host.shell` has noted.
    """

    def __init__(self) -> None:
        self.parent = os.environ.get(git_shell.PARENT_VARIABLE) or git_shell.parent_of_session()
        self.poll = select.poll()
        self.poll.register(sys.stdout.fileno(), 0)  # waits for no event but the loss of the reader

    def gone_within(self, seconds: float) -> bool:
        """Wait up to `seconds`; return whether nobody reads any more."""
        return bool(self.poll.poll(seconds * 1000)) or git_shell.parent_of_session() != self.parent


if __name__ == "__main__":
    sys.exit(main())
