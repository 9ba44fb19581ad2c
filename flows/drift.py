"""Drift: what has changed in the world behind toto's back, told and not touched."""

from pathlib import Path

from prefect import flow, runtime
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from tasks import cancelled_by_sigterm, names, report
from tasks.drift import look_at
from tasks.tell import tell
from toto.base import runs
from toto.base.errors import TotoError
from toto.infra_repo import git
from toto.ledger.ledger import Ledger
from toto.plan.changes import ChangeSet
from toto.report.report import Story
from toto.report.venues import Origin


@flow(name="drift", flow_run_name=names.of_flow, persist_result=False)
async def drift(repo: Path, origin: Origin = "ui", venues: list[str] | None = None) -> State[None]:
    """Hold every terraform root and every release against the world, as its last good commit wants it.

    Nothing is applied. To make it what it was: `reconcile` with `force`, and the target in `only`.

    Args:
        repo: the bare infra repo on toto.
        origin: what started this run.
        venues: who is told the result besides the usual ones, by the names of the venue blocks.
    """
    run = str(runtime.flow_run.id)
    async with cancelled_by_sigterm(), runs.claimed(repo, run):
        newest = git.resolve(repo, "HEAD")
        ledger = Ledger(repo).read()
        story = Story(repo.name.removesuffix(".git"), newest, ChangeSet(commit=newest, ledger=ledger.fingerprint))
        for target, entry in sorted(ledger.entries.items()):
            if target.kind == "host" or entry.good is None or entry.intent is not None:
                continue
            try:
                changed = await look_at.with_options(task_run_name=f"{target}: drift")(repo, run, target, entry.good)
            except TotoError as error:
                story.failure(target.label, "drift check", error)
                continue
            if changed:
                story.failure(target.label, "drift check", TotoError("\n".join(
                    ["it was changed outside", *changed]), target=target.label,
                    hint=f'start reconcile with force=true and only=["{target}"], or bring the change into the repo'))
        await report.show_story(story)
        await tell(repo, newest, story, origin, named=venues or (), check="drift")
        message = story.headline() if story.failed else "everything is as it was deployed"
        return Failed(message=message) if story.failed else Completed(message=message)
