"""What a commit would change."""

import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Final

from typer import Argument, Option

from toto.base import runs
from toto.base.errors import InputError
from toto.cli import progress
from toto.cli.common import Repo, infra
from toto.cli.output import AsJson, emit
from toto.cli.verbs import Verbs
from toto.infra_repo import git
from toto.ledger.ledger import Ledger
from toto.ledger.target import Target
from toto.plan import make
from toto.plan.changes import Action
from toto.plan.order import Plan

verbs = Verbs()

Commit = Annotated[str, Option(metavar="REV", help="commit, tag or branch", show_default="the deployed branch")]
CHANGES: Final = 2  # the exit status of `plan --exit-code` when something would change


@verbs.verb("plan")
async def plan(
    only: Annotated[
        list[str] | None, Argument(metavar="TARGET|TAG|KIND", help="limit it to these (default: all)")
    ] = None,
    repo: Repo = None,
    commit: Commit = "HEAD",
    no_build: Annotated[
        bool, Option("--no-build", help="do not build what changed; then the plan does not show what changes in it")
    ] = False,
    exit_code: Annotated[
        bool,
        Option("--exit-code", help=f"the exit status is 0 when nothing would change, {CHANGES} when something, else 1"),
    ] = False,
    as_json: AsJson = False,
) -> int:
    """Show what a commit would change, and why; touch nothing."""
    async with _made(infra(repo), commit, only or []) as made:
        with progress.step("looking at what changes" if no_build else "building what changes", plain=False):
            differences = await make.previews(made.orders, build=not no_build)
        items = [{**row, "held": _held(made, row["target"])} for row in made.changes.rows(differences)]
        emit("plan", items, made.changes.text(differences), as_json=as_json)
    if made.changes.failed:
        return 1
    return CHANGES if exit_code and not made.changes.empty else 0


def _held(plan: Plan, target: str) -> str:
    return next((each.held for each in plan.changes.changes if str(each.target) == target), "")


@verbs.verb("diff")
async def diff(
    target: Annotated[str, Argument(metavar="TARGET", help="such as web1, terraform/dns, helm/grafana")],
    repo: Repo = None,
    commit: Commit = "HEAD",
    as_json: AsJson = False,
) -> int:
    """Show what a commit would change in one target, from its last good on; touch nothing.

    A host is built for it, and its closure compared. Of a terraform root or a helm release it says what a plan can tell
    without its rehearsal. The commits since its last good come first.
    """
    path, wanted = infra(repo), Target.of(target)
    async with _made(path, commit, [str(wanted)]) as made:
        if failed := next((each for each in made.changes.failed if each.target == wanted), None):
            raise InputError(failed.message, target=wanted.label)
        order = next((each for each in made.orders if each.target == wanted), None)
        last = Ledger(path).read().get(wanted).good
        since = await _commits(path, last.commit, made.commit) if last and last.commit != made.commit else []
        with progress.step("building it", plain=False):
            what = (await make.previews([order], build=order.change.action is Action.DEPLOY)) if order else {}
        item = {
            "target": str(wanted),
            "from": last.commit if last else None,
            "to": made.commit,
            "why": str(order.change.why) if order else "unchanged",
            "commits": since,
            "difference": what.get(wanted.label, ""),
        }
    begin = f"{wanted.label}: {last.commit[:8] if last else 'not deployed'} → {made.commit[:8]}, {item['why']}"
    told = item["difference"] or ("only its rehearsal finds out what changes" if order else "")
    emit("difference", [item], "\n".join(filter(None, [begin, *since, str(told)])), as_json=as_json)
    return 0


async def _commits(repo: Path, old: str, new: str) -> list[str]:
    """The commits from one to the other, newest first, a line each; none when the old one is not there any more."""
    asked = ("log", "--no-color", "--max-count=50", "--format=%h %an: %s", f"{old}..{new}", "--")
    done = await git.git(repo, *asked, check=False)
    return done.lines if done.status == 0 else []


@asynccontextmanager
async def _made(repo: Path, commit: str, only: list[str]) -> AsyncIterator[Plan]:
    """The plan of a commit, whose files are there to the end of the block."""
    run = f"plan-{uuid.uuid4()}"
    async with runs.claimed(repo, run):
        yield await make.make(repo, git.resolve(repo, commit), run, only, shown=progress.Evaluations())
