"""Reads the history of every target from the ledger's commits, for notebooks and charts."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path

import git as gitpython
from gitdb.exc import BadName

from toto.infra_repo import git
from toto.ledger.ledger import REF, Entry
from toto.ledger.target import Target


class What(StrEnum):
    """What happened to a target in one commit of the ledger."""

    BEGUN = "begun"  # an intent was opened
    GOOD = "good"  # the roll-out passed all its tests
    VERIFIED = "verified"  # the target was what it should be, and nothing was touched
    ACCEPTED = "accepted"  # a person took its present state as good
    REVERTED = "reverted"
    UNREACHABLE = "unreachable"
    RETIRED = "retired"


@dataclass(frozen=True)
class Event:
    """One thing that happened to a target. `seconds` is the time since its intent was opened, None when unknown."""

    at: datetime
    target: Target
    what: What
    commit: str
    run: str
    why: str = ""
    seconds: float | None = None


def events(repo: Path, most: int = 10_000, target: Target | None = None) -> list[Event]:
    """What happened to the targets of an infra repo, or to one of them, oldest first.

    It is read from the newest `most` commits of the ledger that are about them.
    """
    path = f"{target}.json" if target else None
    found: list[Event] = []
    with git.open_repo(repo) as opened:
        try:
            commits = list(opened.iter_commits(REF, path or "", max_count=most))
        except (BadName, ValueError):
            return []
        entries: dict[Target, Entry] = {}
        begun: dict[Target, datetime] = {}
        for commit in reversed(commits):
            for changed, blob in [_entry(commit, target)] if target else _changed(commit):
                new = Entry() if blob is None else Entry.model_validate_json(blob.data_stream.read())
                at = commit.committed_datetime
                event = _event(changed, entries.get(changed, Entry()), new, at, begun.get(changed))
                if blob is None:
                    event = Event(at, changed, What.RETIRED, "", "")
                entries[changed] = new
                if event is not None:
                    found.append(event)
                    begun.pop(changed, None)
                    if event.what is What.BEGUN:
                        begun[changed] = event.at
    return found


def _changed(commit: gitpython.Commit) -> Iterator[tuple[Target, gitpython.Blob | None]]:
    """The targets whose entries a commit of the ledger changed, and the entries; None for one that is gone."""
    for diff in commit.parents[0].diff(commit) if commit.parents else commit.diff(gitpython.NULL_TREE):
        kind, _, name = str(diff.b_path or diff.a_path).removesuffix(".json").partition("/")
        yield Target(kind, name), None if diff.deleted_file else diff.b_blob


def _entry(commit: gitpython.Commit, target: Target) -> tuple[Target, gitpython.Blob | None]:
    """A target's entry at a commit of the ledger. (That takes no process of git's.)"""
    try:
        found = commit.tree / f"{target}.json"
    except KeyError:
        return target, None
    return target, found if isinstance(found, gitpython.Blob) else None


def _event(target: Target, old: Entry, new: Entry, at: datetime, begun: datetime | None) -> Event | None:
    seconds = (at - begun).total_seconds() if begun else None
    if new.accepted is not None and new.accepted != old.accepted:
        commit = new.good.commit if new.good else ""
        return Event(at, target, What.ACCEPTED, commit, new.accepted.run, f"{new.accepted.by}: {new.accepted.why}")
    if old.intent is None and new.intent is not None:
        return Event(at, target, What.BEGUN, new.intent.desired.commit, new.intent.run)
    if old.intent is not None and new.intent is None and new.reverted is not None:
        return Event(at, target, What.REVERTED, new.reverted.commit, new.reverted.run, new.reverted.why, seconds)
    if new.unreachable is not None and new.unreachable != old.unreachable:
        return Event(at, target, What.UNREACHABLE, new.unreachable.commit, new.unreachable.run, new.unreachable.why)
    if new.good is not None and new.good != old.good:
        what = What.GOOD if old.intent is not None else What.VERIFIED
        return Event(at, target, what, new.good.commit, new.good.run, seconds=seconds)
    return None
