"""The command `toto`: shows what would change, what is deployed and its history; manages the git host.

A push, Prefect's UI or `prefect deployment run` starts a run; no command here deploys anything.
"""

import argparse
import asyncio
import contextlib
import difflib
import getpass
import json
import os
import pwd
import re
import shlex
import shutil
import signal
import sys
import textwrap
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NoReturn

from flying_monkey.signature import fingerprint
from toto import doctor
from toto.api import certificate
from toto.base import paths, process, runs, server_rules
from toto.base.errors import InputError, TotoError
from toto.base.prefect_api import ServerError, saved_auth
from toto.doctor import findings
from toto.git_host import access, follow, receive, shared
from toto.git_host import host as git_host
from toto.git_host import shell as git_shell
from toto.infra_repo import git
from toto.infra_repo.fields import check_key_name
from toto.ledger import approvals
from toto.ledger.ledger import REF, Entry, Ledger
from toto.ledger.target import HOST, Target
from toto.machine import condition, keys, owners, signing_key
from toto.metrics import machines as monitored
from toto.metrics import token
from toto.nix import builders
from toto.nix import daemon as nix_daemon
from toto.plan import make as plan
from toto.plan.changes import table
from toto.server import backup, database_move, environment, migrate
from toto.server import serve as server

_NARROWEST: Final = 40  # columns of a terminal for which lines are folded
_MOST: Final = 5  # repositories that an error names
_AS_IT_IS: Final[dict[str, Any]] = {
    "replace_whitespace": False,
    "drop_whitespace": True,
    "break_long_words": False,
    "break_on_hyphens": False,
}


def main() -> None:
    """The console script. Exit status 0, 1 when a host does not evaluate, 2 for an error of input or tools."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        del os.environ[name]  # they may name a hook's repository and quarantine, and GitPython would use them
    if sys.argv[1:2] == ["serve"]:
        sys.exit(server.main(sys.argv[2:]))
    if sys.argv[1:2] == ["nix-daemon"]:
        sys.exit(nix_daemon.main(sys.argv[2:]))
    if not sys.argv[1:]:
        sys.argv.append("--help")
    try:
        try:
            arguments = _parser().parse_args()
            status = asyncio.run(arguments.run(arguments))
        finally:
            sys.stdout.flush()
        sys.exit(status)
    except TotoError as error:
        print(f"toto: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `toto log | head`: whoever reads has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # (Python flushes once more as it ends)
        sys.exit(128 + signal.SIGPIPE)


class _Parser(argparse.ArgumentParser):
    """Says of a wrong word what was meant, and not all that there is."""

    def error(self, message: str) -> NoReturn:
        if wrong := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)$", message):
            close = difflib.get_close_matches(wrong[1], re.findall(r"'(.*?)'", wrong[2]), n=1)
            meant = f"did you mean {close[0]}?" if close else f"`{self.prog} --help` lists what there is"
            self.exit(2, f"{self.prog}: there is no {process.shorten(ascii(wrong[1]), 60)}: {meant}\n")
        super().error(message)


def _print(text: str) -> None:
    """Print text, its lines folded where a terminal is narrower."""
    width = shutil.get_terminal_size((0, 0)).columns
    for line in text.splitlines():
        fits = len(line) <= width or width < _NARROWEST
        print(line if fits else textwrap.fill(line, width, subsequent_indent="    ", **_AS_IT_IS))


def _infra(chosen: Path | None) -> Path:
    """The infra repo that is meant: the one named, that of this directory, or the only one on toto."""
    if chosen is not None:
        return git.bare(chosen)
    with contextlib.suppress(InputError):
        return git.bare(Path())
    there = git_host.infra_repos(git_host.default_repos())
    if len(there) == 1:
        return git.bare(there[0])
    raise InputError(
        "this directory is no infra repo",
        hint="say which: --repo " + (f"with one of {', '.join(map(str, there[:_MOST]))}" if there else "PATH"),
    )


def _on_toto(repos: Path, name: str) -> Path:
    """A repository of the git host's. Raises `InputError` when there is none of this name."""
    path = access.path_of(repos.absolute(), access.check_name(name))
    if not path.exists():
        there = [each.name.removesuffix(".git") for each in git_host.infra_repos(repos.absolute())]
        close = difflib.get_close_matches(name, there, n=1)
        raise InputError(
            f"there is no repository {name}",
            hint=f"did you mean {close[0]}?" if close else f"`toto repo create {name}` makes it",
        )
    return git.bare(path)


def _parser() -> _Parser:
    parser = _Parser(prog="toto", description=__doc__)
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    repo = _Parser(add_help=False)
    repo.add_argument(
        "--repo", type=Path, help="the infra repo on toto (default: this directory, or else toto's only one)"
    )

    planning = verbs.add_parser("plan", parents=[repo], help="show what a commit would change, and why; touch nothing")
    planning.add_argument("--commit", default="HEAD", help="commit, tag or branch (default: the deployed branch)")
    planning.add_argument(
        "--no-build",
        action="store_true",
        help="do not build what changed; then the plan does not show what changes in it",
    )
    planning.add_argument("only", nargs="*", metavar="TARGET|TAG|KIND", help="limit it to these (default: all)")
    planning.set_defaults(run=_plan)

    status = verbs.add_parser("status", parents=[repo], help="show what the ledger says about every target")
    status.set_defaults(run=_status)

    verbs.add_parser("serve", help="run toto: Prefect's server, a worker, the deployments (--help says more)")
    verbs.add_parser("nix-daemon", help="run toto's nix daemon, as root, for a `toto serve` that is not (--help)")

    history = verbs.add_parser("log", parents=[repo], help="show the deployment history, newest first")
    history.add_argument("-n", type=int, default=30, help="how many lines (default: 30)")
    history.set_defaults(run=_log)

    secret = verbs.add_parser("password", help="print user and password of UI and API: an administrator's")
    secret.add_argument("--home", type=Path, default=paths.state_home() / "server", help="(%(default)s)")
    secret.set_defaults(run=_password)

    looking = verbs.add_parser(
        "doctor",
        parents=[_where()],
        help="tell what toto lacks on this machine, and what mends it; status 1 when it does not work without",
    )
    looking.add_argument("--home", type=Path, default=paths.state_home() / "server", help="(%(default)s)")
    looking.add_argument("--json", action="store_true", help="print the findings as JSON")
    looking.set_defaults(run=_doctor)

    for verb, help in (
        ("approve", "let a run go on that asks for an approval"),
        ("reject", "refuse what a run asks for"),
    ):
        answering = verbs.add_parser(verb, parents=[_where()], help=f"{help}; over ssh: ssh toto {verb} RUN")
        answering.add_argument("flow_run", metavar="RUN", help="the run's id, as in its log")
        answering.add_argument("--by", metavar="USER", help="the user of the git host who answers")
        answering.set_defaults(run=_answer, approved=verb == "approve")

    waiting = verbs.add_parser(
        "wait", parents=[_where()], help="print a run's progress until it ends; over ssh: ssh toto wait RUN"
    )
    waiting.add_argument("flow_run", metavar="RUN", help="the run's id, as a push prints it")
    waiting.add_argument("--by", metavar="USER", help="the user of the git host who waits")
    waiting.set_defaults(run=_wait)

    accepting = verbs.add_parser(
        "accept",
        parents=[_where()],
        help="take what is there as good, where a target cannot be put back; over ssh: ssh toto accept TARGET …",
    )
    accepting.add_argument("target", metavar="TARGET", help="such as web1, terraform/dns, helm/grafana")
    accepting.add_argument("--reason", required=True, metavar="WHY", help="it is recorded")
    accepting.add_argument("--repo", metavar="NAME", help="its repository, where several have such a target")
    accepting.add_argument("--by", metavar="USER", help="the user of the git host who accepts it")
    accepting.set_defaults(run=_accept)

    _machine_verbs(verbs.add_parser("machine", help="which repository may deploy which machine"))
    _key_verb(verbs)

    migrating = verbs.add_parser("migrate", help="take the state of a toto that ran as root to a user of its own")
    migrating.add_argument("--user", required=True, help="the user as whom toto will run")
    migrating.add_argument("--to", type=Path, default=Path("/var/lib/toto"), help="the new state (%(default)s)")
    migrating.add_argument("--home", type=Path, help="the server's home, where that is not `server` in the state")
    migrating.add_argument("--repos", type=Path, help="the repositories, where they are not `repos` in that home")
    migrating.add_argument("--dry-run", action="store_true", help="change nothing: tell all that would be done")
    migrating.set_defaults(run=_migrate)

    _metrics_verbs(verbs.add_parser("metrics", help="what a Prometheus needs to read toto and the fleet's machines"))
    _saving_verbs(verbs)
    _database_verbs(verbs.add_parser("database", help="move Prefect's database to PostgreSQL, or to a newer one"))
    _repo_verbs(verbs.add_parser("repo", help="the git host: repositories, what they accept, who may use them"))
    return parser


async def _doctor(arguments: argparse.Namespace) -> int:
    place = findings.Toto(paths.state_home(), arguments.home.absolute(), arguments.repos.absolute())
    found = await findings.examine(place, doctor.CHECKS)
    print(json.dumps([asdict(each) for each in found], indent=1) if arguments.json else findings.text(found))
    return int(any(each.status == "missing" for each in found))


async def _password(arguments: argparse.Namespace) -> int:
    if (auth := saved_auth(arguments.home / environment.PROFILES)) is None:
        raise InputError(
            "there is no password yet", target=str(arguments.home), hint="start `toto serve`: it makes one"
        )
    print(auth)
    return 0


async def _migrate(arguments: argparse.Namespace) -> int:
    try:
        user = pwd.getpwnam(arguments.user)
    except KeyError:
        raise InputError(
            "there is no such user",
            target=arguments.user,
            hint=f"useradd --system --user-group --home-dir {arguments.to} --shell /bin/sh {arguments.user}",
        ) from None
    old = paths.state_home()
    home = (arguments.home or old / "server").absolute()
    repos = (arguments.repos or home / "repos").absolute()
    await migrate.migrate(migrate.Migration(user, old, home, repos, arguments.to.absolute(), dry=arguments.dry_run))
    return 0


def _key_verb(verbs: Any) -> None:
    key = verbs.add_parser("key", parents=[_where()], help="print the public half of a key of a repository's")
    key.add_argument("name", metavar="REPO", help="or `builders`, for the key that logs in to remote builders")
    key.add_argument("key", nargs="?", metavar="NAME", help="which key (default: the one for its machines)")
    key.add_argument("--new", choices=keys.USES, help="first make the key, when it is missing")
    key.add_argument("--import", dest="file", type=Path, metavar="FILE", help="first take over this private key")
    key.set_defaults(run=_key)


def _saving_verbs(verbs: Any) -> None:
    for verb, help, run in (
        ("backup", "write all that cannot be made again to a file, also while toto runs", _backup),
        ("restore", "put a backup in the place of what is there, while toto does not run", _restore),
    ):
        saving = verbs.add_parser(verb, parents=[_where()], help=help)
        saving.add_argument("--home", type=Path, default=paths.state_home() / "server", help="(%(default)s)")
        saving.add_argument("file", metavar="FILE", help=f"- for standard {'out' if verb == 'backup' else 'in'}put")
        saving.set_defaults(run=run)


def _metrics_verbs(parser: _Parser) -> None:
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    secret = verbs.add_parser("token", help="print the token by which it reads /metrics: a secret")
    secret.set_defaults(run=_metrics_token)
    machines = verbs.add_parser("targets", parents=[_where()], help="print the machines, for a file of its file_sd")
    machines.set_defaults(run=_metrics_targets)


def _database_verbs(parser: _Parser) -> None:
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    where = _Parser(add_help=False)
    where.add_argument(
        "--home",
        type=Path,
        default=paths.state_home() / "server",
        help="the home of the server, which must not run (default: %(default)s)",
    )
    moving = verbs.add_parser(
        "move",
        parents=[where],
        help="copy the SQLite database into a PostgreSQL of toto's own, and use that from now on",
    )
    moving.set_defaults(run=_database_move)
    upgrading = verbs.add_parser(
        "upgrade", parents=[where], help="upgrade toto's PostgreSQL to the newest version that is installed"
    )
    upgrading.add_argument(
        "--from",
        type=Path,
        dest="old_bin",
        metavar="DIR",
        help="the bin folder of its current version, when that is not installed in the way of Debian",
    )
    upgrading.set_defaults(run=_database_upgrade)


def _where() -> _Parser:
    """The option that says where the repositories are."""
    where = _Parser(add_help=False)
    where.add_argument(
        "--repos",
        type=Path,
        default=git_host.default_repos(),
        help="the folder of the repositories (default: %(default)s)",
    )
    return where


def _machine_verbs(parser: _Parser) -> None:
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    listing = verbs.add_parser("list", help="show every machine that was deployed, and its repository")
    listing.set_defaults(run=_machine_list)
    setup = verbs.add_parser(
        "setup", parents=[_where()], help="print what the configuration of a machine says to be deployed by documents"
    )
    setup.add_argument("name", metavar="REPO")
    setup.add_argument(
        "--pull", metavar="URL", help="for a machine that asks at this address, such as https://toto:4201"
    )
    setup.set_defaults(run=_machine_setup)
    signing = verbs.add_parser(
        "signer", parents=[_where()], help="show the key that machines obey, and who lists it; change to a next one"
    )
    signing.add_argument("--next", action="store_true", help="first make the next key, when it is missing")
    signing.add_argument(
        "--certificate", type=Path, metavar="FILE", help="first take over what a machine's other signer vouches by"
    )
    signing.add_argument("--use", action="store_true", help="sign by the next key from now on, if all machines list it")
    signing.add_argument("--force", action="store_true", help="also if some would then obey nothing")
    signing.set_defaults(run=_machine_signer)
    moving = verbs.add_parser("move", parents=[_where()], help="let a different repository deploy a machine")
    moving.add_argument("name", metavar="MACHINE")
    moving.add_argument("old", metavar="FROM", help="the repository that it belongs to")
    moving.add_argument("new", metavar="TO", help="the repository that it will belong to")
    moving.set_defaults(run=_machine_move)


def _repo_verbs(parser: _Parser) -> None:
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    where = _where()
    policy = _Parser(add_help=False, parents=[where], argument_default=argparse.SUPPRESS)
    policy.add_argument("name", metavar="NAME")
    policy.add_argument("--branch", help="the deployed branch")
    policy.add_argument(
        "--signed", action=argparse.BooleanOptionalAction, help="refuse commits without a trusted signature"
    )
    policy.add_argument(
        "--allow-force",
        action=argparse.BooleanOptionalAction,
        help="accept forced pushes to the deployed branch, and its deletion",
    )
    policy.add_argument("--max-file-size", metavar="SIZE", help="such as 20m; 0 for no limit (default: 100m)")
    policy.add_argument(
        "--allowed-signers",
        metavar="FILE",
        help="ssh keys that are trusted for signatures; '' for "
        "the keys of the users who may deploy or rehearse it, which is the default",
    )
    policy.add_argument("--gpg-home", metavar="DIR", help="the gpg folder whose keys are trusted; '' for none")

    create = verbs.add_parser("create", parents=[policy], help="make a repository, or bring its hooks up to date")
    create.add_argument("--by", metavar="USER", help="the user who creates it; without a table it is theirs to deploy")
    create.add_argument(
        "--inherit", action="store_true", help="let it have what is left of a repository that had its name before"
    )
    create.set_defaults(run=_repo_create)
    change = verbs.add_parser("set", parents=[policy], help="change what a repository accepts, and show all of it")
    change.set_defaults(run=_repo_set)
    admin = verbs.add_parser("admin", parents=[where], help=f"make {access.ADMIN}, the repository of the access rules")
    admin.add_argument("user", help="its first user, who may do everything")
    admin.add_argument("key", type=Path, metavar="KEY.pub", help="their public ssh key")
    admin.set_defaults(run=_repo_admin)
    sshd = verbs.add_parser("sshd", parents=[where], help="print the lines of sshd_config that let these users in")
    sshd.set_defaults(run=_repo_sshd)


async def _plan(arguments: argparse.Namespace) -> int:
    repo = _infra(arguments.repo)
    run = f"plan-{uuid.uuid4()}"
    async with runs.claimed(repo, run):
        made = await plan.make(repo, git.resolve(repo, arguments.commit), run, arguments.only)
        _print(made.changes.text(await plan.previews(made.orders, build=not arguments.no_build)))
    return 1 if made.changes.failed else 0


async def _status(arguments: argparse.Namespace) -> int:
    rows, repo = [], _infra(arguments.repo)
    for target, entry in sorted(Ledger(repo).read().entries.items()):
        state = "good" if entry.good else "rehearsed only" if entry.rehearsed else "not deployed"
        if entry.accepted:
            state = f"accepted by {entry.accepted.by}: {entry.accepted.why}"
        if entry.reverted:
            state = f"reverted {entry.reverted.at}: {entry.reverted.why}"
        if entry.unreachable:
            state = f"unreachable since {entry.unreachable.at}"
        if entry.intent:
            state = f"being changed by run {entry.intent.run} ({entry.intent.step})"
        last = entry.good or entry.rehearsed
        rows.append(
            {
                "target": str(target),
                "commit": last.commit[:8] if last else "",
                "since": last.at if last else "",
                "state": "\n".join([state, *(_heard_of(repo, target.name) if target.kind == HOST else ())]),
            }
        )
    _print(table(rows, ("target", "commit", "since", "state")) if rows else "nothing was deployed from here yet")
    return 0


def _heard_of(repo: Path, machine: str) -> list[str]:
    """What is known of a machine that does what documents say, without asking it."""
    known = condition.read(repo, machine)
    if not (at := condition.heard(repo, machine, known)):
        return []
    said = f"last contact {datetime.fromtimestamp(at, UTC).isoformat(timespec='seconds')}"
    if known is None:
        return [said]
    return [f"{said}, reboot needed" if known.reboot_needed else said, *(f"drifted: {each}" for each in known.drift)]


async def _log(arguments: argparse.Namespace) -> int:
    done = await git.git(
        _infra(arguments.repo), "log", f"--max-count={arguments.n}", "--format=%cI  %s", REF, check=False
    )
    _print(done.stdout.rstrip() if done.status == 0 else "nothing was deployed from here yet")
    return 0


async def _answer(arguments: argparse.Namespace) -> int:
    """Answer for a run of one of the repositories for which the user may; others are as if they were not there."""
    repos, run, user = arguments.repos.absolute(), arguments.flow_run, arguments.by
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
            asked = await approvals.answer(repo, run, approved=arguments.approved, by=by)
            print(f"{'approved' if arguments.approved else 'rejected'} by {by}: run {run} of {name}")
            for label, plan in asked.plans.items():
                print(follow.clean(f"{label}:\n{plan}"))
            return 0
    raise InputError(
        "there is no run of this id that asks for an approval",
        target=f"run {run}",
        hint="the log of the run that asks has the whole line",
    )


async def _wait(arguments: argparse.Namespace) -> int:
    """Follow a run of one of the user's repositories; the status is that of `toto.git_host.follow`."""
    repos, run, user = arguments.repos.absolute(), arguments.flow_run, arguments.by
    for repo in git_host.infra_repos(repos):
        if await access.may(repos, user, "read", repo.name.removesuffix(".git")):
            with contextlib.suppress(ServerError):
                found = await (await git_host.api_of(repo)).call("GET", f"/flow_runs/{run}")
                if Path(found["parameters"].get("repo", "")) == repo.resolve():
                    return await follow.to_the_end(repo, [run], time.monotonic() + follow.AT_MOST)
    raise InputError("no repository of yours has a run of this id", target=f"run {run}", hint="a push prints it")


async def _accept(arguments: argparse.Namespace) -> int:
    """Start a run that accepts, in the repository of the user's that has the target, and follow it to its end."""
    repos, target, user = arguments.repos.absolute(), Target.of(arguments.target), arguments.by
    found = []
    for repo in git_host.infra_repos(repos):
        name = repo.name.removesuffix(".git")
        entry = Ledger(repo).read().get(target) if arguments.repo in (None, name) else Entry()
        if (entry.good or entry.intent) and await access.may(repos, user, "read", name):
            found.append((repo, name))
    if len(found) != 1:
        raise InputError(
            f"is in {', '.join(name for _, name in found)}" if found else "no repository of yours has deployed it",
            target=target.label,
            hint="say which: --repo NAME" if found else "see `toto status`",
        )
    [(repo, name)] = found
    if not await access.may(repos, user, "deploy", name):
        raise InputError(f"{user} may not deploy {name}, so not accept what is there either", target=target.label)
    api = await git_host.api_of(repo)
    deployment = await api.call("GET", f"/deployments/name/{git_host.ACCEPT}")
    run = await api.call(
        "POST",
        f"/deployments/{deployment['id']}/create_flow_run",
        {
            "parameters": {
                "repo": str(repo.resolve()),
                "target": str(target),
                "reason": arguments.reason,
                "by": user or f"{getpass.getuser()} (on toto itself)",
            },
            "tags": [f"user:{user}"] if user else [],
        },
    )
    print(f"toto: accepting {target.label} of {name} in run {run['id']}", flush=True)
    return await follow.to_the_end(repo, [run["id"]], time.monotonic() + follow.AT_MOST)


async def _metrics_token(arguments: argparse.Namespace) -> int:
    print(token.file().read_text())
    return 0


async def _metrics_targets(arguments: argparse.Namespace) -> int:
    print(json.dumps(monitored.targets(git_host.infra_repos(arguments.repos.absolute())), indent=1))
    return 0


async def _database_move(arguments: argparse.Namespace) -> int:
    home = _home(arguments)
    with server.only_one(home, "server"):
        moved = await database_move.move(home, _say)
    print(table([{"table": each.table, "rows": str(each.copied)} for each in moved if each.copied], ("table", "rows")))
    for line in database_move.left_behind(moved):
        _say(line)
    _say(f"moved; `toto serve` uses PostgreSQL from now on, and the old file is {home / database_move.MOVED}")
    return 0


async def _database_upgrade(arguments: argparse.Namespace) -> int:
    home = _home(arguments)
    with server.only_one(home, "server"):
        old, new = await database_move.upgrade(home, _say, arguments.old_bin)
    _say(
        f"`toto serve` uses PostgreSQL {new} from now on; the cluster of {old} is still in "
        f"{home / 'postgres' / str(old)}: remove it when all is well"
    )
    return 0


async def _backup(arguments: argparse.Namespace) -> int:
    await backup.backup(*_saved(arguments), _say)
    return 0


async def _restore(arguments: argparse.Namespace) -> int:
    await backup.restore(*_saved(arguments), _say)
    return 0


def _saved(arguments: argparse.Namespace) -> tuple[backup.Place, Path | None]:
    place = backup.Place(paths.state_home(), arguments.home.absolute(), arguments.repos.absolute())
    return place, None if arguments.file == "-" else Path(arguments.file).absolute()


def _home(arguments: argparse.Namespace) -> Path:
    home: Path = arguments.home.absolute()
    if not home.is_dir():
        raise InputError("no server has run in this folder", target=str(home), hint="name the right one with --home")
    return home


def _say(text: str) -> None:
    print(f"toto: {text}", file=sys.stderr, flush=True)


async def _machine_list(arguments: argparse.Namespace) -> int:
    rows = [
        {"machine": name, "repository": shared.name_of(each.repo), "address": each.address, "since": each.at}
        for name, each in sorted(owners.read().machines.items())
    ]
    _print(table(rows, ("machine", "repository", "address", "since")) if rows else "no machine was deployed yet")
    return 0


async def _machine_move(arguments: argparse.Namespace) -> int:
    repos = arguments.repos.absolute()
    old, new = (access.path_of(repos, access.check_name(each)) for each in (arguments.old, arguments.new))
    await owners.move(arguments.name, old, new)
    print(f"{arguments.name} belongs to {arguments.new}, whose key it must let in:")
    print(await keys.public_half(await keys.of_machines(new)))
    return 0


async def _machine_setup(arguments: argparse.Namespace) -> int:
    repo = _on_toto(arguments.repos, arguments.name)
    closures = await keys.public_half(await keys.for_closures(repo, None))
    lines = [
        "enable = true;",
        f"repo = {_nix(arguments.name)};",
        f"signers = [ {' '.join(map(_nix, await _signers()))} ];",
    ]
    if arguments.pull is None:
        what = "toto hands them over as the user `toto`, who can do little else, and copies closures that are signed"
        login = await keys.public_half(await keys.of_machines(repo), f"toto {arguments.name}")
        lines += [f"loginKeys = [ {_nix(login)} ];", "writableStore = true;"]
    else:
        what = "it asks for them, and nobody logs in for toto"
        lines += [f"url = {_nix(arguments.pull)};"]
        if (authority := certificate.authority()).exists():
            lines += [f"ca = pkgs.writeText \"toto-ca.pem\" ''\n{authority.read_text()}    '';"]
    print(
        "\n".join(
            [
                f"# A machine that does what signed documents of toto's say: {what}.",
                f"# From `toto machine setup {arguments.name}`. Import nixosModules.flying-monkey of toto besides.",
                "{ pkgs, ... }:",
                "{",
                "  services.flying-monkey = {",
                *(f"    {line}" for line in lines),
                "  };",
                f"  nix.settings.trusted-public-keys = [ {_nix(closures)} ];",
                "}",
            ]
        )
    )
    return 0


async def _signers() -> list[str]:
    """The public keys that machines should list: the one that signs, and the next one when there is one."""
    files = [await signing_key.current(), *filter(None, [signing_key.of_next()])]
    return [owners.plain_key(await keys.public_half(each)) for each in files]


async def _machine_signer(arguments: argparse.Namespace) -> int:
    repos = git_host.infra_repos(arguments.repos.absolute())
    if arguments.next:
        await signing_key.make_next()
    if arguments.certificate is not None:
        await signing_key.take_certificate(arguments.certificate, repos)
    if arguments.use:
        return await _use_signer(repos, force=arguments.force)
    current, *following = await _signers()
    print(f"signs: {current}")
    for each in following:
        print(f"next:  {each}")
    names = {fingerprint(each): word for each, word in ((current, "signs"), *((each, "next") for each in following))}
    machines = await signing_key.listed(repos)
    rows = [
        {"machine": name, "repository": repo, "lists": _lists(signers, names)}
        for (repo, name), signers in sorted(machines.items())
    ]
    _print(table(rows, ("machine", "repository", "lists")) if rows else "no machine does what documents say yet")
    newest = (following or [current])[-1]
    if following:
        print("next: list both in services.flying-monkey.signers of every machine, and push; then:")
        print("    toto machine signer --use")
    if any(fingerprint(newest) not in (signers or ()) for signers in machines.values()):
        names_of = ",".join(map(shared.name_of, repos))
        print("if the old one is lost: have an offline key that the machines list vouch for it, and take that over:")
        print(f"    echo {shlex.quote(newest)} > toto.pub")
        print(f"    ssh-keygen -s OFFLINE-KEY -I toto -n {names_of} -V -1d:+30d toto.pub")
        print(f"    toto machine signer --certificate toto-cert.pub{' --use' if following else ''}")
    return 0


def _lists(signers: tuple[str, ...] | None, names: Mapping[str, str]) -> str:
    """Which of toto's keys a machine lists, by their `names`, and how many others."""
    if signers is None:
        return "not known: nothing was heard of it"
    known = [names[each] for each in signers if each in names]
    others = len(signers) - len(known)
    return ", ".join([*known, *([f"{others} other{'s' if others > 1 else ''}"] if others else [])]) or "nothing"


async def _use_signer(repos: list[Path], *, force: bool) -> int:
    if (following := signing_key.of_next()) is None:
        raise InputError("there is no next key", hint="toto machine signer --next")
    if not force:
        await signing_key.require_all(following, repos)
    before, *_ = await _signers()
    old = await signing_key.use_next()
    print(f"signs from now on: {(await _signers())[0]}")
    print(f"next: take the old one out of services.flying-monkey.signers everywhere, and push, then remove {old}:")
    print(f"    {before}")
    print("where it was stolen: put it into services.flying-monkey.revokedKeys as well")
    return 0


def _nix(text: str) -> str:
    """A string of the nix language."""
    return json.dumps(text).replace("${", "\\${")


async def _key(arguments: argparse.Namespace) -> int:
    if (arguments.name, arguments.key) == (
        builders.KEY,
        None,
    ):  # (a repository of that name: `toto key builders machines`)
        print((nix_daemon.socket().parent / builders.PUBLIC).read_text().strip())
        return 0
    repo = _on_toto(arguments.repos, arguments.name)
    try:
        name = check_key_name(arguments.key or keys.MACHINES)
    except ValueError as error:
        raise InputError(str(error), target=arguments.key) from None
    if arguments.file is not None:
        await keys.import_key(repo, name, arguments.file)
    if arguments.new is not None or name == keys.MACHINES:
        await keys.make(repo, name, arguments.new or "ssh")
    key = keys.named(repo, name, None, "toto key: the command line")
    print(await keys.public_half(key, f"toto {arguments.name}"))
    return 0


async def _repo_create(arguments: argparse.Namespace) -> int:
    repos = arguments.repos.absolute()
    path = access.path_of(repos, access.check_name(arguments.name))
    if not arguments.inherit:
        shared.require_new(path)
    if first := shared.keep_with_the_first(repos, arguments.name):
        _say(f"the blocks called toto stay with {first}: shared_blocks in {paths.state_home() / server_rules.FILE}")
    repo = await git_host.make(repos, arguments.name, creator=arguments.by)
    shared.claim(repo, shared.block_name(arguments.name), take=arguments.inherit)
    await keys.of_machines(repo)
    return await _repo_set(arguments)


async def _repo_set(arguments: argparse.Namespace) -> int:
    repo = _on_toto(arguments.repos, arguments.name)
    changes = {field: value for field, value in vars(arguments).items() if field in git_host.POLICY}
    for file in ("allowed_signers", "gpg_home"):
        if file in changes:
            changes[file] = str(Path(changes[file]).absolute()) if changes[file] else None
    if "max_file_size" in changes:
        try:
            changes["max_file_size"] = receive.size(changes["max_file_size"])
        except ValueError as error:
            raise InputError(str(error), target="--max-file-size") from None
    policy = await git_host.set_policy(repo, **changes)
    print(repo)
    print(
        table(
            [{"policy": field.replace("_", "-"), "value": str(getattr(policy, field))} for field in git_host.POLICY],
            ("policy", "value"),
        )
    )
    return 0


async def _repo_admin(arguments: argparse.Namespace) -> int:
    try:
        key = arguments.key.read_text()
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be read: {error}", target=str(arguments.key)) from None
    print(await git_host.make_admin(arguments.repos.absolute(), arguments.user, key))
    return 0


async def _repo_sshd(arguments: argparse.Namespace) -> int:
    keys = shlex.join(git_shell.invocation(arguments.repos.absolute(), "keys"))
    print(f"""\
# /etc/ssh/sshd_config.d/toto.conf: {getpass.getuser()} owns the repositories; keys open them only through toto.
Match User {getpass.getuser()}
    AuthorizedKeysFile none
    AuthorizedKeysCommand {keys}
    AuthorizedKeysCommandUser {getpass.getuser()}
    AuthenticationMethods publickey
    AcceptEnv GIT_PROTOCOL""")
    return 0


if __name__ == "__main__":
    main()
