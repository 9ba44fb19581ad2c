"""What a saved terraform plan would do, and what a state holds, as values without secrets that are safe to show.

They are read from terraform's own JSON (`show -json`, `state pull`;
https://developer.hashicorp.com/terraform/internals/json-format). A value that terraform or a provider marks as
sensitive is shown as `(sensitive value)`, and everything in `secrets` is masked wherever it turns up.
"""

import json
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ConfigDict

from toto.base.errors import TotoError
from toto.base.process import mask, shorten

LONGEST: Final = 200  # characters shown of a value
MOST: Final = 40  # attributes shown of a resource


class PlanRefused(TotoError):
    """The plan does something that the settings prevent. `addresses` are the resources that it would destroy."""

    def __init__(self, message: str, addresses: Sequence[str], *, target: str, hint: str) -> None:
        super().__init__(message, target=target, hint=hint)
        self.addresses = tuple(addresses)


class Action(StrEnum):
    """What a plan does with a resource."""

    CREATE = "create"
    UPDATE = "update"
    REPLACE = "replace"
    DESTROY = "destroy"
    FORGET = "forget"  # terraform's own word: the resource leaves the state, and stays in the world
    MOVE = "move"  # only the address changes
    IMPORT = "import"  # the resource is in the world already, and is added to the state


_SIGNS: Final = {
    Action.CREATE: "+",
    Action.UPDATE: "~",
    Action.REPLACE: "-/+",
    Action.DESTROY: "-",
    Action.FORGET: ".",
    Action.MOVE: ">",
    Action.IMPORT: "<",
}
_PREVENTED: Final = {"destroy": {Action.DESTROY, Action.REPLACE}, "replace": {Action.REPLACE}}


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True)


class State(_Value):
    """What identifies a state: its serial rises with every write, its lineage never changes.

    `resources` are the addresses of what it manages. A state that was never written has serial 0 and lineage "".
    """

    serial: int = 0
    lineage: str = ""
    resources: tuple[str, ...] = ()

    @property
    def empty(self) -> bool:
        return not self.resources


class Change(_Value):
    """One resource or output that a plan changes. `details` has a line for each attribute that changes."""

    address: str
    action: Action
    note: str = ""
    details: tuple[str, ...] = ()

    @property
    def lines(self) -> list[str]:
        """For people: what the plan does to the resource, then its attributes."""
        note = f" ({self.note})" if self.note else ""
        return [f"{_SIGNS[self.action]} {self.address}{note}", *(f"    {line}" for line in self.details)]


class Planned(_Value):
    """A saved plan: the `file` (which holds secrets), and what applying it would do to the state `before`.

    `empty` means that there is nothing to apply. `terraform` is terraform's version. `drift` is what somebody changed
    in the world without terraform. Two plans do the same when their `changes` and `outputs` are equal.
    """

    root: str
    file: Path
    before: State
    empty: bool
    terraform: str
    changes: tuple[Change, ...] = ()
    outputs: tuple[Change, ...] = ()
    drift: tuple[Change, ...] = ()

    def __str__(self) -> str:
        return "\n".join([self.summary, *self.lines])

    @property
    def counts(self) -> Counter[Action]:
        """The number of resources by action."""
        return Counter(change.action for change in self.changes)

    def addresses(self, *actions: Action) -> tuple[str, ...]:
        """The addresses of the resources with one of these actions."""
        return tuple(change.address for change in self.changes if change.action in actions)

    @property
    def destroyed(self) -> tuple[str, ...]:
        """The addresses that are destroyed, for good or to be replaced."""
        return self.addresses(Action.DESTROY, Action.REPLACE)

    @property
    def created(self) -> tuple[str, ...]:
        """The addresses that are created, whether or not something was there before.

        A revert may destroy them again. In the plan of a revert these are new resources: the old ones, and the data in
        them, do not come back.
        """
        return self.addresses(Action.CREATE, Action.REPLACE)

    @property
    def lines(self) -> list[str]:
        """All changes, for people."""
        return [line for change in (*self.changes, *self.outputs) for line in change.lines]

    @property
    def summary(self) -> str:
        """The changes in a line: `1 to create, 2 to destroy`."""
        counts = self.counts
        said = [f"{counts[action]} to {action}" for action in Action if counts[action]]
        said += [f"{len(self.outputs)} output{'s' if len(self.outputs) > 1 else ''} to change"] if self.outputs else []
        return ", ".join(said) or "nothing to change"

    def same(self, other: "Planned") -> bool:
        """Whether this plan would do the same as a different one, whatever states the two were made from."""
        return (self.empty, self.changes, self.outputs) == (other.empty, other.changes, other.outputs)


def refuse(planned: Planned, prevent: Collection[str], allowed: Collection[str] = ()) -> None:
    """Raises `PlanRefused` when the plan does something that `prevent` forbids to a resource that is not `allowed`.

    `prevent` holds the words of the setting: "destroy" (which includes a replacement) and "replace". For the plan of a
    revert, `allowed` are the resources that the reverted run created.
    """
    forbidden = {action for word in prevent for action in _PREVENTED[word]}
    doomed = [
        change.address for change in planned.changes if change.action in forbidden and change.address not in allowed
    ]
    if doomed:
        raise PlanRefused(
            f"the plan would destroy what the settings protect: {', '.join(doomed)}",
            doomed,
            target=f"terraform/{planned.root}",
            hint=f"keep it in the configuration, or remove {' and '.join(prevent)} from `prevent` in toto.toml",
        )


def wants_approval(planned: Planned, approve: str) -> bool:
    """Whether a person must approve the plan, by the setting `approve`: `never`, `destroy` or `always`."""
    return not planned.empty and (approve == "always" or (approve == "destroy" and bool(planned.destroyed)))


def state_of(document: Any, secrets: Sequence[str]) -> State:
    """The state that `terraform state pull` printed, parsed; a `document` of None means that there is no state."""
    if document is None:
        return State()
    addresses = (mask(address, secrets) for address in _addresses(document.get("resources") or ()))
    return State(serial=document["serial"], lineage=document["lineage"], resources=tuple(dict.fromkeys(addresses)))


def _addresses(resources: Sequence[Any]) -> Iterator[str]:
    for each in resources:
        if each["mode"] != "managed":
            continue
        base = ".".join(filter(None, (each.get("module"), each["type"], each["name"])))
        for instance in each["instances"]:
            match instance.get("index_key"):
                case None:
                    yield base
                case str(key):
                    yield f"{base}[{json.dumps(key, ensure_ascii=False).replace('${', '$${').replace('%{', '%%{')}]"
                case key:
                    yield f"{base}[{key}]"


def changes_of(entries: Sequence[Any], secrets: Sequence[str]) -> tuple[Change, ...]:
    """The changes in `resource_changes` or `resource_drift` of a plan's JSON, without reads and no-ops."""
    found = (_change(mask(entry["address"], secrets), entry, entry["change"], secrets) for entry in entries)
    return tuple(change for change in found if change is not None)


def outputs_of(entries: dict[str, Any], secrets: Sequence[str]) -> tuple[Change, ...]:
    """The changes in `output_changes` of a plan's JSON."""
    found = (_change(f"output.{mask(name, secrets)}", {}, change, secrets) for name, change in sorted(entries.items()))
    return tuple(change for change in found if change is not None)


def _change(address: str, entry: Any, change: Any, secrets: Sequence[str]) -> Change | None:
    actions, moved, reason = set(change["actions"]), entry.get("previous_address"), entry.get("action_reason", "")
    forced = [".".join(map(str, path)) for path in change.get("replace_paths", ())]
    notes = [mask(f"because of {', '.join(forced)}", secrets) if forced else reason.replace("_", " ")]
    if moved is not None:
        notes.append(f"was {mask(moved, secrets)}")
    if "importing" in change:
        notes.append("imported")
    if "deposed" in entry:
        notes.append("what is left of an earlier replacement")
    if {"create", "delete"} <= actions:
        action = Action.REPLACE
    elif "delete" in actions:
        action = Action.DESTROY
    elif actions & {"create", "update"}:
        action = Action.CREATE if "create" in actions else Action.UPDATE
    elif "forget" in actions:
        action = Action.FORGET
    elif moved is not None or "importing" in change:
        action = Action.MOVE if moved is not None else Action.IMPORT
    else:
        return None
    details = [] if action is Action.DESTROY else list(dict.fromkeys(_details(change, secrets)))
    if len(details) > MOST:
        details[MOST:] = [f"… and {len(details) - MOST} more"]
    return Change(address=address, action=action, note="; ".join(filter(None, notes)), details=tuple(details))


def _details(change: Any, secrets: Sequence[str]) -> Iterator[str]:
    """A line for each attribute that changes."""

    def marked(name: str) -> set[str]:
        return {path for path, flag in leaves(change.get(name)) if flag is True}

    before, after = (dict(leaves(change.get(when))) for when in ("before", "after"))
    hidden, unknown = marked("before_sensitive") | marked("after_sensitive"), marked("after_unknown")

    def text(path: str, values: dict[str, Any]) -> str:
        if values is after and _within(path, unknown) is not None:
            return "(known after apply)"
        if _within(path, hidden) is not None:
            return "(sensitive value)"
        return shorten(mask(_text(values.get(path), secrets), secrets), LONGEST)

    paths = sorted({*before, *after, *unknown})
    for path in paths:
        old, new = before.get(path), after.get(path)
        if old == new and _within(path, unknown) is None:
            continue
        if ({} in (old, new) or [] in (old, new)) and any(
            other != path and _within(other, (path,)) is not None for other in paths
        ):
            continue  # its parts have lines of their own
        secret = _within(path, hidden)  # when a whole mapping is sensitive, its keys are too
        name = mask(path if secret is None else secret, secrets) or "value"
        yield f"{name}: {'' if old is None else f'{text(path, before)} → '}{text(path, after)}"


def _text(value: Any, secrets: Sequence[str]) -> str:
    """A value as JSON. Secrets in a text are masked before the text is escaped."""
    return json.dumps(mask(value, secrets) if isinstance(value, str) else value, ensure_ascii=False)


def _within(path: str, marked: Collection[str]) -> str | None:
    """The mark on a path, or on a value that contains it; None without a mark."""
    return next((each for each in marked if each in ("", path) or path.startswith((f"{each}.", f"{each}["))), None)


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a JSON document that has no parts, as (path, value); paths look like `tags.Name`, `ports[0]`."""
    match value:
        case dict() if value:
            for key, each in value.items():
                yield from leaves(each, f"{path}.{key}" if path else key)
        case list() if value:
            for index, each in enumerate(value):
                yield from leaves(each, f"{path}[{index}]")
        case _:
            yield path, value
