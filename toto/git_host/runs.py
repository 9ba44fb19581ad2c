"""The runs of toto's deployments, for those who start, watch and cancel them by a command."""

import asyncio
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from toto.base.errors import InputError
from toto.base.prefect_api import Api, ServerError
from toto.git_host import host as git_host
from toto.git_host.follow import ENDS, INFO, PARTIAL, clean, is_chatter

NEWEST: Final = 200  # runs among which one is looked for by the beginning of its id
_DEPTH: Final = 3  # of subflows below subflows: stages, targets, what workers do of them
_PAGE: Final = 200  # lines of a log that one request asks for
_ID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_BEGINNING: Final = re.compile(r"[0-9a-f][0-9a-f-]{3,35}")


async def start(repo: Path, deployment: str, parameters: Mapping[str, Any], user: str | None) -> str:
    """Start a run of `deployment` ("flow/name") on a repo, for a user of the git host; its id. Raises `ServerError`."""
    api = await git_host.api_of(repo)
    found = await api.call("GET", f"/deployments/name/{deployment}")
    asked = {
        "parameters": {"repo": str(repo.resolve()), **parameters},
        "tags": [f"user:{user}"] if user else [],  # as that of a push
    }
    return str((await api.call("POST", f"/deployments/{found['id']}/create_flow_run", asked))["id"])


async def find(api: Api, text: str) -> dict[str, Any]:
    """The run with this id, or the only one of the newest whose id begins so. Raises `InputError`, `ServerError`."""
    if _ID.fullmatch(text):
        try:
            return dict(await api.call("GET", f"/flow_runs/{text}"))
        except ServerError as error:
            if error.status != 404:
                raise
    elif _BEGINNING.fullmatch(text):
        own = {"flow_runs": {"parent_task_run_id": {"is_null_": True}}, "sort": "EXPECTED_START_TIME_DESC"}
        newest = await api.call("POST", "/flow_runs/filter", {**own, "limit": NEWEST})
        found = [each for each in newest if each["id"].startswith(text)]
        if len(found) == 1:
            return dict(found[0])
        if found:
            raise InputError(f"{text} is how the ids of {len(found)} runs begin", hint="write more of it")
    raise InputError(f"there is no run {text[:60]!a}", hint="`toto runs` lists the newest")


async def cancel(api: Api, run: Mapping[str, Any], by: str) -> None:
    """Have a run cancelled: it cleans up, and what it is rolling out is put back.

    Raises `InputError` for one that has ended, and `ServerError`.
    """
    if run["state_type"] in ENDS:
        raise InputError(f"has ended: {ENDS[run['state_type']]}", target=f"run {run['id']}")
    state = {"type": "CANCELLING", "message": f"cancelled by {by}"}
    answer = await api.call("POST", f"/flow_runs/{run['id']}/set_state", {"state": state})
    if answer["status"] not in (
        "ACCEPT",
        "REJECT",
    ):  # (one that has not begun is not cancelling, but cancelled at once)
        raise ServerError(f"cannot be cancelled now: {answer['details'].get('reason')}", target=f"run {run['id']}")


@dataclass(frozen=True)
class Logged:
    """A line of the log of a run, or of one of its subflows."""

    at: str
    run: str
    level: int
    message: str


class Log:
    """The log of a run and of all its subflows, as far as it has been read."""

    def __init__(self, api: Api, run: str) -> None:
        self.api, self.run = api, run
        self._read: Counter[str] = Counter()

    async def new(self) -> list[Logged]:
        """The lines since the last time, by their times. Raises `ServerError`."""
        found = [line for run in await self._runs() for line in await self._of(run)]
        return sorted(found, key=lambda each: each.at)

    async def follow(self, say: Callable[[Logged], None], *, every: float) -> str:
        """Call `say` with each line until the run has ended; the type of the state that it ended in, or `PARTIAL`."""
        while True:
            found = await self.api.call("GET", f"/flow_runs/{self.run}")
            ended = found["state_type"]
            if ended in ENDS:
                await asyncio.sleep(every * 4)  # the last lines come in batches
            for line in await self.new():
                say(line)
            if ended in ENDS:
                return PARTIAL if found["state_name"] == PARTIAL else str(ended)
            await asyncio.sleep(every)

    async def _runs(self) -> list[str]:
        found = parents = [self.run]
        for _ in range(_DEPTH):
            below = {"flow_runs": {"parent_flow_run_id": {"any_": parents}}, "limit": _PAGE}
            parents = [each["id"] for each in await self.api.call("POST", "/flow_runs/filter", below)]
            found = [*found, *parents]
            if not parents:
                break
        return found

    async def _of(self, run: str) -> list[Logged]:
        found = []
        while True:
            lines = {"flow_run_id": {"any_": [run]}, "level": {"ge_": INFO}}
            wanted = {"logs": lines, "sort": "TIMESTAMP_ASC", "offset": self._read[run], "limit": _PAGE}
            fresh = await self.api.call("POST", "/logs/filter", wanted)
            self._read[run] += len(fresh)
            found += [
                Logged(each["timestamp"], run, each["level"], "\n".join(map(clean, each["message"].split("\n"))))
                for each in fresh
                if not is_chatter(each["message"])
            ]
            if len(fresh) < _PAGE:
                return found
