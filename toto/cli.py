"""`toto`, for people at a terminal: what would change, what is deployed, and the history of it.

Runs are started by a push, from Prefect's UI, or by `prefect deployment run`; nothing here deploys.
"""

import argparse
import asyncio
import sys
import uuid
from pathlib import Path

from toto import git, plan
from toto.changes import Action, table
from toto.errors import TotoError
from toto.ledger import REF, Ledger


def main() -> None:
    """The console script. Exit status 0, 1 when a host does not evaluate, 2 for an error of input or tools."""
    arguments = _parser().parse_args()
    try:
        sys.exit(asyncio.run(arguments.run(arguments)))
    except TotoError as error:
        print(f"toto: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="toto", description=__doc__)
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    repo = argparse.ArgumentParser(add_help=False)
    repo.add_argument("--repo", type=Path, default=Path(), help="the infra repo on toto (default: this directory)")

    planning = verbs.add_parser("plan", parents=[repo], help="what a commit would change, and why; touches nothing")
    planning.add_argument("--commit", default="HEAD", help="commit, tag or branch (default: the deployed branch)")
    planning.add_argument("--no-build", action="store_true",
                          help="do not build what changed; then it is not told what changes in it")
    planning.add_argument("only", nargs="*", metavar="HOST|TAG", help="limit it to these (default: all)")
    planning.set_defaults(run=_plan)

    status = verbs.add_parser("status", parents=[repo], help="what the ledger says of every target")
    status.set_defaults(run=_status)

    history = verbs.add_parser("log", parents=[repo], help="the deployment history, newest first")
    history.add_argument("-n", type=int, default=30, help="how many lines (default: 30)")
    history.set_defaults(run=_log)
    return parser


async def _plan(arguments: argparse.Namespace) -> int:
    repo = git.bare(arguments.repo)
    run = f"plan-{uuid.uuid4()}"
    async with plan.claimed(repo, run):
        made = await plan.make(repo, git.resolve(repo, arguments.commit), run, arguments.only)
        if not arguments.no_build:
            await asyncio.gather(*(plan.build(order) for order in made.orders if order.change.action is Action.DEPLOY))
        print(table(made.changes.rows(await plan.differences(made.changes))))
    return 1 if made.changes.failed else 0


async def _status(arguments: argparse.Namespace) -> int:
    rows = []
    for target, entry in sorted(Ledger(git.bare(arguments.repo)).read().entries.items()):
        state = "good" if entry.good else "rehearsed only" if entry.rehearsed else "not deployed"
        if entry.reverted:
            state = f"put back {entry.reverted.at}: {entry.reverted.why}"
        if entry.unreachable:
            state = f"unreachable since {entry.unreachable.at}"
        if entry.intent:
            state = f"being changed by run {entry.intent.run} ({entry.intent.step})"
        last = entry.good or entry.rehearsed
        rows.append({"target": str(target), "commit": last.commit[:8] if last else "", "since": last.at if last else "",
                     "state": state})
    print(table(rows, ("target", "commit", "since", "state")) if rows else "nothing was deployed from here yet")
    return 0


async def _log(arguments: argparse.Namespace) -> int:
    done = await git.git(git.bare(arguments.repo), "log", f"--max-count={arguments.n}", "--format=%cI  %s", REF,
                         check=False)
    print(done.stdout if done.status == 0 else "nothing was deployed from here yet", end="")
    return 0


if __name__ == "__main__":
    main()
