"""Record in the ledger what a run will do to a target, what it did, and what it reverted."""

from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks import Done
from toto.infra_repo import git
from toto.ledger import ledger, steps
from toto.ledger.ledger import Before, Deployed, Entry, Intent, Ledger, Note
from toto.ledger.target import Target
from toto.machine import condition, documents, owners
from toto.plan.host import HostKind
from toto.plan.kinds import kind_of
from toto.plan.order import Order
from toto.store import grants


def deployed(order: Order, **facts: Any) -> Deployed:
    """The ledger's record of what this run makes of a target. `facts` are the kind's own fields."""
    return kind_of(order.target).deployed(order.desired, commit=order.commit, run=order.run, at=git.now(), **facts)


def note(what: Deployed, run: str, why: str) -> Note:
    """A note for a later run on why a target is not what it should be. It keeps the first line of `why`."""
    lines = why.strip().splitlines() or [""]
    return Note(identity=what.identity, commit=what.commit, run=run, at=git.now(), why=lines[0][:500])


@task(name="intend", task_run_name="intend", cache_policy=NO_CACHE)
async def intend(order: Order, before: Before) -> Done:
    """Open an intent: record what will be done, and what the target was `before`. Do it before touching anything.

    Raises `TargetBusy`.
    """
    left = Ledger(order.repo).get(order.target).intent
    if left is not None and left.run == order.run and left.left_by:  # it goes on from what it could not put back
        before = kind_of(order.target).before(left.before, before)
    else:
        left = None
    intent = Intent(desired=deployed(order), before=before, run=order.run, owner=ledger.owner(), at=git.now())
    in_spite = f"; held back, but: {order.override}" if order.override else ""
    await Ledger(order.repo).write(
        order.target,
        steps.intend(intent, left),
        f"{order.label}: intent to deploy {order.commit[:8]} ({order.change.why}{in_spite})",
    )
    return Done()


async def set_step(order: Order, step: str, message: str) -> None:
    """Record how far the roll-out of a target is. Raises `LostTarget`."""
    await Ledger(order.repo).write(
        order.target, lambda entry: steps.set_step(entry, order.run, step), f"{order.label}: {message}"
    )


async def record_before(order: Order, before: Before) -> None:
    """Record more of what a target was before, and of what was done to it since, in the intent. Raises `LostTarget`."""
    await Ledger(order.repo).write(
        order.target, lambda entry: steps.set_before(entry, order.run, before), f"{order.label}: what was done to it"
    )


@task(name="record", task_run_name="record", cache_policy=NO_CACHE)
async def record_good(order: Order, **facts: Any) -> Done:
    """Record the new last good: the target passed all tests. `facts` are its kind's fields. Raises `LostTarget`."""
    await Ledger(order.repo).write(
        order.target, steps.good(deployed(order, **facts), order.run), f"{order.label}: good at {order.commit[:8]}"
    )
    return Done()


@task(name="record", task_run_name="record", cache_policy=NO_CACHE)
async def record_verified(order: Order, **facts: Any) -> Done:
    """Record that the target was already what the commit wants, with a new identity or new tests. Nothing was touched.

    Raises `TargetBusy`.
    """
    await Ledger(order.repo).write(
        order.target,
        steps.verified(deployed(order, **facts)),
        f"{order.label}: verified at {order.commit[:8]}, nothing touched",
    )
    return Done()


@task(name="record", task_run_name="record", cache_policy=NO_CACHE)
async def record_rehearsed(order: Order) -> None:
    """Record that a target that toto does not deploy passed its rehearsal."""
    await Ledger(order.repo).write(
        order.target,
        steps.rehearsed_only(deployed(order)),
        f"{order.label}: rehearsed at {order.commit[:8]}, not deployed from here",
    )


@task(name="record", task_run_name="record", cache_policy=NO_CACHE)
async def record_unreachable(order: Order, why: str) -> None:
    """Record that toto could not connect to the target. Nothing was done to it, and a later run tries again."""
    await Ledger(order.repo).write(
        order.target,
        steps.not_reached(note(deployed(order), order.run, why)),
        f"{order.label}: unreachable, {order.commit[:8]} not deployed",
    )


@task(name="retire", task_run_name="retire", cache_policy=NO_CACHE)
async def retire(repo: Path, target: Target, how: str = "retired") -> None:
    """Remove the ledger entry and the GC roots of a target that left the commit. The target itself is not touched."""
    await Ledger(repo).write(target, lambda _: None, f"{target.label}: {how}")
    for root in kind_of(target).roots(repo, target.name):
        root.unlink(missing_ok=True)
    if target.kind == HostKind.name:
        await owners.release(repo, target.name)
        condition.note(repo, target.name, None)
        documents.forget(repo, target.name)
        await grants.take_back(repo, target.name)


async def intend_to_revert(repo: Path, target: Target, run: str) -> None:
    """Open an intent to revert a target, also one that this run had already made good. Raises `LostTarget`.

    It is not a task: it only needs the repo, and must be written even when Prefect is down.
    """

    def change(entry: Entry) -> Entry:
        if entry.intent is not None:
            return steps.set_step(entry, run, entry.intent.step)
        if entry.good is None or entry.good.run != run or entry.before is None:
            raise ledger.LostTarget("is no longer what this run made of it")
        intent = Intent(
            desired=entry.good, before=entry.before, run=run, owner=ledger.owner(), at=git.now(), step="revert"
        )
        return entry.model_copy(update={"intent": intent, "good": entry.previous})

    await Ledger(repo).write(target, change, f"{target.label}: to be reverted")


async def record_reverted(
    repo: Path, target: Target, to: Deployed | None, failed: Deployed, run: str, why: str
) -> None:
    """Close the intent: the target was reverted to its last good, or (None) to what was there before toto.

    `why` is what failed; "" when it was only tried.
    Raises `LostTarget`.
    """
    where = to.commit[:8] if to else "what was there before toto"
    noted = note(failed, run, why) if why else None
    word = "reverted" if why else "tried, and put back"
    await Ledger(repo).write(target, steps.revert(to, noted, run), f"{target.label}: {word} to {where}")
