"""Roll out one host, and put one back: copy, intent, activate, test, record. Each verb a task of its own."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from tasks import sink
from tasks.rehearse import Reached
from toto import git, keys, ledger, nix, paths, plan, process, ssh
from toto.activation import Activator, Verb
from toto.errors import TotoError
from toto.ledger import Before, Deployed, Entry, Intent, Ledger, Note, Target
from toto.manifest import Machine
from toto.plan import Order
from toto.settings import RollOut


@asynccontextmanager
async def reach(machine: Machine, repo: Path, run: str, connect_timeout: float) -> AsyncIterator[Activator]:
    """A connection to a machine, with the activation verbs on it. Raises `Unreachable`."""
    target = ssh.SshTarget(
        name=machine.name, address=machine.address, port=machine.ssh.port, user=machine.ssh.user,
        identity=await keys.identity(machine.ssh.identity), host_key=machine.ssh.host_key,
        known_hosts=paths.repo_state(repo) / "known_hosts", connect_timeout=max(1, round(connect_timeout)))
    async with ssh.connection(target, plan.run_directory(repo, run) / "ssh" / f"{machine.name}@machine") as connection:
        yield Activator(connection, run, connect_timeout)


def reached(machine: Machine, activator: Activator) -> Reached:
    """How test scripts reach the machine itself: its ports are where they are."""
    return Reached(config=activator.connection.config, address=machine.address,
                   ports={port: port for port in machine.ports})


@task(name="look at the machine", task_run_name="look at the machine", cache_policy=NO_CACHE)
async def look(activator: Activator, expected: str | None = None) -> Before:
    """What the machine runs and boots now: to this it goes back if toto never deployed it.

    Raises `NotWhatItShouldBe` when it does not run `expected`.
    """
    await activator.install()
    facts = await activator.facts()
    if expected is not None:
        await activator.check(expected)
    get_run_logger().info("it runs %s, and boots %s next", facts.system, facts.profile or "what it was installed with")
    return facts.before


@task(name="copy the closure", task_run_name="copy the closure", cache_policy=NO_CACHE, retries=1,
      retry_delay_seconds=3)
async def copy(order: Order, activator: Activator) -> None:
    """Bring the very closure that was rehearsed to the machine."""
    path, settings = order.change.host.path, order.settings.nix
    if settings.signing_key is not None:
        await nix.sign(path, Path(settings.signing_key))
    try:
        await nix.copy(path, activator.connection.target.name, activator.connection.config,
                       timeout=settings.build_timeout, target=order.name, on_line=sink())
    except nix.CopyFailed:
        await activator.connection.run(["true"], fresh=True, timeout=60)  # raises Unreachable when that was why
        raise


@task(name="intend", task_run_name="intend", cache_policy=NO_CACHE)
async def intend(order: Order, before: Before) -> None:
    """Say in the ledger what is about to be done, and what was before, before anything is touched."""
    intent = Intent(desired=desired(order), before=before, run=order.run, owner=ledger.owner(), at=git.now())
    await Ledger(order.repo).write(order.change.target, ledger.intend(intent),
                                   f"{order.name}: intent to deploy {order.commit[:8]} ({order.change.why})")


@task(name="activate", task_run_name="activate", cache_policy=NO_CACHE)
async def activate(order: Order, activator: Activator, verb: Verb, before: Before) -> None:
    """Activate on the machine under its watchdog, and confirm over a new connection."""
    await Ledger(order.repo).write(order.change.target, lambda entry: ledger.now_at(entry, order.run, verb),
                                   f"{order.name}: activation {verb}")
    settings = order.settings.roll_out
    if settings.method == "nixos-rebuild":
        await activator.nixos_rebuild(verb, order.change.host.path, timeout=settings.activation_timeout, on_line=sink())
    else:
        await activator.activate(verb, order.change.host.path, before, finish=settings.activation_timeout,
                                 confirm=settings.confirm_timeout)


@task(name="record", task_run_name="record", cache_policy=NO_CACHE)
async def record_good(order: Order) -> None:
    """The host passed everything: it is the new last good, kept by a GC root, as is the one before it."""
    root = plan.last_good_root(order.repo, order.name)
    if root.is_symlink():
        await nix.keep(str(root.readlink()), plan.previous_root(order.repo, order.name))
    await nix.keep(order.change.host.path, root)
    await Ledger(order.repo).write(order.change.target, ledger.good(desired(order), order.run),
                                   f"{order.name}: good at {order.commit[:8]}")


@task(name="tidy", task_run_name="tidy", cache_policy=NO_CACHE)
async def tidy(activator: Activator) -> None:
    """Remove this run's state from the machine; when that fails, nothing is lost."""
    try:
        await activator.forget()
    except TotoError as error:
        get_run_logger().warning("its /run/toto could not be tidied: %s", error)


@task(name="record", task_run_name="record", cache_policy=NO_CACHE)
async def record_verified(order: Order) -> None:
    """Nothing was activated: the same closure has another drv, or passed other tests."""
    await Ledger(order.repo).write(order.change.target, ledger.verified(desired(order)),
                                   f"{order.name}: verified at {order.commit[:8]}, nothing activated")


@task(name="record", task_run_name="record", cache_policy=NO_CACHE)
async def record_rehearsed(order: Order) -> None:
    """A host without a machine passed its rehearsal."""
    await Ledger(order.repo).write(order.change.target, ledger.rehearsed_only(desired(order)),
                                   f"{order.name}: rehearsed at {order.commit[:8]}, not deployed from here")


@task(name="record", task_run_name="record", cache_policy=NO_CACHE)
async def record_unreachable(order: Order, why: str) -> None:
    """The machine does not answer, and nothing was done to it; a later run tries again."""
    await Ledger(order.repo).write(order.change.target, ledger.not_reached(_note(desired(order), order.run, why)),
                                   f"{order.name}: unreachable, {order.commit[:8]} not deployed")


@task(name="retire", task_run_name="retire", cache_policy=NO_CACHE)
async def retire(repo: Path, name: str) -> None:
    """A machine left the manifest: its ledger entry and GC root go, nothing on it is touched."""
    await Ledger(repo).write(Target("host", name), lambda _: None, f"{name}: retired, it left the manifest")
    for root in (plan.last_good_root(repo, name), plan.previous_root(repo, name)):
        root.unlink(missing_ok=True)


async def intend_to_put_back(repo: Path, name: str, run: str) -> None:
    """Open the intent under which a host is put back, also one that this run had made good already.

    No task: it needs nothing but the repo, and a Prefect that is down must not keep it from being written.
    """
    def change(entry: Entry) -> Entry:
        if entry.intent is not None:
            return ledger.now_at(entry, run, entry.intent.step)
        if entry.good is None or entry.good.run != run:
            raise ledger.LostTarget("is no longer what this run made of it", target=name)
        intent = Intent(desired=entry.good, before=entry.before or Before(system=entry.good.path), run=run,
                        owner=ledger.owner(), at=git.now(), step="revert")
        return entry.model_copy(update={"intent": intent, "good": entry.previous})
    await Ledger(repo).write(Target("host", name), change, f"{name}: to be put back")


@task(name="put back", task_run_name="put back", cache_policy=NO_CACHE)
async def put_back(repo: Path, run: str, machine: Machine, settings: RollOut, why: str, patience: float) -> str:
    """Make one host what it was: its last good, or what it ran before toto first touched it; the path it is back at.

    A machine that may be healing itself, cut off from us, is waited for: `patience` seconds at the most.
    Raises `Unreachable`, `ActivationFailed`; the intent is then still open.
    """
    target = Target("host", machine.name)
    entry = Ledger(repo).read().get(target)
    assert entry.intent is not None
    to = where_to(entry, machine)
    deadline = time.monotonic() + patience
    while True:
        try:
            await _go_back(repo, run, machine, settings, entry, to)
            break
        except ssh.Unreachable:
            if time.monotonic() > deadline:
                raise
            get_run_logger().warning("does not answer yet; it goes back by itself when toto does not confirm")
            await anyio.sleep(2)
    if entry.good is not None:
        try:
            await nix.keep(entry.good.path, plan.last_good_root(repo, machine.name))
        except process.CommandFailed as error:  # the machine is back, and that is what counts
            get_run_logger().warning("its last good is no longer in toto's own store: %s", error)
    where = f"{entry.good.commit[:8]}" if entry.good else "what it ran before toto"
    await Ledger(repo).write(target, ledger.put_back(entry.good, _note(entry.intent.desired, run, why), run),
                             f"{machine.name}: put back to {where}")
    return to.system


async def _go_back(repo: Path, run: str, machine: Machine, settings: RollOut, entry: Entry, to: Before) -> None:
    assert entry.intent is not None
    async with reach(machine, repo, run, settings.connect_timeout) as activator:
        await activator.install()
        # A watchdog that is still armed is named after the run that armed it.
        armed = Activator(activator.connection, entry.intent.desired.run, settings.connect_timeout)
        await armed.take_charge(patience=settings.activation_timeout * 2 + settings.confirm_timeout)
        if (await activator.facts()).system != to.system and await nix.valid(to.system):
            await nix.copy(to.system, machine.name, activator.connection.config, timeout=settings.activation_timeout,
                           target=machine.name)
        await activator.go_back(to, finish=settings.activation_timeout, boot=entry.intent.step != "test")
        await armed.forget()
        await activator.forget()


def where_to(entry: Entry, machine: Machine) -> Before:
    """Where a host with an open intent goes back to: the recorded last good, else what it ran before."""
    assert entry.intent is not None
    before, good = entry.intent.before, entry.good
    if good is None:
        return before
    match machine.activation:
        case "switch":
            return Before(system=good.path, profile=good.path)
        case "boot":  # what runs was never touched
            return Before(system=before.system, profile=good.path)
        case "test":  # what boots was never touched
            return Before(system=good.path, profile=before.profile)


def desired(order: Order) -> Deployed:
    """What this run makes of the host, as the ledger records it."""
    host = order.change.host
    return Deployed(identity=host.drv, path=host.path, commit=order.commit, run=order.run, at=git.now(),
                    tests=host.tests)


def _note(what: Deployed, run: str, why: str) -> Note:
    lines = why.strip().splitlines() or [""]
    return Note(identity=what.identity, commit=what.commit, run=run, at=git.now(), why=lines[0][:500])
