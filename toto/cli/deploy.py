"""What changes the fleet, or tries it: deploy, rehearse, revert, freeze."""

import asyncio
import contextlib
import re
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

from typer import Argument, Option

from toto.base.errors import InputError
from toto.cli import progress
from toto.cli.common import By, Repo, Repos, of_user, who
from toto.cli.output import say
from toto.cli.verbs import Verbs
from toto.git_host import follow, runs
from toto.git_host import host as git_host
from toto.git_host.shared import name_of
from toto.infra_repo import git
from toto.infra_repo.deployed import manifest_of
from toto.infra_repo.git import NoSuchCommit
from toto.ledger import history, steps
from toto.ledger.history import What
from toto.ledger.ledger import Frozen, Ledger
from toto.ledger.target import HOST, Target

verbs = Verbs()

_NOT_KNOWN: Final = 2  # the status of what was not followed to its end
_LONGEST: Final = 12 * 3600  # seconds for which something is tried

Only = Annotated[
    list[str] | None, Argument(metavar="TARGET|TAG|KIND", help="limit it to these (default: all that changed)")
]
Commit = Annotated[str, Option(metavar="REV", help="commit, tag or branch", show_default="the deployed branch")]
Wait = Annotated[bool, Option("--wait", help="print the run's progress, and wait until it ends")]
Override = Annotated[
    str | None, Option(metavar="WHY", help="in an emergency: in spite of a freeze or a closed window; it is recorded")
]


@verbs.verb("deploy")
async def deploy(
    repos: Repos,
    only: Only = None,
    commit: Commit = "HEAD",
    force: Annotated[
        bool, Option("--force", help="also what has not changed, to undo what was changed outside")
    ] = False,
    override: Override = None,
    try_for: Annotated[
        str | None,
        Option("--try", metavar="TIME", help="only try it: hosts go back after this time, such as 90s, 30m, 2h"),
    ] = None,
    wait: Wait = False,
    repo: Repo = None,
    by: By = None,
) -> int:
    """Have toto deploy what changed, as a push does; over ssh: ssh toto deploy [TARGET …]

    With --wait the exit status is 0 when all is done, 1 when it failed or was cancelled, 3 when only a part is done.

    With --try hosts are rehearsed and activated by `test` alone, and put back when the time is up, or as soon as this
    command is left: by Ctrl-C, or with its terminal. If toto does not do it, their machines go back by themselves.
    """
    place = await of_user(repos, repo, by, "deploy")
    parameters = {"commit": git.resolve(place, commit), "only": only or None, "force": force, "override": override}
    if try_for is None:
        return await _start(place, parameters, by, "deploying", only, wait=wait)
    seconds = _seconds(try_for)
    return await _try(place, {**parameters, "try_for": seconds}, by, only, seconds)


def _seconds(text: str) -> int:
    form = re.fullmatch(r"(\d{1,6})([smh])", text)
    seconds = int(form[1]) * {"s": 1, "m": 60, "h": 3600}[form[2]] if form else 0
    if not 0 < seconds <= _LONGEST:
        raise InputError(f"{text[:20]!a} is no time to try something", target="--try", hint="90s, 30m, 2h: at most 12h")
    return seconds


async def _try(
    repo: Path, parameters: Mapping[str, Any], by: str | None, only: Sequence[str] | None, seconds: int
) -> int:
    """Start a run that tries, follow it, and cancel it when this command is left."""
    run = await _begin(repo, parameters, by, "trying", only)
    following = asyncio.ensure_future(progress.to_the_end(repo, run, at_most=follow.AT_MOST + seconds))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, following.cancel)
    with contextlib.suppress(asyncio.CancelledError, BrokenPipeError):
        if (status := await following) != _NOT_KNOWN:
            return status
    api = await git_host.api_of(repo)
    with contextlib.suppress(InputError):  # it has ended meanwhile
        await runs.cancel(api, await runs.find(api, run), who(by))
        with contextlib.suppress(OSError):  # nobody reads it any more
            say(f"run {run} is cancelled: what it tries is put back")
    return 1


@verbs.verb("rehearse")
async def rehearse(
    repos: Repos, only: Only = None, commit: Commit = "HEAD", wait: Wait = False, repo: Repo = None, by: By = None
) -> int:
    """Have toto rehearse what changed, and touch nothing; over ssh: ssh toto rehearse [TARGET …]

    The exit status with --wait is as that of deploy.
    """
    place = await of_user(repos, repo, by, "rehearse")
    parameters = {"commit": git.resolve(place, commit), "only": only or None, "rehearse_only": True}
    return await _start(place, parameters, by, "rehearsing", only, wait=wait)


@verbs.verb("revert")
async def revert(
    repos: Repos,
    to: Annotated[
        str | None,
        Argument(metavar="COMMIT|TARGET", help="what to go back to, or what to put back", show_default=False),
    ] = None,
    override: Override = None,
    wait: Wait = False,
    repo: Repo = None,
    by: By = None,
) -> int:
    """Deploy what was deployed before; over ssh: ssh toto revert [COMMIT|TARGET]

    A commit is deployed again, to the whole fleet. A target becomes what it was by the commit before its present one.
    With neither, the fleet becomes what the commit before its present one says. Rehearsals that passed then are not
    repeated. The next push deploys the branch again, so put it right first.
    """
    place = await of_user(repos, repo, by, "deploy")
    commit, only = before(place, to)
    parameters = {"commit": commit, "only": only or None, "override": override}
    return await _start(place, parameters, by, f"going back to {commit[:8]} with", only, wait=wait)


def before(repo: Path, to: str | None) -> tuple[str, list[str]]:
    """The commit to go back to, and the targets. Raises `InputError`."""
    target = None if to is None else Target.of(to)
    entry = None if target is None else Ledger(repo).get(target)
    if to is not None and (entry is None or entry.good is None):
        try:
            return git.resolve(repo, to), []
        except NoSuchCommit:
            raise InputError(
                f"there is no commit and no deployed target {to[:60]!a}", hint="see `toto status` and `toto log`"
            ) from None
    now = entry.good.commit if entry and entry.good else ""
    for event in history.newest(repo, target):
        if event.what in (What.GOOD, What.VERIFIED) and event.commit:
            now = now or event.commit
            if event.commit != now:
                return event.commit, [str(target)] if target else []
    raise InputError("nothing was deployed before", target=to, hint="see `toto log`: name a commit")


async def _start(
    repo: Path, parameters: Mapping[str, Any], by: str | None, doing: str, only: Sequence[str] | None, *, wait: bool
) -> int:
    run = await _begin(repo, parameters, by, doing, only)
    if wait:
        return await progress.to_the_end(repo, run)
    print(f"toto: `toto wait {run}` shows its progress")
    return 0


async def _begin(
    repo: Path, parameters: Mapping[str, Any], by: str | None, doing: str, only: Sequence[str] | None
) -> str:
    given = {name: value for name, value in parameters.items() if value}
    run = await runs.start(repo, git_host.DEPLOYMENT, {**given, "origin": "cli"}, by)
    print(f"toto: {doing} {', '.join(only or ['what changed'])} of {name_of(repo)} in run {run}", flush=True)
    return run


@verbs.verb("freeze")
async def freeze(
    targets: Annotated[list[str], Argument(metavar="TARGET", help="such as web1, terraform/dns, helm/grafana")],
    repos: Repos,
    reason: Annotated[str, Option(metavar="WHY", help="it is recorded, and shown in the plan")],
    repo: Repo = None,
    by: By = None,
) -> int:
    """Have targets rehearsed and not rolled out, until toto unfreeze; over ssh: ssh toto freeze TARGET … --reason WHY

    It is a note in the ledger, and takes no commit. A run that is at work rolls none of them out any more, but for what
    it has begun with. `toto deploy --override` goes on in spite of it, in an emergency.
    """
    if not reason.strip():
        raise InputError("it takes a reason", hint="--reason WHY")
    place, person = await of_user(repos, repo, by, "deploy"), who(by)
    frozen = Frozen(by=person, why=" ".join(reason.split())[:500], at=git.now())
    for target in _known(place, targets):
        await Ledger(place).write(target, steps.freeze(frozen), f"{target.label}: {frozen}")
        print(f"{target.label}: {frozen}")
    return 0


@verbs.verb("unfreeze")
async def unfreeze(
    targets: Annotated[list[str], Argument(metavar="TARGET", help="such as web1, terraform/dns, helm/grafana")],
    repos: Repos,
    repo: Repo = None,
    by: By = None,
) -> int:
    """Let targets be rolled out again; over ssh: ssh toto unfreeze TARGET …

    What waits for it is rolled out by the next run: toto deploy TARGET.
    """
    place, person = await of_user(repos, repo, by, "deploy"), who(by)
    wanted = [Target.of(each) for each in targets]
    ledger = Ledger(place).read()
    if free := [each.label for each in wanted if ledger.get(each).frozen is None]:
        raise InputError(
            "is not frozen by `toto freeze`", target=", ".join(free), hint="`freeze` in machines.yaml takes a commit"
        )
    for target in wanted:
        await Ledger(place).write(target, steps.freeze(None), f"{target.label}: unfrozen by {person}")
        print(f"{target.label}: unfrozen by {person}")
    return 0


def _known(repo: Path, targets: Sequence[str]) -> list[Target]:
    """The targets of these names. Raises `InputError` for one that is neither in the ledger nor in the manifest."""
    wanted = [Target.of(each) for each in targets]
    there = {*Ledger(repo).read().entries, *(Target(HOST, name) for name in manifest_of(repo).machines)}
    if unknown := [each.label for each in wanted if each not in there]:
        raise InputError(
            "there is no such target in the ledger or in machines.yaml",
            target=", ".join(unknown),
            hint="see `toto status`; those of other kinds have names like terraform/dns",
        )
    return wanted
