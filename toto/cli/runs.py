"""Runs: following one, answering for it, and the run that accepts what is there."""

import contextlib
import getpass
import time
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from toto.base.errors import InputError
from toto.base.prefect_api import ServerError
from toto.cli.common import By, Repo, Repos, infra
from toto.cli.verbs import Verbs
from toto.git_host import access, follow
from toto.git_host import host as git_host
from toto.ledger import approvals
from toto.ledger.ledger import Entry, Ledger
from toto.ledger.target import Target

verbs = Verbs()

Run = Annotated[str, Argument(metavar="RUN", help="the run's id, as a push prints it, and its log")]


@verbs.verb("approve")
async def approve(flow_run: Run, repos: Repos, by: By = None) -> int:
    """Let a run go on that asks for an approval; over ssh: ssh toto approve RUN."""
    return await _answer(flow_run, repos, by, approved=True)


@verbs.verb("reject")
async def reject(flow_run: Run, repos: Repos, by: By = None) -> int:
    """Refuse what a run asks for; over ssh: ssh toto reject RUN."""
    return await _answer(flow_run, repos, by, approved=False)


async def _answer(run: str, repos: Path, user: str | None, *, approved: bool) -> int:
    """Answer for a run of one of the repositories for which the user may; others are as if they were not there."""
    for repo in git_host.infra_repos(repos):
        name = repo.name.removesuffix(".git")
        if approvals.read(repo, run) is not None and await access.may(repos, user, "read", name):
            if not await access.may(repos, user, "approve", name):
                raise InputError(
                    f"{user} may not answer for runs of {name}",
                    hint=f'ask someone who may, or someone who may deploy {access.ADMIN} for `approve = ["{user}"]` '
                    f"in [repos.{name}]",
                )
            by = user or f"{getpass.getuser()} (on toto itself)"
            asked = await approvals.answer(repo, run, approved=approved, by=by)
            print(f"{'approved' if approved else 'rejected'} by {by}: run {run} of {name}")
            for label, plan in asked.plans.items():
                print(follow.clean(f"{label}:\n{plan}"))
            return 0
    raise InputError(
        "there is no run of this id that asks for an approval",
        target=f"run {run}",
        hint="the log of the run that asks has the whole line",
    )


@verbs.verb("wait")
async def wait(flow_run: Run, repos: Repos, by: By = None) -> int:
    """Print a run's progress until it ends; over ssh: ssh toto wait RUN.

    The exit status is 0 when all is done, 1 when it failed or was cancelled, 2 when that is not known, and 3 when
    only a part is done.
    """
    for repo in git_host.infra_repos(repos):
        if await access.may(repos, by, "read", repo.name.removesuffix(".git")):
            with contextlib.suppress(ServerError):
                found = await (await git_host.api_of(repo)).call("GET", f"/flow_runs/{flow_run}")
                if Path(found["parameters"].get("repo", "")) == repo.resolve():
                    return await follow.to_the_end(repo, [flow_run], time.monotonic() + follow.AT_MOST)
    raise InputError("no repository of yours has a run of this id", target=f"run {flow_run}", hint="a push prints it")


@verbs.verb("accept")
async def accept(
    target: Annotated[str, Argument(metavar="TARGET", help="such as web1, terraform/dns, helm/grafana")],
    repos: Repos,
    reason: Annotated[str, Option(metavar="WHY", help="it is recorded")],
    repository: Annotated[
        str | None, Option("--repo", metavar="NAME", help="its repository, where several have such a target")
    ] = None,
    by: By = None,
) -> int:
    """Take what is there as good, where a target cannot be put back; over ssh: ssh toto accept TARGET …"""
    wanted = Target.of(target)
    found = []
    for repo in git_host.infra_repos(repos):
        name = repo.name.removesuffix(".git")
        entry = Ledger(repo).get(wanted) if repository in (None, name) else Entry()
        if (entry.good or entry.intent) and await access.may(repos, by, "read", name):
            found.append((repo, name))
    if len(found) != 1:
        raise InputError(
            f"is in {', '.join(name for _, name in found)}" if found else "no repository of yours has deployed it",
            target=wanted.label,
            hint="say which: --repo NAME" if found else "see `toto status`",
        )
    [(repo, name)] = found
    if not await access.may(repos, by, "deploy", name):
        raise InputError(f"{by} may not deploy {name}, so not accept what is there either", target=wanted.label)
    api = await git_host.api_of(repo)
    deployment = await api.call("GET", f"/deployments/name/{git_host.ACCEPT}")
    run = await api.call(
        "POST",
        f"/deployments/{deployment['id']}/create_flow_run",
        {
            "parameters": {
                "repo": str(repo.resolve()),
                "target": str(wanted),
                "reason": reason,
                "by": by or f"{getpass.getuser()} (on toto itself)",
            },
            "tags": [f"user:{by}"] if by else [],
        },
    )
    print(f"toto: accepting {wanted.label} of {name} in run {run['id']}", flush=True)
    return await follow.to_the_end(repo, [run["id"]], time.monotonic() + follow.AT_MOST)


@verbs.verb("check")
async def check(
    machines: Annotated[
        list[str] | None, Argument(metavar="MACHINE", help="names or tags (default: those that toto.toml chooses)")
    ] = None,
    repo: Repo = None,
) -> int:
    """Check machines by the InSpec profiles and testinfra modules of their repository.

    Nothing is changed on them. The exit status is 0 when all that was checked is as wanted.
    """
    there = infra(repo)
    api = await git_host.api_of(there)
    deployment = await api.call("GET", f"/deployments/name/{git_host.COMPLIANCE}")
    parameters = {"repo": str(there.resolve()), "only": machines or None}
    run = await api.call("POST", f"/deployments/{deployment['id']}/create_flow_run", {"parameters": parameters})
    print(f"toto: checking {', '.join(machines or ['the machines'])} in run {run['id']}", flush=True)
    return await follow.to_the_end(there, [run["id"]], time.monotonic() + follow.AT_MOST)
