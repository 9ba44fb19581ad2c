"""Runs: following one, answering for it, and the run that accepts what is there."""

import contextlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from toto.base.errors import InputError
from toto.base.prefect_api import Api, ServerError
from toto.cli import progress
from toto.cli.common import By, Repo, Repos, api_near, of_user, who
from toto.cli.output import AsJson, document, emit, lines_of
from toto.cli.remote import Remote
from toto.cli.verbs import Verbs
from toto.fleet.state import Fleet
from toto.fleet.words import ago, lasted
from toto.git_host import access, follow, runs
from toto.git_host import host as git_host
from toto.git_host.shared import name_of
from toto.ledger import approvals
from toto.ledger.ledger import Entry, Ledger
from toto.ledger.target import Target

verbs = Verbs()
run_ = verbs.group("run")

Run = Annotated[str, Argument(metavar="RUN", help="the run's id, as a push prints it, and its log")]
Beginning = Annotated[str, Argument(metavar="RUN", help="the run's id, or its beginning, as `toto runs` has it")]


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
        name = name_of(repo)
        if approvals.read(repo, run) is not None and await access.may(repos, user, "read", name):
            if not await access.may(repos, user, "approve", name):
                raise InputError(
                    f"{user} may not answer for runs of {name}",
                    hint=f'ask someone who may, or someone who may deploy {access.ADMIN} for `approve = ["{user}"]` '
                    f"in [repos.{name}]",
                )
            by = who(user)
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
        if await access.may(repos, by, "read", name_of(repo)):
            with contextlib.suppress(ServerError):
                found = await (await git_host.api_of(repo)).call("GET", f"/flow_runs/{flow_run}")
                if Path(found["parameters"].get("repo", "")) == repo.resolve():
                    return await progress.to_the_end(repo, flow_run)
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
        name = name_of(repo)
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
    asked = {"target": str(wanted), "reason": reason, "by": who(by)}
    run = await runs.start(repo, git_host.ACCEPT, asked, by)
    print(f"toto: accepting {wanted.label} of {name} in run {run}", flush=True)
    return await progress.to_the_end(repo, run)


@verbs.verb("check")
async def check(
    repos: Repos,
    machines: Annotated[
        list[str] | None, Argument(metavar="MACHINE|TAG", help="limit it to these (default: what toto.toml says)")
    ] = None,
    repo: Repo = None,
    by: By = None,
) -> int:
    """Check machines by the InSpec profiles and testinfra modules of their repository; over ssh: ssh toto check

    Nothing is changed on them. The exit status is 0 when all that was checked is as wanted.
    """
    there = await of_user(repos, repo, by, "deploy")
    run = await runs.start(there, git_host.COMPLIANCE, {"only": machines or None, "origin": "cli"}, by)
    print(f"toto: checking {', '.join(machines or ['the machines'])} in run {run}", flush=True)
    return await progress.to_the_end(there, run)


@verbs.verb("runs")
async def listing(
    repos: Repos,
    lines: Annotated[int, Option("-n", metavar="N", min=1, max=runs.NEWEST, help="how many, the newest")] = 20,
    as_json: AsJson = False,
) -> int:
    """List the newest runs of all repositories: how each ended, and what it said."""
    found = await Fleet(repos, await _api(repos)).runs(lines)
    now = datetime.now(UTC)
    rows = [
        {
            "run": each.id[:8],
            "begun": ago(each.began, now),
            "state": each.state,
            "took": lasted(each.seconds),
            "name": each.name,
            "message": each.message,
        }
        for each in found
    ]
    moods = [each.mood for each in found]
    columns = ("run", "begun", "state", "took", "name", "message")
    text = lines_of(rows, columns, moods) if rows else "there were none yet"
    emit("runs", [each.json() for each in found], text, as_json=as_json)
    return 0


@run_.verb("logs")
async def logs(
    flow_run: Beginning,
    repos: Repos,
    following: Annotated[bool, Option("-f", "--follow", help="go on until the run ends")] = False,
    as_json: AsJson = False,
) -> int:
    """Print the log of a run, with those of its stages, targets and steps.

    With --follow the exit status is that of toto wait; with --json it is all printed at the end.
    """
    api = await _api(repos)
    found = await runs.find(api, flow_run)
    log, kept, status = runs.Log(api, found["id"]), list[runs.Logged](), 0

    def say(line: runs.Logged) -> None:
        if as_json:
            kept.append(line)
        else:
            print(f"{line.at[11:19]}  {line.message}", flush=True)

    if following:
        ended = await log.follow(say, every=follow.PAUSE)
        status = follow.STATUS.get(ended, 1)
    else:
        for line in await log.new():
            say(line)
    if as_json:
        print(document("log", map(vars, kept)))
    return status


@verbs.verb("cancel")
async def cancel(flow_run: Beginning, repos: Repos, by: By = None) -> int:
    """Cancel a run: what it is rolling out is put back; over ssh: ssh toto cancel RUN"""
    found = None
    for repo in git_host.infra_repos(repos):
        if by is None or await access.may(repos, by, "read", name_of(repo)):
            api = await git_host.api_of(repo)
            with contextlib.suppress(InputError):
                found = await runs.find(api, flow_run)
            if found is not None and Path(found["parameters"].get("repo", "")) == repo.resolve():
                break
            found = None
    if found is None:
        raise InputError(f"no repository of yours has a run {flow_run[:60]!a}", hint="`toto runs` lists the newest")
    if f"user:{by}" not in found["tags"] and not await access.may(repos, by, "deploy", name_of(repo)):
        raise InputError(f"{by} may not deploy {name_of(repo)}, so cancel only runs of their own", target=found["id"])
    await runs.cancel(api, found, who(by))
    print(f"run {found['id']} is cancelled: {found['name']}")
    return 0


async def _api(repos: Path) -> Api:
    """The API of the toto that is meant."""
    remote = Remote.named()
    return remote.api if remote else await api_near(None, repos)
