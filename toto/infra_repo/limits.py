"""How far a pushed commit may go with its numbers: the rules of the server over `toto.toml` and `machines.yaml`.

A value that the commit sets too high is an error. A default that is too high becomes the most that is allowed.
"""

from collections.abc import Iterator
from typing import Any, Final

from pydantic import BaseModel

from toto.base import server_rules
from toto.base.errors import InputError
from toto.infra_repo import settings
from toto.infra_repo.manifest import Manifest, ManifestError, Where, somewhere
from toto.infra_repo.settings import Settings, SettingsError

HOUR: Final = 3600.0
# Seconds, MB, bytes and processors, as in the settings; `machine.` are fields of a machine in the manifest, `vm.` are
# what a host's configuration asks for.
MOST: Final[dict[str, float]] = {
    "nix.evaluate_timeout": HOUR,
    "nix.evaluate_memory": 16_384,
    "nix.build_timeout": 24 * HOUR,
    "sandbox.memory": 16_384,
    "sandbox.boot_timeout": HOUR,
    "sandbox.test_timeout": 2 * HOUR,
    "sandbox.phase_timeout": 4 * HOUR,
    "sandbox.test_output": 100_000_000,
    "roll_out.confirm_timeout": HOUR,
    "roll_out.activation_timeout": 2 * HOUR,
    "roll_out.connect_timeout": 300,
    "terraform.timeout": 12 * HOUR,
    "terraform.lock_timeout": 4 * HOUR,
    "terraform.approve_timeout": 7 * 24 * HOUR,
    "machine.memory": 16_384,
    "machine.cores": 32,
    "vm.memory": 16_384,
    "vm.disk": 32_768,
}


def load() -> dict[str, float]:
    """The most that each number may be on this server. Raises `InputError` for a name that is not one of `MOST`."""
    own = server_rules.load().most
    if wrong := sorted(own.keys() - MOST.keys()):
        raise InputError(
            f"most: {wrong[0]} is not known; known are {', '.join(MOST)}", target=server_rules.FILE, hint="fix its name"
        )
    return MOST | own


def within(chosen: Settings, text: str = "") -> Settings:
    """The settings, with defaults that are too high lowered. Raises `SettingsError` for values that are too high.

    `text` is that of the file, for the lines of what is wrong.
    """
    most = load()
    problems: list[str] = []
    changed: dict[str, BaseModel] = {}
    for section in Settings.model_fields:
        part: BaseModel = getattr(chosen, section)
        lowered: dict[str, Any] = {}
        for key, value, limit in _above(part, section, most):
            if key in part.model_fields_set:
                what = _words(value, limit, f"{section}.{key}")
                problems.append(settings.problem((section, key), what, settings.line_of(text, (section, key))))
            else:
                lowered[key] = type(value)(limit)
        changed[section] = part.model_copy(update=lowered)
    if problems:
        raise SettingsError(problems)
    return chosen.model_copy(update=changed)


def check_machines(fleet: Manifest, where: Where = somewhere) -> None:
    """Raise `ManifestError` when a machine asks for more than this server allows."""
    most = load()
    problems = [
        f"{where(name, key)}: {name}: {key}: {_words(value, limit, f'machine.{key}')}"
        for name, machine in fleet.machines.items()
        for key, value, limit in _above(machine, "machine", most)
    ]
    if problems:
        raise ManifestError(problems)


def of_vm(host: str, memory: int, disk: int) -> tuple[int, int]:
    """The MB of memory and of disks that a host's VM may use: what its configuration asks for.

    Where it asks for nothing (0), it is the most that the server allows. Raises `InputError` when it asks for more.
    """
    most = load()
    for option, value, name, more in (
        ("memorySize", memory, "vm.memory", ", or the machine's memory in machines.yaml"),
        ("diskSize", disk, "vm.disk", " (its virtualisation.emptyDiskImages count as well)"),
    ):
        if value > most[name]:
            raise InputError(
                f"virtualisation.{option}: {_words(value, most[name], name)}",
                target=host,
                hint=f"set a lower one in virtualisation.vmVariant of the host{more}",
            )
    return memory or int(most["vm.memory"]), disk or int(most["vm.disk"])


def _above(part: BaseModel, section: str, most: dict[str, float]) -> Iterator[tuple[str, float, float]]:
    for key in type(part).model_fields:
        value, limit = getattr(part, key), most.get(f"{section}.{key}")
        if limit is not None and value is not None and value > limit:
            yield key, value, limit


def _words(value: float, limit: float, name: str) -> str:
    return f"{value:.15g} is more than the {limit:.15g} that this server allows (most.{name} in its server.toml)"
