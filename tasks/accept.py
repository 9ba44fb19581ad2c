"""Accept: a person takes the present state of a target as good, because it cannot be put back to what it was.

Nothing of the target is touched. Its present state is read, recorded in the ledger with who accepted it and why, and
later runs go on from it.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, TypeAlias

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from tasks import helm, roll_out, terraform
from tasks.record import retire
from tasks.settle import dead_intents, manifest_of
from toto.base.errors import InputError, TotoError
from toto.base.runs import last_good_root, run_directory
from toto.infra_repo import git
from toto.infra_repo.manifest import Manifest
from toto.infra_repo.settings import Settings
from toto.ledger import steps
from toto.ledger.ledger import Accepted, Deployed, Entry, Ledger, TargetBusy
from toto.ledger.target import HOST, Target
from toto.machine import owners, renewal
from toto.nix import commands as nix
from toto.plan.host import DeployedHost
from toto.plan.kind import Source
from toto.plan.kinds import kind_of
from toto.plan.release import DeployedRelease
from toto.plan.root import DeployedRoot
from toto.report.message import one_line

ACCEPTED: Final = "accepted: "
"""begins an identity that no commit has: the next run compares the target itself with what it wants"""


@dataclass(frozen=True)
class Present:
    """The present state of a target, as the ledger records it (None: nothing of it is there), and in words."""

    deployed: Deployed | None
    words: str


@dataclass(frozen=True)
class Asked:
    """A target whose present state is asked for: its ledger `entry`, and what was rolled out `last`, well or not.

    `settings` and `manifest` are those of the newest commit.
    """

    repo: Path
    run: str
    target: Target
    entry: Entry
    last: Deployed
    settings: Settings
    manifest: Manifest


Reader: TypeAlias = Callable[[Asked], Awaitable[Present]]


@task(name="accept", task_run_name="accept", cache_policy=NO_CACHE)
async def accept(repo: Path, run: str, target: Target, read: Reader, *, why: str, by: str) -> str:
    """Take the present state of a target as good, because of `why`, in the name of `by`; return it in words.

    `read` reads that state. The run must hold the roll-out slot of the repo. A target that has left the deployed branch
    and cannot be asked any more loses its entry. Raises `InputError`, `TargetBusy` while a run works on it,
    `LostTarget`: then nothing was recorded.
    """
    why, by = one_line(why), one_line(by)
    entry = Ledger(repo).get(target)
    if entry.accepted is not None and entry.accepted.run == run:
        return entry.accepted.what
    last = entry.intent.desired if entry.intent is not None else entry.good
    if last is None:
        raise InputError("toto has deployed nothing of it: there is nothing to accept", target=target.label)
    if not why:
        raise InputError("to accept what is there takes a reason", target=target.label)
    if entry.intent is not None and target not in await dead_intents(repo, run):
        raise TargetBusy(f"run {entry.intent.run} is working on it", target=target.label, hint="wait for its end")
    newest = git.resolve(repo, "HEAD")
    asked = Asked(repo, run, target, entry, last, *await manifest_of(repo, newest))
    try:
        present = await read(asked)
    except TotoError as error:
        if not await _has_left(asked, newest):
            raise InputError(
                f"its present state cannot be read, so it is not accepted: {error.message}",
                target=target.label,
                hint=error.hint or "see that it answers and ask again, or remove it from the repository first",
            ) from error
        await retire(repo, target, f"given up by {by}: {why}; {one_line(error.message)}")
        return "it has left the commit and cannot be asked: the record of it is gone, and nothing of it was touched"
    record = Accepted(by=by, why=why, what=present.words, run=run, at=git.now())
    await Ledger(repo).write(
        target,
        steps.accepted(present.deployed, record, entry),
        f"{target.label}: {present.words}, accepted by {by}: {why}",
    )
    get_run_logger().warning("%s: %s; accepted by %s: %s", target.label, present.words, by, why)
    await renewal.renew([repo], datetime.now(UTC))  # a document that was to lead elsewhere gives way to this
    return present.words


async def host(asked: Asked) -> Present:
    """The system that runs on the machine now."""
    target, intent = asked.target, asked.entry.intent
    manifest = asked.manifest
    if target.name not in manifest.machines:
        _, manifest = await manifest_of(asked.repo, asked.last.commit)
    if (machine := manifest.machines.get(target.name)) is None:
        raise TotoError("is not in the manifest any more: toto does not know how to connect to it")
    owners.check(asked.repo, machine)
    rules = asked.settings.roll_out
    async with roll_out.connect(machine, asked.repo, asked.run, asked.settings) as activator:
        await activator.prepare()
        if intent is not None:  # a watchdog that is still armed would change what is read here
            longest = await roll_out.patience_at(asked.repo, asked.run, machine, asked.settings, intent.desired.commit)
            await activator.take_charge(intent.desired.run, patience=rules.activation_timeout * 2 + longest)
            await activator.clean_up(intent.desired.run)
        facts = await activator.facts(fresh=True)
        here = await nix.valid(facts.system)
        if here and await activator.may_lack(facts.system):  # one that pulls may be installed anew
            await activator.copy(facts.system, signed=None, timeout=asked.settings.nix.build_timeout)
    words = f"it runs {facts.system}"
    if facts.profile and facts.profile != facts.system:
        words += f" and boots {facts.profile} next"
    if here:
        await nix.add_gc_root(facts.system, last_good_root(asked.repo, target.name))
    for known in (DeployedHost.of(asked.entry.good), DeployedHost.of(intent.desired if intent else None)):
        if known is not None and known.path == facts.system:
            return Present(known, f"{words}, that of {known.commit[:8]}")
    return Present(
        DeployedHost(
            identity=ACCEPTED + facts.system, path=facts.system, commit=asked.last.commit, run=asked.run, at=git.now()
        ),
        words,
    )


async def root(asked: Asked) -> Present:
    """The state that terraform has now."""
    session = await terraform.session_at(asked.repo, asked.run, asked.target, asked.last.commit)
    await session.init()
    state = await session.state()
    if state.empty:
        return Present(None, "its state has no resources")
    words = f"its state is serial {state.serial} of lineage {state.lineage}, with {len(state.resources)} resources"
    return Present(
        DeployedRoot(
            identity=f"{ACCEPTED}serial {state.serial}",
            **terraform.facts(state, session.place),
            commit=asked.last.commit,
            run=asked.run,
            at=git.now(),
        ),
        words,
    )


async def release(asked: Asked) -> Present:
    """The revision that the cluster has now."""
    wanted = await helm.release_at(asked.repo, asked.run, asked.target, asked.last.commit)
    cluster = await helm.connect(asked.repo, asked.run)
    if (now := await cluster.current(wanted)) is None:
        return Present(None, f"it is not installed in namespace {wanted.namespace}")
    number, words = now.number, f"it is at revision {now.number}, which is {now.status}"
    if now.pending:
        number = await cluster.last_whole(wanted)
        words += f"; revision {number} before it was whole"
        if number == 0:
            raise TotoError(f"{words.partition(';')[0]}, and no revision before it was whole")
    return Present(
        DeployedRelease(
            identity=f"{ACCEPTED}revision {number}",
            revision=number,
            commit=asked.last.commit,
            run=asked.run,
            at=git.now(),
        ),
        words,
    )


async def _has_left(asked: Asked, newest: str) -> bool:
    """Whether the newest deployed commit does not have the target any more."""
    if asked.target.kind == HOST:
        return asked.target.name not in asked.manifest.machines
    tree = run_directory(asked.repo, asked.run) / "newest"
    await git.checkout(asked.repo, newest, tree)
    source = Source(asked.repo, newest, asked.run, tree, asked.settings, asked.manifest)
    return asked.target not in [each.target for each in await kind_of(asked.target).discover(source)]
