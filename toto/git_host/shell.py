"""The only program that the keys of the git host's users may run: it starts git for a push or a fetch.

    python -m toto.git_host.shell --repos DIR shell USER     the forced command of USER's keys (`toto-shell`)
    python -m toto.git_host.shell --repos DIR keys           all keys, as sshd's AuthorizedKeysCommand prints them

`toto repo sshd` prints the lines of sshd_config that use both. `toto.git_host.access` has the rules, and
`toto.git_host.receive` decides what a push may contain.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, Literal, NoReturn

from toto.base.errors import InputError, TotoError
from toto.base.without_git import without_git
from toto.git_host import access
from toto.git_host.access import Rules, Verb

VERBS: Final[Mapping[str, Verb]] = {"upload-pack": "read", "receive-pack": "write"}
USER_VARIABLE: Final = "TOTO_USER"  # tells the hooks who pushes
PARENT_VARIABLE: Final = "TOTO_SESSION_PARENT"  # and which process started this session


def invocation(repos: Path, mode: Literal["shell", "keys"]) -> list[str]:
    """The command line with which sshd runs this module: it needs nothing from the environment."""
    root = Path(__file__).resolve().parents[2]
    return [
        "/usr/bin/env",
        f"PYTHONPATH={root}",
        sys.executable,
        "-P",
        "-m",
        "toto.git_host.shell",
        "--repos",
        str(repos),
        mode,
    ]


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Become git, or print why not and exit with status 1."""
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
    # This process becomes git: toto is no longer between the pusher and git.
    os.execvpe(program[0], program, _environment(chosen.user))  # noqa: S606


def admit(rules: Rules, repos: Path, user: str, command: str | None) -> list[str]:
    """The argv to run for `user`, who asked for `command`. A first push makes the repository, if the rules allow it.

    Raises `InputError` with words for the user when they may not. A user who may not read a repository does not learn
    whether it exists.
    """
    if user not in rules.users:
        raise InputError(f"there is no user {user} any more", hint=f"ask someone who may write {access.ADMIN}")
    service, argument = _asked(command, user)
    name = access.repo_name(argument, repos)
    repo = access.path_of(repos, name)
    if not repo.exists():
        if VERBS[service] == "read" or not (rules.may_create(user) and rules.may(user, "write", name, creator=user)):
            raise _unknown(name, user)
        _make(repos, name, user)
        return ["git", service, str(repo)]
    creator = access.creator(repo)
    if not rules.may(user, "read", name, creator):
        raise _unknown(name, user)
    if not rules.may(user, VERBS[service], name, creator):
        raise InputError(f"{user} may read {name}, but not write it", hint=f"ask someone who may write {access.ADMIN}")
    if VERBS[service] == "write" and (repo.is_symlink() or not (repo / "hooks" / "pre-receive").is_file()):
        raise InputError(f"{name} does not have toto's hooks", hint=f"run on toto: toto repo create {name}")
    return ["git", service, str(repo)]


# The functions below run rarely, and their imports take longer than the rest of a login.


def _asked_of_git(repos: Path) -> Rules:
    import asyncio  # noqa: PLC0415

    return asyncio.run(access.in_force(repos))


def _make(repos: Path, name: str, creator: str) -> None:
    import asyncio  # noqa: PLC0415

    from toto.git_host import host as git_host  # noqa: PLC0415

    asyncio.run(git_host.make(repos, name, creator=creator))


def _asked(command: str | None, user: str) -> tuple[str, str]:
    """The service and the repository that git asks for."""
    if not command:
        raise InputError(
            f"hello {user}: this is a git host, it runs nothing but git", hint="git clone toto:NAME, git push toto:NAME"
        )
    try:
        words = shlex.split(command)
    except ValueError:
        words = []
    match words:
        case ["git", service, repo] if service in VERBS:
            return service, repo
        case [program, repo] if program.removeprefix("git-") in VERBS and program.startswith("git-"):
            return program.removeprefix("git-"), repo
    raise InputError("only git's push and fetch are allowed here", hint="git clone toto:NAME, git push toto:NAME")


def _unknown(name: str, user: str) -> InputError:
    return InputError(
        f"there is no repository {name} that {user} may see",
        hint=f"ask someone who may write {access.ADMIN} to make it, or to give you access",
    )


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
