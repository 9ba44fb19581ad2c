"""The bare repository on toto and its hook, with real pushes. Prefect's API is a small stand-in that can misbehave."""

import http.server
import json
import os
import re
import stat
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import free_port
from tests.repos import git
from tests.tasks.test_names import called
from toto.base.errors import InputError
from toto.base.prefect_api import ServerError
from toto.git_host import access
from toto.git_host import host as git_host

ID = "11111111-2222-3333-4444-555555555555"


@dataclass
class Stand:
    """The requests to Prefect. It answers requests for a run with `statuses` first, then with `status`."""

    port: int
    status: int = 201
    statuses: list[int] = field(default_factory=list)
    known: str = ID
    bodies: list[dict[str, Any]] = field(default_factory=list)
    authorization: str | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/api"


@pytest.fixture
def stand() -> Iterator[Stand]:
    seen = Stand(0)

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def answer(self, status: int, body: object) -> None:
            data = json.dumps(body, separators=(",", ":")).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            self.answer(200, {"id": seen.known, "created": "2026-01-01T00:00:00Z", "name": "toto"})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.authorization = self.headers["Authorization"]
            status = seen.statuses.pop(0) if seen.statuses else seen.status
            if f"/deployments/{seen.known}/" not in self.path:
                status = 404
            if status == 201:
                seen.bodies.append(body)
            name = body.get("name", "lucky-otter")
            self.answer(status, {"id": f"run-{len(seen.bodies)}", "name": name, "state": {"name": "Late"}})

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        seen.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield seen
        server.shutdown()
        thread.join()


# With the names and tags that tests limit a run to.
MANIFEST = """\
machines:
  - {name: web1, address: 192.0.2.1, tags: [web, "helm:shop", fine, slow, broken, away]}
  - {name: web2, address: 192.0.2.2}
"""


class Pusher:
    """A clone that makes commits and pushes them."""

    def __init__(self, folder: Path, remote: Path) -> None:
        self.folder, self.remote = folder, remote
        self.git("init", "--quiet", "--initial-branch=main", str(folder), cwd=folder.parent)
        (folder / "machines.yaml").write_text(MANIFEST)
        self.git("add", "--all")
        self.commit()

    def git(self, *words: str, cwd: Path | None = None) -> str:
        env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        env |= {f"GIT_{who}_{what}": "a@b.c" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        done = subprocess.run(
            ["git", *words], cwd=cwd or self.folder, env=env, capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip() if words[0] != "push" else re.sub(r"(?m)^remote: |\s+$", "", done.stderr)

    def commit(self) -> str:
        self.git("commit", "--quiet", "--allow-empty", "-m", str(time.time_ns()))
        return self.git("rev-parse", "HEAD")

    def push(self, refspec: str = "main") -> str:
        return self.git("push", str(self.remote), refspec)


@pytest.fixture
async def repo(tmp_path: Path, stand: Stand) -> Path:
    return await git_host.create(
        tmp_path / "my repos/infra.git", api_url=stand.url, ui_url="http://ui", deployment_id=ID
    )


@pytest.fixture
def pusher(tmp_path: Path, repo: Path) -> Pusher:
    return Pusher(tmp_path / "clone", repo)


def test_push_starts_a_run_and_names_it(pusher: Pusher, repo: Path, stand: Stand) -> None:
    commit = pusher.commit()
    output = pusher.push()
    assert f"toto: rehearsing {commit[:12]} in run infra {commit[:8]} (push)" in output
    assert "toto: http://ui/runs/flow-run/run-1" in output
    [body] = stand.bodies
    assert body["name"] == f"infra {commit[:8]} (push)"
    assert body["parameters"] == {"repo": str(repo), "commit": commit, "origin": "push"}
    assert body["tags"] == ["push"]
    assert body["idempotency_key"].startswith(commit)
    assert git_host.waiting(repo) == []


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["only=web1"],
        ["only=web1,web", "only=helm:shop"],
        ["plan"],
        ["rehearse"],
        ["rehearse", "only=web1"],
        ["plan", f"only={'web1,' * 20}web1"],
    ],
)
def test_hook_names_a_run_as_the_flow_would(
    pusher: Pusher, repo: Path, stand: Stand, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = pusher.git("push", *(word for option in options for word in ("-o", option)), str(repo), "main")
    [body] = stand.bodies
    assert called(monkeypatch, body["parameters"], "reconcile") == body["name"]
    assert f" in run {body['name']}\n" in output


def test_a_push_says_what_it_accepts_and_why(pusher: Pusher, repo: Path, stand: Stand) -> None:
    why = "it's new: größer, $(id) `id` %s {}"
    options = ("-o", "accept=web1", "-o", f"reason={why}", "-o", "accept=terraform/dns")
    output = pusher.git("push", *options, str(repo), "main")
    assert ", accepting what is there of web1,terraform/dns, in run" in output
    [body] = stand.bodies
    assert body["parameters"]["accept"] == ["web1", "terraform/dns"]
    assert body["parameters"]["reason"] == why


async def test_same_commit_pushed_again_after_going_back_is_a_new_request(
    pusher: Pusher, repo: Path, stand: Stand
) -> None:
    await git_host.set_policy(repo, allow_force=True)
    first = pusher.git("rev-parse", "HEAD")
    pusher.push()
    pusher.commit()
    pusher.push()
    pusher.push(f"+{first}:refs/heads/main")
    assert [body["parameters"]["commit"] == first for body in stand.bodies] == [True, False, True]
    assert len({body["idempotency_key"] for body in stand.bodies}) == 3


async def test_push_while_prefect_is_down_is_accepted_and_started_later(
    pusher: Pusher, repo: Path, stand: Stand
) -> None:
    url = stand.url
    pusher.git("config", "--file", str(repo / "config"), "toto.apiUrl", f"http://127.0.0.1:{free_port()}/api")
    one, output = pusher.commit(), pusher.push()
    assert "the push is accepted, but Prefect does not answer" in output
    assert pusher.git("ls-remote", str(repo), "main").startswith(one)
    pusher.git("config", "--file", str(repo / "config"), "toto.apiUrl", url)
    assert [push.commit for push in git_host.waiting(repo)] == [one]
    assert await git_host.drain_spool(repo) == ["run-1"]
    assert [body["parameters"]["commit"] for body in stand.bodies] == [one]
    assert git_host.waiting(repo) == []


async def test_what_still_waits_is_reported_with_the_reason_and_stays(repo: Path, stand: Stand) -> None:
    for number in (1, 2):
        (repo / "toto" / "spool" / f"{number}-{str(number) * 40}.json").write_text("{}")
    stand.status = 401
    with pytest.raises(ServerError, match=r"Prefect does not accept toto's password \(401\) \(2 pushes wait\)"):
        await git_host.drain_spool(repo)
    stand.status, stand.statuses = 201, [201, 422]
    assert await git_host.drain_spool(repo) == ["run-1"]
    assert git_host.waiting(repo) == [] and len(list((repo / "toto" / "spool").glob("2-*.refused"))) == 1
    assert await git_host.drain_spool(repo) == []


def test_next_push_starts_those_that_waited_first(pusher: Pusher, repo: Path, stand: Stand) -> None:
    stand.status = 503
    one, output = pusher.commit(), pusher.push()
    assert "Prefect answered 503" in output
    two = pusher.commit()
    pusher.push()
    stand.status = 201
    three, output = pusher.commit(), pusher.push()
    assert [body["parameters"]["commit"] for body in stand.bodies] == [one, two, three]
    assert f"an earlier push, {one[:12]}, had waited" in output
    assert git_host.waiting(repo) == []


def test_a_short_failure_of_prefect_delays_nothing(pusher: Pusher, stand: Stand) -> None:
    stand.statuses = [503, 503]
    assert "rehearsing" in pusher.push()
    assert len(stand.bodies) == 1


def test_new_database_has_a_new_id_that_is_looked_up(pusher: Pusher, repo: Path, stand: Stand) -> None:
    stand.known = "aaaaaaaa-2222-3333-4444-555555555555"
    assert "rehearsing" in pusher.push()
    assert pusher.git("config", "--file", str(repo / "config"), "toto.deploymentId") == stand.known


def test_refused_request_is_set_aside_and_blocks_nothing(pusher: Pusher, repo: Path, stand: Stand) -> None:
    stand.statuses = [422]
    assert "not deployed" in pusher.push()
    pusher.commit()
    assert "rehearsing" in pusher.push()
    assert len(list((repo / "toto" / "spool").glob("*.refused"))) == 1


@pytest.mark.parametrize("name", ['a"b', "ünïcødé", "$(touch${IFS}pwned)", "`id`", "a;b", "mainly", "x/main", "'"])
def test_other_branches_are_not_deployed_whatever_their_name(
    pusher: Pusher, repo: Path, stand: Stand, name: str
) -> None:
    assert f"{name} is not deployed" in pusher.push(f"main:refs/heads/{name}")
    assert stand.bodies == []
    assert not list(repo.rglob("pwned"))


async def test_deleted_branch_and_tags_start_nothing(pusher: Pusher, repo: Path, stand: Stand) -> None:
    await git_host.set_policy(repo, allow_force=True)
    pusher.push()
    pusher.git("tag", "v1")
    assert "toto:" not in pusher.push("v1")
    assert "toto:" not in pusher.push(":main")
    assert len(stand.bodies) == 1


def test_ledger_cannot_be_pushed_to(pusher: Pusher) -> None:
    with pytest.raises(AssertionError, match="deny updating a hidden ref"):
        pusher.push("main:refs/toto/ledger")


def test_two_quick_pushes_make_two_runs(pusher: Pusher, stand: Stand) -> None:
    pusher.push()
    pusher.commit()
    pusher.push()
    assert len({body["parameters"]["commit"] for body in stand.bodies}) == 2


async def test_password_reaches_prefect_from_a_private_file(tmp_path: Path, stand: Stand) -> None:
    repo = await git_host.create(tmp_path / "b.git", api_url=stand.url, auth='admin:p"a\\s s', deployment_id=ID)
    assert stat.S_IMODE((repo / "toto" / "auth.curl").stat().st_mode) == 0o600
    Pusher(tmp_path / "c", repo).push()
    from_curl = stand.authorization
    assert from_curl is not None
    (repo / "toto" / "spool" / f"1-{'a' * 40}.json").write_text("{}")
    await git_host.drain_spool(repo)
    assert stand.authorization == from_curl
    assert 'p"a' not in (repo / "config").read_text()


async def test_create_is_idempotent_and_updates_an_old_hook(repo: Path, stand: Stand) -> None:
    (repo / "hooks" / "post-receive").write_text("#!/bin/sh\nexit 1\n")
    before = (repo / "HEAD").read_text()
    await git_host.create(repo, api_url=stand.url, branch="deploy")
    assert (repo / "hooks" / "post-receive").read_text() == (git_host.HOOKS / "post-receive").read_text()
    assert await git_host.deployed_branch(repo) == "deploy"
    assert (repo / "HEAD").read_text() != before
    once = (repo / "config").read_text()
    await git_host.create(repo, api_url=stand.url, branch="deploy")
    assert (repo / "config").read_text() == once


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("reconcile/toto", "reconcile/reconcile"),
        ("reconcile/reconcile", "reconcile/reconcile"),
        (None, "reconcile/reconcile"),
        ("reconcile/parked", "reconcile/parked"),
    ],
)
async def test_hook_of_an_older_toto_gets_the_new_name_unless_someone_chose_a_different_one(
    repo: Path, stand: Stand, before: str | None, after: str
) -> None:
    await git_host.create(repo, api_url=stand.url, branch="deploy", deployment=before or "x/y", deployment_id=ID)
    if before is None:
        await access.git(repo, "config", "--unset", "toto.deployment")
    served = git_host.Served(api_url=stand.url, deployment_id="aaaaaaaa-2222-3333-4444-555555555555")
    await git_host.create(repo, **asdict(await git_host.as_chosen(repo, served)))
    config = (await access.git(repo, "config", "--get-regexp", "^toto")).stdout
    assert f"toto.deployment {after}\n" in config and "toto.branch deploy\n" in config
    assert (f"toto.deploymentid {served.deployment_id}" in config) == (after == git_host.DEPLOYMENT)


@pytest.mark.parametrize(
    "path",
    [
        "relative/x.git",
        "/tmp/ blank.git",
        "/tmp/blank /x.git",
        "/tmp/a\tb.git",
        "/tmp/a$(id).git",
        '/tmp/a"b.git',
        "/tmp/../etc/x.git",
        "/tmp/-x.git",
        "/tmp/a\nb.git",
        "/",
    ],
)
async def test_strange_paths_are_refused(path: str) -> None:
    with pytest.raises(InputError):
        await git_host.create(Path(path), api_url="http://127.0.0.1:1/api")


async def test_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "mum.txt").write_text("dear")
    with pytest.raises(InputError, match="not a bare git repository"):
        await git_host.create(tmp_path / "letters", api_url="http://127.0.0.1:1/api")


async def test_a_repository_with_sha256_names_is_refused_and_left_alone(tmp_path: Path) -> None:
    repo = tmp_path / "infra.git"
    git("init", "--quiet", "--bare", "--object-format=sha256", repo, cwd=tmp_path)
    with pytest.raises(InputError, match="SHA-256"):
        await git_host.create(repo, api_url="http://127.0.0.1:1/api")
    assert "toto" not in (repo / "config").read_text() and not (repo / "hooks" / "post-receive").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"api_url": "file:///etc/passwd"},
        {"branch": "a b"},
        {"branch": "-x"},
        {"deployment": "a b/c"},
        {"auth": "nopassword"},
        {"deployment_id": "1;2"},
    ],
)
async def test_strange_settings_are_refused(tmp_path: Path, settings: dict[str, str]) -> None:
    with pytest.raises(InputError):
        await git_host.create(tmp_path / "a.git", **{"api_url": "http://127.0.0.1:1/api", **settings})
