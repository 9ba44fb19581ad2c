"""Terraform: plan in the rehearsal, apply exactly that plan in the roll-out, revert to the last good commit's root."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from blocks import TerraformCredentials
from blocks.access import READ_ONLY
from tasks import report, sink
from tasks.approve import approve_back
from tasks.record import record_before, record_reverted
from tasks.reversal import Reversal
from toto.base import runs
from toto.base.errors import TotoError
from toto.base.process import CommandTimeout
from toto.infra_repo import git, settings
from toto.infra_repo.settings import Approve, Prevent, TerraformRoot
from toto.ledger import steps
from toto.ledger.ledger import Deployed, Ledger, LostTarget, Snapshot
from toto.ledger.target import Target
from toto.plan.root import DeployedRoot, RootBefore, RootKind, RootOrder
from toto.terraform import plan as tfplan
from toto.terraform import session as terraform
from toto.terraform.plan import Planned, PlanRefused, State
from toto.terraform.revert import CannotGoBack, WayBack, apply_back, plan_back, seen, way_back
from toto.terraform.session import ApplyFailed, PlanStale, Root, Session, StateLocked, TerraformFailed


class PlanMoved(TotoError):
    """The state has changed since the rehearsal, and the plan would be different now."""


class PlaceChanged(TotoError):
    """A root's state is at a new place, while the old one still holds something: a second one would be created."""

    def __init__(self, root: Root, old: str, new: str, held: str, was: str) -> None:
        moved = was != root.name
        meant = "to go on with its state" if moved else "to leave there what it holds, and begin anew"
        super().__init__(
            f"its place changed from {old} to {new} while {old} still holds {held}",
            target=root.label,
            hint=f"put it back, in {root.path} or toto.toml{'' if moved else ', or move the state there yourself'}; "
            f'or, {meant}: `was = "{was}"` in [terraform.roots.{root.name}] of toto.toml',
        )


@dataclass(frozen=True)
class Attempt:
    """A plan of a run that will not deploy; None when it could not be made. `note` says how it was made, or why not."""

    planned: Planned | None
    note: str

    @property
    def summary(self) -> str:
        return f"{self.planned.summary} ({self.note})" if self.planned else self.note


async def _session(order: RootOrder) -> Session:
    """Terraform for an order: with credentials where the run deploys, else with those that only read, if there are."""
    block = await TerraformCredentials.saved_of(order.repo, order.name, "" if order.deploys else READ_ONLY)
    return Session(
        repo=order.repo,
        root=order.root,
        tree=order.tree,
        scratch=order.scratch,
        settings=order.settings.terraform,
        env=block.environment() if block else {},
        on_line=sink(),
        endpoints=block.reached() if block else (),
        standing="deploys" if order.deploys else "reads" if block else "guest",
    )


@task(name="plan", task_run_name="plan", cache_policy=NO_CACHE)
async def plan_root(order: RootOrder) -> Planned:
    """Plan the root into a file and show what the plan would do.

    Raises `TerraformFailed`, and `PlanRefused` when the settings prevent what the plan does.
    """
    planned = await (await _session(order)).plan()
    await report.show_terraform_plan(order.repo, order.target, planned)
    _check_place(order, planned)
    tfplan.refuse(planned, order.root.prevent)
    return planned


def _check_place(order: RootOrder, planned: Planned) -> None:
    """Raises `PlaceChanged` when the plan would make a second one of what the root's old place still holds."""
    root, entries = order.root, Ledger(order.repo).read()
    last = DeployedRoot.of(order.change.last)
    if last is None and root.was:
        last = DeployedRoot.of(entries.get(Target(RootKind.name, root.was)).good)
    if last is not None:
        if last.is_in(planned.before) or not (last.resources or not last.lineage):
            return
        if root.was == root.name:
            get_run_logger().warning(
                "%s: what %s holds stays there, and nobody manages it: %s", root.label, last.place, _held(last)
            )
            return
        raise PlaceChanged(root, last.place or "where it was", planned.place, _held(last), root.name)
    for name, gone in _gone(order, entries):
        # (A root that keeps its state elsewhere takes it along under its new name.)
        if set(gone.resources) & set(planned.created) and not gone.is_in(planned.before):
            raise PlaceChanged(root, Target(RootKind.name, name).label, root.label, _held(gone), name)


def _gone(order: RootOrder, entries: Snapshot) -> Iterator[tuple[str, DeployedRoot]]:
    """The roots of the ledger that the commit does not have any more, by name."""
    names = {each.name for each in terraform.discover(order.tree, order.settings.terraform)}
    for target, entry in entries.entries.items():
        if target.kind == RootKind.name and target.name not in names and entry.good is not None:
            yield target.name, DeployedRoot.of(entry.good)


def _earlier(order: RootOrder, state: State) -> str:
    """The name under which the ledger has a root's last good, when the root has a new one: by its word or its state."""
    was, entries = order.root.was or "", Ledger(order.repo).read()
    if order.change.last is not None or (was and entries.get(Target(RootKind.name, was)).good is not None):
        return was
    return next((name for name, gone in _gone(order, entries) if gone.lineage and gone.is_in(state)), was)


def _held(last: DeployedRoot) -> str:
    count = len(last.resources)
    return f"{count} resource{'' if count == 1 else 's'}" if last.lineage else "what was deployed"


@task(name="plan without deploying", task_run_name="plan", cache_policy=NO_CACHE)
async def try_to_plan(order: RootOrder) -> Attempt:
    """Plan the root in a run that will not deploy it: with credentials that only read, or without any.

    A plan that cannot be made for lack of them is no failure. Raises `TerraformFailed` for a root that is wrong by
    itself, `PlanRefused`.
    """
    session = await _session(order)
    reads = session.standing == "reads"
    try:
        planned = await session.plan()
    except (TerraformFailed, CommandTimeout) as error:
        await session.validate()
        get_run_logger().warning("%s", error)
        how = "with credentials that only read" if reads else "without credentials, which this run does not get"
        return Attempt(None, f"not planned: it cannot be {how}")
    await report.show_terraform_plan(order.repo, order.target, planned)
    if reads:
        _check_place(order, planned)
    tfplan.refuse(planned, order.root.prevent)
    how = "with credentials that only read" if reads else "without credentials, as if nothing were there"
    return Attempt(planned, f"planned {how}")


@task(name="apply", task_run_name="apply", cache_policy=NO_CACHE)
async def apply(order: RootOrder, planned: Planned) -> State:
    """Apply exactly the plan of the rehearsal; return the state that it leaves. What is there then is in the intent.

    When the state has changed since, the root is planned again, and the new plan is applied if it does the same.
    Raises `PlanMoved` (nothing was applied), `ApplyFailed`, `StateLocked`.
    """
    session = await _session(order)
    try:
        return await _applied(order, session, planned)
    except PlanStale:
        get_run_logger().warning("the state has changed since the rehearsal: planning again")
    replanned = await session.plan()
    if not replanned.same(planned):
        raise PlanMoved(
            "the state has changed since the rehearsal, and the plan would be different now:\n"
            + "\n".join(replanned.lines),
            target=order.label,
            hint="start the run again: it plans again",
        )
    with suppress(LostTarget):
        await record_before(order, before_of(order, replanned))
    return await _applied(order, session, replanned)


async def _applied(order: RootOrder, session: Session, planned: Planned) -> State:
    """Apply a plan; then record which objects are there, also when it failed: only those may be destroyed again."""
    try:
        state = await session.apply(planned)
    except ApplyFailed:
        with suppress(TotoError):
            await record_before(order, before_of(order, planned, await session.state()))
        raise
    with suppress(LostTarget):  # (nothing is recorded as good then, either)
        await record_before(order, before_of(order, planned, state))
    return state


def before_of(order: RootOrder, planned: Planned, after: State | None = None) -> RootBefore:
    """What the intent of a plan records: the state before, and what is done to it; `after` is the state after that."""
    before = planned.before
    return RootBefore(
        was=_earlier(order, before),
        serial=before.serial,
        resources=before.resources,
        deeds=planned.deeds if after is None else seen(planned.deeds, after),
    )


def facts(state: State, place: str) -> dict[str, Any]:
    """What the ledger records of a root that has this state: the own fields of `DeployedRoot`."""
    return {"serial": state.serial, "lineage": state.lineage, "resources": state.resources, "place": place}


async def revert(reversal: Reversal) -> str:
    """Undo what the roll-out did to a root, by a plan of its own. Returns what it is now, in words.

    The plan destroys only what the roll-out created, and is held to `prevent` and `approve` like each other plan. A
    resource that was destroyed is created anew, without its old data; the words say so.
    Raises `CannotGoBack`, `StateLocked`, `ApplyFailed`, `LostTarget`, `NotApproved` while nobody has approved the plan;
    the intent is then still open.
    """
    repo, run, target, why = reversal.repo, reversal.run, reversal.target, reversal.why
    entry = Ledger(repo).get(target)
    intent, good = steps.require_intent(entry, run), DeployedRoot.of(entry.good)
    before = RootBefore.of(intent.before)
    base, of = good, target
    if base is None and before.was not in ("", target.name):  # its last good is that of its earlier name
        of = Target(RootKind.name, before.was)
        base = DeployedRoot.of(Ledger(repo).get(of).good)
    session = await session_at(repo, run, of if base else target, (base or intent.desired).commit)
    try:
        await session.init()
        state = await session.state()
        way = way_back(
            base.commit if base else None,
            State(serial=before.serial, resources=before.resources),
            before.deeds,
            state,
            target=target.label,
        )
        if way is None:
            await record_reverted(repo, target, good, intent.desired, run, why)
            return "as it was: nothing had been applied, according to its state"
        planned = await plan_back(session, way)
        await report.show_terraform_plan(repo, target, planned, back=True)
        await _check_back(reversal, session, before, way, planned)
    except StateLocked:
        raise
    except (CannotGoBack, PlanRefused, TerraformFailed) as error:
        raise _cannot(target, error, before) from None
    asks = tfplan.wants_approval(planned, _rules(reversal)[1])
    await approve_back(repo, intent.left_by or run, target.label, _both(before, planned), asks)
    state = await apply_back(session, way, planned)
    await record_reverted(
        repo, target, good and good.model_copy(update=facts(state, good.place)), intent.desired, run, why
    )
    return way.words(planned)


async def _check_back(reversal: Reversal, session: Session, before: RootBefore, way: WayBack, planned: Planned) -> None:
    """Raises `CannotGoBack` or `PlanRefused` for a plan of the way back that must not be applied."""
    if before.deeds is None and not planned.empty:
        raise CannotGoBack(
            "an older version of toto has not recorded what its run did, and what it did not do must not be undone:\n"
            + "\n".join(planned.lines),
            target=session.root.label,
        )
    if wrong := way.wrong(planned):
        raise CannotGoBack(
            f"the way back would {'; it would '.join(wrong)}\nthe way back:\n" + "\n".join(planned.lines),
            target=session.root.label,
        )
    for prevent in (session.root.prevent, _rules(reversal)[0]):  # what either commit protects stays
        tfplan.refuse(planned, prevent)


def _rules(reversal: Reversal) -> tuple[Prevent, Approve]:
    """What the commit that failed says of its root's plans: the newest rules."""
    new = reversal.settings.terraform
    own = new.roots.get(reversal.target.name, TerraformRoot())
    return new.prevent if own.prevent is None else own.prevent, own.approve or new.approve


def _both(before: RootBefore, planned: Planned) -> str:
    """Both plans, for people: what the run was to do, and the way back."""
    return f"the plan of the run:\n{_lines(before)}\nthe way back:\n{planned}"


def _lines(before: RootBefore) -> str:
    return "\n".join(map(str, before.deeds or ())) or "not recorded"


def _cannot(target: Target, error: TotoError, before: RootBefore) -> CannotGoBack:
    """The error of a root that toto leaves as it is, with what its run did."""
    return CannotGoBack(
        f"cannot go back by itself: {error.message}\nthe plan of the run:\n{_lines(before)}", target=target.label
    )


async def find_drift(repo: Path, run: str, target: Target, good: Deployed) -> list[str]:
    """What was changed outside toto since the last good, a summary and a line for each change.

    Raises `TerraformFailed`, `CannotGoBack`.
    """
    planned = await (await session_at(repo, run, target, good.commit)).plan()
    return [] if planned.empty else [planned.summary, *planned.lines]


async def session_at(repo: Path, run: str, target: Target, commit: str) -> Session:
    """Terraform for a root as it is at a commit. Raises `CannotGoBack` when the commit does not have it."""
    tree = runs.run_directory(repo, run) / "back" / f"terraform-{target.name}"
    await git.checkout(repo, commit, tree)
    wanted = settings.load(tree, deployed=True).terraform
    for root in terraform.discover(tree, wanted):
        if root.name == target.name:
            block = await TerraformCredentials.saved_of(repo, root.name)
            return Session(
                repo=repo,
                root=root,
                tree=tree,
                scratch=runs.run_directory(repo, run) / "back",
                settings=wanted,
                env=block.environment() if block else {},
                on_line=sink(),
                endpoints=block.reached() if block else (),
            )
    raise CannotGoBack(f"there is no such root at {commit[:8]}", target=target.label)
