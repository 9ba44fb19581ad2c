"""Remembers what each venue was notified of, so that it gets a failure once, and again when it changes or is over.

It is stored beside the ledger: a JSON file for each kind of check on the branch `refs/toto/told` of the infra repo.
This module also writes a run's result as a git note on its commit (`git log --notes=toto`). If either is lost, venues
are notified once more, and nothing else happens.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from toto.infra_repo import branch, git
from toto.report.message import Message

REF: Final = "refs/toto/told"  # an old name that stays: installed repos have their data under it
NOTES: Final = "refs/notes/toto"
_MOST_LINES: Final = 50  # kept of a note


class Known(BaseModel):
    """A failure that a venue knows of: its `Problem.key`, and since when it knows (UTC, ISO 8601)."""

    model_config = ConfigDict(frozen=True)

    key: str
    since: str


Notified = dict[str, dict[str, Known]]  # by venue, by target
# (They are kept apart: one may find good what the other finds wrong.)
Check: TypeAlias = Literal["reconcile", "drift", "compliance"]
_NOTIFIED: Final = TypeAdapter(Notified)


def news(message: Message, known: Mapping[str, Known]) -> Message | None:
    """The message for a venue that knows of these failures, with what has recovered since; None when it is no news.

    News is a failure that the venue does not know, a failure that is over, a target that could not be reverted, and, in
    a run that did not fail, everything that was deployed.
    """
    fresh = any(target not in known or known[target].key != key for target, key in _keys(message).items())
    recovered = {target: failure.since for target, failure in known.items() if message.is_good(target)}
    if not (fresh or recovered or message.stuck or (message.changed and message.state != "failed")):
        return None
    return replace(
        message, recovered=recovered, state="recovered" if recovered and message.state == "done" else message.state
    )


def after(message: Message, known: Mapping[str, Known]) -> dict[str, Known]:
    """What a venue knows after it was notified of this message."""
    still = {target: each for target, each in known.items() if not message.is_good(target)}
    return still | {
        target: Known(key=key, since=known[target].since if target in known else git.now())
        for target, key in _keys(message).items()
    }


def _keys(message: Message) -> dict[str, str]:
    keys: dict[str, str] = {}
    for problem in message.problems:
        keys[problem.target] = "+".join(filter(None, (keys.get(problem.target), problem.key)))
    return keys


async def read(repo: Path, check: Check = "reconcile") -> Notified:
    """What the venues of a repo were last notified of; empty when that cannot be read."""
    done = await git.git(repo, "cat-file", "blob", f"{REF}:{check}.json", check=False)
    return _parse(done.stdout)


async def remember(repo: Path, notified: Notified, check: Check = "reconcile") -> None:
    """Store what these venues know now, and keep what the others know. Raises `NotWritten`."""
    file = f"{check}.json"

    def edit(texts: Mapping[str, str]) -> dict[str, str]:
        before = _parse(texts.get(file, ""))
        merged = {venue: known for venue, known in (before | notified).items() if known}
        if merged == before:
            return {}
        return {file: json.dumps(_NOTIFIED.dump_python(merged), indent=1, sort_keys=True) + "\n"}

    await branch.change(repo, REF, [file], edit, f"notified {', '.join(sorted(notified))}")


def _parse(text: str) -> Notified:
    try:
        return _NOTIFIED.validate_json(text)
    except ValidationError:
        return {}


async def note(repo: Path, commit: str, message: Message) -> None:
    """Add the result to the note of its commit, unless the note's last line has it already. Raises `NotWritten`."""
    said = f"{message.state}: {message.summary}"

    def edit(text: str) -> str:
        lines = text.splitlines()
        if lines and lines[-1].partition(" ")[2].partition(" <")[0] == said:
            return text
        link = f" <{message.link}>" if message.link else ""
        return "\n".join([*lines, f"{git.now()} {said}{link}"][-_MOST_LINES:]) + "\n"

    await branch.change_note(repo, NOTES, commit, edit)
