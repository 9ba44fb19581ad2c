"""One run of reconcile: what was requested, how far it is, whether a newer push replaces it, when to plan again."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from prefect import runtime
from prefect.client.schemas.objects import State
from prefect.logging import get_run_logger
from prefect.states import Cancelled, Completed, Failed

from tasks import cancelled_by_sigterm
from tasks.detect import clean_up
from tasks.jobs import follow_roll_out
from tasks.jobs import register as register_jobs
from tasks.notify import notify
from tasks.record import retire
from tasks.retry import retry_later, run_later
from toto.base import runs
from toto.base.errors import InputError, TotoError
from toto.git_host import admission
from toto.infra_repo import git
from toto.ledger.ledger import Ledger
from toto.ledger.target import Target
from toto.machine import owners
from toto.machine.owners import NotOwned
from toto.plan.changes import Action
from toto.plan.host import HostOrder
from toto.plan.kinds import KINDS
from toto.plan.make import LAST_GOOD
from toto.plan.order import Order, Plan
from toto.plan.verdict import Verdict
from toto.report.report import PARTIAL, Report, Reverted
from toto.report.venues import Origin

T = TypeVar("T")
CHECK_EVERY: Final = 2  # seconds between two checks for a newer push


class Superseded(TotoError):
    """A newer push has replaced this run's."""


class Outdated(Exception):
    """What is deployed has changed since the plan was made, so plan again. Rehearsals that passed are not repeated."""


@dataclass(frozen=True)
class Request:
    """What was requested of a run: the parameters of `flows.reconcile`, with `commit` resolved to a hash."""

    repo: Path
    commit: str
    origin: Origin
    only: tuple[str, ...]
    plan_only: bool
    rehearse_only: bool
    override: str | None
    force: bool
    venues: tuple[str, ...]
    accept: tuple[str, ...] = ()
    reason: str | None = None
    try_for: float = 0

    @property
    def accepts(self) -> bool:
        """Whether it takes present states as good. Raises `InputError` in a run that must not change anything."""
        if self.accept and not self.deploys:
            raise InputError(
                "a run that plans or rehearses accepts nothing", hint="leave `accept` out, or let it deploy"
            )
        return bool(self.accept)

    @property
    def somebody(self) -> str:
        """Who requested it, where that is not known by name."""
        return "somebody on toto itself" if self.origin in ("push", "cli") else "somebody in the UI"

    @property
    def deploys(self) -> bool:
        """Whether the run may change anything outside toto."""
        return not (self.plan_only or self.rehearse_only)


class Run:
    """How far a run is. Each stage takes it, adds its results and returns it, which draws the edges of the graph.

    (It has slots, so that Prefect shows it as `<Run>` among a stage's parameters and does not store all of it.)
    """

    __slots__ = ("__weakref__", "forward", "id", "plan", "report", "request", "stage", "stuck", "touched", "verdicts")

    def __init__(self, request: Request, run: str) -> None:
        self.request, self.id = request, run
        self.plan: Plan
        self.report: Report
        self.stage = ""  # the id of the subflow that is at work
        self.verdicts: dict[str, Verdict[Any]] = {}
        self.touched: list[Target] = []
        self.stuck: set[str] = set()  # the labels of what was half done before the run, and could not be put back
        self.forward: set[str] = set()  # those of them that this run rolls out all the same

    def planned(self, plan: Plan) -> None:
        """Start again with a new plan: clear the report, the verdicts and the touched targets.

        A machine of a different repository is a failure from the start.
        """
        self.plan = plan
        self.report = Report(self.repo.name.removesuffix(".git"), plan.commit, plan.changes)
        self.verdicts, self.touched, self.forward = {}, [], set()
        for order in plan.orders if self.request.deploys else ():
            if self.request.try_for and not _can_be_tried(order):
                why = "only a host is tried, and not one that is set for the next boot"
                self.report.failure(order.label, "claim", InputError(why, target=order.label))
            if isinstance(order, HostOrder) and order.machine and order.change.action in (Action.DEPLOY, Action.VERIFY):
                try:
                    owners.check(self.repo, order.machine)
                except NotOwned as error:
                    self.report.failure(order.label, "claim", error)

    @property
    def repo(self) -> Path:
        return self.request.repo

    @property
    def commit(self) -> str:
        """The first eight digits of the commit."""
        return self.request.commit[:8]

    @property
    def problems(self) -> list[str]:
        """What has failed so far, and what could not be reverted, in a few words each."""
        if not hasattr(self, "report"):
            return []
        return [
            *(each.title for each in self.report.causes),
            *(f"{each.target} could not be reverted" for each in self.report.reverted if each.error),
        ]

    @property
    def rehearses(self) -> bool:
        """Whether the run has something to rehearse."""
        return bool(self.plan.orders) and not self.request.plan_only

    @property
    def stops(self) -> bool:
        """Whether the run must not roll anything out because something failed before.

        A target that is stuck blocks only itself, and what comes after it.
        """
        failed = [
            each
            for each in self.report.failures
            if each.target not in self.stuck or each.stage not in ("evaluation", "rehearsal")
        ]
        return bool(failed) and (self.plan.settings.roll_out.policy == "all" or not self.verdicts)

    @property
    def asks(self) -> bool:
        """Whether a person must approve something before the roll-out."""
        return self.rolls_out and any(each.question for each in self.verdicts.values())

    @property
    def rolls_out(self) -> bool:
        """Whether the run goes on to the roll-out, even if only to record that there is nothing to do."""
        return self.request.deploys and not self.stops

    def due(self, kind: str) -> list[Order]:
        """The orders of a kind that have a verdict and have not failed since."""
        return [
            each
            for each in self.plan.of_kind(kind)
            if each.label in self.verdicts and each.label not in self.report.failed_targets
        ]

    @property
    def kinds_due(self) -> Iterator[str]:
        """The kinds with something to roll out, in order, until a roll-out fails."""
        for kind in KINDS:
            if self.due(kind) and not self.report.failed_roll_out:
                yield kind

    @property
    def finds_open_intents(self) -> bool:
        """Whether something is half done before the run begins, and the run may settle it."""
        return not self.request.plan_only and bool(Ledger(self.repo).read().open_intents)

    def passed(self, order: Order, verdict: Verdict[Any]) -> None:
        """Record a verdict: the order's target may be rolled out."""
        self.verdicts[order.label] = verdict
        if verdict.how != "waived":
            self.report.rehearsals[order.label] = str(verdict)

    def not_passed(self, order: Order, error: Exception) -> None:
        """Record that a rehearsal failed. That of a host which only the settings ask for is a warning."""
        if order.stops:
            self.report.failure(order.label, "rehearsal", error)
        else:
            self.report.excused[order.label] = str(error)
            get_run_logger().warning("%s: its rehearsal failed: %s", order.label, error)

    def left(self, reverted: Reverted) -> None:
        """Decide about a target that was half done before the run, and could not be put back just now.

        When this commit has a plan that starts from what is there, it is rolled out. Otherwise the target has failed.
        """
        self.stuck.add(reverted.target)
        due = {each.label for kind in KINDS for each in self.due(kind) if each.change.action is Action.DEPLOY}
        if reverted.target in due and not reverted.away:
            self.forward.add(reverted.target)
        else:
            self.report.failure(reverted.target, "settling", TotoError(reverted.error))

    def hold_back(self) -> None:
        """Hold back what is frozen, or outside its window, as the roll-out begins."""
        ledger = Ledger(self.repo).read()
        for order in (each for kind in KINDS for each in self.due(kind)):
            if reason := order.held(ledger.get(order.target)):
                self.report.held[order.label] = reason

    def verdict_before_touching(self, order: Order) -> Verdict[Any]:
        """The verdict that permits a target's roll-out. From now on the target counts as touched."""
        if order.change.action is Action.DEPLOY:
            self.touched.append(order.target)
        return self.verdicts[order.label]

    def note_unreachable(self, order: Order) -> None:
        """Have the report say why a target was not reached, as its roll-out has recorded it."""
        if self.report.outcome.get(order.label) == "unreachable":
            noted = Ledger(self.repo).get(order.target).unreachable
            self.report.away[order.label] = noted.why if noted else ""

    def not_held(self, group: Sequence[Order]) -> list[Order]:
        """The orders of a group that may go on, as it begins. What was frozen meanwhile is held back.

        So is what comes after a target that was not rolled out.
        """
        ledger = Ledger(self.repo).read()
        for order in group:
            if (frozen := ledger.get(order.target).frozen) is not None and not order.override:
                self.report.held[order.label] = str(frozen)
        free = self.report.hold_behind([each.label for each in group], self.plan.held_behind)
        return [each for each in group if each.label in free]

    @property
    def why_back(self) -> str:
        """Why what was touched is put back; "" when it was only tried."""
        return self.report.cause if self.report.failures else ""

    @property
    def to_revert(self) -> list[Target]:
        """The targets that were touched, in order, without those that were only recorded or did not answer.

        They are all reverted when a roll-out fails, and those that were only tried; otherwise those that failed to go
        forward.
        """
        failed = self.report.failed_targets
        untouched = ("recorded", "recorded without its CRDs", "unreachable")
        return [
            each
            for each in self.touched
            if self.report.outcome.get(each.label) not in untouched
            and (self.report.failed_roll_out or each.label in failed or self.request.try_for)
        ]

    async def check_superseded(self) -> None:
        """Raises `Superseded` when a newer push has replaced the one that started this run."""
        of_a_push = self.request.origin == "push" and self.request.deploys
        if of_a_push and (newer := await git.superseded_by(self.repo, self.request.commit)):
            raise Superseded(f"superseded by {newer[:8]}: nothing was touched")

    async def check_deployable(self) -> None:
        """Raises `NotDeployable` when the run would deploy a commit that may only be planned and rehearsed."""
        if self.request.deploys:
            await admission.check(self.repo, self.request.commit)

    async def unless_superseded(self, work: Coroutine[Any, Any, T]) -> T:
        """Do `work` and return its result. When a newer push replaces this run's, end it and raise `Superseded`."""
        task = asyncio.ensure_future(work)
        try:
            while not task.done():
                await asyncio.wait((task,), timeout=CHECK_EVERY)
                if not task.done():
                    await self.check_superseded()
            return task.result()
        finally:
            task.cancel()
            await asyncio.wait((task,))
            if not task.cancelled():
                task.exception()  # after a cancel of the run; asyncio complains when nobody retrieves it

    def check_plan(self) -> None:
        """Raises `Outdated` when what is deployed has changed since the plan was made."""
        if Ledger(self.repo).read().fingerprint != self.plan.changes.ledger:
            raise Outdated

    def ended(self) -> State[None]:
        """The state that the run ends in."""
        said = self.report.headline()
        if self.report.failed or any(each.error for each in self.report.reverted):
            return Failed(message=said)
        return Completed(name=PARTIAL, message=said) if self.report.partial else Completed(message=said)


def _can_be_tried(order: Order) -> bool:
    """Whether a target can be activated so that its machine goes back by itself."""
    return isinstance(order, HostOrder) and (order.machine is None or order.machine.activation != "boot")


def names_nothing() -> State[None]:
    """The state of a run that is limited to targets and names none, as the form of `deploy-host` does at first."""
    return Failed(message="no target is named, so nothing is deployed; put names or tags in `only`")


async def conclude(run: Run) -> None:
    """After the roll-out: retry machines that did not answer, retire targets that left the commit, tag the commit,
    register its jobs."""
    if run.request.try_for:  # the fleet is as it was
        return
    await retry_later(run.repo, run.report.unreachable)
    for target in run.plan.changes.retired:
        if target.label not in run.report.failed_targets:  # one that is half done keeps its entry
            await retire(run.repo, target)
    if run.report.complete and run.plan.changes.whole:
        await git.mark(run.repo, LAST_GOOD, run.request.commit)
    if not run.report.failed_targets and run.plan.changes.whole:
        await _register_jobs(run)


async def _register_jobs(run: Run) -> None:
    """Register the commit's jobs. When Prefect refuses that, a good roll-out stays good: it is told, and tried again
    by the next run; one that is no retry itself schedules a run for it."""
    try:
        await register_jobs(run.repo, run.request.commit, run.plan.jobs)
    except Exception as error:
        get_run_logger().warning("the jobs could not be registered: %s", error)
        run.report.notes.append("its jobs could not be registered: the next run tries again")
        if run.request.origin != "schedule":
            await run_later(run.repo, "registering the jobs", None)


async def start_jobs(run: Run) -> Run:
    """Begin the jobs that follow what the run did."""
    if run.request.deploys:
        report = run.report
        reverted = {each.target for each in report.reverted}
        deployed = {label for label, end in report.outcome.items() if end == "deployed"}
        await follow_roll_out(
            run.repo,
            run.request.commit,
            {"deployed": deployed - reverted, "failed": report.failed_targets, "reverted": reverted},
        )
    return run


async def carry_out(request: Request, stages: Callable[[Run], Awaitable[Run]]) -> State[None]:
    """Take a run through its stages and return its final state. When its plan is outdated, start again with the first.

    When an error breaks the run off, people are notified of it, and it is raised again.
    """
    run = Run(request, str(runtime.flow_run.id))
    async with cancelled_by_sigterm(), runs.claimed(request.repo, run.id):
        try:
            clean_up(request.repo)
            await run.check_deployable()
            while True:
                try:
                    await stages(run)
                except Outdated:
                    continue
                return run.ended()
        except Superseded as newer:
            return Cancelled(message=str(newer))
        except Exception as error:
            await notify(
                request.repo,
                request.commit,
                error,
                origin=request.origin,
                named=request.venues,
                listening=request.deploys,
            )
            raise
