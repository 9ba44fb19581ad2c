"""Figures of runs, from Prefect's database: what has ended since the last look, and what is there now.

Counters and histograms begin with the process, as Prometheus expects it. What runs keep is not kept a second time: each
run and each task that has ended is read once. (Prefect forgets runs after a while, so a count of them would fall.)

It runs in Prefect's server (`toto.server.app`).
"""

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import sqlalchemy
from prefect.server.database import provide_database_interface
from prefect.server.schemas.states import StateType
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, disable_created_metrics
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import aliased

from toto.base.resources import SANDBOXES
from toto.git_host import host as git_host
from toto.git_host.shared import name_of

# The tasks that are phases, as they are called; a host's or a target's name follows on the last ones.
PHASES: Final = (
    *("build the system", "build the VM", "sandbox", "no-internet tests", "with-internet tests"),
    *("inspect the machine", "copy the closure", "activate: test", "activate: switch", "set for the next boot"),
    *("smoke tests", "post-switch tests", "plan", "apply", "render and compare", "upgrade", "the chart's tests"),
)
NAMED: Final = ("evaluate", "build", "revert")
PARTIAL: Final = "Partial"  # the name of a run's state, as `toto.report` has it
OF_RECONCILE: Final = ("deploy", "rehearse", "plan")
ACTIONS: Final = (*OF_RECONCILE, "build", "settle", "accept", "drift", "compliance", "prune")
JOB: Final = "job"  # the flow by which jobs of an infra repo run
ABORTED: Final = "Aborted"  # the name of its state when a job was
_JOB_RESULTS: Final = ("completed", "failed", "aborted", "crashed", "cancelled")
_RESULTS: Final = ("completed", "partial", "failed", "crashed", "cancelled")
_UNDER_WAY: Final = (StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING, StateType.PAUSED, StateType.CANCELLING)
_LATE: Final = timedelta(seconds=60)  # Prefect writes down what ended up to so long ago
_MOST: Final = 10_000  # rows of one look
_SECONDS: Final = (1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1200, 3600, 10_800)
_BEATS: Final = 3  # heartbeats that a worker may miss, by Prefect's own rule


class _Ended:
    """Rows that have ended, each once: `since` moves on, and what is written down late is found as well."""

    def __init__(self) -> None:
        self.since = datetime(1970, 1, 1, tzinfo=UTC)
        self._seen: dict[UUID, datetime] = {}

    def fresh(self, rows: Iterable[Any]) -> list[Any]:
        """The rows that were not seen yet, the oldest first."""
        found = sorted((row for row in rows if row.id not in self._seen), key=lambda row: row.end_time)
        self._seen |= {row.id: row.end_time for row in found}
        if found:
            self.since = max(self.since, found[-1].end_time - _LATE)
        self._seen = {id: end for id, end in self._seen.items() if end > self.since}
        return found


class Runs:
    """The figures of the runs of all repositories in the folder `repos`; `pool` is the work pool of toto's worker."""

    def __init__(self, repos: Path, pool: str) -> None:
        self.repos, self.pool = repos, pool
        self._began = datetime.now(UTC)
        self._runs, self._tasks = _Ended(), _Ended()
        self.registry = of = CollectorRegistry()
        disable_created_metrics()  # type: ignore[no-untyped-call]  # (a series more for each of these)
        run, phase = ("repo", "action"), ("phase",)
        self.ended = Counter("toto_runs", "runs that have ended", (*run, "result"), registry=of)
        self.took = Histogram(
            "toto_run_duration_seconds", "how long runs took", ("action",), buckets=_SECONDS, registry=of
        )
        self.phases = Histogram(
            "toto_phase_duration_seconds", "how long phases of runs took", phase, buckets=_SECONDS, registry=of
        )
        for each in ACTIONS:  # what appears with 1 has not risen, for Prometheus: so all begin with 0
            self.took.labels(each)
        for each in (*PHASES, *NAMED):
            self.phases.labels(each)
        self.failed = Gauge("toto_run_last_failed", "1 when the newest run has failed or crashed", run, registry=of)
        self.last = Gauge("toto_run_last_end_timestamp_seconds", "when the newest run has ended", run, registry=of)
        self.evaluated = Gauge("toto_evaluation_seconds", "of a host, the last time", ("repo", "host"), registry=of)
        of_job, last = ("repo", "name"), "the newest run of a job"
        # (The label `job` is Prometheus's own.)
        self.jobs_ended = Counter("toto_job_runs", "runs of jobs that have ended", (*of_job, "result"), registry=of)
        self.job_failed = Gauge("toto_job_last_failed", f"1 when {last} did not succeed", of_job, registry=of)
        self.job_took = Gauge("toto_job_last_duration_seconds", f"how long {last} took", of_job, registry=of)
        self.job_last = Gauge("toto_job_last_end_timestamp_seconds", f"when {last} has ended", of_job, registry=of)
        self._jobs: set[tuple[str, str]] = set()
        self.now = Gauge("toto_runs_now", "runs that are under way or should be", ("state",), registry=of)
        self.waits = Gauge("toto_queue_seconds", "how long the oldest run has waited to begin", registry=of)
        self.sandboxes = Gauge("toto_sandboxes_running", "virtual machines of rehearsals", registry=of)
        self.room = Gauge("toto_sandboxes_limit", "how many of them may run at once", registry=of)
        self.worker = Gauge("toto_worker_up", "1 while a worker says that it lives", registry=of)

    async def read(self) -> list[Metric]:
        """The figures as they are now."""
        known = {str(repo.resolve()): name_of(repo) for repo in git_host.infra_repos(self.repos)}
        for repo in known.values():
            for action in ACTIONS:
                for result in _RESULTS:
                    self.ended.labels(repo, action, result)
        database: Any = provide_database_interface()
        async with database.session_context() as session:
            await self._read_jobs(session, database, known)
            await self._read_runs(session, database, known)
            await self._read_tasks(session, database, known)
            await self._read_now(session, database)
        return list(self.registry.collect())

    async def _read_jobs(self, session: AsyncSession, database: Any, known: Mapping[str, str]) -> None:
        """Which jobs there are: those of the deployed commits. Of others nothing is told any more."""
        deployment, flow = database.Deployment, database.Flow
        query = sqlalchemy.select(deployment.parameters).join(flow, flow.id == deployment.flow_id)
        found = (await session.execute(query.where(flow.name == JOB))).scalars()
        pairs = [(known.get(str(each.get("repo"))), str(each.get("job"))) for each in found]
        there = {(repo, job) for repo, job in pairs if repo is not None}
        for gone in self._jobs - there:
            for figure in (self.job_failed, self.job_took, self.job_last):
                figure.remove(*gone)
            for result in _JOB_RESULTS:
                self.jobs_ended.remove(*gone, result)
        for new in there - self._jobs:
            for result in _JOB_RESULTS:
                self.jobs_ended.labels(*new, result)
        self._jobs = there

    def _job(self, row: Any, of: tuple[str, str]) -> None:
        result = "aborted" if row.state_name == ABORTED else _result(row)
        if result != "cancelled":
            self.job_failed.labels(*of).set(result != "completed")
            self.job_took.labels(*of).set(row.total_run_time.total_seconds())
            self.job_last.labels(*of).set(row.end_time.timestamp())
        if row.end_time >= self._began:
            self.jobs_ended.labels(*of, result).inc()

    async def _read_runs(self, session: AsyncSession, database: Any, known: Mapping[str, str]) -> None:
        run, flow = database.FlowRun, database.Flow
        columns = (run.id, flow.name, run.parameters, run.state_type, run.state_name, run.end_time, run.total_run_time)
        query = (
            sqlalchemy.select(*columns)
            .join(flow, flow.id == run.flow_id)
            .where(run.deployment_id.is_not(None), run.end_time > self._runs.since)
            .order_by(run.end_time.desc())
            .limit(_MOST)
        )
        for row in self._runs.fresh((await session.execute(query)).all()):
            repo, action, result = known.get(str(row.parameters.get("repo"))), _action(row), _result(row)
            if repo is None:
                continue
            if action == JOB and (of_job := (repo, str(row.parameters.get("job")))) in self._jobs:
                self._job(row, of_job)
            if action not in ACTIONS:
                continue
            if result != "cancelled":  # a newer one has taken its place, or a person knows of it
                self.failed.labels(repo, action).set(result in ("failed", "crashed"))
                self.last.labels(repo, action).set(row.end_time.timestamp())
            if row.end_time >= self._began:
                self.ended.labels(repo, action, result).inc()
                self.took.labels(action).observe(row.total_run_time.total_seconds())

    async def _read_tasks(self, session: AsyncSession, database: Any, known: Mapping[str, str]) -> None:
        task, stage = database.TaskRun, aliased(database.FlowRun)
        parent, run = aliased(database.TaskRun), aliased(database.FlowRun)
        query = (
            sqlalchemy.select(task.id, task.name, task.state_name, task.end_time, task.total_run_time)
            .add_columns(stage.parameters.label("own"), run.parameters.label("outer"))
            .outerjoin(stage, stage.id == task.flow_run_id)
            .outerjoin(parent, parent.id == stage.parent_task_run_id)
            .outerjoin(run, run.id == parent.flow_run_id)
            .where(
                task.end_time > self._tasks.since,
                task.state_type.in_((StateType.COMPLETED, StateType.FAILED)),
                task.name.in_(PHASES) | sqlalchemy.or_(*(task.name.startswith(f"{each} ") for each in NAMED)),
            )
            .order_by(task.end_time.desc())
            .limit(_MOST)
        )
        for row in self._tasks.fresh((await session.execute(query)).all()):
            phase, _, of = (row.name, "", "") if row.name in PHASES else row.name.partition(" ")
            seconds = row.total_run_time.total_seconds()
            if row.end_time >= self._began and row.state_name != "Cached":
                self.phases.labels(phase).observe(seconds)
            if phase == "evaluate":
                for parameters in (row.own, row.outer):  # of the run, or of a stage and its run
                    if repo := known.get(str((parameters or {}).get("repo"))):
                        self.evaluated.labels(repo, of).set(seconds)

    async def _read_now(self, session: AsyncSession, database: Any) -> None:
        run, limit, worker, pool = database.FlowRun, database.ConcurrencyLimitV2, database.Worker, database.WorkPool
        now = datetime.now(UTC)
        counted = (
            sqlalchemy.select(run.state_type, sqlalchemy.func.count(), sqlalchemy.func.min(run.expected_start_time))
            .where(run.deployment_id.is_not(None), run.state_type.in_(_UNDER_WAY), run.expected_start_time <= now)
            .group_by(run.state_type)
        )
        there = {state: (count, oldest) for state, count, oldest in (await session.execute(counted)).all()}
        for state in _UNDER_WAY:
            self.now.labels(state.value.lower()).set(there.get(state, (0, None))[0])
        waiting = [there[state][1] for state in (StateType.SCHEDULED, StateType.PENDING) if state in there]
        self.waits.set(max(((now - oldest).total_seconds() for oldest in waiting), default=0))
        sandboxes = sqlalchemy.select(limit.active_slots, limit.limit).where(limit.name == SANDBOXES)
        for running, most in (await session.execute(sandboxes)).all():
            self.sandboxes.set(running)
            self.room.set(most)
        beats = (
            sqlalchemy.select(worker.last_heartbeat_time, worker.heartbeat_interval_seconds)
            .join(pool, pool.id == worker.work_pool_id)
            .where(pool.name == self.pool)
        )
        alive = [now - last < timedelta(seconds=_BEATS * (each or 30)) for last, each in await session.execute(beats)]
        self.worker.set(any(alive))


def _action(row: Any) -> str:
    """What a run does: for `reconcile`, whether it deploys."""
    if row.name != "reconcile":
        return str(row.name)
    return next((each for each in ("plan", "rehearse") if row.parameters.get(f"{each}_only")), "deploy")


def _result(row: Any) -> str:
    return "partial" if row.state_name == PARTIAL else str(row.state_type.value).lower()
