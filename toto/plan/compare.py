"""Compares what a commit wants with what the ledger says is deployed, target by target."""

from collections.abc import Iterable

from toto.infra_repo.manifest import Manifest
from toto.ledger.ledger import Snapshot
from toto.ledger.target import HOST, Target
from toto.plan.changes import Action, Change, ChangeSet, Desired, Failure, Why
from toto.plan.kinds import kind_of, place


def compare(
    commit: str,
    desired: Iterable[Desired],
    failed: Iterable[Failure],
    manifest: Manifest,
    ledger: Snapshot,
    *,
    left: Iterable[Target] = (),
    force: bool = False,
) -> ChangeSet:
    """The change set of a commit: what it wants, compared with the ledger (never with the previous push).

    `left` are targets that the commit has and the run leaves out, since nobody asked for them.
    It is sorted in the order of a roll-out: by kind, then by name. With `force` it also has every deployed target that
    has not changed. Raises `TotoError` for a target in the ledger whose kind is not known.
    """
    wanted = sorted(desired, key=lambda each: place(each.target))
    broken = sorted(failed, key=lambda each: place(each.target))
    changes, unchanged = [], []
    for each in wanted:
        entry = ledger.get(each.target)
        change = kind_of(each.target).change(each, entry, manifest)
        if change is None and force and entry.good is not None:
            change = Change(desired=each, why=Why.FORCED, action=Action.DEPLOY, last=entry.good)
        if change is None:
            unchanged.append(each.target)
        else:
            changes.append(change)
    known = {each.target for each in wanted} | {each.target for each in broken} | set(left)
    return ChangeSet(
        commit=commit,
        ledger=ledger.fingerprint,
        changes=tuple(changes),
        unchanged=tuple(unchanged),
        waiting=tuple(
            name
            for name, machine in manifest.machines.items()
            if Target(HOST, name) not in known and machine.role != "other"
        ),
        retired=tuple(
            sorted(
                target
                for target, entry in ledger.entries.items()
                if kind_of(target).retired(target, entry, known, manifest)
            )
        ),
        failed=tuple(broken),
    )
