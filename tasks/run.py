"""One run of reconcile: what was asked for, how far it is, when a newer push takes its place, when it plans again."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from prefect import runtime
from prefect.client.schemas.objects import State
from prefect.states import Cancelled, Completed, Failed

from tasks import cancelled_by_sigterm
from tasks.detect import clean_up
from tasks.notify import notify
from tasks.record import retire
from tasks.retry import retry_later
from toto.base import runs
from toto.base.errors import TotoError
from toto.infra_repo import git
from toto.ledger.ledger import Ledger
from toto.ledger.target import Target
from toto.plan.changes import Action
from toto.plan.kinds import KINDS
from toto.plan.make import LAST_GOOD
from toto.plan.order import Order, Plan
from toto.plan.verdict import Verdict
from toto.report.report import Report
from toto.report.venues import Origin

T = TypeVar("T")
LOOK: Final = 2  # seconds between two looks whether a newer push has come


class Superseded(TotoError):
    """A newer push has taken the place of this run's."""


class Outdated(Exception):
    """What is deployed has changed since the plan was made: plan again. What was rehearsed is not rehearsed again."""


@dataclass(frozen=True)
class Request:
    """What is asked of a run; the words are the parameters of `flows.reconcile`, `commit` is resolved."""

    repo: Path
    commit: str
    origin: Origin
    only: tuple[str, ...]
    plan_only: bool
    rehearse_only: bool
    override: str | None
    force: bool
    venues: tuple[str, ...]

    @property
    def deploys(self) -> bool:
        """Whether it is to change anything outside toto."""
        return not (self.plan_only or self.rehearse_only)


class Run:
    """How far a run is. Each stage takes it, adds what it found, and returns it: that draws the graph's edges.

    (It has slots, so that Prefect shows it as `<Run>` among a stage's parameters and does not write all of it down.)
    """

    __slots__ = ("__weakref__", "id", "plan", "report", "request", "stage", "touched", "verdicts")

    def __init__(self, request: Request, run: str) -> None:
        self.request, self.id = request, run
        self.plan: Plan
        self.report: Report
        self.stage = ""  # the id of the subflow that is at work
        self.verdicts: dict[str, Verdict[Any]] = {}
        self.touched: list[Target] = []

    def planned(self, plan: Plan) -> None:
        """Begin anew with a plan."""
        self.plan = plan
        self.report = Report(self.repo.name.removesuffix(".git"), plan.commit, plan.changes)
        self.verdicts, self.touched = {}, []

    @property
    def repo(self) -> Path:
        return self.request.repo

    @property
    def commit(self) -> str:
        """The first eight digits of what it is about."""
        return self.request.commit[:8]

    @property
    def problems(self) -> list[str]:
        """What has failed so far, and what could not be reverted, in a few words each."""
        if not hasattr(self, "report"):
            return []
        return [*(f"{each.target}: {each.stage} failed" for each in self.report.failures),
                *(f"{each.target} could not be reverted" for each in self.report.reverted if each.error)]

    @property
    def rehearses(self) -> bool:
        """Whether there is something to rehearse."""
        return bool(self.plan.orders) and not self.request.plan_only

    @property
    def stops(self) -> bool:
        """Whether nothing is rolled out, because something failed before."""
        return self.report.failed and (self.plan.settings.roll_out.policy == "all" or not self.verdicts)

    @property
    def asks(self) -> bool:
        """Whether a person is to approve something before anything is rolled out."""
        return self.rolls_out and any(each.question for each in self.verdicts.values())

    @property
    def rolls_out(self) -> bool:
        """Whether it goes on to the roll-out, if only to record that there is nothing to do."""
        return self.request.deploys and not self.stops

    def due(self, kind: str) -> list[Order]:
        """The orders of a kind that have a verdict, and no failure since."""
        return [each for each in self.plan.of_kind(kind)
                if each.label in self.verdicts and each.label not in self.report.failed_targets]

    @property
    def kinds_due(self) -> Iterator[str]:
        """The kinds of which something is to be rolled out, one after the other, until a roll-out fails."""
        for kind in KINDS:
            if self.due(kind) and not self.report.failed_roll_out:
                yield kind

    @property
    def finds_open_intents(self) -> bool:
        """Whether something is half done before the run has begun, and the run may put it right."""
        return not self.request.plan_only and bool(Ledger(self.repo).read().open_intents)

    def passed(self, order: Order, verdict: Verdict[Any]) -> None:
        """A target may be rolled out."""
        self.verdicts[order.label] = verdict
        self.report.rehearsals[order.label] = str(verdict)

    def verdict_before_touching(self, order: Order) -> Verdict[Any]:
        """The verdict by which a target is rolled out; from now on it counts as touched."""
        if order.change.action is Action.DEPLOY:
            self.touched.append(order.target)
        return self.verdicts[order.label]

    def not_held(self, group: Sequence[Order]) -> list[Order]:
        """Of a group, those that may go on; one that comes `after` a target that did not get there is held back."""
        free = self.report.hold_behind([each.label for each in group], self.plan.held_behind)
        return [each for each in group if each.label in free]

    @property
    def to_revert(self) -> list[Target]:
        """What was touched, in that order; one that was only recorded, or could not be reached, was not."""
        return [each for each in self.touched
                if self.report.outcome.get(each.label) not in ("recorded", "unreachable")]

    async def check_superseded(self) -> None:
        """Raises `Superseded` when a newer push has taken the place of the one that started this run."""
        of_a_push = self.request.origin == "push" and self.request.deploys
        if of_a_push and (newer := await git.superseded_by(self.repo, self.request.commit)):
            raise Superseded(f"superseded by {newer[:8]}: nothing was touched")

    async def unless_superseded(self, work: Coroutine[Any, Any, T]) -> T:
        """What `work` returns. Ends it, and raises `Superseded`, as soon as a newer push takes this one's place."""
        task = asyncio.ensure_future(work)
        try:
            while not task.done():
                await asyncio.wait((task,), timeout=LOOK)
                if not task.done():
                    await self.check_superseded()
            return task.result()
        finally:
            task.cancel()
            await asyncio.wait((task,))
            if not task.cancelled():
                task.exception()  # what a cancel of the run made of it; asyncio complains where nobody asks

    def check_plan(self) -> None:
        """Raises `Outdated` when what is deployed has changed since the plan was made."""
        if Ledger(self.repo).read().fingerprint != self.plan.changes.ledger:
            raise Outdated

    def ended(self) -> State[None]:
        """The state in which the run ends."""
        return (Failed if self.report.failed else Completed)(message=self.report.headline())


async def conclude(run: Run) -> None:
    """All that could be rolled out was: retry what did not answer, retire what left, mark the commit."""
    await retry_later(run.repo, run.report.unreachable)
    for target in run.plan.changes.retired:
        if target.label not in run.report.failed_targets:  # one that is half done is not forgotten
            await retire(run.repo, target)
    if run.report.complete and run.plan.changes.whole:
        await git.mark(run.repo, LAST_GOOD, run.request.commit)


async def carry_out(request: Request, stages: Callable[[Run], Awaitable[Run]]) -> State[None]:
    """Take a run through its stages, again from the first when its plan is outdated; the state in which it ends.

    Whatever breaks it off is notified, and raised.
    """
    run = Run(request, str(runtime.flow_run.id))
    async with cancelled_by_sigterm(), runs.claimed(request.repo, run.id):
        try:
            clean_up(request.repo)
            while True:
                try:
                    await stages(run)
                except Outdated:
                    continue
                return run.ended()
        except Superseded as newer:
            return Cancelled(message=str(newer))
        except Exception as error:
            await notify(request.repo, request.commit, error, origin=request.origin, named=request.venues,
                               listening=request.deploys)
            raise
