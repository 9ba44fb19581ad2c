"""What a saved terraform plan would do, and what a state holds, as values without secrets that are safe to show.

They are read from terraform's own JSON (`show -json`, `state pull`;
https://developer.hashicorp.com/terraform/internals/json-format). A value that terraform or a provider marks as
sensitive is shown as `(sensitive value)`, and everything in `secrets` is masked wherever it turns up.
"""

import hashlib
import hmac
import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ConfigDict

from toto.base.errors import TotoError
from toto.base.process import mask, shorten

LONGEST: Final = 200  # characters shown of a value
MOST: Final = 40  # attributes shown of a resource
HASHED: Final = "hash:"  # how the id of an object begins that has none, or none that may be shown


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

    `resources` are the addresses of what it manages, `ids` say which object each of them is: another object at the same
    address has another one. A state that was never written has serial 0 and lineage "".
    """

    serial: int = 0
    lineage: str = ""
    resources: tuple[str, ...] = ()
    ids: Mapping[str, str] = {}

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


class Deed(_Value):
    """What a plan does to one object, for the ledger: so much that exactly this can be undone.

    `was` is the object's address before, when it moves. `id` is which object is there before (see `State.ids`); of one
    that is `imported`, the id that it is imported by. `left` is which object is there after the apply, "" when nobody
    has seen that. `deposed`: the object is what an earlier replacement has left, beside the one at its address.
    """

    address: str
    action: Action
    was: str = ""
    id: str = ""
    left: str = ""
    imported: bool = False
    deposed: bool = False

    @property
    def place(self) -> str:
        """Its address before the plan is applied."""
        return self.was or self.address

    def __str__(self) -> str:
        notes = [f"was {self.was}" if self.was else "", "imported" if self.imported else ""]
        notes += ["what is left of an earlier replacement" if self.deposed else ""]
        said = "; ".join(filter(None, notes))
        return f"{_SIGNS[self.action]} {self.address}" + (f" ({said})" if said else "")


class Planned(_Value):
    """A saved plan: the `file` (which holds secrets), and what applying it would do to the state `before`.

    `empty` means that there is nothing to apply. `terraform` is terraform's version. `drift` is what somebody changed
    in the world without terraform. Two plans do the same when their `changes` and `outputs` are equal. `deeds` has each
    of the `changes` for the ledger.
    """

    root: str
    file: Path
    before: State
    empty: bool
    terraform: str
    changes: tuple[Change, ...] = ()
    outputs: tuple[Change, ...] = ()
    drift: tuple[Change, ...] = ()
    deeds: tuple[Deed, ...] = ()
    place: str = ""

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

        In the plan of a revert these are new resources: the old ones, and the data in them, do not come back.
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


def refuse(planned: Planned, prevent: Collection[str]) -> None:
    """Raises `PlanRefused` when the plan does something that `prevent` forbids.

    `prevent` holds the words of the setting: "destroy" (which includes a replacement) and "replace".
    """
    forbidden = {action for word in prevent for action in _PREVENTED[word]}
    if doomed := planned.addresses(*forbidden):
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
    lineage, resources, ids = document["lineage"], list[str](), dict[str, str]()
    for address, instance in _instances(document.get("resources") or ()):
        resources.append(mask(address, secrets))
        if "deposed" not in instance:
            ids[resources[-1]] = _id(instance, lineage, secrets)
    return State(serial=document["serial"], lineage=lineage, resources=tuple(dict.fromkeys(resources)), ids=ids)


def _id(instance: Any, lineage: str, secrets: Sequence[str]) -> str:
    """Which object an instance is, in words that hold no secret: its id, or a hash of what it has in place of one."""
    values = instance.get("attributes") or instance.get("attributes_flat") or {}
    given = values.get("id")
    secret = any(path[:1] == [{"type": "get_attr", "value": "id"}] for path in instance.get("sensitive_attributes", ()))
    if (
        isinstance(given, str | int)
        and given != ""
        and not secret
        and len(str(given)) <= LONGEST
        and mask(str(given), secrets) == str(given)
    ):
        return str(given)
    text = json.dumps(values if given in (None, "") else given, sort_keys=True)
    return f"{HASHED}{hmac.new(lineage.encode(), text.encode(), hashlib.sha256).hexdigest()[:32]}"


def _instances(resources: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    for each in resources:
        if each["mode"] != "managed":
            continue
        base = ".".join(filter(None, (each.get("module"), each["type"], each["name"])))
        for instance in each["instances"]:
            match instance.get("index_key"):
                case None:
                    yield base, instance
                case str(key):
                    text = json.dumps(key, ensure_ascii=False).replace("${", "$${").replace("%{", "%%{")
                    yield f"{base}[{text}]", instance
                case key:
                    yield f"{base}[{key}]", instance


def changes_of(entries: Sequence[Any], secrets: Sequence[str]) -> tuple[Change, ...]:
    """The changes in `resource_changes` or `resource_drift` of a plan's JSON, without reads and no-ops."""
    found = (_change(mask(entry["address"], secrets), entry, entry["change"], secrets) for entry in entries)
    return tuple(change for change in found if change is not None)


def deeds_of(entries: Sequence[Any], before: State, secrets: Sequence[str]) -> tuple[Deed, ...]:
    """What a plan of the state `before` does, by the `resource_changes` of its JSON, without reads and no-ops."""
    found = []
    for entry in entries:
        if entry.get("mode", "managed") != "managed" or (action := _action(entry, entry["change"])) is None:
            continue
        address, was = (mask(entry.get(key) or "", secrets) for key in ("address", "previous_address"))
        importing, deposed = entry["change"].get("importing"), "deposed" in entry
        by = str((importing or {}).get("id", ""))
        id = by if importing is not None else "" if deposed else before.ids.get(was or address, "")
        found.append(
            Deed(
                address=address,
                action=action,
                was=was,
                id=id if mask(id, secrets) == id else "",
                imported=importing is not None,
                deposed=deposed,
            )
        )
    return tuple(found)


def outputs_of(entries: dict[str, Any], secrets: Sequence[str]) -> tuple[Change, ...]:
    """The changes in `output_changes` of a plan's JSON."""
    found = (_change(f"output.{mask(name, secrets)}", {}, change, secrets) for name, change in sorted(entries.items()))
    return tuple(change for change in found if change is not None)


def _change(address: str, entry: Any, change: Any, secrets: Sequence[str]) -> Change | None:
    action = _action(entry, change)
    if action is None:
        return None
    moved, reason = entry.get("previous_address"), entry.get("action_reason", "")
    forced = [".".join(map(str, path)) for path in change.get("replace_paths", ())]
    notes = [mask(f"because of {', '.join(forced)}", secrets) if forced else reason.replace("_", " ")]
    if moved is not None:
        notes.append(f"was {mask(moved, secrets)}")
    if "importing" in change:
        notes.append("imported")
    if "deposed" in entry:
        notes.append("what is left of an earlier replacement")
    details = [] if action is Action.DESTROY else list(dict.fromkeys(_details(change, secrets)))
    if len(details) > MOST:
        details[MOST:] = [f"… and {len(details) - MOST} more"]
    return Change(address=address, action=action, note="; ".join(filter(None, notes)), details=tuple(details))


def _action(entry: Any, change: Any) -> Action | None:
    """What a change does; None for nothing."""
    actions = set(change["actions"])
    if {"create", "delete"} <= actions:
        return Action.REPLACE
    if "delete" in actions:
        return Action.DESTROY
    if actions & {"create", "update"}:
        return Action.CREATE if "create" in actions else Action.UPDATE
    if "forget" in actions:
        return Action.FORGET
    if entry.get("previous_address") is not None:
        return Action.MOVE
    return Action.IMPORT if "importing" in change else None


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
