"""The bare infra repositories on toto: making one, its post-receive hook, and the pushes that wait in its spool.

What git commands there are for reading a repository is in `toto.git`; what a push starts is in `flows/`.
"""

import json
import os
import re
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from toto import process
from toto.errors import InputError
from toto.prefect_api import Api, ServerError

HOOK: Final = Path(__file__).parent / "hooks" / "post-receive"
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


async def create(path: Path, *, api_url: str, deployment: str = "reconcile/toto", deployment_id: str | None = None,
                 ui_url: str | None = None, branch: str = "main", auth: str | None = None) -> Path:
    """Make the bare repository `path`, or bring an existing one's hook and settings up to date; return it.

    A push to `branch` creates a run of `deployment` ("flow/name"; `deployment_id` saves the hook a look-up) at
    `api_url`. `auth` is "user:password"; it goes to a file that only the owner reads. Refs below refs/toto (the
    ledger) cannot be pushed to. Raises `InputError` for a path, branch or address that toto does not take.
    """
    path = _checked(path, api_url, ui_url, deployment, deployment_id, branch, auth)
    if not (path / "HEAD").exists():
        await _git("init", "--quiet", "--bare", f"--initial-branch={branch}", str(path))
    # HEAD is the commit that a run takes when it is given none.
    await _git("--git-dir", str(path), "symbolic-ref", "HEAD", f"refs/heads/{branch}")
    settings = {
        "toto.apiUrl": api_url.rstrip("/"), "toto.deployment": deployment, "toto.branch": branch,
        "toto.uiUrl": ui_url.rstrip("/") if ui_url else None, "toto.deploymentId": deployment_id,
        "receive.hideRefs": "refs/toto",
    }
    for key, value in settings.items():
        if value is not None:
            await _git("--git-dir", str(path), "config", "--replace-all", key, value)
        else:
            await _git("--git-dir", str(path), "config", "--unset-all", key, check=False)
    (path / "toto" / "spool").mkdir(parents=True, exist_ok=True)
    secret = path / "toto" / "auth.curl"
    if auth is None:
        secret.unlink(missing_ok=True)
    else:
        _write(secret, 'user = "{}"\n'.format(auth.replace("\\", "\\\\").replace('"', '\\"')), 0o600)
    _write(path / "hooks" / "post-receive", HOOK.read_text(), 0o755)
    return path


async def deployed_branch(repo: Path) -> str | None:
    """The branch whose pushes `repo` deploys, or None when toto did not make it."""
    return await _setting(repo, "toto.branch")


def waiting(repo: Path) -> list[Waiting]:
    """The pushes to `repo` that have no run yet, oldest first."""
    files = sorted((repo / "toto" / "spool").glob("*.json"))
    return [Waiting(file, file.stem.rpartition("-")[2]) for file in files]


async def drain_spool(repo: Path, api: Api | None = None) -> list[str]:
    """Start what was pushed to `repo` while Prefect was down, in the order of the pushes; return the runs' ids.

    `api` defaults to what the repository's hook uses. A request that Prefect refuses is set aside as `.refused`.
    Raises `ServerError` when Prefect does not answer; what is not started then stays in the spool.
    """
    pending = waiting(repo)
    if not pending:
        return []
    if api is None:
        url = await _setting(repo, "toto.apiUrl")
        if url is None:
            raise InputError("this repository has no toto.apiUrl", target=str(repo), hint="toto.git_host.create it")
        api = Api(url, _read_auth(repo / "toto" / "auth.curl"))
    deployment = await _setting(repo, "toto.deployment") or "reconcile/toto"
    found = await api.call("GET", f"/deployments/name/{deployment}")
    runs = []
    for push in pending:
        try:
            body = json.loads(push.file.read_text())
            run = await api.call("POST", f"/deployments/{found['id']}/create_flow_run", body)
        except FileNotFoundError:
            continue  # a hook was quicker
        except (ServerError, ValueError) as error:
            if isinstance(error, ServerError) and error.status not in {400, 409, 422}:
                raise
            push.file.rename(push.file.with_name(push.file.name + ".refused"))
            continue
        push.file.unlink(missing_ok=True)
        runs.append(str(run["id"]))
    return runs


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
    if not _BRANCH.fullmatch(branch) or ".." in branch or branch.endswith((".lock", "/", ".")):
        raise InputError(f"{branch!r} is not a branch name that toto takes", target=place)
    if not _DEPLOYMENT.fullmatch(deployment):
        raise InputError(f"{deployment!r} is not FLOW/NAME of a deployment", target=place)
    if deployment_id is not None and not _UUID.fullmatch(deployment_id):
        raise InputError(f"{deployment_id!r} is not a deployment's id", target=place)
    if auth is not None and (":" not in auth or "\n" in auth):
        raise InputError("the API's credentials are not user:password", target=place)  # the text itself is secret
    return path


def _write(file: Path, text: str, mode: int) -> None:
    """Replace `file` at once, never readable by more than `mode` says."""
    file.parent.mkdir(exist_ok=True)
    fresh = file.with_name(f"{file.name}.new")
    fresh.unlink(missing_ok=True)
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as sink:
        sink.write(text)
    fresh.chmod(mode)
    fresh.replace(file)


def _read_auth(file: Path) -> str | None:
    if not file.exists():
        return None
    quoted = file.read_text().strip().removeprefix('user = "').removesuffix('"')
    return re.sub(r"\\(.)", r"\1", quoted)


async def _setting(repo: Path, key: str) -> str | None:
    done = await _git("--git-dir", str(repo), "config", "--get", key, check=False)
    return done.stdout.strip() or None


async def _git(*arguments: str, check: bool = True) -> process.Completed:
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    return await process.run(["git", *arguments], env=env, timeout=30, check=check)
