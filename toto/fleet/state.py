"""What is known of every target, read from where it is kept: the ledgers, the results of runs, the contact of machines.

Nothing is kept here but what was read, for as long as the ledger that it was read from has not changed.
"""

import asyncio
import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

from gitdb.exc import BadName

from toto.base.errors import InputError, TotoError
from toto.base.moment import moment
from toto.base.prefect_api import Api
from toto.fleet import builds
from toto.fleet import results as results_of
from toto.fleet.builds import Built
from toto.fleet.results import AS_WANTED, OTHERS, Result
from toto.git_host.host import infra_repos
from toto.git_host.shared import name_of
from toto.infra_repo import git
from toto.infra_repo.deployed import manifest_of
from toto.infra_repo.manifest import FILE
from toto.ledger import history
from toto.ledger.ledger import Entry, Frozen, Ledger, Snapshot, owner_lives
from toto.ledger.target import HOST, Target
from toto.machine import condition, owners, signing_key
from toto.machine.condition import Condition

RUNS: Final = 50  # of the timeline
FRESH: Final = 1.0  # seconds for which what was read is shown again
_RESULTS: Final = 20  # runs, of one repo, among which the newest result of a target is looked for
_EVENTS: Final = 100  # of a target's page
_BUILDS: Final = 20  # runs that built something

Mood: TypeAlias = Literal["bad", "warn", "busy", "good", "none"]
_MOODS: Final[tuple[Mood, ...]] = ("bad", "warn", "busy", "good", "none")  # what needs a person comes first


@dataclass(frozen=True)
class Commit:
    """A commit for people."""

    hash: str
    author: str = ""
    subject: str = ""


@dataclass(frozen=True)
class Line:
    """One target. `state` is by the ledger, `since` when (UTC); `commit` is what it runs, `desired` what it is to run.

    `condition` is how a machine was when it was `heard` of last, in seconds since 1970; 0 for never. `vouched` is until
    when it obeys toto only by a certificate, in the same form. `frozen` says by whom, or that the manifest says so.
    """

    repo: str
    target: Target
    state: str
    why: str
    mood: Mood
    since: str
    commit: Commit | None
    desired: Commit | None
    system: str
    last: Result
    condition: Condition | None = None
    heard: float = 0
    vouched: float = 0
    frozen: Frozen | None = None

    @property
    def label(self) -> str:
        return self.target.label

    @property
    def notes(self) -> list[str]:
        """What a person should know of a target besides: who has frozen it; of a machine, how it differs, and whether
        it waits for a reboot."""
        notes = [str(self.frozen)] if self.frozen else []
        if self.condition is not None:
            notes += [f"drifted: {each}" for each in self.condition.drift]
            notes += ["reboot needed"] if self.condition.reboot_needed else []
        if self.vouched:
            until = moment(self.vouched)
            notes.append(f"obeys toto by a certificate, until {until}: list the key of `toto machine signer`")
        return notes

    def json(self) -> dict[str, Any]:
        """As the page's JSON has it."""
        return {
            "repo": self.repo,
            "target": str(self.target),
            "state": self.state,
            "why": self.why,
            "mood": self.mood,
            "since": self.since,
            "commit": None if self.commit is None else vars(self.commit),
            "desired": None if self.desired is None else vars(self.desired),
            "system": self.system,
            "last": vars(self.last),
            "drift": list(self.condition.drift) if self.condition else [],
            "reboot_needed": bool(self.condition and self.condition.reboot_needed),
            "heard": moment(self.heard) if self.heard else None,
            "vouched_until": moment(self.vouched) if self.vouched else None,
            "notes": self.notes,
            "frozen": self.frozen and self.frozen.model_dump(),
        }


@dataclass(frozen=True)
class Ran:
    """A run: its id, name and flow, its state and what that says, when it began (UTC) and how many seconds it took."""

    id: str
    name: str
    state: str
    mood: Mood
    message: str
    began: str
    seconds: float | None

    def json(self) -> dict[str, Any]:
        """As the page's JSON has it."""
        return {name: value for name, value in vars(self).items() if name != "mood"}


@dataclass(frozen=True)
class State:
    """The fleet at one moment: its targets, those that need a person first; its runs and repos; what is not known."""

    lines: tuple[Line, ...]
    runs: tuple[Ran, ...]
    errors: tuple[str, ...]
    repos: tuple[str, ...] = ()
    stamp: str = ""
    """differs when anything has changed but the time at which a machine was heard of"""

    def line(self, repo: str, target: Target) -> Line | None:
        """One target of a repo."""
        return next((each for each in self.lines if (each.repo, each.target) == (repo, target)), None)

    @property
    def counts(self) -> dict[Mood, int]:
        """How many targets there are of each mood that there is."""
        moods = [each.mood for each in self.lines]
        return {mood: moods.count(mood) for mood in _MOODS if mood in moods}


class Fleet:
    """The fleet of the infra repos in a folder, or of the `only` one. `api` is Prefect's, which has the runs."""

    def __init__(self, repos: Path, api: Api, only: Path | None = None) -> None:
        self.repos, self.api, self.only = repos, api, only
        self._commits: dict[Path, dict[str, Commit]] = {}
        self._reading = asyncio.Lock()
        self._state = State((), (), ())
        self._read_at = float("-inf")

    async def now(self) -> State:
        """The fleet as it is; at most `FRESH` seconds old."""
        async with self._reading:
            if time.monotonic() - self._read_at > FRESH:
                self._state = await self._gathered()
                self._read_at = time.monotonic()
        return self._state

    @property
    def names(self) -> list[str]:
        """The names of the infra repos."""
        return [name_of(each) for each in infra_repos(self.repos)]

    def repo(self, name: str) -> Path | None:
        """The infra repo of this name."""
        return next((each for each in infra_repos(self.repos) if name_of(each) == name), None)

    async def events(self, repo: Path, target: Target) -> list[history.Event]:
        """What happened to a target, newest first."""
        return (await asyncio.to_thread(history.events, repo, _EVENTS, target))[::-1]

    async def shown(self, keys: Sequence[str]) -> dict[str, Any]:
        """The newest artifacts of these keys, by key: their data."""
        found = await self.api.call(
            "POST", "/artifacts/latest/filter", {"artifacts": {"key": {"any_": list(keys)}}, "limit": len(keys)}
        )
        return {each["key"]: each["data"] for each in found}

    async def builds(self, repo: str) -> list[Built]:
        """What was built of a repo, by commit, the newest first."""
        wanted = {"artifacts": {"key": {"any_": [builds.key(repo)]}}, "sort": "CREATED_DESC", "limit": _BUILDS}
        return Built.of(await self.api.call("POST", "/artifacts/filter", wanted))

    async def _gathered(self) -> State:
        repos = [self.only] if self.only else infra_repos(self.repos)
        errors: list[str] = []
        try:
            runs, results = await asyncio.gather(self.runs(), self._results([name_of(each) for each in repos]))
        except TotoError as error:
            runs, results = [], {}
            errors.append(f"the runs cannot be read: {error}")
        lines = await asyncio.to_thread(self._lines, repos, results, errors)
        lines.sort(key=lambda each: (_MOODS.index(each.mood), each.repo, each.target.kind != HOST, each.target))
        names = tuple(map(name_of, repos))
        told = [(replace(each, condition=None, heard=0), each.notes) for each in lines]
        stamp = hashlib.sha256(repr((told, runs, errors, names)).encode()).hexdigest()
        return State(tuple(lines), tuple(runs), tuple(errors), names, stamp)

    def _lines(self, repos: Iterable[Path], results: Mapping[str, Sequence[Any]], errors: list[str]) -> list[Line]:
        found: list[Line] = []
        owned = owners.read()
        for repo in repos:
            try:
                last = results_of.newest(results.get(results_of.key(name_of(repo)), ()))
                found += self._lines_of(repo, last, owned)
            except (TotoError, OSError) as error:
                errors.append(f"{name_of(repo)}: its ledger cannot be read: {error}")
        return found

    def _lines_of(self, repo: Path, last: Mapping[str, Result], owned: owners.Owners) -> Iterator[Line]:
        entries, machines = dict(self._read(repo).entries), condition.known(repo)
        commits, frozen = self._commits.get(repo, {}), _frozen(repo)
        for target in map(Target.of, last.keys() - {OTHERS}):  # such as one whose first rehearsal failed
            if last[target.label].result not in ("retired", AS_WANTED):
                entries.setdefault(target, Entry())
        for target, entry in entries.items():
            made = _line(name_of(repo), commits, target, entry, last)
            if target.kind == HOST:
                made = replace(made, frozen=made.frozen or frozen.get(target.name))
            if target.kind == HOST and target.name in machines:
                known = condition.read(repo, target.name, owned)
                made = replace(made, condition=known, heard=condition.heard(repo, target.name, known))
                with suppress(InputError):  # (a certificate that cannot be read)
                    made = replace(made, vouched=signing_key.vouched_until(repo, target.name) or 0)
            yield replace(made, mood="warn") if made.notes and made.mood == "good" else made

    def _read(self, repo: Path) -> Snapshot:
        """A repo's ledger, with the commits that it names in `_commits`. Raises `LedgerError`, OSError."""
        ledger = Ledger(repo).read()
        named = {each for entry in ledger.entries.values() for each in _commits_of(entry)}
        known = self._commits.get(repo, {})
        if named != known.keys():
            with git.open_repo(repo) as opened:
                self._commits[repo] = {each: known.get(each) or _commit(opened, each) for each in named}
        return ledger

    async def runs(self, most: int = RUNS) -> list[Ran]:
        """The newest runs, of all repos. Raises `ServerError`."""
        own = {"parent_task_run_id": {"is_null_": True}, "state": {"type": {"not_any_": ["SCHEDULED"]}}}
        wanted = {"flow_runs": own, "sort": "EXPECTED_START_TIME_DESC", "limit": most}
        return [_ran(each) for each in await self.api.call("POST", "/flow_runs/filter", wanted)]

    async def _results(self, repos: Sequence[str]) -> dict[str, list[Any]]:
        """The newest results of each repo's runs, the newest first, by the artifacts' keys."""
        keys = [results_of.key(each) for each in repos]
        wanted = [{"artifacts": {"key": {"any_": [key]}}, "sort": "CREATED_DESC", "limit": _RESULTS} for key in keys]
        found = await asyncio.gather(*(self.api.call("POST", "/artifacts/filter", each) for each in wanted))
        return dict(zip(keys, found, strict=True))


def _line(repo: str, commits: Mapping[str, Commit], target: Target, entry: Entry, last: Mapping[str, Result]) -> Line:
    state, why, since, mood = described(entry)
    result = last.get(target.label) or last.get(OTHERS) or Result("")
    if mood in ("good", "none") and result.failed:
        mood = "bad"
    elif mood in ("good", "none") and result.result in ("held back", "waiting"):
        mood = "warn"
    runs = entry.good or entry.rehearsed
    return Line(
        repo=repo,
        target=target,
        state=state,
        why=why,
        mood=mood,
        since=since,
        commit=commits.get(runs.commit) if runs else None,
        desired=commits.get(entry.intent.desired.commit) if entry.intent else None,
        system=str(getattr(runs, "path", "") or ""),
        last=result,
        frozen=entry.frozen,
    )


def _frozen(repo: Path) -> dict[str, Frozen]:
    """The machines that the deployed manifest freezes."""
    try:
        machines = manifest_of(repo).machines
    except TotoError:  # (a plan tells of it)
        return {}
    return {
        name: Frozen(by=FILE, why=each.freeze if isinstance(each.freeze, str) else "freeze: true")
        for name, each in machines.items()
        if each.freeze
    }


def described(entry: Entry) -> tuple[str, str, str, Mood]:
    """The state of a target by its entry: in a word, why, since when (UTC), and how that is for a person.

    `half done`: the process that was changing it is gone.
    """
    said: tuple[str, str, str, Mood] = ("not deployed", "", "", "none")
    if entry.intent:
        at_it = f"run {entry.intent.run}: {entry.intent.step}"
        said = "being changed", at_it, entry.intent.at, "busy"
        if owner_lives(entry.intent.owner) is False:
            said = "half done", at_it, entry.intent.at, "bad"
    elif entry.unreachable:
        said = "unreachable", entry.unreachable.why, entry.unreachable.at, "warn"
    elif entry.reverted:
        said = "reverted", entry.reverted.why, entry.reverted.at, "bad"
    elif entry.accepted:
        said = "accepted", f"{entry.accepted.by}: {entry.accepted.why}", entry.accepted.at, "good"
    elif entry.good:
        said = "good", "", entry.good.at, "good"
    elif entry.rehearsed:
        said = "rehearsed only", "", entry.rehearsed.at, "good"
    return said


def _commits_of(entry: Entry) -> Iterator[str]:
    runs = entry.good or entry.rehearsed
    yield from (each.commit for each in (runs, entry.intent.desired if entry.intent else None) if each)


def _commit(opened: Any, name: str) -> Commit:
    try:
        found = opened.commit(name)
    except (BadName, ValueError):
        return Commit(name)
    return Commit(name, str(found.author.name or ""), str(found.summary))


_RUN_MOODS: Final[Mapping[str, Mood]] = {
    "COMPLETED": "good",
    "FAILED": "bad",
    "CRASHED": "bad",
    "RUNNING": "busy",
    "PENDING": "busy",
    "CANCELLING": "busy",
    "PAUSED": "warn",
}


def _ran(run: Mapping[str, Any]) -> Ran:
    state = run["state"] or {}
    mood = _RUN_MOODS.get(run["state_type"] or "", "none")
    return Ran(
        id=run["id"],
        name=run["name"],
        state=run["state_name"] or "",
        mood="warn" if run["state_name"] == "Partial" else mood,
        message=(state.get("message") or "").split("\n", 1)[0],
        began=run["start_time"] or run["expected_start_time"] or "",
        seconds=run["total_run_time"] if run["end_time"] else None,
    )
