"""What the pusher sees who waits: the progress and the end of runs, told in a terminal while they happen.

`python -m toto.git_host.follow REPO RUN…` is called by the post-receive hook for `git push -o wait` and `-o plan`. It
only watches: when the pusher goes away, or the time is up, it ends and the run goes on.
"""

import argparse
import asyncio
import os
import re
import select
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from toto.base.errors import TotoError
from toto.base.prefect_api import Api, ServerError
from toto.git_host import host as git_host
from toto.git_host import shell as git_shell

PAUSE: Final = 0.5  # seconds between two looks
LAST_WORDS: Final = 5.0  # seconds after its end in which a run's last lines arrive: they come in batches
INFO: Final = 20
ENDS: Final = {"COMPLETED": "done", "FAILED": "failed", "CANCELLED": "cancelled", "CRASHED": "crashed"}
# What Prefect says of itself in a run's log.
_CHATTER: Final = re.compile(
    r"(Beginning (sub)?flow run|Created (sub)?flow run|View at |Finished in state |Worker '.*' submitting|"
    r"Flow run '.*' submitted|Completed submission|Running \d+ deployment pull|Executing deployment step|"
    r"Deployment step '|All deployment steps)")
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # nothing steers the pusher's terminal


def main(arguments: Sequence[str] | None = None) -> int:
    """Follow runs one after the other; status 0 when all are completed, 1 when one is not, 2 when that is not known."""
    parser = argparse.ArgumentParser("toto.git_host.follow", description="Tell how runs go on, until they end.")
    parser.add_argument("repo", type=Path, help="the bare repo whose hook started them")
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--at-most", type=float, default=3600, help="seconds (%(default)g)")
    chosen = parser.parse_args(arguments)
    signal.alarm(int(chosen.at_most) + 60)  # for the last time that nobody reads what is written
    try:
        return asyncio.run(_all(chosen.repo, chosen.runs, time.monotonic() + chosen.at_most))
    except TotoError as error:
        print(f"toto: {error}", flush=True)
        return 2
    except (BrokenPipeError, KeyboardInterrupt):  # nobody listens any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2


async def _all(repo: Path, runs: Sequence[str], deadline: float) -> int:
    api = await git_host.api_of(repo)
    pause = Listener().gone_within
    status = 0
    for run in runs:
        ended = await follow(api, run, lambda text: print(text, flush=True), deadline=deadline, pause=pause)
        if ended is None:
            return 2
        status = status or int(ended != "COMPLETED")
    return status


async def follow(api: Api, run: str, tell: Callable[[str], None], *, deadline: float,
                 pause: Callable[[float], bool]) -> str | None:
    """Tell what a run and its subflows do; the type of the state in which it ended.

    None when `deadline` (of the monotonic clock) came first, or `pause(seconds)` said that nobody listens any more.
    An API that does not answer for a while is told once, and asked again.
    """
    watched = _Watched(api, run, tell)
    while time.monotonic() < deadline:
        try:
            if ended := await watched.look():
                return ended
        except ServerError as error:
            if error.status == 404:
                raise
            watched.say_once("Prefect does not answer; the run goes on, and so does the waiting")
        if await asyncio.to_thread(pause, PAUSE):
            return None
    tell("toto: the time to wait is up; the run goes on")
    return None


class _Watched:
    """One run, and what was told of it."""

    def __init__(self, api: Api, run: str, tell: Callable[[str], None]) -> None:
        self.api, self.run, self.tell = api, run, tell
        self.began = time.monotonic()
        self.stages: list[str] = []
        self.flows: dict[str, str] = {}
        self.lines: Counter[str] = Counter()
        self.told: set[str] = set()
        self.logged: set[str] = set()
        self.ended: float | None = None
        self.closed = False

    async def look(self) -> str | None:
        """Tell what is new; the type of the last state, once all is told."""
        found = await self.api.call("GET", f"/flow_runs/{self.run}", timeout=5)
        await self._subflows()
        await self._log()
        if found["state_name"] == "Late":
            self.say_once("toto has not begun with it: it is busy, or its worker is not there")
        if found["state_type"] not in ENDS:
            return None
        self.ended = self.ended or time.monotonic()
        if not self.closed and time.monotonic() < self.ended + LAST_WORDS:
            return None
        message = found["state"].get("message") or ""
        said = _clean(message) in self.logged  # (nobody needs it twice)
        self.tell(f"toto: {ENDS[found['state_type']]}" + (f": {_clean(message)}" if message and not said else ""))
        return str(found["state_type"])

    def say_once(self, text: str) -> None:
        """A line that is not repeated."""
        if text not in self.told:
            self.told.add(text)
            self.tell(f"{time.monotonic() - self.began:5.0f} s  {_clean(text)}")

    async def _subflows(self) -> None:
        """The stages of the run, and the targets within them, by the names that the UI shows."""
        self.stages, parents = [], [self.run]
        for _ in ("stages", "targets"):
            below = {"flow_runs": {"parent_flow_run_id": {"any_": parents}}, "sort": "START_TIME_ASC"}
            children = await self.api.call("POST", "/flow_runs/filter", below, timeout=5) if parents else []
            for child in children:
                name = f"{await self._flow(child['flow_id'])} / {child['name']}"
                if child["state_type"] in {"RUNNING", *ENDS}:
                    self.say_once(name)
                if child["state_type"] in ENDS:
                    self.say_once(f"{name}: {ENDS[child['state_type']]}")
            parents = [child["id"] for child in children]
            self.stages = self.stages or parents

    async def _flow(self, id: str) -> str:
        """The name of a flow."""
        if id not in self.flows:
            self.flows[id] = (await self.api.call("GET", f"/flows/{id}", timeout=5))["name"]
        return self.flows[id]

    async def _log(self) -> None:
        """The lines that the run and its stages logged; those of tasks and targets are in the UI."""
        for run in (*self.stages, self.run):
            await self._log_of(run)

    async def _log_of(self, run: str) -> None:
        while True:
            wanted: dict[str, Any] = {
                "logs": {"flow_run_id": {"any_": [run]}, "task_run_id": {"is_null_": True},
                         "level": {"ge_": INFO}},
                "sort": "TIMESTAMP_ASC", "offset": self.lines[run], "limit": 200}
            fresh = await self.api.call("POST", "/logs/filter", wanted, timeout=5)
            self.lines[run] += len(fresh)
            for line in fresh:
                self.closed |= run == self.run and line["message"].startswith("Finished in state ")
                if not _CHATTER.match(line["message"]):
                    self.logged.add(_clean(line["message"]))
                    self.tell(_clean(line["message"]))
            if len(fresh) < 200:
                return


def _clean(text: str) -> str:
    return _CONTROL.sub("�", text.rstrip())


class Listener:
    """Whoever reads standard output: at the other end of a pipe, and perhaps of an ssh connection beyond it.

    While git runs a hook, it goes on reading from it when its own reader has gone: the pipe alone tells nothing. But
    then the session that sshd had begun for it (`toto.git_host.shell` knew its parent) is an orphan.
    """

    def __init__(self) -> None:
        self.parent = os.environ.get(git_shell.PARENT_VARIABLE) or git_shell.parent_of_session()
        self.poll = select.poll()
        self.poll.register(sys.stdout.fileno(), 0)  # no event that is waited for: only that there is no reader

    def gone_within(self, seconds: float) -> bool:
        """Wait so long; whether nobody listens any more."""
        return bool(self.poll.poll(seconds * 1000)) or git_shell.parent_of_session() != self.parent


if __name__ == "__main__":
    sys.exit(main())
