"""What compliance checks found on each machine, over time: the branch `refs/toto/compliance` of the infra repo on toto.

It has one JSON file for each machine, `host/web1.json`, with all results of its last check and the counts of those
before, and a commit for each check: `git log refs/toto/compliance` is the history. When it is lost, nothing else is.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

from gitdb.exc import BadName
from pydantic import BaseModel, ConfigDict, ValidationError

from toto.compliance.results import Control, Outcome, counts, summary
from toto.infra_repo import branch, git

REF: Final = "refs/toto/compliance"
KEPT: Final = 400  # counts of a machine's checks, the newest
_FOLDER: Final = "host"


class Counts(BaseModel):
    """One check of a machine in numbers: when (UTC), of which commit, by which run, how many controls by outcome.

    `worst` is the highest impact of what failed or could not be run; 0 when nothing did.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    at: str
    commit: str
    run: str
    controls: dict[Outcome, int]
    worst: float = 0.0


class Checked(BaseModel):
    """What is known of a machine: the controls of its last check, and the counts of all, the oldest first."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    controls: tuple[Control, ...]
    trend: tuple[Counts, ...]

    def and_now(self, controls: Sequence[Control], commit: str, run: str) -> Self:
        """The same after one more check."""
        now = Counts(
            at=git.now(),
            commit=commit,
            run=run,
            controls={each: count for each, count in counts(controls).items() if count},
            worst=max((each.impact for each in controls if each.bad), default=0.0),
        )
        return self.model_copy(update={"controls": tuple(controls), "trend": (*self.trend, now)[-KEPT:]})


NEVER: Final = Checked(controls=(), trend=())


@dataclass(frozen=True)
class Known:
    """The machines that were checked, by name, as `commit` of the branch has them; "" before the first."""

    commit: str = ""
    machines: Mapping[str, Checked] = field(default_factory=dict)


def read(repo: Path, known: Known | None = None) -> Known:
    """What is known of a repo's machines; `known` itself while nothing is new.

    A file that does not parse is left out: the next check of its machine begins anew.
    """
    with git.open_repo(repo) as opened:
        try:
            head = opened.commit(REF)
            if known is not None and known.commit == head.hexsha:
                return known
            blobs = head.tree[_FOLDER].blobs
        except (BadName, ValueError, KeyError):
            return Known()
        found = {str(each.name).removesuffix(".json"): _parsed(each.data_stream.read()) for each in blobs}
        return Known(str(head.hexsha), {name: its for name, its in found.items() if its is not NEVER})


async def record(repo: Path, machine: str, controls: Sequence[Control], commit: str, run: str) -> str:
    """Record a check of a machine; return what is different from the one before, in words. Raises `NotWritten`."""
    path, different = f"{_FOLDER}/{machine}.json", ""

    def edit(texts: Mapping[str, str]) -> dict[str, str | None]:
        nonlocal different
        before = _parsed(texts.get(path, ""))
        different = change(before.controls, controls) if before.trend else ""
        now = before.and_now(controls, commit, run)
        return {path: json.dumps(now.model_dump(mode="json"), indent=1, sort_keys=True) + "\n"}

    await branch.change(repo, REF, [path], edit, f"{machine}: {summary(controls)}")
    return different


async def forget_all_but(repo: Path, machines: Collection[str]) -> None:
    """Forget the machines that are not there any more. Raises `NotWritten`."""
    gone = [f"{_FOLDER}/{each}.json" for each in read(repo).machines if each not in machines]
    if gone:
        await branch.change(repo, REF, gone, lambda _: dict.fromkeys(gone), f"{len(gone)} machines are gone")


def change(before: Sequence[Control], after: Sequence[Control]) -> str:
    """What is different, in one line, such as `1 fails since, 2 are mended`; "" when the same controls fail."""
    failed, fails = ({each.name for each in controls if each.bad} for controls in (before, after))
    new, mended = len(fails - failed), len(failed - fails)
    parts = [f"{new} {'fails' if new == 1 else 'fail'} since"] if new else []
    parts += [f"{mended} {'is' if mended == 1 else 'are'} mended"] if mended else []
    return ", ".join(parts)


def _parsed(text: str | bytes) -> Checked:
    try:
        return Checked.model_validate_json(text)
    except ValidationError:
        return NEVER
