"""Hosts as a kind of target: nix evaluates them, and the drv of its toplevel identifies a host."""

import difflib
import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from toto.base import runs
from toto.base.errors import InputError
from toto.compliance import checks
from toto.infra_repo import limits, manifest, settings
from toto.infra_repo.manifest import Machine, Manifest
from toto.ledger.ledger import Before, Deployed, Entry
from toto.ledger.target import HOST, Target
from toto.machine import condition, keys, owners
from toto.nix import closure, hosts, inputs, pins
from toto.nix import commands as nix
from toto.nix.builders import Heard
from toto.nix.hosts import FLAKE, Host
from toto.plan.changes import Action, Change, Desired, Told, Why, deploy
from toto.plan.kind import Found, Kind, Source
from toto.plan.order import Order
from toto.plan.window import Rules
from toto.rehearsal import suite

_NAMED: Final = 10  # hosts in a line
_REBOOT: Final = {
    "never": "its next boot begins with a different kernel, initrd or modules",
    "window": "its next boot begins with a different kernel, initrd or modules: a run in its window reboots it",
    "now": "its next boot begins with a different kernel, initrd or modules: its next roll-out reboots it",
}


class DesiredHost(Desired):
    """What a commit wants a host to be.

    `path` is the output path of the toplevel, which is activated. `tests` is the digest of the test scripts. `moved`
    is the address at which its machine was deployed, when it has a new one now. `again` is why its machine should have
    the same once more: it needs a reboot, and its window for that is open; or what was changed by hand is to be undone.
    """

    path: str
    tests: str
    moved: str = ""
    again: Why | None = None


class DeployedHost(Deployed):
    """What a host is, by toto's own roll-out.

    `path` is the output path of the toplevel that was activated. `tests` is the digest of the tests that it passed.
    """

    path: str
    tests: str = ""


class HostOrder(Order):
    """One host's part of a plan. `vm` is the drv of the VM for its rehearsal; "" when it is not rehearsed.

    `vm_memory` and `vm_disk` are the MB that the VM may use.
    """

    machine: Machine | None
    vm: str = ""
    vm_memory: int = 0
    vm_disk: int = 0

    @property
    def host(self) -> DesiredHost:
        """What the commit wants it to be."""
        assert isinstance(self.desired, DesiredHost)
        return self.desired

    @property
    def last(self) -> DeployedHost | None:
        """Its last good."""
        return DeployedHost.of(self.change.last)

    @property
    def rules(self) -> Rules | None:
        return self.machine

    @property
    def roots(self) -> Path:
        """The folder of the GC roots for what this run evaluates and builds of the host."""
        return self.scratch / "roots" / self.name


class HostKind(Kind[Host]):
    """NixOS configurations."""

    name, one, many = HOST, "host", "hosts"
    evaluated = True

    async def discover(self, source: Source) -> list[Found[Host]]:
        """The hosts of a commit: those of its flake when it has some, else those that are files. Raises `InputError`.

        Those that the manifest does not list are not due, unless the settings say so.
        """
        rules, machines = source.settings.nix, source.manifest.machines
        if rules.signing_key is not None and source.deploys:
            keys.signing(source.repo, rules.signing_key)  # else only the copy to a machine would miss it
        found = await _of_flake(source)
        if found is None:
            found = await _pinned(source, hosts.in_files(source.tree, machines, unlisted=rules.unlisted))
        return [
            Found(
                Target(HOST, host.name),
                host,
                machines[host.name].tags if host.name in machines else (),
                due=rules.unlisted or host.name in machines,
                stops=host.name in machines,
            )
            for host in found
        ]

    def is_deployed(self, found: Found[Host], manifest: Manifest) -> bool:
        machine = manifest.machines.get(found.target.name)
        return machine is not None and machine.deployed

    def told(self, source: Source, found: Sequence[Found[Host]], deployed: Collection[str]) -> list[Told]:
        """Files that are no hosts because of a flake, hosts that are not due, and machines whose host is not there."""
        names, machines = {each.target.name for each in found}, source.manifest.machines
        told = []
        if flake := _flake(source):
            files = [each for each in hosts.named(source.tree) if each.name not in names]
            if not (found or files):
                told.append(Told(place=flake, what="has no nixosConfigurations, and there is no hosts/"))
            elif not any(each.subject.file for each in found):
                for file in files:
                    what = (
                        f"is no host, since {flake} says what is: "
                        f"add nixosConfigurations.{file.name} there, or remove it"
                    )
                    told.append(Told(place=file.file, what=what))
        if left := [each.target.name for each in found if not each.due]:
            some = f"{', '.join(left[:_NAMED])}{f' and {len(left) - _NAMED} more' if len(left) > _NAMED else ''}"
            what = (
                f"does not list {some}: not evaluated. List what is a machine; `only` rehearses one by its name, "
                "and nix.unlisted in toto.toml has all of them rehearsed"
            )
            told.append(Told(place=manifest.FILE, what=what, why="not listed"))
        for place in suite.of_nobody(source.tree, names | machines.keys()):
            close = difflib.get_close_matches(place.partition("/")[2], names, n=1)
            meant = f": did you mean {close[0]}?" if close else ""
            told.append(Told(place=place, what=f"has tests that never run, since no host has this name{meant}"))
        for name, machine in machines.items():
            if machine.role == "other" or name in names:
                continue
            if name in deployed:
                what = (
                    "its host is gone from the commit: it runs on as it was deployed; "
                    "put it back, or remove the machine from machines.yaml"
                )
                told.append(Told(place=f"host/{name}", what=what))
            elif close := difflib.get_close_matches(name, names - machines.keys(), n=1):
                what = f"no host has this machine's name: did you mean {close[0]}? (or `role: other`: not toto's)"
                told.append(Told(place=f"host/{name}", what=what))
        return [*told, *(each for machine in machines.values() for each in _known_of(source.repo, machine))]

    async def identify(self, source: Source, found: Found[Host]) -> DesiredHost:
        """Evaluate the host's toplevel. Raises `EvaluationFailed`, `CommandTimeout`, `InputError`."""
        host, machine = found.subject, source.manifest.machines.get(found.target.name)
        moved = await owners.moved(source.repo, machine, source.owners) if machine and machine.deployed else ""
        tests = suite.find(source.tree, host.name)
        drv = await nix.instantiate(
            source.tree,
            host,
            source.roots / host.name / "toplevel.drv",
            nixpkgs=source.settings.nix.nixpkgs,
            system=machine.system if machine else None,
            timeout=source.settings.nix.evaluate_timeout,
            memory=source.memory,
        )
        return DesiredHost(
            target=found.target,
            file=host.file,
            identity=drv,
            path=nix.output(drv, target=host.name),
            tests=_digest(source, tests, machine.tags if machine else ()),
            moved=moved,
            again=_again(source.repo, machine) if machine else None,
        )

    async def order(self, source: Source, found: Found[Host], change: Change) -> HostOrder:
        """Evaluate the host's VM, when it will be rehearsed. Raises what `identify` raises.

        Raises `InputError` too when the VM asks for more than the server allows.
        """
        machine, vm = source.manifest.machines.get(found.target.name), nix.Vm("")
        if change.action is not Action.RECORD:  # evaluations are most of what a push costs
            vm = await nix.instantiate_vm(
                source.tree,
                found.subject,
                source.roots / found.target.name / "vm.drv",
                nixpkgs=source.settings.nix.nixpkgs,
                system=machine.system if machine else None,
                sandbox_key=await keys.public("sandbox"),
                ports=machine.ports if machine else (),
                timeout=source.settings.nix.evaluate_timeout,
                memory=source.memory,
            )
        chosen = (machine.memory if machine else None) or source.settings.sandbox.memory
        memory, disk = limits.of_vm(found.target.name, 0 if chosen else vm.memory, vm.disk)
        return source.order(HostOrder, change, machine=machine, vm=vm.drv, vm_memory=chosen or memory, vm_disk=disk)

    def change(self, desired: Desired, entry: Entry, manifest: Manifest) -> Change | None:
        """What a run does with the host; None when the host is what the commit wants.

        When the paths are equal nothing is activated, even if the drvs differ; when only the tests differ, they are run
        against the machine.
        """
        assert isinstance(desired, DesiredHost)
        machine = manifest.machines.get(desired.target.name)
        if machine is None or not machine.deployed:
            return _rehearsed_only(
                desired,
                entry,
                "no machine in the manifest" if machine is None else f"role {machine.role}, deploy {machine.deploy}",
            )
        last = DeployedHost.of(entry.good)
        if desired.moved and entry.intent is None:
            return Change(
                desired=desired,
                why=Why.MOVED,
                note=f"it was at {desired.moved}: what runs there stays, if that is a different machine",
                last=last,
                action=Action.DEPLOY,
            )
        tests_differ = last is not None and last.tests != desired.tests
        if entry.intent is None and last is not None and last.path == desired.path:
            if desired.again and entry.reverted is None:  # (One that was reverted is not tried again by itself.)
                return Change(desired=desired, why=desired.again, action=Action.DEPLOY, last=last)
            if last.identity != desired.identity:
                return Change(
                    desired=desired,
                    why=Why.CHANGED,
                    note="the same closure",
                    last=last,
                    action=Action.VERIFY if tests_differ else Action.RECORD,
                )
            return Change(desired=desired, why=Why.TESTS, action=Action.VERIFY, last=last) if tests_differ else None
        found = deploy(desired, entry, Why.CHANGED)
        # That toto may do everything there is said where the roll-out is.
        said = ["by sudo"] if not machine.by_document else []
        return found.model_copy(update={"note": "; ".join(filter(None, (found.note, *said)))})

    def retired(self, target: Target, entry: Entry, known: Collection[Target], manifest: Manifest) -> bool:
        """A host is retired when its machine leaves the manifest, unless it is rehearsed without one."""
        rehearsed_only = entry.rehearsed is not None and entry.good is None and target in known
        return target.name not in manifest.machines and not rehearsed_only

    def deployed(self, desired: Desired, **facts: Any) -> DeployedHost:
        assert isinstance(desired, DesiredHost)
        return DeployedHost(identity=desired.identity, path=desired.path, tests=desired.tests, **facts)

    def before(self, first: Before, now: Before) -> Before:
        """What the machine ran before toto first touched it: what it runs now was never good."""
        return first

    def after(self, source: Source, found: Sequence[Found[Host]]) -> Mapping[str, tuple[str, ...]]:
        """The order of the machines in the manifest, also of those that have no host file yet."""
        return {name: machine.after for name, machine in source.manifest.machines.items()}

    def groups(self, manifest: Manifest, orders: Sequence[Order]) -> list[list[Order]]:
        """Hosts by their machines' wave and `after`. The hosts of a group are rolled out side by side.

        One that may reboot is a group of its own.
        """
        named, groups = {each.name: each for each in orders}, []
        for names in manifest.order(named.keys() & manifest.machines.keys()):
            group = [named[name] for name in names]
            now = datetime.now()
            reboots = [
                each
                for each in group
                if each.change.why is Why.REBOOT
                or (isinstance(each, HostOrder) and each.machine is not None and each.machine.reboots(now))
            ]
            groups += [[each for each in group if each not in reboots], *([each] for each in reboots)]
        return list(filter(None, groups))

    async def preview(self, order: Order, *, build: bool = False) -> str:
        """What changes between the last good closure and the desired one. With `build`, the host is built first.

        Raises `BuildFailed`.
        """
        assert isinstance(order, HostOrder)
        if order.change.action in (Action.VERIFY, Action.RECORD):
            return "nothing in the closure"
        if build and order.change.action is Action.DEPLOY:
            await build_toplevel(order)
        if not await nix.valid(order.host.path):
            return "not built yet"
        return str(await difference(order))

    def roots(self, repo: Path, name: str) -> tuple[Path, ...]:
        return runs.last_good_root(repo, name), runs.previous_root(repo, name)


def _again(repo: Path, machine: Machine) -> Why | None:
    """Why a machine should have its last good once more, by what is known of it and by its policies."""
    reboots = machine.reboot == "window" and machine.reboots(datetime.now()) is not None
    known = condition.read(repo, machine.name) if reboots or machine.drift == "mend" else None
    if known is None:
        return None
    if reboots and known.reboot_needed:
        return Why.REBOOT
    return Why.DRIFT if machine.drift == "mend" and known.drift else None


def _known_of(repo: Path, machine: Machine) -> list[Told]:
    """What toto knows of a machine without asking it."""
    known = condition.read(repo, machine.name) if machine.deployed and machine.by_document else None
    if known is None:
        return []
    said = [("drifted", each) for each in known.drift]
    if known.reboot_needed:
        said.append(("reboot needed", _REBOOT[machine.reboot]))
    return [Told(place=f"machine/{machine.name}", what=what, why=why) for why, what in said]


def _flake(source: Source) -> str:
    """The path in the tree of the flake that names the hosts; "" when there is none. Raises `InputError`."""
    folder = source.settings.nix.flake
    if folder is False:
        return ""
    file = f"{folder}/{FLAKE}".removeprefix("./")
    place = source.tree / file
    if place.is_file() and place.resolve().is_relative_to(source.tree.resolve()):
        return file
    if folder != ".":
        raise InputError(
            f"nix.flake: there is no {file}", target=settings.FILE, hint="name the folder that has the flake.nix"
        )
    return ""


async def _pinned(source: Source, found: list[Host]) -> list[Host]:
    """Hosts that are files, with the nixpkgs that npins or niv have pinned, where the settings say so."""
    rules = source.settings.nix
    if not (found and (pin := pins.names(rules.nixpkgs))):
        return found
    path = await pins.fetch(source.tree, *pin, timeout=rules.evaluate_timeout)
    return [replace(each, nixpkgs=path) for each in found]


async def _of_flake(source: Source) -> list[Host] | None:
    """The hosts of the commit's flake; None when the hosts are files. Raises `InputError`."""
    rules = source.settings.nix
    if not (file := _flake(source)):
        return None
    if lacking := await inputs.lacking(source.tree, str(rules.flake)):
        await inputs.fetch(lacking, *keys.of_inputs(source.repo), timeout=rules.evaluate_timeout)
    found = await nix.flake_hosts(
        source.tree, str(rules.flake), timeout=rules.evaluate_timeout, memory=rules.most_memory
    )
    if found is None and rules.flake != ".":
        raise InputError("has no nixosConfigurations, and nix.flake says that it names the hosts", target=file)
    if found is None and "nixpkgs" not in rules.model_fields_set and (files := list(hosts.named(source.tree))):
        raise InputError(
            f"has no nixosConfigurations, and there is {files[0].file}: toto does not guess which nixpkgs that is for",
            target=file,
            hint=f"name the hosts in nixosConfigurations, or set nix.flake = false in {settings.FILE}: then hosts are "
            "files, on nix.nixpkgs",
        )
    return found


def _digest(source: Source, tests: suite.Suite, tags: Collection[str]) -> str:
    """The digest of a host's tests: of its scripts, and of its compliance checks where these are a gate.

    Raises `InputError`.
    """
    scripts = tests.digest(list(suite.Phase))
    if not checks.gated(source.settings, tags):
        return scripts
    if not (found := checks.find(source.tree, source.settings.compliance, tags)):
        return scripts
    return hashlib.sha256(f"{scripts} {checks.digest(source.tree, found)}".encode()).hexdigest()


def _rehearsed_only(host: DesiredHost, entry: Entry, note: str) -> Change | None:
    seen = DeployedHost.of(entry.rehearsed)
    if seen is not None and (seen.identity, seen.tests) == (host.identity, host.tests):
        return None
    why = Why.NEW if seen is None else Why.CHANGED if seen.identity != host.identity else Why.TESTS
    return Change(desired=host, why=why, action=Action.REHEARSE, note=note)


async def build_toplevel(order: HostOrder, heard: Heard | None = None) -> Path:
    """Build a host's system; a GC root keeps it until the run ends.

    Raises `BuildFailed`, and `InputError` for one that could never be activated on the machine.
    """
    path = await _build(order, order.desired.identity, "toplevel", heard)
    if (
        order.machine is not None
        and order.machine.role != "other"
        and not (path / "bin/switch-to-configuration").exists()
    ):
        raise InputError(
            "its system has no bin/switch-to-configuration, so nothing can activate it",
            target=order.label,
            hint="set system.switch.enable = true",
        )
    return path


async def build_vm(order: HostOrder, heard: Heard | None = None) -> Path:
    """Build the VM for a host's rehearsal; a GC root keeps it until the run ends. Raises `BuildFailed`."""
    return await _build(order, order.vm, "vm", heard)


async def _build(order: HostOrder, drv: str, link: str, heard: Heard | None) -> Path:
    return Path(
        await nix.build(
            drv, order.roots / link, timeout=order.settings.nix.build_timeout, target=order.label, heard=heard
        )
    )


async def difference(order: HostOrder) -> closure.Difference:
    """What changes from a host's last good to the desired system, which must be in the store."""
    last = order.last.path if order.last and await nix.valid(order.last.path) else None
    return await closure.difference(last, order.host.path)
