"""The approvals: what runs have asked for, and who answered. They are the branch `refs/toto/approvals` of the repo.

A run that needs one asks; the user answers by `ssh toto approve RUN`, and the run goes on when it finds the answer.
There is one file for each run, and a commit for each question and answer, so that `git log refs/toto/approvals` says
who approved what. An answer counts only for the plans that were there when it was given.
"""

import calendar
import json
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from gitdb.exc import BadName
from pydantic import BaseModel, ConfigDict

from toto.base.errors import InputError
from toto.infra_repo import branch, git

REF: Final = "refs/toto/approvals"
_RUN: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_TIME: Final = "%Y-%m-%dT%H:%M:%SZ"


class NothingAsked(InputError):
    """The run does not ask for an approval, or does not ask any more."""


class Answer(BaseModel):
    """Who answered what, and when (UTC)."""

    model_config = ConfigDict(frozen=True)

    approved: bool
    by: str
    at: str


class Asked(BaseModel):
    """What a run asks for: the plans of its targets, by label. It waits for the answer until `until` (UTC)."""

    model_config = ConfigDict(frozen=True)

    plans: dict[str, str]
    at: str
    until: str
    answer: Answer | None = None

    @property
    def waits(self) -> bool:
        """Whether it still waits for an answer."""
        return self.answer is None and calendar.timegm(time.strptime(self.until, _TIME)) > time.time()


def read(repo: Path, run: str) -> Asked | None:
    """What a run asks, or has asked; None when it has not."""
    with git.open_repo(repo) as opened:
        try:
            text = opened.commit(REF).tree.join(_path(run)).data_stream.read()
        except (BadName, ValueError, KeyError):
            return None
    return Asked.model_validate_json(text)


async def ask(repo: Path, run: str, plans: Mapping[str, str], seconds: float) -> Asked:
    """Ask for an approval of `plans` within `seconds`; an earlier question of the run, and its answer, are void."""
    until = time.strftime(_TIME, time.gmtime(time.time() + seconds))
    asked = Asked(plans=dict(plans), at=git.now(), until=until)
    await _write(repo, run, lambda _: asked, f"{run} asks to approve {', '.join(plans)}")
    return asked


async def answer(repo: Path, run: str, *, approved: bool, by: str) -> Asked:
    """Record the answer of `by` to what a run asks. Raises `NothingAsked` when it does not ask, or not any more."""

    def change(asked: Asked | None) -> Asked:
        if asked is None:
            raise NothingAsked("does not ask for an approval", target=f"run {run}")
        if asked.answer is not None:
            said = "approved" if asked.answer.approved else "rejected"
            raise NothingAsked(f"was {said} by {asked.answer.by} at {asked.answer.at}", target=f"run {run}")
        if not asked.waits:
            raise NothingAsked(
                f"has waited until {asked.until}, and does not any more",
                target=f"run {run}",
                hint="start it again, and answer the new run",
            )
        return asked.model_copy(update={"answer": Answer(approved=approved, by=by, at=git.now())})

    return await _write(repo, run, change, f"{run} {'approved' if approved else 'rejected'} by {by}")


async def withdraw(repo: Path, run: str) -> None:
    """End the question of a run that does not wait for the answer any more; an answer that was given stays."""

    def change(asked: Asked | None) -> Asked | None:
        return asked.model_copy(update={"until": git.now()}) if asked is not None and asked.waits else asked

    if read(repo, run) is not None:
        await _write(repo, run, change, f"{run} does not wait any more")


def _path(run: str) -> str:
    if not _RUN.fullmatch(run):
        raise NothingAsked(f"{ascii(run)[:60]} is not the id of a run")
    return f"{run}.json"


async def _write(repo: Path, run: str, change: Callable[[Asked | None], Asked | None], message: str) -> Asked:
    path, written = _path(run), None

    def edit(texts: Mapping[str, str]) -> dict[str, str | None]:
        nonlocal written
        written = change(Asked.model_validate_json(texts[path]) if path in texts else None)
        return {} if written is None else {path: json.dumps(written.model_dump(), indent=1, sort_keys=True) + "\n"}

    await branch.change(repo, REF, [path], edit, message)
    assert written is not None
    return written
