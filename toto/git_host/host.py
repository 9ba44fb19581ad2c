"""The bare repositories on toto: making one, its hooks and its policy, and the pushes that wait in its spool.

Who may reach them over ssh is `toto.git_host.access`, what a push may bring is `toto.git_host.receive`. What git
commands there are for reading a repository is in `toto.infra_repo.git`; what a push starts is in `flows/`.
"""

import contextlib
import fcntl
import json
import re
import shutil
import sys
import urllib.parse
from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

from toto.base import files, paths, process
from toto.base.errors import InputError
from toto.base.prefect_api import Api, ServerError
from toto.base.without_git import without_git
from toto.git_host import access, receive
from toto.git_host.access import git

HOOKS: Final = Path(__file__).parent / "hooks"
RULES: Final = """\
# Who may do what on this git host: docs/git-host.md. A push to the branch main changes it, at once.
create = ["{user}"]

[users]
{user} = ["{key}"]

[repos.{admin}]
write = ["{user}"]

[repos."*"]
write = ["{user}"]
"""
DEPLOYMENT: Final = "reconcile/reconcile"
OLD_DEPLOYMENT: Final = "reconcile/toto"  # its name in 0.1.0, which hooks of that time still have
POLICY: Final[Mapping[str, str]] = {
    "branch": "toto.branch", "signed": "toto.signed", "allow_force": "toto.allowForce",
    "max_file_size": "toto.maxFileSize", "allowed_signers": "toto.allowedSigners", "gpg_home": "toto.gpgHome"}
# The hook prints the path into JSON, and ssh and git pass it through shells: no character that means something there.
_PATH: Final = re.compile(r"(/[A-Za-z0-9._+@][A-Za-z0-9._+@-]*)+")
_BRANCH: Final = re.compile(r"[A-Za-z0-9._][A-Za-z0-9._/+-]*")
_DEPLOYMENT: Final = re.compile(r"[a-z0-9][a-z0-9_-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_UUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@dataclass(frozen=True)
class Waiting:
    """A push that has no run yet: the file of its request, and the commit."""

    file: Path
    commit: str


@dataclass(frozen=True)
class Served:
    """Where the hooks of a repository find toto's server: what `create` takes."""

    api_url: str = "http://127.0.0.1:4200/api"
    ui_url: str | None = None
    deployment: str = DEPLOYMENT
    deployment_id: str | None = None
    branch: str = "main"
    auth: str | None = None


def default_repos() -> Path:
    """The folder of the repositories where nothing else is said; the server's own default."""
    return paths.state_home() / "server" / "repos"


def infra_repos(repos: Path) -> list[Path]:
    """The infra repositories in the folder `repos`: all but the one that holds the rules of access."""
    return sorted(set(repos.glob("*.git")) - {access.path_of(repos, access.ADMIN)})


async def remember(repos: Path, served: Served) -> None:
    """Remember where the server is, for repositories that are made from now on; bring the rules' hooks up to date.

    (The hooks of infra repositories are brought up to date by `create`.)
    """
    repos.mkdir(parents=True, exist_ok=True)
    files.write(repos / "server.json", json.dumps(asdict(served)))
    if (access.path_of(repos, access.ADMIN) / "HEAD").exists():
        await _install(access.path_of(repos, access.ADMIN), "main", {"toto.rules": "true"})


async def make(repos: Path, name: str, *, creator: str | None = None) -> Path:
    """Make the repository `name` in the folder `repos`, or bring it up to date; return its path.

    A new one is there at once with its hooks, or not at all. Raises `InputError` for a name that is none.
    """
    path = access.path_of(repos, access.check_name(name))
    if name == access.ADMIN:
        raise InputError("holds the rules of access", target=name, hint="toto repo admin USER KEY.pub")
    file = repos / "server.json"
    served = Served(**json.loads(file.read_text())) if file.exists() else Served()
    async with _new(path) as fresh:
        await create(fresh or path, **asdict(served if fresh else await as_chosen(path, served)))
        if fresh and creator:
            (fresh / "toto" / "creator").write_text(creator)
    return path


async def make_admin(repos: Path, user: str, key: str) -> Path:
    """Make the repository of the rules of access, in which `user` with the public key `key` may do everything.

    Raises `InputError` when it is there already: from then on a push changes the rules.
    """
    try:
        key = access.check_key(key)
    except ValueError as error:
        raise InputError(f"{error}", target="key") from None
    rules = RULES.format(user=access.check_user(user), key=key, admin=access.ADMIN)
    async with _new(access.path_of(repos, access.ADMIN)) as fresh:
        if fresh is None:
            raise InputError("is there already", target=access.ADMIN, hint="clone it, change access.toml, push it")
        await _install(fresh, "main", {"toto.rules": "true"})
        blob = (await git(fresh, "hash-object", "-w", "--stdin", stdin=rules)).stdout.strip()
        tree = (await git(fresh, "mktree", stdin=f"100644 blob {blob}\t{access.FILE}\n")).stdout.strip()
        commit = (await git(fresh, "-c", "user.name=toto", "-c", "user.email=toto@localhost", "commit-tree", "-m",
                            f"{user} may do everything", tree)).stdout.strip()
        await git(fresh, "update-ref", "refs/heads/main", commit)
    return access.path_of(repos, access.ADMIN)


@contextlib.asynccontextmanager
async def _new(path: Path) -> AsyncIterator[Path | None]:
    """A path for a repository that becomes `path` at the end of the block; None when that is there. One at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.parent / ".new" / path.name
    with (path.parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # (a repository is made in a tenth of a second)
        if path.exists():
            yield None
            return
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.parent.mkdir(exist_ok=True)
        yield fresh
        fresh.rename(path)


async def set_policy(repo: Path, **changes: str | int | bool | None) -> receive.Policy:
    """Change what a repository takes, by fields of `receive.Policy`; None is the default again. Returns all of it."""
    branch = changes.get("branch", "main")
    if not isinstance(branch, str) or not _is_branch(branch):
        raise InputError(f"{branch!r} is not a branch name that toto takes", target=repo.name)
    for field, value in changes.items():
        text = str(value).lower() if isinstance(value, bool) else None if value is None else str(value)
        await _configure(repo, POLICY[field], text)
    if "branch" in changes:
        await git(repo, "symbolic-ref", "HEAD", f"refs/heads/{branch}")
    policy = await policy_of(repo)
    # Git itself refuses to delete what HEAD names, whatever the policy says.
    await _configure(repo, "receive.denyDeleteCurrent", "ignore" if policy.allow_force else None)
    return policy


async def policy_of(repo: Path) -> receive.Policy:
    """What a repository takes."""
    return receive.Policy.of((await git(repo, "config", "--null", "--get-regexp", "^toto[.]", check=False)).stdout)


async def create(path: Path, *, api_url: str, deployment: str = DEPLOYMENT, deployment_id: str | None = None,
                 ui_url: str | None = None, branch: str = "main", auth: str | None = None) -> Path:
    """Make the bare repository `path`, or bring an existing one's hook and settings up to date; return it.

    A push to `branch` creates a run of `deployment` ("flow/name"; `deployment_id` saves the hook a look-up) at
    `api_url`. `auth` is "user:password"; it goes to a file that only the owner reads. Refs below refs/toto (the
    ledger) cannot be pushed to. Raises `InputError` for a path, branch or address that toto does not take.
    """
    path = _checked(path, api_url, ui_url, deployment, deployment_id, branch, auth)
    await _install(path, branch, {
        "toto.apiUrl": api_url.rstrip("/"), "toto.deployment": deployment, "toto.deploymentId": deployment_id,
        "toto.uiUrl": ui_url.rstrip("/") if ui_url else None})
    (path / "toto" / "spool").mkdir(parents=True, exist_ok=True)
    secret = path / "toto" / "auth.curl"
    if auth is None:
        secret.unlink(missing_ok=True)
    else:
        files.write(secret, 'user = "{}"\n'.format(auth.replace("\\", "\\\\").replace('"', '\\"')))
    return path


async def _install(path: Path, branch: str, settings: Mapping[str, str | None]) -> None:
    """A bare repository with toto's hooks, and what they need to know."""
    if not (path / "HEAD").exists():
        path.mkdir(parents=True, exist_ok=True)
        await git(path, "init", "--quiet", "--bare", f"--initial-branch={branch}")
    # HEAD is the commit that a run takes when it is given none.
    await git(path, "symbolic-ref", "HEAD", f"refs/heads/{branch}")
    for key, value in {
            **settings, "toto.branch": branch, "toto.python": sys.executable, "toto.root": str(HOOKS.parents[2]),
            "receive.hideRefs": "refs/toto", "receive.advertisePushOptions": "true"}.items():
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
    """`served` for a repository that is there: with its own branch, and with its own deployment where it has another.

    An operator chooses another by `git config toto.deployment FLOW/NAME`; the default under its old name is no choice.
    """
    served = replace(served, branch=await deployed_branch(repo) or served.branch)
    chosen = await _setting(repo, "toto.deployment")
    if chosen is None or chosen in {OLD_DEPLOYMENT, served.deployment}:
        return served
    return replace(served, deployment=chosen, deployment_id=None)


async def deployed_branch(repo: Path) -> str | None:
    """The branch whose pushes `repo` deploys, or None when toto did not make it."""
    return await _setting(repo, "toto.branch")


def waiting(repo: Path) -> list[Waiting]:
    """The pushes to `repo` that have no run yet, oldest first."""
    files = sorted((repo / "toto" / "spool").glob("*.json"))
    return [Waiting(file, file.stem.rpartition("-")[2]) for file in files]


async def drain_spool(repo: Path) -> list[str]:
    """Start what was pushed to `repo` while Prefect was down, in the order of the pushes; return the runs' ids.

    The hook does it, which knows what is sent and what an answer means; a request that Prefect refuses is set aside as
    `.refused`. Raises `ServerError` when Prefect does not answer; what is not started then stays in the spool.
    """
    if not waiting(repo):
        return []
    done = await process.run(["sh", HOOKS / "post-receive", "drain"], cwd=repo, env=without_git(), timeout=600,
                             check=False)
    if done.status != 0:
        raise ServerError(process.tail(done.stderr).removeprefix("toto: "), target=str(repo))
    return done.lines


async def api_of(repo: Path) -> Api:
    """The API that the hook of `repo` uses."""
    url = await _setting(repo, "toto.apiUrl")
    if url is None:
        raise InputError("this repository has no toto.apiUrl", target=str(repo), hint="toto repo create it")
    return Api(url, _read_auth(repo / "toto" / "auth.curl"))


def _checked(path: Path, api_url: str, ui_url: str | None, deployment: str, deployment_id: str | None, branch: str,
             auth: str | None) -> Path:
    place = str(path)
    if not path.is_absolute() or ".." in path.parts or not _PATH.fullmatch(place):
        raise InputError("not a path that toto takes for a repository", target=place,
                         hint="use an absolute path of letters, digits and . _ + @ -")
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise InputError("is there already and is no folder", target=place, hint="choose another path")
    if path.is_dir() and any(path.iterdir()) and not (path / "HEAD").is_file():
        raise InputError("is there already and is no bare git repository", target=place, hint="choose another path")
    for url in filter(None, (api_url, ui_url)):
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname or re.search(r"[\s\"'\\\x00-\x1f]", url):
            raise InputError(f"{url!r} is not an http address", target=place)
    if not _is_branch(branch):
        raise InputError(f"{branch!r} is not a branch name that toto takes", target=place)
    if not _DEPLOYMENT.fullmatch(deployment):
        raise InputError(f"{deployment!r} is not FLOW/NAME of a deployment", target=place)
    if deployment_id is not None and not _UUID.fullmatch(deployment_id):
        raise InputError(f"{deployment_id!r} is not a deployment's id", target=place)
    if auth is not None and (":" not in auth or "\n" in auth):
        raise InputError("the API's credentials are not user:password", target=place)  # the text itself is secret
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
