"""The manifest, `machines.yaml`: the physical machines, and what toto may do with each.

`load` reports all mistakes in a file at once, one line each: file, line, machine, field. `toto.machine.ssh` connects to
the machines; `hosts/` in the infra repo says what runs on them.

`python -m toto.infra_repo.manifest` prints the JSON schema of the file, for editors.
"""

import contextlib
import difflib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, TypeAlias

from pydantic import AfterValidator, Field, StrictBool, StrictInt, StrictStr, model_validator

from toto.base.after import in_order
from toto.base.model import Fields, Location, Model, shown
from toto.base.yaml_file import FileError, Reading, Unreadable, quoted, read_text
from toto.infra_repo.fields import (
    Distinct,
    Freeze,
    KeyName,
    Name,
    OpenIn,
    Port,
    Word,
    check_address,
    check_feature,
    check_host_key,
    check_system,
    check_user,
    plain_address,
)

FILE: Final = "machines.yaml"
Where: TypeAlias = Callable[[str, str], str]


class ManifestError(FileError):
    """The manifest has mistakes. `problems` holds one line for each: `file:line: machine: field: what`."""


class SSH(Fields):
    """How to connect to a machine."""

    user: Annotated[StrictStr, AfterValidator(check_user)] = "toto"
    """the user that toto logs in as"""
    port: Port = 22
    """the port of the machine's SSH server"""
    identity: KeyName | None = None
    """the name of one of the repository's private keys on toto; when left out, its key for the machines"""
    host_key: Annotated[StrictStr, AfterValidator(check_host_key)] | None = None
    """the machine's public host key, as in `ssh_host_ed25519_key.pub`; without it, the first one seen is kept"""


class Builds(Fields):
    """What a builder builds for toto, once the server's settings approve it."""

    systems: Annotated[tuple[Annotated[StrictStr, AfterValidator(check_system)], ...], Distinct] = ()
    """the platforms that it builds for; when left out, its own"""
    jobs: Annotated[StrictInt, Field(ge=1, le=1000)] = 1
    """builds at once"""
    speed: Annotated[StrictInt, Field(ge=1, le=1000)] = 1
    """of several with room, the fastest for its load gets a build"""
    features: Annotated[tuple[Annotated[StrictStr, AfterValidator(check_feature)], ...], Distinct] = ()
    """what derivations may require of it, such as `kvm` or `big-parallel`"""


class Machine(Fields):
    """A machine, and what toto may do with it."""

    name: Name
    """the machine's name; it runs the host of the same name in `hosts/`"""
    address: Annotated[StrictStr, AfterValidator(check_address)]
    """host name or IP address"""
    was: Annotated[StrictStr, AfterValidator(check_address)] | None = None
    """the address at which it was deployed, as `address` or `address:port`, when it has a new one now"""
    system: Annotated[StrictStr, AfterValidator(check_system)] = "x86_64-linux"
    """its platform, by nix's name"""
    role: Literal["nixos", "builder", "other"] = "nixos"
    """`builder` builds for toto as well; `other` (a NAS, a switch) is never deployed"""
    builds: Builds | None = None
    """what a builder builds"""
    after: Annotated[tuple[Name, ...], Distinct] = ()
    """machines that are rolled out before this one, such as the hypervisor of a guest"""
    wave: Annotated[StrictInt, Field(ge=0, le=1000)] = 0
    """a wave begins when every machine of the earlier waves is done"""
    deploy: Literal["push", "pull", "none"] = "push"
    """toto pushes, the machine's flying-monkey pulls, or neither"""
    access: Literal["sudo", "locked"] = "sudo"
    """`sudo`: toto may do everything on it. `locked`: it only hands over signed documents, which flying-monkey obeys"""
    substitute: StrictBool = False
    """what a machine that is pushed to can fetch from its own substituters is not sent, and compared afterwards"""
    activation: Literal["switch", "boot", "test"] = "switch"
    """what a roll-out ends with; a netbooted host is only ever `test`ed"""
    reboot: Literal["never", "window", "now"] = "never"
    """whether a machine that does what documents say reboots for a new kernel: `now`, or if its window is open"""
    drift: Literal["tell", "mend"] = "tell"
    """what was changed by hand on a machine that does what documents say: only told, or undone by the next run"""
    ssh: SSH = SSH()
    """how to connect to it"""
    ports: Annotated[tuple[Port, ...], Distinct] = ()
    """ports that tests may reach, forwarded into the sandbox as `TOTO_PORT_<port>`"""
    tags: Annotated[tuple[Word, ...], Distinct] = ()
    """words to select machines by"""
    venues: Annotated[tuple[Word, ...], Distinct] = ()
    """venues that are notified of this machine's results, besides the usual ones"""
    freeze: Freeze = False
    """`true` or a reason: rehearsed, not rolled out"""
    window: OpenIn | None = None
    """when it may be rolled out, like `Sat-Sun 22:00-06:00`; when left out, always"""
    memory: Annotated[StrictInt, Field(ge=64, le=16_777_216)] | None = None
    """MB of memory of its sandbox; when left out, the host's VM decides"""
    cores: Annotated[StrictInt, Field(ge=1, le=1024)] | None = None
    """processors of its sandbox; when left out, the host's VM decides"""

    @model_validator(mode="after")
    def _tells(self) -> Self:
        if self.reboot == "window" and self.window is None:
            raise ValueError("reboot: window needs a window")
        if self.reboot != "never" and not self.by_document:
            raise ValueError("reboot is for machines with access: locked or deploy: pull; others only tell")
        if self.drift != "tell" and not self.by_document:
            raise ValueError(
                "drift is for machines with access: locked or deploy: pull; others tell nothing by themselves"
            )
        return self

    def reboots(self, moment: datetime) -> "Reboot | None":
        """The reboot that a roll-out at `moment`, in toto's local time, may do; None when it may not."""
        until = self.window.until(moment) if self.reboot == "window" and self.window is not None else None
        return Reboot(until) if self.reboot == "now" or until is not None else None

    @model_validator(mode="after")
    def _proves_itself(self) -> Self:
        if self.deploy == "pull" and self.ssh.host_key is None:
            raise ValueError("a machine that pulls proves itself by its host key: write it as ssh.host_key")
        return self

    @model_validator(mode="after")
    def _builds_for_toto(self) -> Self:
        if self.role == "builder":
            if self.ssh.host_key is None:
                raise ValueError("a builder is known by its host key: write it as ssh.host_key")
            if self.by_document:
                raise ValueError("a builder takes builds of toto's: it cannot have access: locked, or deploy: pull")
        elif self.builds is not None:
            raise ValueError("builds is for machines with role: builder")
        return self

    @model_validator(mode="after")
    def _substitutes(self) -> Self:
        if self.substitute and self.deploy != "push":
            raise ValueError("substitute is for machines that are pushed to; one that pulls fetches everything")
        return self

    @property
    def by_document(self) -> bool:
        """Whether it does what signed documents say, instead of what toto runs on it by sudo."""
        return self.access == "locked" or self.deploy == "pull"

    @property
    def deployed(self) -> bool:
        """Whether toto may ever change this machine."""
        return self.role != "other" and self.deploy != "none"


@dataclass(frozen=True)
class Reboot:
    """A reboot that a machine may do. It begins before `until` (UTC), if that is given."""

    until: datetime | None = None


class Manifest(Model):
    """The machines of a fleet, by name, in the order of the file."""

    machines: dict[str, Machine] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _related(self) -> Self:
        for name, machine in self.machines.items():
            if machine.name != name:
                raise ValueError(f"machine {shown(machine.name)} stands under the name {shown(name)}")
        if wrong := list(_relations(self.machines)):
            raise ValueError("; ".join(f"{name}: {'.'.join(map(str, where))}: {what}" for name, where, what in wrong))
        return self

    def order(self, names: Iterable[str]) -> list[list[str]]:
        """`names` in groups that are rolled out one after the other: by wave, then by `after`.

        A machine comes after those that it depends on, also through machines that are not among `names`.
        Within a group the order is that of the file. Raises `ManifestError` for a name that is not a machine's.
        """
        chosen = set(names)
        if unknown := sorted(chosen - self.machines.keys()):
            raise ManifestError([f"{FILE}: {name}: there is no such machine" for name in unknown])
        depth: dict[str, int] = {}
        for name in in_order({name: machine.after for name, machine in self.machines.items()})[0]:
            machine = self.machines[name]
            depth[name] = max(
                (
                    depth[other] + (other in chosen)
                    for other in machine.after
                    if self.machines[other].wave == machine.wave
                ),
                default=0,
            )
        groups: dict[tuple[int, int], list[str]] = {}
        for name, machine in self.machines.items():
            if name in chosen:
                groups.setdefault((machine.wave, depth[name]), []).append(name)
        return [groups[key] for key in sorted(groups)]


def load(path: Path) -> Manifest:
    """Read the manifest from the file `path`. Raises `ManifestError` with all mistakes."""
    return _read(path.name, lambda: read_text(path, missing="list the machines in it, see docs/manifest.md"))


def parse(text: str) -> Manifest:
    """Read the manifest from `text`. Raises `ManifestError` with all mistakes."""
    return _read(FILE, lambda: text)


def places(text: str) -> Where:
    """Where each machine's fields are in the text of a manifest: `machines.yaml:7`."""
    reading = _Reading(FILE)
    with contextlib.suppress(Unreadable):
        reading.manifest(text)
    return lambda name, field: f"{FILE}:{reading.line((*reading.places.get(name.lower(), ()), field))}"


def somewhere(name: str, field: str) -> str:
    """Where a machine's field is when the text of the manifest is not at hand: `machines.yaml`."""
    return FILE


def check_distinct(fleet: Manifest, where: Where = somewhere) -> None:
    """Raise `ManifestError` when two names are one machine: a commit that says so is not deployed.

    (`load` bears it, for what is deployed already has to be understood.)
    """
    problems: list[str] = []
    known: dict[tuple[str, int], str] = {}
    for name, machine in fleet.machines.items():
        place = (plain_address(machine.address), machine.ssh.port)
        if machine.deployed and (other := known.setdefault(place, name)) != name:
            problems.append(
                f"{where(name, 'address')}: {name}: address: {machine.address}, port {machine.ssh.port}, is {other}'s: "
                "one machine has one name"
            )
    if problems:
        raise ManifestError(problems)


def _read(name: str, text: Callable[[], str]) -> Manifest:
    reading = _Reading(name)
    with reading.reporting(ManifestError):
        manifest = reading.manifest(text())
    return manifest


def json_schema() -> dict[str, Any]:
    """The JSON schema of the file, for editors and for the docs."""
    machine = Machine.model_json_schema(ref_template="#/$defs/{model}")
    definitions = machine.pop("$defs", {})
    named = {**machine, "title": "Machine by name", "required": ["address"]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "toto's manifest, machines.yaml",
        "type": "object",
        "required": ["machines"],
        "additionalProperties": False,
        "properties": {
            "machines": {
                "description": "the machines: a list, or a mapping of each one's name to its other fields",
                "oneOf": [
                    {"type": "array", "items": {"$ref": "#/$defs/Machine"}},
                    {"type": "object", "additionalProperties": {"$ref": "#/$defs/NamedMachine"}},
                ],
            }
        },
        "$defs": {**definitions, "Machine": machine, "NamedMachine": named},
    }


Relation: TypeAlias = tuple[str, Location, str]


def _relations(machines: Mapping[str, Machine], wrong: Collection[str] = ()) -> Iterator[Relation]:
    """The mistakes in how machines refer to each other: (machine, field, what).

    `wrong` are the names of further machines, which have mistakes of their own.
    """
    for machine in machines.values():
        for index, other in enumerate(machine.after):
            if other not in machines:
                if other not in wrong:
                    close = difflib.get_close_matches(other, [*machines, *wrong], n=1)
                    meant = f"; did you mean '{close[0]}'?" if close else ""
                    yield machine.name, ("after", index), f"there is no machine {shown(other)}{meant}"
            elif machines[other].wave > machine.wave:
                waves = f"wave {machines[other].wave}, which comes after this machine's wave {machine.wave}"
                yield machine.name, ("after", index), f"{other} is in {waves}"
    for circle in in_order({name: machine.after for name, machine in machines.items()})[1]:
        yield circle.name, ("after",), str(circle)


class _Reading(Reading):
    """One reading of a manifest. `places` are those of the machines, by their names in lower case."""

    def __init__(self, file: str) -> None:
        super().__init__(file)
        self.places: dict[str, Location] = {}

    def manifest(self, text: str) -> Manifest:
        root = self.document(text, empty="it should begin with `machines:`")
        if not isinstance(root, dict):
            self.problem(1, f"should be a mapping that begins with `machines:`, not {shown(root)}")
            return Manifest()
        for key in root.keys() - {"machines"}:
            self.problem(self.line((key,)), quoted(key), "is not a known field; known is machines")
        if "machines" not in root:
            self.problem(1, "machines", "is missing")
            return Manifest()
        machines: dict[str, Machine] = {}
        places = self.places
        names: set[str] = set()
        for place, label, fields in self.entries(root["machines"]):
            machine = self.validated(Machine, fields, place, label)
            name = fields.get("name") if isinstance(fields, dict) else None
            if not isinstance(name, str):
                continue
            names.add(name)
            if name.lower() in places:
                first = self.line(places[name.lower()])
                self.problem(
                    self.line((*place, "name")),
                    label,
                    "name",
                    f"is taken by the machine on line {first} (upper and lower case count as one)",
                )
                continue
            places[name.lower()] = place
            if machine is not None:
                machines[name] = machine
        for name, where, what in _relations(machines, names - machines.keys()):
            place = places[name.lower()]
            self.problem(self.line((*place, *where)), name, str(where[0]), what)
        return Manifest() if self.problems else Manifest(machines=machines)

    def entries(self, machines: object) -> Iterator[tuple[Location, str, object]]:
        """Each machine of the list or mapping: its place, its name for messages, its fields."""
        match machines:
            case tuple():
                for index, fields in enumerate(machines):
                    name = fields.get("name") if isinstance(fields, dict) else None
                    label = quoted(name) if isinstance(name, str) else f"machine {index + 1}"
                    yield ("machines", index), label, fields
            case dict():
                for name, fields in machines.items():
                    place = ("machines", name)
                    if isinstance(fields, dict) and fields.get("name", name) != name:
                        self.problem(
                            self.line((*place, "name")),
                            quoted(name),
                            "name",
                            f"is {shown(name)} by its key, not {shown(fields['name'])}",
                        )
                    named = {**fields, "name": name} if isinstance(fields, dict) else fields
                    yield place, quoted(name), {"name": name} if fields is None else named
            case _:
                self.problem(
                    self.line(("machines",)),
                    "machines",
                    f"should be a list of machines, or a mapping by their names, not {shown(machines)}",
                )


if __name__ == "__main__":
    print(json.dumps(json_schema(), indent=2))
