"""Roll out or revert a host: copy, activate, test, clean up. Each step is a task of its own."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import anyio
from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from blocks import SshIdentity
from flying_monkey.desired import BadDocument
from flying_monkey.signature import NotGenuine
from tasks import Done, sink
from tasks.record import record_reverted, set_step
from tasks.reversal import Reversal
from tasks.settle import manifest_of
from toto.base import process, runs
from toto.base.errors import TotoError
from toto.infra_repo import git
from toto.infra_repo.manifest import Machine
from toto.infra_repo.settings import Settings
from toto.ledger import steps
from toto.ledger.ledger import Deployed, Intent, Ledger
from toto.ledger.target import Target
from toto.machine import access, condition, keys, owners, ssh
from toto.machine.activation import Activator, MachineState, Verb, WayChanged
from toto.machine.fleet_builders import not_building
from toto.machine.revert import where_to
from toto.nix import commands as nix
from toto.plan.host import DeployedHost, HostOrder
from toto.rehearsal import suite
from toto.rehearsal.suite import Phase
from toto.store import grants


@asynccontextmanager
async def connect(machine: Machine, repo: Path, run: str, settings: Settings) -> AsyncIterator[Activator]:
    """Reach a machine; the result has the activation verbs.

    Raises as `access.connect` does.
    """
    identity = None if machine.deploy == "pull" else await _identity(machine, repo, run)
    async with access.connect(machine, repo, run, settings, identity) as activator:
        yield activator


async def _identity(machine: Machine, repo: Path, run: str) -> Path:
    """The key for a machine: the manifest's, else the one of the repo's block, else the repo's own."""
    if machine.ssh.identity is None:
        directory = runs.run_directory(repo, run) / "identity" / machine.name
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if (saved := (await SshIdentity.of_repo(repo)).file(directory)) is not None:
            return saved
    return await keys.identity(repo, machine.ssh.identity)


async def claim(order: HostOrder, activator: Activator) -> None:
    """Make the order's repo the owner of its machine, before anything is copied to it. Raises `NotOwned`."""
    assert order.machine is not None
    await owners.claim(order.repo, order.machine, activator.host_keys, activator.ip)


@task(name="inspect the machine", task_run_name="inspect the machine", cache_policy=NO_CACHE)
async def inspect(order: HostOrder, activator: Activator, expected: str | None = None) -> MachineState:
    """What the machine runs and boots now. A revert goes back to this if toto has never deployed the machine.

    A warning says so when that is the system of a different host: the address may be wrong.
    Raises `NotWhatItShouldBe` when it does not run `expected`, and `Unreachable`.
    """
    await activator.prepare()
    facts = await activator.facts()
    for other in whose(facts.system, order):
        get_run_logger().warning(
            "%s runs the system of %s: is its address %s right?",
            order.label,
            other,
            order.machine.address if order.machine else "",
        )
    if expected is not None:
        await activator.check(expected)
    get_run_logger().info("it runs %s, and boots %s next", facts.system, facts.profile or "what it was installed with")
    return facts


def whose(system: str, order: HostOrder) -> list[str]:
    """The other hosts whose system it is: that was deployed to them from this repo, or it has their names."""
    ledger = Ledger(order.repo).read()
    deployed = {
        target.name
        for target, entry in ledger.entries.items()
        for record in (entry.good, entry.intent.desired if entry.intent else None)
        if target.kind == order.target.kind and record and getattr(record, "path", None) == system
    }
    if order.name in deployed:
        return []
    names = {target.name for target in ledger.entries if target.kind == order.target.kind} - {order.name}
    called = {name for name in names if f"-nixos-system-{name}-" in system}
    return sorted((deployed | called) - {order.name})


@task(
    name="copy the closure", task_run_name="copy the closure", cache_policy=NO_CACHE, retries=1, retry_delay_seconds=3
)
async def copy(order: HostOrder, activator: Activator) -> Done:
    """Copy exactly the rehearsed closure to the machine. Raises `CopyFailed`, `Unreachable`."""
    assert order.machine is not None
    settings = order.settings.nix
    key = await _signs(order.repo, settings.signing_key, order.machine)
    if order.machine.substitute:  # from toto as well
        closures = [order.host.path, *await grants.good(order.repo, order.name)]
        signs = key or await keys.for_closures(order.repo, settings.signing_key)
        await grants.grant(order.repo, order.name, closures, signs, timeout=settings.build_timeout)
    await _copy(order.host.path, activator, order.repo, key, timeout=settings.build_timeout, on_line=sink())
    return Done()


async def _signs(repo: Path, name: str | None, machine: Machine) -> Path | None:
    """The secret key that signs what is copied to a machine; None where toto is trusted with anything."""
    if name is None and (machine.access == "sudo" or machine.deploy == "pull"):  # (What is pulled is signed anyway.)
        return None
    return await keys.for_closures(repo, name)


async def _copy(
    path: str,
    activator: Activator,
    repo: Path,
    key: Path | None,
    *,
    timeout: float,
    on_line: process.LineSink | None = None,
) -> None:
    """Copy a closure to a machine, signed with a secret key when there is one. Raises `CopyFailed`."""
    signed = None
    if key is not None:
        signed = runs.run_directory(repo, activator.run) / "signed" / activator.name
        await nix.sign(path, key, signed)
    await activator.copy(path, signed=signed, timeout=timeout, on_line=on_line)


@task(name="try the way in", task_run_name="try the way in", cache_policy=NO_CACHE)
async def try_way_in(order: HostOrder, activator: Activator, before: MachineState) -> MachineState:
    """Log in as the new configuration would let toto in, before it is activated. Returns `before`.

    Raises `WouldLockOut`.
    """
    await activator.try_way_in(order.host.path, before.system, address=order.settings.roll_out.check_address)
    return before.model_copy()


@task(name="activate", task_run_name="activate", cache_policy=NO_CACHE)
async def activate(order: HostOrder, activator: Activator, verb: Verb, before: MachineState) -> Done:
    """Activate on the machine under its watchdog, and confirm over a new connection.

    Raises `ActivationFailed`, `Unreachable`, `LostTarget`.
    """
    await set_step(order, verb, f"activation {verb}")
    assert order.machine is not None
    finish, confirm = order.settings.roll_out.activation_timeout, _patience(order.machine, order.settings, order.tree)
    await activator.activate(
        verb,
        order.host.path,
        before,
        finish=finish,
        confirm=confirm + order.try_for,
        on_line=sink(),
        stays=not order.try_for,
    )
    return Done()


@task(name="try", task_run_name="try", cache_policy=NO_CACHE)
async def try_out(order: HostOrder) -> Done:
    """Leave the host as it is for as long as it is tried. Its machine goes back by itself if toto does not do it."""
    until = datetime.now(UTC) + timedelta(seconds=order.try_for)
    get_run_logger().info(
        "tried until %s UTC; it goes back then, or as soon as this run is cancelled: toto cancel %s",
        f"{until:%H:%M:%S}",
        order.run,
    )
    await anyio.sleep(order.try_for)
    return Done()


def _patience(machine: Machine, settings: Settings, tree: Path) -> float:
    """Seconds until a machine goes back by itself; `tree` is the commit that is deployed.

    toto confirms at once by sudo, and after its own tests where a signed document says that a system is kept.
    """
    if not machine.by_document:
        return settings.roll_out.confirm_timeout
    phases = (Phase.SMOKE,) if machine.activation == "switch" else (Phase.SMOKE, Phase.POST_SWITCH)
    found = suite.find(tree, machine.name)
    tests = sum(len(found.of(phase)) for phase in phases)
    return settings.roll_out.confirm_timeout + settings.sandbox.test_timeout * tests


async def patience_at(repo: Path, run: str, machine: Machine, settings: Settings, commit: str) -> float:
    """The same of a commit that was being deployed; no problem with that keeps a machine from being reverted."""
    if not machine.by_document:
        return settings.roll_out.confirm_timeout
    tree = runs.run_directory(repo, run) / "deployed" / machine.name
    try:
        await git.checkout(repo, commit, tree)
        return _patience(machine, settings, tree)
    except (TotoError, OSError) as error:
        get_run_logger().warning("how long its watchdog waits is not known: %s", error)
        return settings.roll_out.confirm_timeout


@task(name="keep", task_run_name="keep", cache_policy=NO_CACHE)
async def keep(order: HostOrder, activator: Activator, verb: Verb) -> Done:
    """Have kept what passed its tests, on a machine that does what documents say, when no `switch` follows.

    Raises `ActivationFailed`, `Unreachable`, `LostTarget`.
    """
    if verb == "test":
        await set_step(order, "keep", "to be kept")
    await activator.keep(verb, order.host.path, finish=order.settings.roll_out.activation_timeout)
    return Done()


@task(name="add GC roots", task_run_name="add GC roots", cache_policy=NO_CACHE)
async def add_gc_root(order: HostOrder) -> Done:
    """Add a GC root for the closure that becomes the last good, and one for the last good before it."""
    root = runs.last_good_root(order.repo, order.name)
    if root.is_symlink():
        await nix.add_gc_root(str(root.readlink()), runs.previous_root(order.repo, order.name))
    await nix.add_gc_root(order.host.path, root)
    return Done()


@task(name="clean up", task_run_name="clean up", cache_policy=NO_CACHE)
async def clean_up(order: HostOrder, activator: Activator) -> None:
    """Remove this run's files from the machine, and note how it is now. Nothing is lost if that fails."""
    try:
        await activator.clean_up()
        condition.note(order.repo, order.name, await activator.condition())
    except (TotoError, OSError, NotGenuine, BadDocument) as error:  # the host is recorded as good by now
        get_run_logger().warning("could not clean up its /run/toto: %s", error)


async def revert(reversal: Reversal) -> str:
    """Revert a host to its last good, or to what it ran before toto first touched it; return the path that it runs now.

    A machine that does not answer may be reverting itself, so this waits for it (see `Reversal`).
    Raises `Unreachable`, `ActivationFailed`, `LostTarget`; the intent is then still open.
    """
    repo, run, target = reversal.repo, reversal.run, reversal.target
    machine = reversal.manifest.machines.get(target.name)
    if machine is None:
        raise TotoError(
            "is not in the manifest any more: toto does not know how to connect to it",
            target=target.name,
            hint="add it to machines.yaml again, or revert it by hand",
        )
    entry = Ledger(repo).get(target)
    intent, good = steps.require_intent(entry, run), DeployedHost.of(entry.good)
    to = where_to(MachineState.of(intent.before), good.path if good else None, machine.activation)
    patience = await patience_at(repo, run, machine, reversal.settings, intent.desired.commit)
    deadline = time.monotonic() + max(0.0, reversal.since + patience - time.time())
    while True:
        try:
            await _go_back(reversal, machine, intent, to, is_good=good is not None and to.system == good.path)
            break
        except (ssh.Unreachable, WayChanged) as error:
            if time.monotonic() > deadline:
                raise
            if isinstance(error, WayChanged):
                get_run_logger().warning("%s; going on by that", error.message)
            else:
                get_run_logger().warning("does not answer yet; it reverts itself when toto does not confirm")
            await anyio.sleep(2)
    if good is not None:
        try:
            await nix.add_gc_root(good.path, runs.last_good_root(repo, machine.name))
        except process.CommandFailed as error:  # the machine is reverted, and that is what counts
            get_run_logger().warning("its last good is no longer in toto's own store: %s", error)
    await record_reverted(repo, target, good, intent.desired, run, reversal.why)
    return to.system


async def _go_back(reversal: Reversal, machine: Machine, intent: Intent, to: MachineState, *, is_good: bool) -> None:
    """Once. Only its last good is copied: what ran before toto is there, and its path is the machine's own account."""
    settings = reversal.settings.roll_out
    async with (
        not_building(machine, patience=0),  # (what it builds may well be lost by what is reverted)
        connect(machine, reversal.repo, reversal.run, reversal.settings) as activator,
    ):
        await activator.prepare()
        # A watchdog that is still armed is named after the run that armed it.
        armed = intent.desired.run
        await activator.interrupt(armed, patience=settings.activation_timeout * 2 + settings.confirm_timeout)
        if is_good and await activator.may_lack(to.system) and await nix.valid(to.system):
            key = await _signing_key_now(reversal, machine)
            await _copy(to.system, activator, reversal.repo, key, timeout=settings.activation_timeout)
        await activator.revert(to, finish=settings.activation_timeout, boot=intent.step != "test")
        await activator.clean_up(armed)
        await activator.clean_up()


async def _signing_key_now(reversal: Reversal, machine: Machine) -> Path | None:
    """The key that signs what a revert copies. Without it the machine may accept the closure all the same."""
    try:
        return await _signs(reversal.repo, reversal.settings.nix.signing_key, machine)
    except TotoError as error:
        get_run_logger().warning("what is copied is not signed: %s", error)
        return None


async def find_drift(repo: Path, run: str, target: Target, good: Deployed) -> list[str]:
    """What a machine runs or boots instead of its last good, one line for each.

    A machine that does not answer is a warning: the next check may find it. Raises `TotoError` for one that cannot be
    read.
    """
    settings, manifest = await manifest_of(repo, good.commit)
    machine, deployed, logger = manifest.machines.get(target.name), DeployedHost.of(good), get_run_logger()
    if machine is None or not machine.deployed or deployed is None:
        return []
    owners.check(repo, machine)
    try:
        async with connect(machine, repo, run, settings) as activator:
            await activator.prepare()
            facts = await activator.facts(fresh=True)
            said = await activator.condition()
    except ssh.Unreachable as error:
        logger.warning("%s", error)
        return []
    found = []
    if machine.activation != "boot" and facts.system != deployed.path:
        found.append(f"it runs {facts.system}, and not {deployed.path}")
    if machine.activation != "test" and facts.profile != deployed.path:
        found.append(f"it boots {facts.profile or 'nothing'} next, and not {deployed.path}")
    if said is not None and said.reboot_needed:
        logger.warning("%s: it needs a reboot for its kernel, initrd or modules", target.label)
    condition.note(repo, target.name, said and said.model_copy(update={"drift": tuple(found)}))
    return found
