"""Jobs of a commit as Prefect has them: deployments that come and go with it, places in contexts, what follows."""

import asyncio
import getpass
import json
import os
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from prefect.client.schemas.objects import State
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings

from blocks import JobAccess, WebhookVenue
from flows.jobs import job
from flows.reconcile import reconcile
from tasks import jobs
from tasks.job_access import Access
from tests.conftest import PrefectServer
from tests.flows.test_approve import asked
from tests.machine.test_ssh import needs_sshd, sshd
from tests.repos import InfraRepo
from tests.repos import git as run_git
from tests.venue_servers import http_server
from toto.base import paths, process
from toto.base.errors import InputError
from toto.base.prefect_api import ServerError
from toto.cli import jobs as cli
from toto.infra_repo import git
from toto.jobs import folder, registered
from toto.jobs.history import History, Run
from toto.jobs.history import State as HowEnded
from toto.ledger import approvals
from toto.machine import keys
from toto.server import deployments, environment
from toto.server import serve as server

QUIET = "NETWORK=none\n"
Started = Callable[..., Awaitable[State[Any]]]


class Infra(InfraRepo):
    """A repo of jobs, and what Prefect has of it."""

    def __init__(self, directory: Path, on: PrefectServer) -> None:
        super().__init__(directory)
        self.on, self.history = on, History(self.bare)

    def jobs(self, **of: str | None) -> str:
        """Commit files of `jobs/`, `a_run` for `a.run`. No job has a network, unless its `.conf` says so."""
        quiet: dict[str, str | None] = {
            f"jobs/{name.removesuffix('_run')}.conf": QUIET for name in of if name.endswith("_run") and of[name]
        }
        given = {f"jobs/{name.replace('__', '/').replace('_', '.')}": text for name, text in of.items()}
        return self.commit(quiet | given)

    async def register(self, pool: str = "toto-of-tests") -> str:
        commit = git.resolve(self.bare, "HEAD")
        jobs = folder.read(self.work)
        return str(await registered.register(self.on.api.call, self.bare, commit, jobs, pool))

    async def found(self) -> dict[str, Mapping[str, Any]]:
        wanted = {"deployments": {"tags": {"all_": [registered.TAG]}}}
        listed = await self.on.api.call("POST", "/deployments/filter", wanted)
        return {each["name"].removeprefix("infra:"): each for each in listed}

    async def start(self, name: str, **parameters: Any) -> str:
        """Start a job by its deployment; the flow run's id."""
        deployment = (await self.found())[name]
        path = f"/deployments/{deployment['id']}/create_flow_run"
        return str((await self.on.api.call("POST", path, {"parameters": parameters}))["id"])

    async def ended(self, run: str) -> Mapping[str, Any]:
        """The final state of a flow run."""
        while True:
            state: dict[str, Any] = (await self.on.api.call("GET", f"/flow_runs/{run}"))["state"]
            if state["type"] in ("COMPLETED", "FAILED", "CANCELLED", "CRASHED"):
                return state
            await asyncio.sleep(0.2)


@pytest.fixture
async def infra(prefect_server: PrefectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Infra]:
    monkeypatch.setenv(paths.STATE, str(tmp_path / "state"))
    made = Infra(tmp_path, prefect_server)
    run_git("config", "toto.apiUrl", prefect_server.api_url, cwd=made.bare)
    await deployments.ensure_pool(prefect_server.api, "toto-of-tests")
    yield made
    for each in (await made.found()).values():
        await prefect_server.api.call("DELETE", f"/deployments/{each['id']}")


@pytest.fixture
def run(infra: Infra, tmp_path: Path) -> Started:
    """Runs a job in this process."""

    async def ran(name: str, **more: Any) -> State[Any]:
        return await job(infra.bare, name, return_state=True, **more)

    return ran


@pytest.fixture(autouse=True)
def _settings(prefect_server: PrefectServer, tmp_path: Path) -> Any:
    with temporary_settings({PREFECT_API_URL: prefect_server.api_url, PREFECT_HOME: tmp_path / "prefect"}):
        yield


async def test_deployments_come_change_and_go_with_the_commit(infra: Infra) -> None:
    conf = "PARAMS=LEVEL=low|high -- how much\nPARAMS=WHO\nSCHEDULE=0 3 * * * Europe/Berlin\nDESCRIPTION=Saves all\n"
    infra.jobs(a_run="#!/bin/sh\n", a_conf=conf, b_run="#!/bin/sh\n", groups_conf="Nightly=^a$\n")
    assert await infra.register() == "added: a, b"
    a = (await infra.found())["a"]
    assert (a["description"], a["entrypoint"], "Nightly" in a["tags"]) == ("Saves all", "flows.jobs.job", True)
    (schedule,) = a["schedules"]
    assert (schedule["schedule"]["cron"], schedule["schedule"]["timezone"]) == ("0 3 * * *", "Europe/Berlin")
    form = a["parameter_openapi_schema"]["properties"]["parameters"]
    assert (form["properties"]["LEVEL"]["enum"], form["required"]) == (["low", "high"], ["WHO"])
    path = f"/deployments/{a['id']}/schedules/{schedule['id']}"
    await infra.on.api.call("PATCH", path, {"active": False})
    commit = infra.commit({"README.md": "x"})
    assert await infra.register() == ""
    again = (await infra.found())["a"]
    assert again["parameters"]["commit"] == commit
    assert not again["schedules"][0]["active"], "what a person made of an unchanged job stays"
    infra.jobs(a_conf="DESCRIPTION=Different\n", b_run=None, b_conf=None, c_run="#!/bin/sh\n")
    assert await infra.register() == "added: c; changed: a; removed: b"
    found = await infra.found()
    assert (sorted(found), found["a"]["schedules"]) == (["a", "c"], [])


async def test_a_run_that_deploys_a_commit_registers_its_jobs(infra: Infra) -> None:
    infra.commit({"machines.yaml": "machines: []\n"})
    infra.jobs(a_run="#!/bin/sh\n")
    with suppress(ServerError):
        await infra.on.api.call("DELETE", f"/work_pools/{deployments.POOL}")
    state = await reconcile(infra.bare, return_state=True)
    assert state.is_completed(), "a good roll-out stays good when Prefect does not take the jobs"
    assert str(state.message).endswith("; its jobs could not be registered: the next run tries again")
    await deployments.ensure_pool(infra.on.api, deployments.POOL)
    state = await reconcile(infra.bare, return_state=True)
    assert state.is_completed() and "registered" not in str(state.message), state.message
    assert (await infra.found())["a"]["parameters"]["commit"] == git.resolve(infra.bare, "HEAD")
    infra.jobs(a_run=None, a_conf=None)
    assert (await reconcile(infra.bare, return_state=True)).is_completed()
    assert await infra.found() == {}
    infra.jobs(a_run="#!/bin/sh\n", a_conf="COLOR=red\n")
    state = await reconcile(infra.bare, return_state=True)
    assert state.is_failed() and "jobs/a.conf:1" in str(state.message), state.message
    assert await infra.found() == {}


async def test_a_run_tells_how_it_ended(infra: Infra, run: Started) -> None:
    infra.jobs(
        a_run="#!/bin/sh\necho $A $B $LAMINAR_REASON; echo x >$ARCHIVE/x\n",
        a_conf=f"{QUIET}PARAMS=A=1|2\n",
        b_run="#!/bin/sh\nexit 3\n",
        c_run="#!/bin/sh\nkill -TERM $$\n",
    )
    state = await run("a", parameters={"B": "3"}, reason="smoke")
    assert (state.type.value, str(state.message).rpartition(" in ")[0]) == ("COMPLETED", "a:1 succeeded")
    done = infra.history.get("a", 1)
    assert (done.reason, done.parameters, done.context) == ("smoke", {"A": "1", "B": "3"}, "default")
    assert "1 3 smoke\n" in infra.history.log(done).read_text()
    state = await run("b")
    assert (state.type.value, state.message) == ("FAILED", "b:1 failed: jobs/b.run exited with status 3")
    state = await run("c")
    assert (state.name, state.message) == ("Aborted", "c:1 aborted: jobs/c.run was ended by SIGTERM")
    for name, more, why in (("a", {"A": "9"}, "A should be one of 1, 2"), ("d", {}, "there is no job 'd'")):
        state = await run(name, parameters=more)
        assert state.type.value == "FAILED" and why in str(state.message)
    assert infra.history.queue("a").number == 2, "a run that is refused has no number"


async def test_contexts_limit_how_many_run_at_once(infra: Infra, run: Started) -> None:
    count = "#!/bin/sh\nmkdir $WORKSPACE/$RUN; ls $WORKSPACE | wc -l; sleep 1; rmdir $WORKSPACE/$RUN\n"
    infra.jobs(
        a_run=count,
        a_conf=f"{QUIET}CONTEXTS=arm-*\n",
        **{"contexts__arm-1_conf": "EXECUTORS=1\n", "contexts__arm-2_conf": "EXECUTORS=1\n"},
    )
    async with asyncio.timeout(300):
        states = await asyncio.gather(*(run("a") for _ in range(5)))
    assert {each.type.value for each in states} == {"COMPLETED"}
    done = list(infra.history.runs("a"))
    said = [infra.history.log(each).read_text().splitlines()[-1] for each in done]
    assert set(said) <= {"1", "2"}
    assert {each.context for each in done} == {"arm-1", "arm-2"}
    assert sorted(each.number for each in done) == [1, 2, 3, 4, 5]


async def test_many_runs_at_once_take_their_turns(infra: Infra) -> None:
    count = 100 if os.environ.get("TOTO_CUTS") else 25
    infra.jobs(a_run="#!/bin/sh\n", a_conf=f"{QUIET}CONTEXTS=arm\n", contexts__arm_conf="EXECUTORS=2\n")
    found = folder.read(infra.work)
    runs = [infra.history.queue("a", flow_run=str(uuid.uuid4()), owner=process.owner()) for _ in range(count)]
    at_work, most, order = 0, 0, list[int]()

    async def one(queued: Run) -> None:
        nonlocal at_work, most
        work = jobs.Work(infra.bare, infra.work, found, found.job("a"), queued, Access())
        async with jobs.place(work) as context:
            at_work += 1
            most = max(most, at_work)
            order.append(queued.number)
            infra.history.begin(queued, context.name)
            await asyncio.sleep(0.1)
            infra.history.end(queued, HowEnded.SUCCESS)
            at_work -= 1

    async with asyncio.timeout(600):
        await asyncio.gather(*map(one, reversed(runs)))
    assert most <= 2 and infra.history.open() == []
    waited = order[count // 2 :]  # (the first ones may have begun before the others stood in the line)
    assert waited == sorted(waited)


async def test_a_job_that_is_removed_while_it_runs_ends_as_it_would_have(infra: Infra, run: Started) -> None:
    infra.jobs(
        a_run="#!/bin/sh\ntouch $WORKSPACE/ready; until [ -e $WORKSPACE/go ]; do sleep 0.1; done; exit 1\n",
        a_conf=f"{QUIET}RETRY=1\n",
        a_after="#!/bin/sh\necho after\n",
    )
    await infra.register()
    workspace = infra.history.workspace("a")
    async with asyncio.timeout(240):
        running = asyncio.ensure_future(run("a"))
        while not (workspace / "ready").exists():
            await asyncio.sleep(0.1)
        infra.jobs(a_run=None, a_conf=None, a_after=None)
        assert await infra.register() == "removed: a"
        (workspace / "go").touch()
        state = await running
    assert state.message == "a:1 failed: jobs/a.run exited with status 1"
    assert "after\n" in infra.history.log(infra.history.get("a", 1)).read_text()
    assert infra.history.open() == [], "there is nothing to try again"


async def test_a_job_after_a_job_is_queued_when_that_succeeds(infra: Infra, run: Started) -> None:
    infra.jobs(a_run="#!/bin/sh\nexit $FAILS\n", b_run="#!/bin/sh\n", b_conf=f"{QUIET}AFTER=a\n", c_run="#!/bin/sh\n")
    await infra.register()
    await run("a", parameters={"FAILS": "1"})
    assert list(infra.history.runs("b")) == []
    await run("a", parameters={"FAILS": "0"})
    (queued,) = infra.history.runs("b")
    assert (queued.state, queued.parent, queued.reason) == ("queued", "a:2", "after a:2")
    state = await run("b", number=queued.number)
    assert (state.type.value, infra.history.get("b", 1).state) == ("COMPLETED", "success")
    state = await run("b", number=queued.number)
    assert "b:1 is success already" in str(state.message)
    waits = infra.history.queue("b", owner=f"{os.getppid()}.{process.started(os.getppid())}")
    state = await run("b", number=waits.number)
    assert "waits for its turn already" in str(state.message)
    assert infra.history.get("b", waits.number).state == "queued", "it is the other one's"


async def test_a_job_is_started_read_and_aborted_from_the_command_line(
    infra: Infra, run: Started, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")  # (pytest -n gives its processes 80)
    infra.jobs(
        a_run="#!/bin/sh\necho level $LEVEL, $LAMINAR_REASON\n",
        a_conf=f"{QUIET}PARAMS=LEVEL=low|high\nDESCRIPTION=Saves all\n",
        b_run="#!/bin/sh\nexit 1\n",
    )
    await infra.register()

    async def said(status: int, verb: Awaitable[int] | int) -> str:
        assert (verb if isinstance(verb, int) else await verb) == status
        return capsys.readouterr().out

    for wrong, why in (
        (cli.run("a", infra.bare.parent, ["LEVEL=x"], infra.bare), "LEVEL should be one of low, high"),
        (cli.run("a", infra.bare.parent, ["LEVEL"], infra.bare), "no NAME=VALUE"),
        (cli.run("c", infra.bare.parent, [], infra.bare), "no job 'c'"),
        (cli.abort("a", infra.bare.parent, infra.bare), "no run that waits or runs"),
        (cli.run("a", infra.bare.parent, [], by="eve"), "has no access.toml"),
        (cli.log("a", infra.bare.parent, infra.bare), "it has no runs"),
        (cli.log("a:x", infra.bare.parent, infra.bare), "is no run"),
        (cli.log("../a:1", infra.bare.parent, infra.bare), "there is no job"),
    ):
        with pytest.raises(InputError, match=why):
            await wrong
    assert await said(0, cli.run("a", infra.bare.parent, ["LEVEL=high"], infra.bare, reason="smoke")) == "a:1\n"
    assert await said(0, cli.run("a", infra.bare.parent, [], infra.bare)) == "a:2\n"
    why = f"smoke (by {getpass.getuser()} (on toto itself))"
    await run("a", number=1, parameters={"LEVEL": "high"})
    assert (
        await said(0, cli.log("a:1", infra.bare.parent, infra.bare, following=True))
        == f"[toto] jobs/a.run\nlevel high, {why}\n"
    )
    assert await said(0, cli.abort("a", infra.bare.parent, infra.bare)) == "a:2 is aborted\n"
    assert infra.history.get("a", 2).why == "it was cancelled while it waited"
    with pytest.raises(InputError, match="a:2 is aborted already"):
        await cli.abort("a:2", infra.bare.parent, infra.bare)
    await run("b")
    assert await said(1, cli.log("b", infra.bare.parent, infra.bare, following=True)) != ""
    rows = json.loads(await said(0, cli.list_(infra.bare.parent, None, infra.bare, as_json=True)))["items"]
    assert [(row["job"], row["state"]) for row in rows] == [
        ("a", "aborted: it was cancelled while it waited"),
        ("b", "failed: jobs/b.run exited with status 1"),
    ]
    listed = await said(0, cli.list_(infra.bare.parent, "a", infra.bare))
    assert [line.split()[:2] for line in listed.splitlines()[1:]] == [["a:2", "aborted:"], ["a:1", "success"]]
    assert await said(0, cli.search("^level H", None, infra.bare, ignore=True)) == f"a:1:2: level high, {why}\n"
    assert await said(1, cli.search("level", ["b"], infra.bare)) == ""


async def test_a_run_that_fails_is_tried_again_and_not_queued_twice(infra: Infra, run: Started) -> None:
    infra.jobs(
        a_run="#!/bin/sh\nexit 1\n",
        a_conf=f"{QUIET}RETRY=2\nRETRY_WAIT=100\nONCE=yes\n",
        b_run="#!/bin/sh\necho $OS\n",
        b_conf=f"{QUIET}MATRIX=OS=debian|nixos\nMATRIX=ARCH=arm|x86\n",
    )
    await infra.register()
    await run("a")
    (again,) = infra.history.open()
    assert (again.label, again.parent, again.attempt, again.reason) == ("a:2", "a:1", 1, "try 2 of 3, after a:1")
    due = await infra.on.api.call("GET", f"/flow_runs/{again.flow_run}")
    assert due["state_type"] == "SCHEDULED"
    state = await run("a")
    assert (state.type.value, state.message) == ("COMPLETED", "a:2 is queued already, and not twice")
    await run("a", number=2)
    (third,) = infra.history.open()
    due = [await infra.on.api.call("GET", f"/flow_runs/{each.flow_run}") for each in (again, third)]
    waits = [each["expected_start_time"] for each in due]
    assert third.attempt == 2 and waits[0] < waits[1]
    await run("a", number=3)
    assert infra.history.open() == []
    state = await run("b", parameters={"ARCH": "arm"})
    assert state.message == "b:1, b:2: a run for each combination"
    assert [each.parameters for each in infra.history.open()] == [
        {"ARCH": "arm", "OS": "debian"},
        {"ARCH": "arm", "OS": "nixos"},
    ]


async def test_runs_with_a_lock_in_common_wait_for_each_other(infra: Infra, run: Started) -> None:
    once = "#!/bin/sh\nmkdir $WORKSPACE/held || exit 1; sleep 1; rmdir $WORKSPACE/held\n"
    infra.jobs(a_run=once, a_conf=f"{QUIET}LOCKS=disk,a\n")
    async with asyncio.timeout(300):
        states = await asyncio.gather(*(run("a") for _ in range(3)))
    assert {each.type.value for each in states} == {"COMPLETED"}, [each.message for each in states]


@pytest.mark.parametrize("approved", [True, False])
async def test_a_run_waits_for_an_approval_where_its_job_needs_one(infra: Infra, run: Started, approved: bool) -> None:
    infra.jobs(a_run="#!/bin/sh\n", a_conf=f"{QUIET}APPROVE=600\n")
    async with asyncio.timeout(240):
        work = asyncio.ensure_future(run("a", parameters={"A": "b"}, reason="because"))
        flow_run, question = await asked(infra.bare)
        assert question.plans == {"a:1": f"a.run of {git.resolve(infra.bare, 'HEAD')[:8]}, because\n  A=b"}
        assert infra.history.get("a", 1).state == "queued"
        await approvals.answer(infra.bare, flow_run, approved=approved, by="alice")
        state = await work
    ended = infra.history.get("a", 1)
    if approved:
        assert (state.type.value, ended.state) == ("COMPLETED", "success")
    else:
        assert (state.type.value, ended.state, ended.why) == ("FAILED", "failed", "its plan was rejected by alice")


async def test_venues_are_notified_of_a_change_of_state_alone(infra: Infra, run: Started) -> None:
    infra.jobs(a_run="#!/bin/sh\necho no room left\nexit $FAILS\n", a_conf=f"{QUIET}VENUES=job-of-tests, job-none\n")
    with http_server() as heard:
        await WebhookVenue(url=heard.address).save("job-of-tests", overwrite=True)
        for fails in "0110":
            await run("a", parameters={"FAILS": fails})
    first, second = (json.loads(each.body) for each in heard.requests)
    assert first["title"] == "[infra] job a failed" and "no room left" in first["text"]
    assert (second["state"], second["title"]) == ("recovered", "[infra] job a fine again")


@needs_sshd
@pytest.mark.skipif(os.geteuid() != 0, reason="toto logs in as root, or by sudo")
async def test_a_job_gets_what_its_conf_names_and_a_block_gives(infra: Infra, run: Started, tmp_path: Path) -> None:
    (tmp_path / "machine").mkdir()
    async with asyncio.timeout(240), sshd(tmp_path / "machine") as machine:
        with http_server() as web:
            place = web.address.removeprefix("http://").partition("/")[0]
            text = "apiVersion: v1\nclusters: []\n"
            access = JobAccess(variables={"TOKEN": "s3cret-word"}, endpoints=[place], kubeconfig=text)
            await access.save("infra--shop", overwrite=True)
            for_ssh = {"address": machine.target.address, "ssh": {"port": machine.target.port, "user": "root"}}
            infra.commit({"machines.yaml": json.dumps({"machines": [{"name": "web1", **for_ssh}]})})
            identity = await keys.of_machines(infra.bare)
            with (machine.directory / "authorized").open("a") as file:
                file.write(await keys.public_half(identity) + "\n")
            script = f"""#!/bin/bash
            echo token ${{#TOKEN}} $TOKEN
            grep clusters $KUBECONFIG
            (exec 3<>/dev/tcp/{place.replace(":", "/")}) && echo reached
            on-host web1 id -un; on-host web1 sh -c 'exit 7'; echo $?
            on-host web2 id 2>&1; echo $?
            find / -name '*id_ed25519*' 2>/dev/null || :
            """
            infra.jobs(a_run=script, a_conf=f"{QUIET}ACCESS=shop\nMACHINES=web1\n")
            state = await run("a")
        said = infra.history.log(infra.history.get("a", 1)).read_text().splitlines()[1:]
        assert said == [
            "token 11 ******",
            "clusters: []",
            "reached",
            "root",
            "7",
            "usage: on-host MACHINE [--stdin] COMMAND [ARGUMENT...]; the job's MACHINES are web1",
            "64",
        ], (said, state.message)
    other = infra.jobs(a_conf=f"{QUIET}ACCESS=none-such\n")
    assert "save a block `Toto job access` as infra--none-such" in str((await run("a")).message)
    run_git("update-ref", "refs/heads/main", f"{other}~1", cwd=infra.bare)
    run_git("branch", "side", other, cwd=infra.bare)
    assert "is not on the deployed branch" in str((await run("a", commit="side")).message)


async def test_old_runs_are_removed(infra: Infra, run: Started) -> None:
    infra.jobs(a_run="#!/bin/sh\n", a_conf=f"{QUIET}KEEP=1\n")
    for _ in range(3):
        await run("a")
    waits = infra.history.queue("a")
    assert [each.number for each in infra.history.runs("a")] == [4, 3]
    assert (await run("a")).is_completed(), "also when it is the one that is removed"
    infra.history.end(waits, HowEnded.ABORTED)
    last = infra.history.queue("a")
    infra.history.queue("a")
    assert (await run("a", number=last.number)).is_completed(), "its own record is one of the old ones"


@asynccontextmanager
async def working(infra: Infra, home: Path) -> AsyncIterator[None]:
    """A worker of the pool with its fork server, as `toto serve` runs them."""
    env = {**infra.on.env, paths.STATE: str(paths.state_home()), environment.REPOS: str(infra.bare.parent)}
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(server.running_fork_server(env, home / "runs.log"))
        await stack.enter_async_context(
            server.running_worker(env, home / "worker.log", name="jobs", pool="toto-of-tests")
        )
        yield


@pytest.mark.slow
async def test_a_worker_runs_jobs_and_a_cancel_is_an_abort(infra: Infra, tmp_path: Path) -> None:
    infra.jobs(
        a_run="#!/bin/sh\necho $A\n",
        b_run="#!/bin/sh\necho ready; sleep 3000 & wait\n",
        b_after="#!/bin/sh\nsleep 33; echo after $RESULT\n",  # (the worker gives up its own part after 30 s)
        b_conf=f"{QUIET}GRACE=40\n",
        c_run="#!/bin/sh\nlaminarc run a A=from-c && laminarc start d && laminarc run e; echo $?\nlaminarc abort d 1\n",
        d_run="#!/bin/sh\nsleep 3000\n",
        e_run="#!/bin/sh\nexit 1\n",
    )
    await infra.register()
    async with asyncio.timeout(300), working(infra, tmp_path):
        state = await infra.ended(await infra.start("a", parameters={"A": "given"}))
        assert state["type"] == "COMPLETED", state
        assert "given\n" in infra.history.log(infra.history.get("a", 1)).read_text()
        state = await infra.ended(await infra.start("c", reason="because"))
        said = infra.history.log(infra.history.get("c", 1)).read_text().splitlines()
        assert said == ["[toto] jobs/c.run", "a:2", "d:1", "e:1", "3"], said
        child = infra.history.get("a", 2)
        assert (child.parent, child.reason, child.parameters) == ("c:1", "because", {"A": "from-c"})
        while not infra.history.get("d", 1).state.ended:
            await asyncio.sleep(0.2)
        assert infra.history.get("d", 1).state == "aborted"
        stubborn = await infra.start("b")
        while not list(infra.history.runs("b")) or not infra.history.log(infra.history.get("b", 1)).exists():
            await asyncio.sleep(0.2)
        await infra.on.api.call(
            "POST", f"/flow_runs/{stubborn}/set_state", {"state": {"type": "CANCELLING"}, "force": True}
        )
        assert (await infra.ended(stubborn))["type"] == "CANCELLED"
        while not (ended := infra.history.get("b", 1)).state.ended:
            await asyncio.sleep(0.2)
        assert ended.state == "aborted"
        assert infra.history.log(ended).read_text().splitlines()[-1] == "after aborted"
