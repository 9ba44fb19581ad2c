"""Reads the history of every target from the ledger's commits, for notebooks and charts."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import Any

import git as gitpython
from gitdb.exc import BadName, BadObject

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
    TRIED = "tried"  # and put back
    UNREACHABLE = "unreachable"
    RETIRED = "retired"
    FROZEN = "frozen"  # a person said that it is not to be rolled out
    UNFROZEN = "unfrozen"


@dataclass(frozen=True)
class Event:
    """One thing that happened to a target. `seconds` is the time since its intent was opened, None when unknown.

    `author` is that of the commit; or the person who took the target's state as good, or has frozen it.
    """

    at: datetime
    target: Target
    what: What
    commit: str
    run: str
    why: str = ""
    seconds: float | None = None
    author: str = ""

    def json(self) -> dict[str, Any]:
        """As the page's JSON has it."""
        return {**vars(self), "at": self.at.isoformat(), "target": str(self.target)}


def events(repo: Path, most: int = 10_000, target: Target | None = None) -> list[Event]:
    """What happened to the targets of an infra repo, or to one of them, oldest first.

    It is read from the newest `most` commits of the ledger that are about them.
    """
    return list(newest(repo, target, most=most))[::-1]


def newest(repo: Path, target: Target | None = None, *, since: str = "", most: int = -1) -> Iterator[Event]:
    """What happened to the targets of an infra repo, or to one of them, newest first, as far as it is asked for.

    `since` is a time in any form that git knows, such as `2 weeks ago`; `most` is as in `events`.
    """
    limits: dict[str, Any] = {"since": since} if since else {}
    authors: dict[str, str] = {}
    with git.open_repo(repo) as opened:
        try:
            for commit in opened.iter_commits(REF, f"{target}.json" if target else "", max_count=most, **limits):
                for event in _of_commit(commit, target):
                    yield _authored(event, opened, authors)
        except (BadName, ValueError, gitpython.GitCommandError):  # there is no ledger yet
            return


def chosen(
    repo: Path, target: Target | None = None, *, since: str = "", author: str = "", most: int = 30
) -> list[dict[str, Any]]:
    """The newest `most` events as JSON, newest first; with `author`, those of whom that is a part of the name."""
    found = (each for each in newest(repo, target, since=since) if author.casefold() in each.author.casefold())
    return [each.json() for each in islice(found, most)]


def _of_commit(commit: gitpython.Commit, target: Target | None) -> Iterator[Event]:
    """What happened in one commit of the ledger, to all targets or to one."""
    before = commit.parents[0].tree if commit.parents else None
    for changed in [target] if target else _changed(before, commit.tree):
        old, new = _entry(before, changed), _entry(commit.tree, changed)
        event = _event(changed, old or Entry(), new or Entry(), commit.committed_datetime)
        if old is not None and new is None and old != Entry(frozen=old.frozen):
            event = Event(commit.committed_datetime, changed, What.RETIRED, "", "")
        if event is not None:
            yield event


def _changed(before: gitpython.Tree | None, after: gitpython.Tree) -> Iterator[Target]:
    """The targets whose entries differ. (Trees that are the same are not read, and git is not started for it.)"""
    folders = [{each.name: each for each in tree.trees} if tree else {} for tree in (before, after)]
    for kind in sorted(folders[0].keys() | folders[1].keys()):
        old, new = (each.get(kind) for each in folders)
        if old and new and old.hexsha == new.hexsha:
            continue
        was, now = ({blob.name: blob.hexsha for blob in each.blobs} if each else {} for each in (old, new))
        for name in sorted(was.keys() | now.keys()):
            if was.get(name) != now.get(name):
                yield Target(kind, name.removesuffix(".json"))


def _entry(tree: gitpython.Tree | None, target: Target) -> Entry | None:
    """A target's entry in a tree of the ledger; None when there is none."""
    try:
        found = tree / f"{target}.json" if tree else None
    except KeyError:
        return None
    return Entry.model_validate_json(found.data_stream.read()) if isinstance(found, gitpython.Blob) else None


def _authored(event: Event, opened: gitpython.Repo, authors: dict[str, str]) -> Event:
    """The event with its author, where it has none; `authors` are those of commits."""
    if event.author or not event.commit:
        return event
    if event.commit not in authors:
        try:
            authors[event.commit] = str(opened.commit(event.commit).author.name or "")
        except (BadName, BadObject, ValueError):  # a ledger that was restored may name commits that are not there
            authors[event.commit] = ""
    return replace(event, author=authors[event.commit])


def _event(target: Target, old: Entry, new: Entry, at: datetime) -> Event | None:
    if new.frozen != old.frozen:
        if new.frozen is None:
            return Event(at, target, What.UNFROZEN, "", "")
        return Event(at, target, What.FROZEN, "", "", f"{new.frozen.by}: {new.frozen.why}", author=new.frozen.by)
    if new.accepted is not None and new.accepted != old.accepted:
        commit, by = new.good.commit if new.good else "", new.accepted.by
        return Event(at, target, What.ACCEPTED, commit, new.accepted.run, f"{by}: {new.accepted.why}", author=by)
    begun = old.intent and datetime.fromisoformat(old.intent.at)
    return _deployed(target, old, new, at, (at - begun).total_seconds() if begun else None)


def _deployed(target: Target, old: Entry, new: Entry, at: datetime, seconds: float | None) -> Event | None:
    if old.intent is None and new.intent is not None:
        return Event(at, target, What.BEGUN, new.intent.desired.commit, new.intent.run)
    if old.intent is not None and new.intent is None and new.reverted is not None:
        return Event(at, target, What.REVERTED, new.reverted.commit, new.reverted.run, new.reverted.why, seconds)
    if old.intent is not None and new.intent is None and new.good == old.good:
        return Event(at, target, What.TRIED, old.intent.desired.commit, old.intent.run, seconds=seconds)
    if new.unreachable is not None and new.unreachable != old.unreachable:
        return Event(at, target, What.UNREACHABLE, new.unreachable.commit, new.unreachable.run, new.unreachable.why)
    if new.good is not None and new.good != old.good:
        what = What.GOOD if old.intent is not None else What.VERIFIED
        return Event(at, target, what, new.good.commit, new.good.run, seconds=seconds)
    return None
