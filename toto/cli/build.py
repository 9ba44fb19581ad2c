"""Builds on request: having a host built, and fetching what was built."""

import sys
from typing import Annotated

from typer import Argument, Option

from toto.cli import progress
from toto.cli.common import By, Repos
from toto.cli.output import say
from toto.cli.verbs import Verbs
from toto.fleet import on_request
from toto.git_host import host as git_host
from toto.git_host.shared import name_of

verbs = Verbs()

Host = Annotated[str, Argument(metavar="HOST[@COMMIT]", help="a host, and a commit, tag or branch (default: deployed)")]
Repository = Annotated[
    str | None, Option("--repo", metavar="NAME", help="its repository, where you may rehearse several")
]


@verbs.verb("build")
async def build(host: Host, repos: Repos, repository: Repository = None, by: By = None) -> int:
    """Have toto build a host, and touch nothing; over ssh: ssh toto build HOST[@COMMIT].

    It prints the log of the build, and then how to fetch the result. The build goes on when nobody reads.
    """
    wanted = await on_request.Wanted.of(repos, host, by, repository)
    run = await on_request.start(wanted, by)
    print(f"toto: building {wanted} of {name_of(wanted.repo)} in run {run}", flush=True)
    status = await progress.to_the_end(wanted.repo, run, steps=True)
    if status == 0:
        row = await on_request.row(await git_host.api_of(wanted.repo), wanted, run)
        print(f"toto: {row['path']} ({int(row['bytes']) / 1e6:.0f} MB; {row['why'] or 'it was built before'})")
        print("toto: to have it on your own machine:")
        print(await on_request.how_to_fetch(wanted, row["path"]))
    return status


@verbs.verb("fetch")
async def fetch(host: Host, repos: Repos, repository: Repository = None, by: By = None) -> int:
    """Write what was built to standard output: a tar of a binary cache; over ssh: ssh toto fetch HOST[@COMMIT].

    Standard input lists the store paths that need not be sent, a line each; </dev/null for none.
    """
    wanted = await on_request.Wanted.of(repos, host, by, repository)
    path = on_request.built(wanted)
    if sys.stdout.isatty():
        say(f"{path} is written to standard output: lead that to `tar -x`. Or rather:")
        print(await on_request.how_to_fetch(wanted, path))
        return 2
    await on_request.fetch(wanted, on_request.known(sys.stdin.buffer), sys.stdout.buffer)
    return 0
