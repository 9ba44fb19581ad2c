"""Jobs: a run of one of the infra repo's jobs, started by a person, a schedule, a different job or a script."""

from pathlib import Path

from prefect import flow, runtime
from prefect.client.schemas.objects import State
from prefect.states import Completed

from tasks import cancelled_by_sigterm, jobs, names
from toto.base import runs
from toto.infra_repo import git


@flow(name="job", flow_run_name=names.of_job, persist_result=False)
async def job(
    repo: Path,
    job: str,
    parameters: dict[str, str] | None = None,
    reason: str = "",
    commit: str | None = None,
    number: int | None = None,
    parent: str = "",
) -> State[None]:
    """Run a job of an infra repo, as soon as one of its contexts has a free place.

    Args:
        repo: the bare infra repo on toto.
        job: the job's name.
        parameters: what it is given; those that it declares have their defaults.
        reason: why it is started; it is recorded.
        commit: the commit that it is run from; the tip of the deployed branch when left out.
        number: its number, when it was queued with one.
        parent: the run that queued it.
    """
    run, asked = str(runtime.flow_run.id), git.resolve(repo, commit or "HEAD")
    about = {"reason": reason, "parent": parent}
    try:
        async with (
            cancelled_by_sigterm(),
            runs.claimed(repo, run),
            jobs.begun(repo, job, asked, parameters or {}, run, number, **about) as work,
        ):
            await jobs.approve(work)
            async with jobs.place(work) as context:
                ended = await jobs.carry_out(work, context)
            await jobs.show_archive(work)
            await jobs.follow(work, ended)
    except jobs.Instead as others:
        return Completed(message=str(others))
    return jobs.state_of(ended)
