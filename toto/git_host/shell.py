"""The only program that the keys of the git host's users may run: it starts git for a push or a fetch.

It also starts `toto` itself for the few commands in `COMMANDS`, under the name of the user.

    python -m toto.git_host.shell --repos DIR shell USER     the forced command of USER's keys (`toto-shell`)
    python -m toto.git_host.shell --repos DIR keys           all keys, as sshd's AuthorizedKeysCommand prints them

`toto repo sshd` prints the lines of sshd_config that use both. `toto.git_host.access` has the rules, and
`toto.git_host.receive` decides what a push may contain.
"""

import argparse
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, Literal, NoReturn

from toto.base.errors import InputError, TotoError
from toto.base.without_git import without_git
from toto.git_host import access
from toto.git_host.access import ADMIN, USER_VARIABLE, Right, Rules

# A push needs `rehearse`; the hook knows which refs it moves, and which of those need `deploy`.
SERVICES: Final[Mapping[str, Right]] = {"upload-pack": "read", "receive-pack": "rehearse"}
COMMANDS: Final = (
    *("deploy [TARGET …] [--wait]", "rehearse [TARGET …] [--wait]", "revert [COMMIT|TARGET] [--wait]"),
    *("freeze TARGET … --reason WHY", "unfreeze TARGET …", "check [MACHINE …]"),
    *("build HOST[@COMMIT]", "fetch HOST[@COMMIT]", "wait RUN", "cancel RUN", "approve RUN", "reject RUN"),
    *("job list [JOB]", "job run JOB [NAME=VALUE …] [--wait]", "job log JOB[:NUMBER] [-f]", "job abort JOB[:NUMBER]"),
    *("accept TARGET --reason WHY", "repo create NAME"),
)
PARENT_VARIABLE: Final = "TOTO_SESSION_PARENT"  # tells the hooks which process started this session
STATUS_VARIABLE: Final = "TOTO_STATUS_FD"  # where the hook writes the status of a run that the pusher waited for
_TARGET: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")
BUILT: Final = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)(?:@([A-Za-z0-9][A-Za-z0-9._/+-]*))?")  # HOST[@COMMIT]
_REVISION: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/+-]*")
# The options with a value of verbs that change or check the fleet; the text of a reason is all words up to an option.
_ON_FLEET: Final[Mapping[str, Sequence[str]]] = {
    "deploy": ("--commit", "--override", "--try"),
    "rehearse": ("--commit",),
    "revert": ("--override",),
    "freeze": ("--reason",),
    "unfreeze": (),
    "check": (),
}
# The same of verbs of `toto job`: their options without a value.
_ON_JOBS: Final[Mapping[str, Sequence[str]]] = {
    "list": ("--json",),
    "run": ("--wait",),
    "log": ("-f", "--follow"),
    "abort": (),
}
_JOB: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(:[0-9]{1,9})?")
_PARAMETER: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=.*", re.DOTALL)
_REASONS: Final = ("--override", "--reason")
_FLAGS: Final[Mapping[str, Sequence[str]]] = {
    "deploy": ("--force", "--wait"),
    "rehearse": ("--wait",),
    "revert": ("--wait",),
}
_BEGINNING: Final = re.compile(r"[0-9a-f][0-9a-f-]{3,35}")
_RUN: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def invocation(repos: Path, mode: Literal["shell", "keys"]) -> list[str]:
    """The command line with which sshd runs this module: it needs nothing from the environment."""
    state = os.environ.get("TOTO_STATE")
    root = Path(__file__).resolve().parents[2]
    return [
        "/usr/bin/env",
        f"PYTHONPATH={root}",
        *([f"TOTO_STATE={state}"] if state else []),
        sys.executable,
        "-P",
        "-m",
        "toto.git_host.shell",
        "--repos",
        str(repos),
        mode,
    ]


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Become git, or print why not and exit with status 1. A push is waited for: its hook may say how it ended."""
    parser = argparse.ArgumentParser("toto-shell", description="The forced command of toto's git host.")
    parser.add_argument("--repos", type=Path, required=True, help="the folder of the bare repositories")
    modes = parser.add_subparsers(required=True, dest="mode")
    modes.add_parser("keys")
    modes.add_parser("shell").add_argument("user")
    chosen = parser.parse_args(arguments)
    try:
        rules = access.remembered(chosen.repos) or _asked_of_git(chosen.repos)
        if chosen.mode == "keys":
            print(rules.authorized_keys(invocation(chosen.repos, "shell")), end="")
            sys.exit(0)
        program = admit(rules, chosen.repos, chosen.user, os.environ.get("SSH_ORIGINAL_COMMAND"))
    except TotoError as error:
        print("\n".join(f"toto: {line}" for line in str(error).splitlines()), file=sys.stderr)
        sys.exit(1)
    environment = _environment(chosen.user)
    if program[1:2] == ["receive-pack"]:
        sys.exit(_pushed(program, environment))
    # This process becomes git: toto is no longer between the pusher and git.
    os.execvpe(program[0], program, environment)  # noqa: S606


def _pushed(program: list[str], environment: dict[str, str]) -> int:
    """Run git for a push, and return its status, or that of the run that the pusher waited for.

    git ignores the status of a post-receive hook. So the hook writes it to a pipe, whose end it inherits.
    """
    reads, writes = os.pipe()
    os.set_blocking(reads, False)  # (what git leaves behind, such as a repack, holds the other end)
    if (pid := os.fork()) == 0:
        try:
            os.set_inheritable(writes, True)
            os.execvpe(program[0], program, environment | {STATUS_VARIABLE: str(writes)})  # noqa: S606
        finally:
            os._exit(127)
    os.close(writes)
    _, ended = os.waitpid(pid, 0)
    try:
        said = os.read(reads, 8)
    except BlockingIOError:
        said = b""
    return os.waitstatus_to_exitcode(ended) or (int(said) if said.isdigit() else 0)


def admit(rules: Rules, repos: Path, user: str, command: str | None) -> list[str]:
    """The argv to run for `user`, who asked for `command`: git, or `toto`.

    Raises `InputError` with words for the user when they may not. A user who may not read a repository does not learn
    whether it exists.
    """
    if user not in rules.users:
        raise InputError(f"there is no user {user} any more", hint=f"ask someone who may deploy {ADMIN}")
    match words := _words(command):
        case ["repo", "create", name]:
            if not rules.may_create(user):
                raise InputError(
                    f"{user} may not create repositories", hint=f"ask someone who may deploy {ADMIN}: {_create(name)}"
                )
            return _toto(repos, user, "repo", "create", access.check_name(name))
        case ["wait" | "cancel" | "approve" | "reject" as verb, run]:
            if not (_BEGINNING if verb == "cancel" else _RUN).fullmatch(run):
                raise InputError(
                    f"{ascii(run)[:60]} is not the id of a run", hint="the log of the run that asks has the whole line"
                )
            return _toto(repos, user, verb, run)
        case ["build" | "fetch" as verb, host, *rest]:
            return _toto(repos, user, verb, *_of_repo(host, rest))
        case ["job", verb, *rest] if verb in _ON_JOBS:
            return _toto(repos, user, "job", verb, *_on_jobs(verb, rest))
        case [verb, *rest] if verb in ("accept", *_ON_FLEET):
            return _toto(repos, user, verb, *(_accepting(rest) if verb == "accept" else _on_fleet(verb, rest)))
    service, argument = _asked(words, user)
    name = access.repo_name(argument, repos)
    repo = access.path_of(repos, name)
    creator = access.creator(repo) if repo.exists() else None
    if not (repo.exists() and rules.may(user, "read", name, creator)):
        raise InputError(
            f"there is no repository {name} that {user} may see",
            hint=f"{_create(name)} makes it"
            if rules.may_create(user)
            else f"is the name right? Someone who may deploy {ADMIN} makes it by `{_create(name)}`, "
            "or gives you access",
        )
    if not rules.may(user, SERVICES[service], name, creator):
        raise InputError(
            f"{user} may read {name}, but not push to it",
            hint=f"ask someone who may deploy {ADMIN} for `rehearse` or `deploy`",
        )
    if service == "receive-pack" and (repo.is_symlink() or not (repo / "hooks" / "pre-receive").is_file()):
        raise InputError(f"{name} does not have toto's hooks", hint=f"run on toto: toto repo create {name}")
    return ["git", service, str(repo)]


def _on_fleet(verb: str, words: list[str]) -> list[str]:
    """The arguments of a verb of `_ON_FLEET`. ssh has joined the words, so that a reason may be several of them."""
    targets, options = list[str](), list[str]()
    rest = list(words)
    flags, valued = _FLAGS.get(verb, ()), (*_ON_FLEET[verb], "--repo")
    wrong = InputError(
        "that is not how it is asked for", hint=f"ssh toto {next(each for each in COMMANDS if each.split()[0] == verb)}"
    )
    while rest:
        word, equals, value = rest.pop(0).partition("=")
        if word in flags and not equals:
            options.append(word)
        elif word in valued:
            said = [value] if equals else rest[:1]
            del rest[: 0 if equals else 1]
            while word in _REASONS and rest and rest[0].partition("=")[0] not in (*flags, *valued):
                said.append(rest.pop(0))
            text = " ".join(said)
            if word == "--repo":
                access.check_name(text)
            elif not (text.strip() and (word in _REASONS or _REVISION.fullmatch(text))):
                raise wrong
            options.append(f"{word}={text}")
        elif equals or not _REVISION.fullmatch(word) or ".." in word:
            raise wrong
        else:
            targets.append(word)
    return [*options, *targets]


def _on_jobs(verb: str, words: list[str]) -> list[str]:
    """The arguments of a verb of `toto job`. The words after `--reason`, which comes last, are the reason."""
    said, options = list[str](), list[str]()
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word in _ON_JOBS[verb]:
            options.append(word)
        elif word == "--repo" and rest:
            options.append(f"--repo={access.check_name(rest.pop(0))}")
        elif word == "--reason" and verb == "run" and " ".join(rest).strip():
            options.append(f"--reason={' '.join(rest)}")
            rest.clear()
        elif (_PARAMETER if said and verb == "run" else _JOB).fullmatch(word):
            said.append(word)
        else:
            said.clear()
            break
    if not (said or (verb == "list" and not rest)) or (verb != "run" and len(said) > 1):
        usage = next(each for each in COMMANDS if each.startswith(f"job {verb}"))
        raise InputError("that is not how it is asked for", hint=f"ssh toto {usage}")
    return [*options, *said]


def _accepting(words: list[str]) -> list[str]:
    """The arguments of `toto accept`. ssh has joined the words, so that those after `--reason` are the reason."""
    target, where, why = words[:1], [], []
    rest = words[1:]
    if "--repo" in rest[:-1]:
        at = rest.index("--repo")
        where = [f"--repo={access.check_name(rest[at + 1])}"]
        del rest[at : at + 2]
    if rest[:1] == ["--reason"]:
        why = [f"--reason={' '.join(rest[1:])}"]
    if not (target and why and rest[1:] and _TARGET.fullmatch(target[0])):
        raise InputError(
            "that does not say what to accept, and why",
            hint="ssh toto accept TARGET --reason WHY, where TARGET is like web1, terraform/dns or helm/grafana",
        )
    return [*target, *where, *why]


def _of_repo(host: str, rest: list[str]) -> list[str]:
    """The arguments of `toto build` and `toto fetch`."""
    if not BUILT.fullmatch(host) or ".." in host or not (rest == [] or (len(rest) == 2 and rest[0] == "--repo")):
        raise InputError("that does not say which host", hint="ssh toto build HOST, or HOST@COMMIT, and --repo NAME")
    return [host, *([f"--repo={access.check_name(rest[1])}"] if rest else [])]


def _create(name: str) -> str:
    return f"ssh toto repo create {access.check_name(name)}"


def _toto(repos: Path, user: str, *words: str) -> list[str]:
    """The command `toto` on behalf of a user."""
    return [sys.executable, "-P", "-m", "toto.cli", *words, "--by", user, "--repos", str(repos)]


def _asked_of_git(repos: Path) -> Rules:
    import asyncio  # noqa: PLC0415  (it takes longer than the rest of a login, and is rarely needed)

    return asyncio.run(access.in_force(repos))


def _words(command: str | None) -> list[str]:
    try:
        return shlex.split(command or "")
    except ValueError:  # a reason has an apostrophe, and ssh has taken its quotes away
        verb, *_ = words = (command or "").split() or [""]
        return words if verb == "accept" or verb in _ON_FLEET else []


def _asked(words: list[str], user: str) -> tuple[str, str]:
    """The service and the repository that git asks for."""
    hint = f"git clone toto:NAME, git push toto:NAME; or ssh toto {', '.join(COMMANDS)}"
    match words:
        case ["git", service, repo] if service in SERVICES:
            return service, repo
        case [program, repo] if program.removeprefix("git-") in SERVICES and program.startswith("git-"):
            return program.removeprefix("git-"), repo
        case [verb, *_] if usage := next((each for each in COMMANDS if each.split()[0] == verb), None):
            raise InputError("that is not how it is asked for", hint=f"ssh toto {usage}")
        case []:
            raise InputError(f"hello {user}: this is a git host, it runs nothing but git", hint=hint)
    raise InputError("only git's push and fetch are allowed here", hint=hint)


def _environment(user: str) -> dict[str, str]:
    return without_git(kept=("GIT_PROTOCOL",)) | {USER_VARIABLE: user, PARENT_VARIABLE: parent_of_session()}


def parent_of_session() -> str:
    """The PID of the process that started this session: sshd. When it changes, the connection is gone."""
    try:
        return Path(f"/proc/{os.getsid(0)}/stat").read_text().rpartition(")")[2].split()[1]
    except OSError:
        return ""


if __name__ == "__main__":
    main()
