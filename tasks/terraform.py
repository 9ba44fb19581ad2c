"""Terraform: plan in the rehearsal, apply exactly that plan in the roll-out, revert to the last good commit's root."""

from dataclasses import dataclass
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from blocks import TerraformCredentials
from blocks.access import READ_ONLY
from tasks import report, sink
from tasks.record import record_reverted
from tasks.reversal import Reversal
from toto.base import runs
from toto.base.errors import TotoError
from toto.base.process import CommandTimeout
from toto.infra_repo import git, settings
from toto.ledger import steps
from toto.ledger.ledger import Deployed, Ledger
from toto.ledger.target import Target
from toto.plan.root import DeployedRoot, RootBefore, RootOrder
from toto.terraform import plan as tfplan
from toto.terraform import session as terraform
from toto.terraform.plan import Planned, State
from toto.terraform.revert import CannotGoBack, way_back
from toto.terraform.session import PlanStale, Session, TerraformFailed


class PlanMoved(TotoError):
    """The state has changed since the rehearsal, and the plan would be different now."""


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
    await report.show_terraform_plan(order.label, planned)
    tfplan.refuse(planned, order.root.prevent)
    return planned


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
    await report.show_terraform_plan(order.label, planned)
    tfplan.refuse(planned, order.root.prevent)
    how = "with credentials that only read" if reads else "without credentials, as if nothing were there"
    return Attempt(planned, f"planned {how}")


@task(name="apply", task_run_name="apply", cache_policy=NO_CACHE)
async def apply(order: RootOrder, planned: Planned) -> State:
    """Apply exactly the plan of the rehearsal; return the state that it leaves.

    When the state has changed since, the root is planned again, and the new plan is applied if it does the same.
    Raises `PlanMoved` (nothing was applied), `ApplyFailed`, `StateLocked`.
    """
    session = await _session(order)
    try:
        return await session.apply(planned)
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
    return await session.apply(replanned)


async def revert(reversal: Reversal) -> str:
    """Apply the last good commit's root, or destroy what the first roll-out created. Returns what it is now, in words.

    A resource that was destroyed is created anew, without its old data; the words say so. When the settings prevent
    destruction, only resources that the roll-out created are destroyed.
    Raises `CannotGoBack`, `TerraformFailed`, `PlanRefused`, `LostTarget`; the intent is then still open.
    """
    repo, run, target, why = reversal.repo, reversal.run, reversal.target, reversal.why
    entry = Ledger(repo).read().get(target)
    intent, good = steps.require_intent(entry, run), DeployedRoot.of(entry.good)
    before = RootBefore.of(intent.before)
    commit = (good or intent.desired).commit
    session = await session_at(repo, run, target, commit)
    await session.init()
    state = await session.state()
    way = way_back(
        good.commit if good else None,
        State(serial=before.serial, resources=before.resources),
        state,
        target=target.label,
    )
    if way is None:
        await record_reverted(repo, target, good, intent.desired, run, why)
        return "as it was: nothing had been applied, according to its state"
    planned = await session.plan(destroy=way.destroy)
    await report.show_terraform_plan(target.label, planned, back=True)
    tfplan.refuse(planned, session.root.prevent, allowed=way.since)
    if not planned.empty:
        state = await session.apply(planned)
    await record_reverted(
        repo, target, good and good.model_copy(update={"serial": state.serial}), intent.desired, run, why
    )
    return way.words(planned)


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
