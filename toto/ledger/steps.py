"""The changes to a target's ledger entry at each step of a run: intent, good, revert and so on. Each is pure."""

from toto.ledger.ledger import (
    REF,
    Accepted,
    Before,
    Change,
    Deployed,
    Entry,
    Frozen,
    Intent,
    LostTarget,
    Note,
    TargetBusy,
    owner,
)


def intend(intent: Intent, over: Intent | None = None) -> Change:
    """Open an intent. Raises `TargetBusy` when one is open: it knows what the target was, and must be settled first.

    It takes the place of `over`, which the run has taken over and could not put back.
    """

    def change(entry: Entry) -> Entry:
        if entry.intent is not None and entry.intent != over:
            raise TargetBusy(
                f"run {entry.intent.run} has worked on it since {entry.intent.at}, or left it half done",
                hint="wait for it to end, or run settle/settle",
            )
        return entry.model_copy(update={"intent": intent})

    return change


def take_over(old: Intent, run: str) -> Change:
    """Take over an intent that a dead run left. Raises `LostTarget` when the intent is no longer there."""

    def change(entry: Entry) -> Entry:
        if entry.intent != old:
            raise LostTarget("a different run settled its open intent")
        return entry.model_copy(
            update={"intent": old.model_copy(update={"run": run, "owner": owner(), "left_by": old.left_by or old.run})}
        )

    return change


def require_intent(entry: Entry, run: str) -> Intent:
    """The open intent of this run. Raises `LostTarget` when the run has none on the target."""
    if entry.intent is None or entry.intent.run != run:
        raise LostTarget("this run's intent is gone: a different run settled the target", hint="see git log " + REF)
    return entry.intent


def set_step(entry: Entry, run: str, step: str) -> Entry:
    """Record how far the roll-out of a target is. Raises `LostTarget`."""
    return entry.model_copy(update={"intent": require_intent(entry, run).model_copy(update={"step": step})})


def set_before(entry: Entry, run: str, before: Before) -> Entry:
    """Record more of what the target was before, and what was done to it since. Raises `LostTarget`."""
    return entry.model_copy(update={"intent": require_intent(entry, run).model_copy(update={"before": before})})


def good(deployed: Deployed, run: str) -> Change:
    """Close the intent: the target passed all its tests, so this is its new last good. Raises `LostTarget`."""

    def change(entry: Entry) -> Entry:
        before = require_intent(entry, run).before
        return Entry(good=deployed, previous=entry.good, before=before, frozen=entry.frozen)

    return change


def verified(deployed: Deployed) -> Change:
    """Record that the target is unchanged, but its identity or its tests have a new hash. Raises `TargetBusy`."""

    def change(entry: Entry) -> Entry:
        if entry.intent is not None:
            raise TargetBusy(f"run {entry.intent.run} is working on it")
        return entry.model_copy(update={"good": deployed, "reverted": None, "unreachable": None, "accepted": None})

    return change


def accepted(deployed: Deployed | None, by: Accepted, seen: Entry) -> Change:
    """Take the present state of a target as good, and close its intent; None: nothing of it is there.

    Raises `LostTarget` when its entry is not any more what was `seen` before its state was read.
    """

    def change(entry: Entry) -> Entry:
        if entry != seen:
            raise LostTarget(
                "a different run has worked on it meanwhile", hint="see git log " + REF + ", and ask again"
            )
        return Entry(good=deployed, rehearsed=entry.rehearsed, accepted=by, frozen=entry.frozen)

    return change


def revert(to: Deployed | None, note: Note | None, run: str) -> Change:
    """Close the intent: the target was reverted to `to`; None: to what it was before toto. Raises `LostTarget`.

    Without a `note` nothing had failed: it was only tried.
    """

    def change(entry: Entry) -> Entry:
        require_intent(entry, run)
        return Entry(good=to, reverted=note, frozen=entry.frozen)

    return change


def not_reached(note: Note) -> Change:
    """Record that toto could not connect to the target and did nothing to it. An open intent stays open."""
    return lambda entry: entry.model_copy(update={"unreachable": note})


def rehearsed_only(deployed: Deployed) -> Change:
    """Record that a target that toto does not deploy passed its rehearsal."""
    return lambda entry: entry.model_copy(update={"rehearsed": deployed})


def freeze(frozen: Frozen | None) -> Change:
    """Note that the target is not to be rolled out, and who says so; None takes that back."""

    def change(entry: Entry) -> Entry | None:
        changed = entry.model_copy(update={"frozen": frozen})
        return None if changed == Entry() else changed

    return change
