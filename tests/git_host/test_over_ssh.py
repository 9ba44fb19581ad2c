"""The git host over real ssh: two users, what they may do, and what a push with options starts in a real Prefect.

The flow is a stand-in of a few lines; `reconcile/parked` is it too, with no worker, for what only a request shows.
"""

import asyncio
import contextlib
import getpass
import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import PrefectServer, background, free_port
from tests.git_host.test_access import key
from tests.git_host.test_host import Pusher
from tests.machine.test_ssh import SSHD, keygen, needs_sshd
from tests.server.test_serve import until
from toto.base import paths, process
from toto.base.errors import InputError
from toto.base.prefect_api import Api
from toto.git_host import access
from toto.git_host import host as git_host
from toto.git_host import shell as git_shell
from toto.git_host.host import Served
from toto.ledger import approvals, steps
from toto.ledger.ledger import Intent, Ledger
from toto.ledger.target import Target
from toto.machine.activation import MachineState
from toto.plan.host import DeployedHost
from toto.server import deployments
from toto.server import serve as server

pytestmark = [needs_sshd, pytest.mark.minutes(1)]

FLOW = '''
import asyncio
from pathlib import Path
from prefect import flow, get_run_logger, task
from prefect.states import Completed, Failed
from tasks import cancelled_by_sigterm, names

@task(task_run_name="no-internet tests")
async def tests_in_the_sandbox() -> None:
    await asyncio.sleep(2)

@flow(flow_run_name="{host}")
async def rehearse_host(host: str) -> None:
    get_run_logger().info("not for the pusher")
    await tests_in_the_sandbox()

@flow(flow_run_name="{host}")
async def rehearse(host: str) -> None:
    """A stage."""
    await rehearse_host(host)

@flow(flow_run_name=names.of_reconcile)
async def reconcile(repo: str, commit: str | None = None, origin: str = "ui", only: list[str] | None = None,
                    plan_only: bool = False, rehearse_only: bool = False, try_for: float = 0):
    """Stands in for the real one."""
    async with cancelled_by_sigterm():
        return await stages(repo, commit, only, plan_only)

async def stages(repo: str, commit: str | None, only: list[str] | None, plan_only: bool):
    log = get_run_logger()
    log.info("the plan of %s:\\nHOST  ACTION\\nweb1  deploy", (commit or "the tip")[:8])
    if plan_only:
        return Completed(message="plan only: web1 would change")
    await rehearse("web1")
    while only == ["slow"] and not Path(repo, "toto", "go-on").exists():
        await asyncio.sleep(0.1)
    if only == ["broken"]:
        log.error("web1: tests failed: \\x1b[31mnot ok 1\\a")
        return Failed(message="web1: rehearsal failed; nothing was touched")
    if only == ["away"]:
        return Completed(name="Partial", message="1 of 2 hosts: web1 deployed; web2 unreachable")
    return Completed(message="web1 deployed")
'''
ACCEPT = '''
from prefect import flow, get_run_logger
from prefect.states import Completed, Failed

@flow
async def accept(repo: str, target: str, reason: str, by: str | None = None):
    """Stands in for the real one."""
    if reason == "fail":
        return Failed(message="web1: roll-out failed")
    return Completed(message=f"{target} because of: {reason}, says {by}")
'''
BUILD = '''
from pathlib import Path
from prefect import flow, get_run_logger, task
from prefect.artifacts import create_table_artifact
from prefect.states import Completed
from toto.fleet import builds

@task
def build_host(host: str) -> None:
    get_run_logger().info("building %s on pi", host)

@flow
def build(repo: str, commit: str, only: list[str]):
    """Stands in for the real one."""
    build_host(only[0])
    row = builds.row(only[0], builds.BUILT, why="built by pi 1", path="/nix/store/x-web1", size=5_000_000)
    create_table_artifact(key=builds.key(Path(repo).stem), table=[row], description=commit)
    return Completed(message="1 of 1 hosts built")
'''
PROJECT = """
name: tiny
deployments:
  - {name: build, entrypoint: "flows/build.py:build", work_pool: {name: toto}}
  - {name: accept, entrypoint: "flows/accept.py:accept", work_pool: {name: toto}}
  - {name: reconcile, entrypoint: "flows/reconcile.py:reconcile", work_pool: {name: toto}}
"""


@dataclass
class Host:
    """An sshd that serves only the repositories in `repos`."""

    folder: Path
    port: int

    @property
    def repos(self) -> Path:
        return self.folder / "repos"

    def url(self, name: str) -> str:
        return f"ssh://{getpass.getuser()}@127.0.0.1:{self.port}/{name}"

    def ssh(self, user: str) -> str:
        return shlex.join(
            [
                "ssh",
                "-F",
                "none",
                "-i",
                str(self.folder / user),
                "-o",
                "IdentitiesOnly=yes",
                "-o",
                "BatchMode=yes",
                "-o",
                "StrictHostKeyChecking=no",
                "-o",
                "UserKnownHostsFile=/dev/null",
                "-o",
                "LogLevel=ERROR",
                "-o",
                "IdentityAgent=none",
            ]
        )

    def ask(self, user: str, *command: str, options: Sequence[str] = ()) -> "subprocess.CompletedProcess[str]":
        """The answer to a command that a user runs by hand."""
        argv = [*shlex.split(self.ssh(user)), *options, "-p", str(self.port), "-l", getpass.getuser(), "127.0.0.1"]
        return subprocess.run([*argv, *command], capture_output=True, text=True, check=False, timeout=60)

    def clone(self, user: str, name: str = "infra") -> "Clone":
        """A work tree of `user`, whose remote is a repository on the host."""
        there = Clone(self.folder / f"{user}-{name}", Path(name))
        there.git("config", "core.sshCommand", self.ssh(user))
        there.git("remote", "add", "toto", self.url(name))
        return there

    async def sshd(self, state: Path | None = None) -> list[str]:
        """The command line of the server, in the foreground; what it starts has `state` (default: this process's)."""
        with pytest.MonkeyPatch.context() as own:
            if state is not None:
                own.setenv("TOTO_STATE", str(state))
            keys = git_shell.invocation(self.repos, "keys")
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)
            lines = [
                "AuthorizedKeysFile none",
                f"AuthorizedKeysCommand {shlex.join(keys)}",
                f"AuthorizedKeysCommandUser {getpass.getuser()}",
            ]
        else:  # sshd runs a command for root only
            (self.folder / "authorized").write_text((await process.run(keys)).stdout)
            lines = [f'AuthorizedKeysFile "{self.folder}/authorized"']
        (self.folder / "sshd_config").write_text(
            "\n".join(
                [
                    f"Port {self.port}",
                    "ListenAddress 127.0.0.1",
                    f'HostKey "{self.folder}/host"',
                    *lines,
                    "AcceptEnv GIT_*",
                    "StrictModes no",
                    "PidFile none",
                    "UsePAM no",
                    "AuthenticationMethods publickey",
                    "PermitRootLogin prohibit-password",
                    "",
                ]
            )
        )
        assert SSHD is not None
        return [SSHD, "-D", "-f", str(self.folder / "sshd_config")]


class Clone(Pusher):
    def push(self, refspec: str = "main", *options: str) -> str:
        return self.git("push", *(f"--push-option={option}" for option in options), "toto", refspec)

    def refused(self, refspec: str = "main", *options: str) -> str:
        with pytest.raises(AssertionError) as failed:
            self.push(refspec, *options)
        return str(failed.value)


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """alice may do everything, bob may read infra; eve has a key, but is not in the rules."""
    host = Host(tmp_path_factory.mktemp("a host"), free_port())

    async def serve(stop: asyncio.Event, ready: Callable[[], None]) -> None:
        for name in ("host", "alice", "bob", "eve"):
            await keygen(host.folder / name)
        await git_host.make_admin(host.repos, "alice", (host.folder / "alice.pub").read_text())
        set_rules(
            host,
            host.clone("alice", access.ADMIN),
            lambda text: (
                text.replace("[users]", f'[users]\nbob = ["{(host.folder / "bob.pub").read_text().strip()}"]')
                + ('[repos.infra]\nread = ["bob"]\nwrite = ["alice"]\n')
            ),
            push=False,
        )
        argv, journal = await host.sshd(), host.folder / "journal"
        async with process.start([*argv, "-E", journal]):
            async with asyncio.timeout(60):
                while not (journal.exists() and "listening" in journal.read_text()):
                    await asyncio.sleep(0.02)
            ready()
            await stop.wait()

    with pytest.MonkeyPatch.context() as own:
        own.setenv("TOTO_STATE", str(host.folder / "state"))
        with background(serve):
            yield host


@pytest.fixture
async def host(sshd: Host) -> AsyncIterator[Host]:
    """The host, as it was at the start."""
    await git_host.remember(sshd.repos, Served(api_url=f"http://127.0.0.1:{free_port()}/api"))
    admin = access.path_of(sshd.repos, access.ADMIN)
    rules = (await access.git(admin, "rev-parse", "main")).stdout.strip()
    yield sshd
    await access.git(admin, "update-ref", "refs/heads/main", rules)
    for repo in git_host.infra_repos(sshd.repos):
        shutil.rmtree(repo)
        shutil.rmtree(paths.repo_state(repo))
    (paths.state_home() / "names.json").unlink(missing_ok=True)
    for clone in sshd.folder.glob("*-*"):
        shutil.rmtree(clone)


def set_rules(host: Host, admin: Clone, change: Callable[[str], str], *, push: bool = True) -> None:
    bare = access.path_of(host.repos, access.ADMIN)
    admin.git("fetch", "--quiet", str(bare), "main")
    admin.git("reset", "--quiet", "--hard", "FETCH_HEAD")
    file = admin.folder / access.FILE
    file.write_text(change(file.read_text()))
    admin.git("add", "--all")
    admin.commit()
    admin.git("push", "--quiet", *(["toto"] if push else [str(bare)]), "main")


# Who gets in, and where to


async def test_an_unknown_repository_is_made_by_the_command_that_the_refusal_prints(host: Host) -> None:
    alice, bob = host.clone("alice"), host.clone("bob")
    said = bob.refused()
    assert "there is no repository infra that bob may see" in said
    assert "Someone who may deploy toto-admin makes it by `ssh toto repo create infra`" in said
    assert "there is no repository infra that alice may see" in host.ask("alice", "git-upload-pack 'infra'").stderr
    said = alice.refused()
    assert not access.path_of(host.repos, "infra").exists(), "a misspelt name makes nothing"
    command = re.search(r"next: ssh toto (repo create infra) makes it", said)
    assert command, said
    assert "bob may not create repositories" in host.ask("bob", command[1]).stderr
    assert not access.path_of(host.repos, "infra").exists()
    done = host.ask("alice", command[1])
    assert done.returncode == 0 and "infra.git" in done.stdout, done.stderr
    output = alice.push()
    assert "the push is accepted" in output and "nothing is deployed yet" in output
    repo = access.path_of(host.repos, "infra")
    assert access.creator(repo) == "alice"
    [waiting] = (repo / "toto" / "spool").glob("*.json")
    assert '"tags":["push","user:alice"]' in waiting.read_text()
    assert host.ask("alice", "repo create private").returncode == 0
    assert host.clone("alice", "private").push()
    assert "no repository private" in host.clone("bob", "private").refused()


@pytest.mark.skipif(os.geteuid() != 0, reason="sshd runs an AuthorizedKeysCommand for root only")
async def test_a_rehearser_pushes_branches_and_deploys_nothing(host: Host) -> None:
    await git_host.make(host.repos, "infra")
    admin = host.clone("alice", "admin")
    admin.git("remote", "set-url", "toto", host.url(access.ADMIN))
    set_rules(host, admin, lambda text: text.replace('read = ["bob"]', 'rehearse = ["bob"]'))
    alice, bob = host.clone("alice"), host.clone("bob")
    alice.push("main", "skip")
    for options in ([], ["rehearse"], ["plan"], ["skip"], ["only=web1"]):
        assert "bob may rehearse infra, but not deploy it: main is its deployed branch" in bob.refused(
            "+main:main", *options
        )
    assert "the push is accepted" in bob.push("main:refs/heads/try", "rehearse")
    assert "try2 is not deployed" in bob.push("+main:refs/heads/try2")
    repo = access.path_of(host.repos, "infra")
    [waiting] = (repo / "toto" / "spool").glob("*.json")
    assert '"rehearse_only":true' in waiting.read_text() and '"user:bob"' in waiting.read_text()


@pytest.mark.skipif(os.geteuid() != 0, reason="sshd runs an AuthorizedKeysCommand for root only")
async def test_an_approval_is_by_name_and_only_by_those_who_may(host: Host) -> None:
    run, other, secret = (f"5a0c0000-0000-4000-8000-00000000000{number}" for number in (1, 2, 3))
    for name, asking in (("infra", (run, other)), ("private", (secret,))):
        repo = await git_host.make(host.repos, name)
        host.clone("alice", name).push("main", "skip")
        for each in asking:
            await approvals.ask(repo, each, {"terraform/dns": "\x1b[31mdestroy"}, 3600)
    admin = host.clone("alice", "admin")
    admin.git("remote", "set-url", "toto", host.url(access.ADMIN))
    set_rules(host, admin, lambda text: text.replace('read = ["bob"]', 'rehearse = ["bob"]'))
    for verb, word in (("approve", run), ("reject", run)):
        assert "bob may not answer for runs of infra" in host.ask("bob", verb, word).stderr
    for word in (secret, secret.replace("3", "4")):  # there is one of them, and bob does not learn which
        assert "there is no run of this id that asks" in host.ask("bob", "approve", word).stderr
    assert "alice may not answer for runs of infra" in host.ask("alice", "approve", run).stderr  # who wrote it
    set_rules(host, admin, lambda text: text.replace('write = ["alice"]', 'write = ["alice"]\napprove = ["bob"]'))
    done = host.ask("bob", "approve", run)
    assert done.returncode == 0 and f"approved by bob: run {run} of infra" in done.stdout, done.stderr
    assert "�[31mdestroy" in done.stdout
    assert "was approved by bob at" in host.ask("bob", "reject", run).stderr
    assert "rejected by bob" in host.ask("bob", "reject", other).stdout
    found = approvals.read(access.path_of(host.repos, "infra"), other)
    assert found and found.answer and not found.answer.approved
    toto = ["python", "-m", "toto.cli", "approve", secret, "--repos", str(host.repos)]
    assert "(on toto itself): run" in (await process.run(toto)).stdout


async def deployed_host(repos: Path, name: str, host: str) -> Path:
    """A repository whose ledger says that the host is half done."""
    repo = await git_host.make(repos, name)
    deployed = DeployedHost(identity="drv", path="/nix/store/x", commit="0" * 40, run="r", at="2026-01-01T00:00:00Z")
    intent = Intent(desired=deployed, before=MachineState(), run="r", owner="o", at="2026-01-01T00:00:00Z")
    await Ledger(repo).write(Target("host", host), steps.intend(intent), "intent")
    return repo


@pytest.mark.skipif(os.geteuid() != 0, reason="sshd runs an AuthorizedKeysCommand for root only")
async def test_accepting_is_by_name_and_only_by_those_who_may_deploy(host: Host, deployed: Served) -> None:
    await git_host.remember(host.repos, deployed)
    repo = await deployed_host(host.repos, "infra", "web1")
    await deployed_host(host.repos, "private", "web2")
    for each in ("web1", "web2", "web3"):  # (web2 is in a repository that bob does not see)
        said = host.ask("bob", "accept", each, "--reason", "so").stderr
        assert ("bob may not deploy infra" if each == "web1" else "no repository of yours has deployed it") in said
    done = host.ask("alice", "accept", "web1", "--repo", "infra", "--reason", "it's", "new $(id)")
    assert done.returncode == 0, done.stderr
    run = re.search(r"accepting web1 of infra in run (\S+)", done.stdout)
    assert run and "host/web1 because of: it's new $(id), says alice" in done.stdout, done.stdout
    found = await Api(deployed.api_url, git_host._read_auth(repo / "toto" / "auth.curl")).call(
        "GET", f"/flow_runs/{run[1]}"
    )
    assert found["tags"] == ["user:alice"] and found["parameters"]["repo"] == str(repo)
    assert "is in infra, private" in await two_have_it(host)
    assert "web1: roll-out failed" in host.ask("alice", "accept", "web1", "--reason", "fail").stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="sshd runs an AuthorizedKeysCommand for root only")
async def test_who_may_rehearse_has_a_host_built_and_sees_its_log_and_how_to_fetch_it(
    host: Host, deployed: Served
) -> None:
    await git_host.remember(host.repos, deployed)
    await git_host.make(host.repos, "infra")
    alice = host.clone("alice")
    alice.push("main", "skip")
    commit = alice.git("rev-parse", "HEAD").strip()
    assert "there is no repository of which you may have hosts built" in host.ask("bob", "build", "web1").stderr
    done = host.ask("alice", "build", f"web1@{commit[:10]}", "--repo", "infra")
    assert done.returncode == 0, done.stderr
    assert f"toto: building web1@{commit[:8]} of infra in run " in done.stdout
    assert "building web1 on pi" in done.stdout, "the lines of its steps"
    assert "toto: /nix/store/x-web1 (5 MB; built by pi 1)" in done.stdout
    assert f"ssh toto fetch web1@{commit[:8]} --repo infra | tar" in done.stdout
    assert "extra-trusted-public-keys = " in done.stdout
    assert "has no commit 'nothing'" in host.ask("alice", "build", "web1@nothing").stderr
    assert "was not built" in host.ask("alice", "fetch", "web1").stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="sshd runs an AuthorizedKeysCommand for root only")
async def test_who_may_deploy_does_all_of_it_over_ssh_and_from_a_different_machine(
    host: Host, deployed: Served, tmp_path: Path
) -> None:
    await git_host.remember(host.repos, deployed)
    repo = await deployed_host(host.repos, "infra", "web1")
    alice = host.clone("alice")
    alice.push("main", "skip")
    for asked in ("deploy", "revert main", "freeze web1 --reason so", "check"):
        done = host.ask("bob", *asked.split())
        assert done.returncode == 2 and "bob may not deploy infra" in done.stderr, done
    assert "there is no such repository of yours" in host.ask("bob", "deploy", "--repo", "private").stderr
    said = "web1: frozen by alice: it's an audit\n"
    assert host.ask("alice", "freeze", "web1", "--reason", "it's an audit", "--repo", "infra").stdout == said
    assert "there is no such target" in host.ask("alice", "freeze", "web9", "--reason", "so").stderr
    frozen = Ledger(repo).get(Target("host", "web1")).frozen
    assert frozen is not None and (frozen.by, frozen.why) == ("alice", "it's an audit")

    bin = tmp_path / "bin"
    bin.mkdir()
    ssh = bin / "ssh"  # as a host `toto` in ~/.ssh/config
    ssh.write_text(
        f'#!/bin/sh\n[ "$1 $2" = "-- toto" ] || exit 9\nshift 2\n'
        f"exec {shutil.which('ssh')} {shlex.join(shlex.split(host.ssh('alice'))[1:])} -p {host.port} "
        f'-l {getpass.getuser()} 127.0.0.1 "$@"\n'
    )
    ssh.chmod(0o755)
    auth = git_host._read_auth(repo / "toto" / "auth.curl")
    address = deployed.api_url.removesuffix("/api").replace("http://", f"http://{auth}@" if auth else "http://")
    there = {"TOTO_URL": address, "PATH": f"{bin}:{os.environ['PATH']}", "TOTO_STATE": str(tmp_path / "none")}

    def toto(*words: str) -> "subprocess.CompletedProcess[str]":
        argv, env = [sys.executable, "-m", "toto.cli", *words], os.environ | there
        return subprocess.run(argv, env=env, capture_output=True, text=True, check=False, timeout=120)

    assert toto("unfreeze", "web1").stdout == "web1: unfrozen by alice\n"
    done = toto("deploy", "away", "--wait", "--commit", "main")
    assert done.returncode == 3 and "toto: deploying away of infra in run " in done.stdout, done
    assert "web2 unreachable" in done.stdout
    partial = done.stdout.partition(" in run ")[2].split()[0]
    assert toto("rehearse", "broken", "--wait").returncode == 1
    done = toto("deploy", "slow")
    run = done.stdout.partition(" in run ")[2].split()[0]
    assert done.returncode == 0 and f"`toto wait {run}`" in done.stdout
    listed = json.loads(toto("runs", "-n", "3", "--json").stdout)["items"]
    assert listed[0]["id"] == run and "Partial" in [each["state"] for each in listed]
    assert run[:8] in toto("runs").stdout
    assert "no repository of yours has a run" in host.ask("alice", "cancel", run[:-4] + "0000").stderr
    assert "bob may not deploy infra, so cancel only runs of their own" in host.ask("bob", "cancel", run).stderr
    assert toto("cancel", run[:8]).stdout.startswith(f"run {run} is cancelled")
    done = toto("run", "logs", "-f", run[:8])
    assert done.returncode == 1, done
    (log,) = [json.loads(toto("run", "logs", listed[1]["id"], "--json").stdout)]
    assert log["kind"] == "log" and "not for the pusher" in [each["message"] for each in log["items"]]
    assert "has ended: cancelled" in toto("cancel", run).stderr
    for wrong in ("30", "0m", "13h"):
        assert "is no time to try something" in toto("deploy", "web1", "--try", wrong).stderr
    api = Api(deployed.api_url, auth)
    argv = [sys.executable, "-m", "toto.cli", "deploy", "slow", "--try", "1h", "--repo", str(repo)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as trying:
        assert trying.stdout is not None
        run = trying.stdout.readline().split()[-1]
        await until(api, run, {"RUNNING"})
        trying.send_signal(signal.SIGINT)
        assert await asyncio.to_thread(trying.wait, 60) == 1
    await until(api, run, {"CANCELLED"})
    said = at_a_terminal("deploy", "--wait", "--repo", str(repo), "--repos", str(host.repos))
    assert "deploying what changed of infra in run " in said and "toto: done: web1 deployed" in said
    assert re.search(r"web1: no-internet tests +\d+ s", said), "what is at work, with its seconds"
    assert "not for the pusher" not in said
    said = at_a_terminal("runs", "--repos", str(host.repos))
    assert (
        "\x1b[31m" in said
        and "�" not in said
        and "\x1b" not in at_a_terminal("runs", "--repos", str(host.repos), NO_COLOR="1")
    )
    assert toto("run", "logs", "-f", partial[:8]).returncode == 3


def at_a_terminal(*words: str, **environment: str) -> str:
    """What the command prints on a terminal."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "toto.cli", *words],
        env=os.environ | {"TERM": "xterm", "COLUMNS": "100", "LINES": "40"} | environment,
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=subprocess.STDOUT,
    ) as toto:
        os.close(theirs)
        said = b""
        with contextlib.suppress(OSError):  # (the other end has gone)
            while chunk := os.read(ours, 65_536):
                said += chunk
        os.close(ours)
    assert toto.returncode == 0, said
    return said.decode()


async def two_have_it(host: Host) -> str:
    await deployed_host(host.repos, "private", "web3")
    await deployed_host(host.repos, "infra", "web3")
    done = host.ask("alice", "accept", "host/web3", "--reason", "so")
    assert done.returncode == 2
    return done.stderr


async def test_reader_reads_and_does_not_push(host: Host) -> None:
    await git_host.make(host.repos, "infra")
    alice, bob = host.clone("alice"), host.clone("bob")
    alice.push("main", "skip")
    bob.git("fetch", "--quiet", "toto")
    assert bob.git("rev-parse", "toto/main") == alice.git("rev-parse", "main")
    assert "bob may read infra, but not push to it" in bob.refused()
    assert "no repository toto-admin that bob may see" in host.ask("bob", "git-upload-pack 'toto-admin'").stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="sshd runs an AuthorizedKeysCommand for root only")
async def test_a_push_of_the_rules_changes_them_at_once(host: Host) -> None:
    assert "Permission denied" in host.ask("eve").stderr
    admin = host.clone("alice", "admin")
    admin.git("remote", "set-url", "toto", host.url(access.ADMIN))
    eve = (host.folder / "eve.pub").read_text().strip()
    set_rules(
        host,
        admin,
        lambda text: (
            text.replace("[users]", f'[users]\neve = ["{eve}"]')
            .replace("\n[users]", 'create = ["eve"]\n[users]')
            .replace('admin = ["alice"]', 'admin = ["alice", "eve"]')
        ),
    )
    assert "hello eve" in host.ask("eve").stderr
    assert host.ask("eve", "repo create attic").returncode == 0
    host.clone("eve", "attic").push("main", "skip")
    assert access.creator(access.path_of(host.repos, "attic")) == "eve"
    set_rules(
        host, admin, lambda text: text.replace(f'eve = ["{eve}"]', "").replace(', "eve"', "").replace('"eve"', "")
    )
    assert "Permission denied" in host.ask("eve").stderr
    with pytest.raises(AssertionError, match=r"access\.toml:2: create: there is no user 'eve'"):
        set_rules(host, admin, lambda text: text.replace("create = []", 'create = ["eve"]'))
    assert "hello alice" in host.ask("alice").stderr


def test_user_who_left_the_rules_is_out_whatever_key_opens(host: Host) -> None:
    """A line in authorized_keys that somebody wrote by hand lets nobody in who is not in the rules."""
    shell = git_shell.invocation(host.repos, "shell")
    done = subprocess.run(
        [*shell, "eve"],
        capture_output=True,
        text=True,
        check=False,
        env={"SSH_ORIGINAL_COMMAND": "git-upload-pack 'infra'"},
    )
    assert done.returncode == 1 and "toto: there is no user eve any more" in done.stderr


@pytest.mark.parametrize(
    "command",
    [
        "",
        "bash",
        "sh -c id",
        "git-upload-archive 'infra'",
        "git-receive-pack 'infra'; id",
        "git-receive-pack infra x",
        "git-receive-pack '../infra'",
        "git-receive-pack '/etc/x'",
        "git-upload-pack '--help'",
        "git-upload-pack 'a/../b'",
        "git-upload-pack '.new/infra'",
        "git-upload-pack '~root/infra'",
        "git -c core.pager=id upload-pack infra",
        "git-upload-pack 'infra",
        "git-upload-pack $'infra\\n'",
        "scp -t /tmp",
        "internal-sftp",
        "/usr/bin/git-receive-pack infra",
        "repo create ../x",
        "repo create -x",
        "repo create a b",
        "repo create toto-admin --signed",
        "repo set infra --no-signed",
        "repo admin eve /etc/passwd",
        "accept",
        "accept web1",
        "accept web1 --reason",
        "accept --reason so",
        "accept --by=alice web1 --reason so",
        "accept web1 --by alice --reason so",
        "accept web1 --repo ../x --reason so",
        "accept web1 --repo --reason so",
        "accept ../web1 --reason so",
        "accept host/../web1 --reason so",
        "build",
        "build ../web1",
        "build web1@",
        "build web1@-x",
        "build web1@a..b",
        "build --by=alice",
        "build web1 --by alice",
        "build web1 --repo ../x",
        "build web1 web2",
        "fetch",
        "fetch web1 --repos /tmp",
        "fetch web1 --repo infra --by alice",
        "fetch /nix/store/x",
        "deploy --by=alice",
        "deploy web1 --by alice",
        "deploy ../x",
        "deploy --repo ../x",
        "deploy --commit=--help",
        "deploy --commit",
        "deploy --override",
        "deploy web1 --wait=yes",
        "rehearse --force",
        "revert -- -x",
        "freeze --by=eve web1 --reason so",
        "freeze web1 --reason ' '",
        "check --repos /tmp",
        "job",
        "job search x",
        "job run",
        "job run a b",
        "job run ../a",
        "job run a:1 A=b --by eve",
        "job run a --by=eve",
        "job run A=b",
        "job run a --reason ' '",
        "job run a --repo ../x",
        "job list a b",
        "job list --repos /tmp",
        "job log",
        "job log a:x",
        "job log a --wait",
        "job abort",
        "job abort a b",
        "cancel *",
        "cancel 5a",
        "cancel ../../infra",
        "approve",
        "approve ..",
        "approve ../../infra",
        "approve --by alice",
        "approve 5a0c0000-0000-4000-8000-000000000000/../x",
        "approve '5a0c0000-0000-4000-8000-000000000000\n'",
        "reject *",
        "serve",
    ],
)
def test_whatever_else_is_asked_is_refused(tmp_path: Path, command: str) -> None:
    everyone = access.Allowed(admin=frozenset("*"))
    rules = access.Rules({"alice": ()}, frozenset("*"), {"*": everyone, access.ADMIN: everyone})
    with pytest.raises(InputError):
        git_shell.admit(rules, tmp_path, "alice", command)
    assert not list(tmp_path.iterdir())


def test_a_job_is_asked_for_in_the_name_of_the_user(tmp_path: Path) -> None:
    everyone = access.Allowed(admin=frozenset("*"))
    rules = access.Rules({"alice": ()}, frozenset("*"), {"*": everyone, access.ADMIN: everyone})

    def asked(command: str) -> list[str]:
        words = git_shell.admit(rules, tmp_path, "alice", command)
        assert words[1:4] == ["-P", "-m", "toto.cli"] and words[-4:] == ["--by", "alice", "--repos", str(tmp_path)]
        return words[4:-4]

    assert asked("job run a 'B=x y' --wait --repo infra --reason it is due --wait") == [
        *("job", "run", "--wait", "--repo=infra", "--reason=it is due --wait", "a", "B=x y")
    ]
    assert asked("job list --json") == ["job", "list", "--json"]
    assert asked("job log a:7 -f") == ["job", "log", "-f", "a:7"]


def test_refusals_are_in_plain_words_and_forwarding_is_closed(host: Host) -> None:
    for command in ([], ["id"], ["git-receive-pack '../../etc/x'"]):
        done = host.ask("alice", *command)
        assert done.returncode == 1 and done.stdout == "" and done.stderr.startswith("toto: "), done
        assert "Traceback" not in done.stderr
    done = host.ask("alice", options=["-W", f"127.0.0.1:{host.port}"])
    assert done.returncode != 0 and "forwarding failed" in done.stderr


@pytest.mark.parametrize("form", ["~/infra", "{repos}/infra.git"])
async def test_every_form_of_a_repositorys_address(host: Host, form: str) -> None:
    await git_host.make(host.repos, "infra")
    alice = host.clone("alice")
    alice.git("remote", "set-url", "toto", host.url(form.format(repos=str(host.repos).lstrip("/"))))
    assert "(-o skip)" in alice.push("main", "skip")


async def test_two_pushes_at_once_to_a_new_repository(host: Host) -> None:
    made = await asyncio.gather(*(asyncio.to_thread(host.ask, "alice", "repo create infra") for _ in range(2)))
    assert [each.returncode for each in made] == [0, 0], made
    clones = [host.clone("alice"), host.clone("alice", "again")]
    clones[1].git("remote", "set-url", "toto", host.url("infra"))
    await asyncio.gather(
        *(asyncio.to_thread(each.push, f"main:refs/heads/{index}", "skip") for index, each in enumerate(clones))
    )
    assert len(clones[0].git("ls-remote", "--heads", "toto").splitlines()) == 2


async def test_nothing_of_the_pushers_environment_reaches_the_hooks(host: Host) -> None:
    """Even when sshd accepts GIT_*: a pusher who could set GIT_CONFIG_PARAMETERS could run any command."""
    await git_host.make(host.repos, "infra")
    alice = host.clone("alice")
    alice.push("main", "skip")
    pwned = host.folder / "pwned"
    alice.git("config", "core.sshCommand", host.ssh("alice") + " -o SendEnv=GIT_*")
    env = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "core.hooksPath", "GIT_CONFIG_VALUE_0": str(pwned)}
    done = subprocess.run(
        ["git", "push", "-o", "nonsense", "toto", "main:refs/heads/x"],
        cwd=alice.folder,
        env=os.environ | env,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert "the push option 'nonsense' is not known" in done.stderr


# What a push starts


@pytest.fixture(scope="module")
def deployed(prefect_server: PrefectServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The stand-in with a worker, and `reconcile/parked`, the same without."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "flows").mkdir()
    (folder / "flows" / "reconcile.py").write_text(FLOW)
    (folder / "flows" / "accept.py").write_text(ACCEPT)
    (folder / "flows" / "build.py").write_text(BUILD)
    (folder / "prefect.yaml").write_text(PROJECT)
    found: dict[str, str] = {}

    async def serve(stop: asyncio.Event, ready: Callable[[], None]) -> None:
        found.update(await deployments.deploy(prefect_server.env, root=folder))
        api = prefect_server.api
        own = await api.call("GET", f"/deployments/{found['reconcile/reconcile']}")
        await api.call(
            "POST",
            "/deployments/",
            {
                "name": "parked",
                "flow_id": own["flow_id"],
                "enforce_parameter_schema": True,
                "parameter_openapi_schema": own["parameter_openapi_schema"],
            },
        )
        async with server.running_worker(prefect_server.env, folder / "worker.log", name="here", root=folder):
            ready()
            await stop.wait()

    with background(serve):
        yield Served(api_url=prefect_server.api_url, ui_url="http://ui", deployment_id=found["reconcile/reconcile"])


@pytest.fixture
async def parked(host: Host, deployed: Served) -> Clone:
    await git_host.remember(
        host.repos, Served(api_url=deployed.api_url, ui_url="http://ui", deployment="reconcile/parked")
    )
    await git_host.make(host.repos, "infra")
    return host.clone("alice")


@pytest.fixture
async def alice(host: Host, deployed: Served) -> Clone:
    await git_host.remember(host.repos, deployed)
    await git_host.make(host.repos, "infra")
    return host.clone("alice")


async def runs(api: Api, output: str) -> list[dict[str, Any]]:
    """The runs that the output of a push names."""
    return [await api.call("GET", f"/flow_runs/{run}") for run in re.findall(r"http://ui/runs/flow-run/(\S+)", output)]


@pytest.mark.parametrize(
    ("refspec", "options", "parameters", "words"),
    [
        ("main", [], {}, "toto: rehearsing {commit} in run"),
        (
            "main",
            ["only=web1,web", "only=helm:shop"],
            {"only": ["web1", "web", "helm:shop"]},
            ", only web1,web,helm:shop",
        ),
        ("main", ["rehearse"], {"rehearse_only": True}, "; nothing is rolled out"),
        (
            "main:refs/heads/feature",
            ["rehearse", "only=web1"],
            {"rehearse_only": True, "only": ["web1"]},
            ", only web1; nothing is rolled out",
        ),
        (
            "main:refs/heads/feature",
            ["only=web1"],
            None,
            "feature is not deployed (only main is): `git push -o rehearse`",
        ),
        ("main", ["skip"], None, "main is accepted, and nothing is started (-o skip)"),
        ("main:refs/tags/v1", ["rehearse"], None, ""),
    ],
)
async def test_push_options_become_parameters_of_the_run(
    host: Host,
    parked: Clone,
    prefect_server: PrefectServer,
    refspec: str,
    options: list[str],
    parameters: dict[str, object] | None,
    words: str,
) -> None:
    commit = parked.commit()
    output = parked.push(refspec, *options)
    assert words.format(commit=commit[:12]) in output
    found = await runs(prefect_server.api, output)
    repo = access.path_of(host.repos, "infra")
    assert [run["parameters"] for run in found] == (
        [] if parameters is None else [{"repo": str(repo), "commit": commit, "origin": "push", **parameters}]
    )
    assert all(set(run["tags"]) == {"push", "user:alice"} for run in found)
    assert git_host.waiting(repo) == []


@pytest.mark.parametrize("options", [[], ["only=web1"]])
async def test_name_that_the_hook_prints_is_the_runs_before_and_after(
    alice: Clone, prefect_server: PrefectServer, options: list[str]
) -> None:
    commit = alice.commit()
    output = alice.push("main", *options)
    name = f"infra {commit[:8]}{': only web1' if options else ''} (push)"
    assert f" in run {name}\n" in output
    [run] = await runs(prefect_server.api, output)
    assert run["name"] == name
    assert (await until(prefect_server.api, run["id"], {"COMPLETED"}, 60))["name"] == name


async def test_run_from_the_ui_is_named_after_the_commit_that_it_found(
    host: Host, alice: Clone, deployed: Served, prefect_server: PrefectServer
) -> None:
    alice.push("main", "skip")
    run = await prefect_server.api.call(
        "POST",
        f"/deployments/{deployed.deployment_id}/create_flow_run",
        {"parameters": {"repo": str(access.path_of(host.repos, "infra"))}},
    )
    ended = await until(prefect_server.api, run["id"], {"COMPLETED"}, 60)
    assert ended["name"] == f"infra {alice.git('rev-parse', 'main')[:8]} (ui)"


async def test_unknown_option_is_refused_with_those_that_are_known(host: Host, parked: Clone) -> None:
    output = parked.refused("main", "dry-run")
    assert "toto: the push option 'dry-run' is not known" in output and "-o only=web1,web2" in output
    assert parked.git("ls-remote", "toto") == ""


async def test_push_while_prefect_is_down_keeps_its_options(
    host: Host, parked: Clone, prefect_server: PrefectServer
) -> None:
    repo = access.path_of(host.repos, "infra")
    there = prefect_server.api_url
    parked.git("config", "--file", str(repo / "config"), "toto.apiUrl", f"http://127.0.0.1:{free_port()}/api")
    commit = parked.commit()
    output = parked.push("main:refs/heads/feature", "rehearse", "only=web1,web2", "wait")
    assert "the push is accepted, but Prefect does not answer" in output
    parked.git("config", "--file", str(repo / "config"), "toto.apiUrl", there)
    [run] = await git_host.drain_spool(repo)
    found = await prefect_server.api.call("GET", f"/flow_runs/{run}")
    assert found["parameters"] == {
        "repo": str(repo),
        "commit": commit,
        "origin": "push",
        "only": ["web1", "web2"],
        "rehearse_only": True,
    }
    assert set(found["tags"]) == {"push", "user:alice"}


async def test_plan_is_printed_and_nothing_is_deployed(host: Host, alice: Clone, prefect_server: PrefectServer) -> None:
    output = alice.push("main:refs/heads/feature", "plan")
    assert "planning" in output and "; nothing is deployed" in output
    assert f"the plan of {alice.git('rev-parse', 'main')[:8]}:\nHOST  ACTION\nweb1  deploy\n" in output
    assert output.index("web1  deploy") < output.index("toto: done: plan only: web1 would change")
    [run] = await runs(prefect_server.api, output)
    assert run["state_type"] == "COMPLETED" and run["parameters"]["plan_only"] is True
    assert "rehearse" not in output


async def test_a_pusher_who_waits_sees_the_progress_and_the_end(host: Host, alice: Clone) -> None:
    output = alice.push("main", "wait")
    assert re.search(r"(?m)^ *\d+ s  rehearse-host / web1\n", output)
    assert re.search(r"(?m)^ *\d+ s  web1: no-internet tests\n", output)
    assert re.search(r"(?m)^ *\d+ s  rehearse-host / web1: done$", output)
    assert output.splitlines()[-3:] and "toto: done: web1 deployed" in output
    assert "not for the pusher" not in output and "Beginning" not in output
    alice.commit()
    output = alice.refused("main", "wait", "only=broken")
    assert "web1: tests failed: �[31mnot ok 1�" in output
    assert "toto: failed: web1: rehearsal failed; nothing was touched" in output
    assert "the commits are on toto all the same" in output


@pytest.mark.parametrize(
    ("only", "status", "end"),
    [
        ("web1", 0, "toto: done: web1 deployed"),
        ("broken", 1, "toto: failed: web1: rehearsal failed; nothing was touched"),
        ("away", 3, "toto: done in part: 1 of 2 hosts: web1 deployed; web2 unreachable"),
    ],
)
async def test_a_program_learns_how_a_run_ended(
    host: Host, alice: Clone, prefect_server: PrefectServer, only: str, status: int, end: str
) -> None:
    output = alice.push("main", f"only={only}")
    [run] = await runs(prefect_server.api, output)
    waited = await asyncio.to_thread(host.ask, "alice", "wait", run["id"])
    assert waited.returncode == status, waited
    assert waited.stdout.splitlines()[-1] == end
    alice.commit()
    (alice.push if status == 0 else alice.refused)("main", "wait", f"only={only}")
    assert alice.git("ls-remote", "toto", "main").split()[0] == alice.git("rev-parse", "main")


async def test_run_goes_on_when_the_pusher_goes_away(host: Host, alice: Clone, prefect_server: PrefectServer) -> None:
    pushing = subprocess.Popen(
        ["git", "push", "-o", "wait", "-o", "only=slow", "toto", "main"],
        cwd=alice.folder,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert pushing.stderr is not None
    output = ""
    while "rehearse-host / web1" not in output:
        line = await asyncio.wait_for(asyncio.to_thread(pushing.stderr.readline), 60)
        assert line, output
        output += line
    repo = str(access.path_of(host.repos, "infra"))
    assert followers(repo)
    os.killpg(pushing.pid, signal.SIGINT)  # as ^C does
    await asyncio.to_thread(pushing.wait, 60)
    pushing.stderr.close()
    deadline = time.monotonic() + 60
    while followers(repo):
        assert time.monotonic() < deadline, "a hook still waits after its pusher has gone"
        await asyncio.sleep(0.1)
    [run] = await runs(prefect_server.api, output.replace("remote: ", ""))
    assert run["state_type"] == "RUNNING"
    Path(repo, "toto", "go-on").touch()
    await until(prefect_server.api, run["id"], {"COMPLETED"}, 60)


def followers(repo: str) -> list[int]:
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                words = Path(entry.path, "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"toto.git_host.follow" in words and os.fsencode(repo) in words:
                found.append(int(entry.name))
    return found


async def test_time_to_wait_is_bounded(parked: Clone, host: Host, prefect_server: PrefectServer) -> None:
    [run] = await runs(prefect_server.api, parked.push())
    repo = access.path_of(host.repos, "infra")
    done = await process.run(["python", "-m", "toto.git_host.follow", repo, run["id"], "--at-most", "1"], check=False)
    assert (done.status, done.lines[-1]) == (2, "toto: the time to wait is up; the run goes on")


async def test_waiting_outlives_a_prefect_that_is_restarted(parked: Clone, host: Host) -> None:
    repo = access.path_of(host.repos, "infra")
    parked.git("config", "--file", str(repo / "config"), "toto.apiUrl", f"http://127.0.0.1:{free_port()}/api")
    done = await process.run(["python", "-m", "toto.git_host.follow", repo, "some-run", "--at-most", "2"], check=False)
    assert done.stdout.count("Prefect does not answer; the run goes on") == 1
    assert done.lines[-1] == "toto: the time to wait is up; the run goes on"


async def test_signed_pushes_over_ssh_need_no_file_of_signers(host: Host, parked: Clone) -> None:
    parked.push("main", "skip")
    await git_host.set_policy(access.path_of(host.repos, "infra"), signed=True)
    unsigned = parked.commit()
    assert f"{unsigned[:8]} is not signed" in parked.refused()
    parked.git(
        "-c",
        "gpg.format=ssh",
        "-c",
        f"user.signingKey={host.folder / 'alice'}",
        "commit",
        "--quiet",
        "--amend",
        "-S",
        "--no-edit",
        "--allow-empty",
    )
    assert "rehearsing" in parked.push()


def test_lines_for_sshd_are_what_sshd_takes(host: Host) -> None:
    printed = subprocess.run(
        ["python", "-m", "toto.cli", "repo", "sshd", "--repos", host.repos], capture_output=True, text=True, check=True
    ).stdout
    config = host.folder / "printed"
    config.write_text(f'HostKey "{host.folder}/host"\n{printed}')
    assert SSHD is not None
    shown = subprocess.run(
        [SSHD, "-T", "-f", config, "-C", f"user={getpass.getuser()},host=x,addr=127.0.0.1"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert f"authorizedkeyscommand {shlex.join(git_shell.invocation(host.repos, 'keys'))}" in shown
    assert key("a") not in shown
