"""The bare repositories on toto: making them, their hooks and policy, and the pushes that wait in their spool.

`toto.git_host.access` decides who may use them over ssh, and `toto.git_host.receive` what a push may contain. The git
commands that read a repository are in `toto.infra_repo.git`; `flows/` has what a push starts.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
import sys
import urllib.parse
from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

from toto.base import files, paths, process, server_rules
from toto.base.errors import InputError
from toto.base.prefect_api import Api, ServerError
from toto.base.without_git import without_git
from toto.git_host import access, receive
from toto.git_host.access import git

HOOKS: Final = Path(__file__).parent / "hooks"
RULES: Final = """\
# Who may do what on this git host: docs/git-host.md. A push to the branch main changes it, at once.

[users]
{user} = ["{key}"]

[repos.{admin}]
admin = ["{user}"]

[repos."*"]
admin = ["{user}"]
"""
DEPLOYMENT: Final = "reconcile/reconcile"
ACCEPT: Final = "accept/accept"
COMPLIANCE: Final = "compliance/compliance"
OLD_DEPLOYMENT: Final = "reconcile/toto"  # its name in 0.1.0, which hooks from then still use
POLICY: Final[Mapping[str, str]] = {
    "branch": "toto.branch",
    "signed": "toto.signed",
    "allow_force": "toto.allowForce",
    "max_file_size": "toto.maxFileSize",
    "allowed_signers": "toto.allowedSigners",
    "gpg_home": "toto.gpgHome",
}
# The hook prints the path into JSON, and ssh and git pass it through shells: no character is special to those.
_PATH: Final = re.compile(r"(/[A-Za-z0-9._+@]([A-Za-z0-9._+@ -]*[A-Za-z0-9._+@-])?)+")
_BRANCH: Final = re.compile(r"[A-Za-z0-9._][A-Za-z0-9._/+-]*")
_DEPLOYMENT: Final = re.compile(r"[a-z0-9][a-z0-9_-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_UUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@dataclass(frozen=True)
class Waiting:
    """A push without a run: the file of its request, and its commit."""

    file: Path
    commit: str


@dataclass(frozen=True)
class Served:
    """How the hooks of a repository find toto's server: the arguments of `create`."""

    api_url: str = "http://127.0.0.1:4200/api"
    ui_url: str | None = None
    deployment: str = DEPLOYMENT
    deployment_id: str | None = None
    branch: str = "main"
    auth: str | None = None


def default_repos() -> Path:
    """The default folder of the repositories, which is also the server's default."""
    return paths.state_home() / "server" / "repos"


def infra_repos(repos: Path) -> list[Path]:
    """The infra repositories in the folder `repos`: all but the one with the rules of access."""
    return sorted(set(repos.glob("*.git")) - {access.path_of(repos, access.ADMIN)})


async def remember(repos: Path, served: Served) -> None:
    """Save where the server is, for repositories that are made later; update the hooks of the rules' repository.

    (`create` updates the hooks of infra repositories.)
    """
    repos.mkdir(parents=True, exist_ok=True)
    files.write(repos / "server.json", json.dumps(asdict(served)))
    if (access.path_of(repos, access.ADMIN) / "HEAD").exists():
        await _install(access.path_of(repos, access.ADMIN), "main", {"toto.rules": "true"})


async def make(repos: Path, name: str, *, creator: str | None = None) -> Path:
    """Make the repository `name` in the folder `repos`, or update it; return its path.

    A new one appears complete with its hooks, or not at all. Raises `InputError` for a bad name.
    """
    path = access.path_of(repos, access.check_name(name))
    if name == access.ADMIN:
        raise InputError("holds the rules of access", target=name, hint="make it by `toto repo admin USER KEY.pub`")
    file = repos / "server.json"
    served = Served(**json.loads(file.read_text())) if file.exists() else Served()
    async with _new(path) as fresh:
        await create(fresh or path, **asdict(served if fresh else await as_chosen(path, served)))
        if fresh and creator:
            (fresh / "toto" / "creator").write_text(creator)
    return path


async def make_admin(repos: Path, user: str, key: str) -> Path:
    """Make the repository of the rules of access: `user`, who has the public key `key`, may do everything.

    Raises `InputError` when it exists: from then on a push changes the rules.
    """
    try:
        key = access.check_key(key)
    except ValueError as error:
        raise InputError(f"{error}", target="key") from None
    rules = RULES.format(user=access.check_user(user), key=key, admin=access.ADMIN)
    async with _new(access.path_of(repos, access.ADMIN)) as fresh:
        if fresh is None:
            raise InputError("exists already", target=access.ADMIN, hint="clone it, change access.toml, push it")
        await _install(fresh, "main", {"toto.rules": "true"})
        blob = (await git(fresh, "hash-object", "-w", "--stdin", stdin=rules)).stdout.strip()
        tree = (await git(fresh, "mktree", stdin=f"100644 blob {blob}\t{access.FILE}\n")).stdout.strip()
        commit = (
            await git(
                fresh,
                "-c",
                "user.name=toto",
                "-c",
                "user.email=toto@localhost",
                "commit-tree",
                "-m",
                f"{user} may do everything",
                tree,
            )
        ).stdout.strip()
        await git(fresh, "update-ref", "refs/heads/main", commit)
    return access.path_of(repos, access.ADMIN)


@contextlib.asynccontextmanager
async def _new(path: Path) -> AsyncIterator[Path | None]:
    """A path for a new repository, moved to `path` at the end of the block; None when `path` exists. One at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.parent / ".new" / path.name
    with files.lock(path.parent / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # (a repository is made in a tenth of a second)
        if path.exists():
            yield None
            return
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.parent.mkdir(exist_ok=True)
        yield fresh
        fresh.rename(path)


async def set_policy(repo: Path, **changes: str | int | bool | None) -> receive.Policy:
    """Change fields of a repository's `receive.Policy`; None sets the default. Return the whole policy.

    Raises `InputError` for a bad branch name.
    """
    branch = changes.get("branch", "main")
    if not isinstance(branch, str) or not _is_branch(branch):
        raise InputError(f"{branch!r} is not a branch name that toto accepts", target=repo.name)
    for field, value in changes.items():
        text = str(value).lower() if isinstance(value, bool) else None if value is None else str(value)
        await _configure(repo, POLICY[field], text)
    if "branch" in changes:
        await git(repo, "symbolic-ref", "HEAD", f"refs/heads/{branch}")
    policy = await policy_of(repo)
    # git refuses to delete the branch that HEAD names, unless this is set.
    await _configure(repo, "receive.denyDeleteCurrent", "ignore" if policy.allow_force else None)
    return policy


async def policy_of(repo: Path) -> receive.Policy:
    """The policy of a repository."""
    return receive.Policy.of((await git(repo, "config", "--null", "--get-regexp", "^toto[.]", check=False)).stdout)


async def create(
    path: Path,
    *,
    api_url: str,
    deployment: str = DEPLOYMENT,
    deployment_id: str | None = None,
    ui_url: str | None = None,
    branch: str = "main",
    auth: str | None = None,
) -> Path:
    """Make the bare repository `path`, or update the hooks and settings of an existing one; return its path.

    A push to `branch` creates a run of `deployment` ("flow/name"; `deployment_id` saves the hook a request) at
    `api_url`. `auth` is "user:password"; it is stored in a file that only the owner can read. Nobody can push to refs
    below refs/toto (the ledger). Raises `InputError` for a path, branch or address that toto does not accept.
    """
    path = _checked(path, api_url, ui_url, deployment, deployment_id, branch, auth)
    await _install(
        path,
        branch,
        {
            "toto.apiUrl": api_url.rstrip("/"),
            "toto.deployment": deployment,
            "toto.deploymentId": deployment_id,
            "toto.uiUrl": ui_url.rstrip("/") if ui_url else None,
        },
    )
    (path / "toto" / "spool").mkdir(parents=True, exist_ok=True)
    secret = path / "toto" / "auth.curl"
    if auth is None:
        secret.unlink(missing_ok=True)
    else:
        files.write(secret, 'user = "{}"\n'.format(auth.replace("\\", "\\\\").replace('"', '\\"')))
    return path


async def _install(path: Path, branch: str, settings: Mapping[str, str | None]) -> None:
    """Make a bare repository if there is none; write toto's hooks and their settings into it."""
    if not (path / "HEAD").exists():
        path.mkdir(parents=True, exist_ok=True)
        await git(path, "init", "--quiet", "--bare", "--object-format=sha1", f"--initial-branch={branch}")
    elif (await git(path, "rev-parse", "--show-object-format")).stdout.strip() != "sha1":
        raise InputError(
            "its objects have SHA-256 names, which toto does not know",
            target=path.name,
            hint="make a new one (`toto repo create NAME`), and push to that from a clone that `git init` has made",
        )
    # A run that is given no commit uses HEAD.
    await git(path, "symbolic-ref", "HEAD", f"refs/heads/{branch}")
    for key, value in {
        **settings,
        "toto.branch": branch,
        "toto.python": sys.executable,
        "toto.root": str(HOOKS.parents[2]),
        "toto.state": os.environ.get("TOTO_STATE"),
        "receive.hideRefs": "refs/toto",
        "receive.fsckObjects": "true",
        "receive.maxInputSize": str(server_rules.load().push.size),
        "receive.advertisePushOptions": "true",
    }.items():
        await _configure(path, key, value)
    (path / "hooks").mkdir(exist_ok=True)
    for hook in HOOKS.iterdir():
        files.write(path / "hooks" / hook.name, hook.read_text(), 0o755)


async def _configure(repo: Path, key: str, value: str | None) -> None:
    if value is None:
        await git(repo, "config", "--unset-all", key, check=False)
    else:
        await git(repo, "config", "--replace-all", key, value)


async def as_chosen(repo: Path, served: Served) -> Served:
    """`served` with the branch of an existing repository, and its deployment if the operator chose one.

    An operator does that by `git config toto.deployment FLOW/NAME`. The old name of the default is replaced.
    """
    served = replace(served, branch=await deployed_branch(repo) or served.branch)
    chosen = await _setting(repo, "toto.deployment")
    if chosen is None or chosen in {OLD_DEPLOYMENT, served.deployment}:
        return served
    return replace(served, deployment=chosen, deployment_id=None)


async def deployed_branch(repo: Path) -> str | None:
    """The branch that `repo` deploys, or None when toto did not make the repository."""
    return await _setting(repo, "toto.branch")


def waiting(repo: Path) -> list[Waiting]:
    """The pushes to `repo` that have no run yet, oldest first."""
    files = sorted((repo / "toto" / "spool").glob("*.json"))
    return [Waiting(file, file.stem.rpartition("-")[2]) for file in files]


async def drain_spool(repo: Path) -> list[str]:
    """Start runs for the pushes to `repo` that wait in the spool, oldest first; return the ids of the runs.

    The hook does it, since it knows the requests and answers. It renames a request that Prefect refuses to `.refused`.
    Raises `ServerError` when Prefect does not answer; the other requests then stay in the spool.
    """
    if not waiting(repo):
        return []
    done = await process.run(
        ["sh", HOOKS / "post-receive", "drain"], cwd=repo, env=without_git(), timeout=600, check=False
    )
    if done.status != 0:
        raise ServerError(process.tail(done.stderr).removeprefix("toto: "), target=str(repo))
    return done.lines


async def api_of(repo: Path) -> Api:
    """The API that the hook of `repo` uses. Raises `InputError` when none is set."""
    url = await _setting(repo, "toto.apiUrl")
    if url is None:
        raise InputError("this repository has no toto.apiUrl", target=str(repo), hint="run `toto repo create` for it")
    return Api(url, _read_auth(repo / "toto" / "auth.curl"))


def _checked(
    path: Path,
    api_url: str,
    ui_url: str | None,
    deployment: str,
    deployment_id: str | None,
    branch: str,
    auth: str | None,
) -> Path:
    place = str(path)
    if not path.is_absolute() or ".." in path.parts or not _PATH.fullmatch(place):
        raise InputError(
            "not a path that toto accepts for a repository",
            target=place,
            hint="use an absolute path of letters, digits, blanks and . _ + @ -",
        )
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise InputError("exists already and is not a folder", target=place, hint="use a different path")
    if path.is_dir() and any(path.iterdir()) and not (path / "HEAD").is_file():
        raise InputError("exists already and is not a bare git repository", target=place, hint="use a different path")
    for url in filter(None, (api_url, ui_url)):
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname or re.search(r"[\s\"'\\\x00-\x1f]", url):
            raise InputError(f"{url!r} is not an http address", target=place)
    if not _is_branch(branch):
        raise InputError(f"{branch!r} is not a branch name that toto accepts", target=place)
    if not _DEPLOYMENT.fullmatch(deployment):
        raise InputError(f"{deployment!r} is not FLOW/NAME of a deployment", target=place)
    if deployment_id is not None and not _UUID.fullmatch(deployment_id):
        raise InputError(f"{deployment_id!r} is not a deployment's id", target=place)
    if auth is not None and (":" not in auth or "\n" in auth):
        raise InputError("the API's credentials are not user:password", target=place)  # their text is secret
    return path


def _read_auth(file: Path) -> str | None:
    if not file.exists():
        return None
    quoted = file.read_text().strip().removeprefix('user = "').removesuffix('"')
    return re.sub(r"\\(.)", r"\1", quoted)


def _is_branch(name: str) -> bool:
    return _BRANCH.fullmatch(name) is not None and ".." not in name and not name.endswith((".lock", "/", "."))


async def _setting(repo: Path, key: str) -> str | None:
    return (await git(repo, "config", "--get", key, check=False)).stdout.strip() or None
