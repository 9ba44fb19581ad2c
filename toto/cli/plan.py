"""What a commit would change."""

import uuid
from typing import Annotated

from typer import Argument, Option

from toto.base import runs
from toto.cli.common import Repo, infra, show
from toto.cli.verbs import Verbs
from toto.infra_repo import git
from toto.plan import make

verbs = Verbs()


@verbs.verb("plan")
async def plan(
    only: Annotated[
        list[str] | None, Argument(metavar="[TARGET|TAG|KIND]...", help="limit it to these (default: all)")
    ] = None,
    repo: Repo = None,
    commit: Annotated[
        str, Option(metavar="REV", help="commit, tag or branch", show_default="the deployed branch")
    ] = "HEAD",
    no_build: Annotated[
        bool, Option("--no-build", help="do not build what changed; then the plan does not show what changes in it")
    ] = False,
) -> int:
    """Show what a commit would change, and why; touch nothing."""
    path = infra(repo)
    run = f"plan-{uuid.uuid4()}"
    async with runs.claimed(path, run):
        made = await make.make(path, git.resolve(path, commit), run, only or [])
        show(made.changes.text(await make.previews(made.orders, build=not no_build)))
    return 1 if made.changes.failed else 0
