"""The git host: its repositories, and what they accept."""

import getpass
import shlex
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from toto.base import paths, server_rules
from toto.base.errors import InputError
from toto.cli.common import Repos, on_toto
from toto.cli.output import AsJson, emit, say
from toto.cli.verbs import Verbs
from toto.git_host import access, receive, shared, shell
from toto.git_host import host as git_host
from toto.machine import keys
from toto.plan.changes import table

verbs = Verbs()
repo = verbs.group("repo")

Name = Annotated[str, Argument(metavar="NAME")]
Branch = Annotated[str | None, Option(metavar="NAME", help="the deployed branch")]
Signed = Annotated[bool | None, Option(help="refuse commits without a trusted signature", show_default=False)]
AllowForce = Annotated[
    bool | None, Option(help="accept forced pushes to the deployed branch, and its deletion", show_default=False)
]
MaxFileSize = Annotated[str | None, Option(metavar="SIZE", help="such as 20m; 0 for no limit (default: 100m)")]
AllowedSigners = Annotated[
    str | None,
    Option(
        metavar="FILE",
        help="ssh keys that are trusted for signatures; '' for the keys of the users who may deploy or rehearse it, "
        "which is the default",
    ),
]
GpgHome = Annotated[str | None, Option(metavar="DIR", help="the gpg folder whose keys are trusted; '' for none")]


@repo.verb("create")
async def create(
    name: Name,
    repos: Repos,
    branch: Branch = None,
    signed: Signed = None,
    allow_force: AllowForce = None,
    max_file_size: MaxFileSize = None,
    allowed_signers: AllowedSigners = None,
    gpg_home: GpgHome = None,
    by: Annotated[
        str | None, Option(metavar="USER", help="the user who creates it; without a table it is theirs to deploy")
    ] = None,
    inherit: Annotated[
        bool, Option("--inherit", help="let it have what is left of a repository that had its name before")
    ] = False,
) -> int:
    """Make a repository, or bring its hooks up to date."""
    path = access.path_of(repos, access.check_name(name))
    if not inherit:
        shared.require_new(path)
    if first := shared.keep_with_the_first(repos, name):
        say(f"the blocks called toto stay with {first}: shared_blocks in {paths.state_home() / server_rules.FILE}")
    made = await git_host.make(repos, name, creator=by)
    shared.claim(made, shared.block_name(name), take=inherit)
    await keys.of_machines(made)
    return await change(name, repos, branch, signed, allow_force, max_file_size, allowed_signers, gpg_home)


@repo.verb("set")
async def change(
    name: Name,
    repos: Repos,
    branch: Branch = None,
    signed: Signed = None,
    allow_force: AllowForce = None,
    max_file_size: MaxFileSize = None,
    allowed_signers: AllowedSigners = None,
    gpg_home: GpgHome = None,
    as_json: AsJson = False,
) -> int:
    """Change what a repository accepts, and show all of it."""
    asked = {
        "branch": branch,
        "signed": signed,
        "allow_force": allow_force,
        "max_file_size": max_file_size,
        "allowed_signers": allowed_signers,
        "gpg_home": gpg_home,
    }
    changes: dict[str, Any] = {field: value for field, value in asked.items() if value is not None}
    path = on_toto(repos, name)
    for file in ("allowed_signers", "gpg_home"):
        if file in changes:
            changes[file] = str(Path(changes[file]).absolute()) if changes[file] else None
    if "max_file_size" in changes:
        try:
            changes["max_file_size"] = receive.size(changes["max_file_size"])
        except ValueError as error:
            raise InputError(str(error), target="--max-file-size") from None
    policy = await git_host.set_policy(path, **changes)
    said = {field: getattr(policy, field) for field in git_host.POLICY}
    rows = [{"policy": field.replace("_", "-"), "value": str(value)} for field, value in said.items()]
    text = f"{path}\n{table(rows, ('policy', 'value'))}"
    emit("repositories", [{"path": str(path), **said}], text, as_json=as_json)
    return 0


@repo.verb("admin")
async def admin(
    user: Annotated[str, Argument(metavar="USER", help="its first user, who may do everything")],
    key: Annotated[Path, Argument(metavar="KEY.pub", help="their public ssh key")],
    repos: Repos,
) -> int:
    """Make toto-admin, the repository of the access rules."""
    try:
        text = key.read_text()
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be read: {error}", target=str(key)) from None
    print(await git_host.make_admin(repos, user, text))
    return 0


@repo.verb("sshd")
def sshd(repos: Repos) -> int:
    """Print the lines of sshd_config that let these users in."""
    command = shlex.join(shell.invocation(repos, "keys"))
    print(f"""\
# /etc/ssh/sshd_config.d/toto.conf: {getpass.getuser()} owns the repositories; keys open them only through toto.
Match User {getpass.getuser()}
    AuthorizedKeysFile none
    AuthorizedKeysCommand {command}
    AuthorizedKeysCommandUser {getpass.getuser()}
    AuthenticationMethods publickey
    AcceptEnv GIT_PROTOCOL""")
    return 0
