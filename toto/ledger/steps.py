"""What happens to a target's entry at each step of a run: intent, good, put back and so on. Each is a pure change."""

from toto.ledger.ledger import REF, Change, Deployed, Entry, Intent, LostTarget, Note, TargetBusy, owner


def intend(intent: Intent) -> Change:
    """Open an intent. Raises `TargetBusy` when there is one: what was before must be known until it is settled."""
    def change(entry: Entry) -> Entry:
        if entry.intent is not None:
            raise TargetBusy(f"run {entry.intent.run} is at work on it since {entry.intent.at}, or left it half done",
                             hint="wait for it to end, or run settle/settle")
        return entry.model_copy(update={"intent": intent})
    return change


def take_over(old: Intent, run: str) -> Change:
    """Make an intent that a dead run left this run's own. Raises `LostTarget` when it is no longer there."""
    def change(entry: Entry) -> Entry:
        if entry.intent != old:
            raise LostTarget("its open intent was settled by another run")
        return entry.model_copy(update={"intent": old.model_copy(
            update={"run": run, "owner": owner(), "left_by": old.left_by or old.run})})
    return change


def mine(entry: Entry, run: str) -> Intent:
    """The open intent of this run. Raises `LostTarget` when it has none."""
    if entry.intent is None or entry.intent.run != run:
        raise LostTarget("this run's intent is gone: another run settled the target", hint="see git log " + REF)
    return entry.intent


def now_at(entry: Entry, run: str, step: str) -> Entry:
    """Say how far the roll-out of a target is. Raises `LostTarget`."""
    return entry.model_copy(update={"intent": mine(entry, run).model_copy(update={"step": step})})


def good(deployed: Deployed, run: str) -> Change:
    """Close the intent: the target passed all its tests and is the new last good. Raises `LostTarget`."""
    def change(entry: Entry) -> Entry:
        return Entry(good=deployed, previous=entry.good, before=mine(entry, run).before)
    return change


def verified(deployed: Deployed) -> Change:
    """The target is what it was, but its identity or tests have another hash. Raises `TargetBusy`."""
    def change(entry: Entry) -> Entry:
        if entry.intent is not None:
            raise TargetBusy(f"run {entry.intent.run} is at work on it")
        return entry.model_copy(update={"good": deployed, "reverted": None, "unreachable": None})
    return change


def put_back(to: Deployed | None, note: Note, run: str) -> Change:
    """Close the intent: the target went back; `to` is what the ledger knows of where it is now. Raises `LostTarget`."""
    def change(entry: Entry) -> Entry:
        mine(entry, run)
        return Entry(good=to, reverted=note)
    return change


def not_reached(note: Note) -> Change:
    """The target could not be reached, and nothing was done to it. An intent that is still open stays open."""
    return lambda entry: entry.model_copy(update={"unreachable": note})


def rehearsed_only(deployed: Deployed) -> Change:
    """A host that has no machine passed its rehearsal."""
    return lambda entry: entry.model_copy(update={"rehearsed": deployed})
