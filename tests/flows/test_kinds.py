"""A kind is one row in each of two tables: a fourth one goes through a whole reconcile with no other file touched."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pytest
from prefect import tags
from prefect.client.schemas.objects import State
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings
from prefect.utilities.annotations import quote

from flows import kinds as flow_kinds
from flows.accept import accept
from flows.drift import drift
from flows.reconcile import reconcile
from flows.stage import Stage, stage
from flows.stages import detect
from tasks.run import Run
from tests.conftest import PrefectServer
from tests.repos import InfraRepo, git
from tests.toy import steps as toy
from tests.toy.kind import DeployedFile, FileKind
from toto.base import paths
from toto.jobs import queue
from toto.jobs.history import History
from toto.ledger.history import What, events
from toto.ledger.ledger import Entry, Frozen, Ledger
from toto.ledger.steps import freeze
from toto.ledger.target import Target
from toto.plan import kinds, make
from toto.plan.verdict import Verdict
from toto.server import deployments

T = TypeVar("T")


class Files:
    """An infra repo with files only, and the folder that they are copied to."""

    def __init__(self, folder: Path) -> None:
        self.repo, self.to = InfraRepo(folder / "repo"), folder / "to"
        self.to.mkdir()
        self.repo.commit({"machines.yaml": "machines: []\n", "files/TO": f"{self.to}\n"})

    def commit(self, files: Mapping[str, str | None]) -> str:
        return self.repo.commit({f"files/{name}": text for name, text in files.items()})

    async def reconcile(self, **parameters: Any) -> State[Any]:
        return await reconcile(self.repo.bare, return_state=True, **parameters)

    def entry(self, name: str) -> Entry:
        return Ledger(self.repo.bare).read().get(Target("file", name))

    def there(self) -> dict[str, str]:
        return {path.name: path.read_text() for path in self.to.iterdir()}


@pytest.fixture
async def files(prefect_server: PrefectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Files]:
    monkeypatch.setenv("TOTO_STATE", str(tmp_path / "state"))
    monkeypatch.setitem(kinds.KINDS, "file", FileKind())
    monkeypatch.setitem(flow_kinds.STEPS, "file", toy.STEPS)
    with temporary_settings({PREFECT_API_URL: prefect_server.api_url, PREFECT_HOME: tmp_path / "prefect"}):
        yield Files(tmp_path)


async def test_a_fourth_kind_is_detected_rehearsed_rolled_out_and_recorded(files: Files) -> None:
    files.commit({"a": "one"})
    assert (await files.reconcile()).message.endswith("file/a deployed")  # type: ignore[union-attr]
    assert files.there() == {"a": "one"}
    good = DeployedFile.of(files.entry("a").good)
    assert good is not None and good.size == 3
    assert [event.what for event in events(files.repo.bare)] == [What.BEGUN, What.GOOD]
    assert (await files.reconcile()).message.endswith("nothing to do (1 file as wanted)")  # type: ignore[union-attr]


async def test_what_is_frozen_in_the_ledger_is_not_rolled_out_also_when_the_run_is_on_its_way(files: Files) -> None:
    frozen = Frozen(by="alice", why="an audit")
    files.commit({"a": "one, which freezes b", "b": "two", "c": "three"})
    await Ledger(files.repo.bare).write(Target("file", "c"), freeze(frozen), "file/c: frozen")
    state = await files.reconcile()
    said = state.message or ""
    assert state.name == "Partial" and files.there() == {"a": "one, which freezes b"}
    assert "file/c held back: frozen by alice: an audit" in said and "file/b held back: frozen by a: so it says" in said
    for name in ("b", "c"):
        await Ledger(files.repo.bare).write(Target("file", name), freeze(None), f"file/{name}: unfrozen")
    await Ledger(files.repo.bare).write(Target("file", "a"), freeze(frozen), "file/a: frozen")
    assert (await files.reconcile()).is_completed() and set(files.there()) == {"a", "b", "c"}
    files.commit({"a": "four"})
    assert (await files.reconcile(override="it is urgent")).name == "Completed" and files.there()["a"] == "four"


async def test_plans_of_one_repo_are_made_side_by_side(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FileKind, "evaluated", True)
    begun, other_made = asyncio.Event(), asyncio.Event()

    class Held(make.Shown):
        async def all(self, count: int, work: Callable[[make.Note], Awaitable[T]]) -> T:
            begun.set()
            await other_made.wait()
            return await work(lambda: None)

    first, second = files.commit({"a": "one"}), files.commit({"a": None, "b": "two"})
    async with asyncio.timeout(60):
        held = asyncio.create_task(make.make(files.repo.bare, first, "held", shown=Held()))
        await begun.wait()
        other = await make.make(files.repo.bare, second, "other")
        other_made.set()
        assert [[each.label for each in made.orders] for made in (await held, other)] == [["file/a"], ["file/b"]]


async def test_only_a_host_can_be_only_tried(files: Files) -> None:
    files.commit({"a": "one"})
    state = await files.reconcile(try_for=60)
    assert state.is_failed() and "only a host is tried" in (state.message or "") and files.there() == {}


async def test_no_more_runs_are_at_work_than_the_servers_rules_allow(
    files: Files, prefect_server: PrefectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = paths.state_home() / "server.toml"
    rules.write_text("[runs]\nper_repo = 3\nper_pusher = 2\n")
    files.commit({"a": "one"})
    at_work, most = 0, 0

    async def counted(run: Run) -> Run:
        nonlocal at_work, most
        at_work += 1
        most = max(most, at_work)
        await asyncio.sleep(1)
        at_work -= 1
        return await detect(run)

    monkeypatch.setattr("flows.reconcile.detect", counted)

    async def runs(*pushers: str) -> int:
        nonlocal most
        most = 0
        states = await asyncio.gather(*(one(pusher) for pusher in pushers))
        assert all(state.is_completed() for state in states)
        return most

    async def one(pusher: str) -> State[Any]:
        with tags(f"user:{pusher}"):
            return await files.reconcile(rehearse_only=True)

    assert await runs("alice", "alice", "alice", "alice") == 2
    assert await runs("alice", "alice", "bob", "bob", "carol") == 3
    rules.write_text("[runs]\nper_repo = 1\n")
    assert await runs("alice", "bob", "carol") == 1


async def test_a_commit_that_is_not_on_the_deployed_branch_is_planned_and_rehearsed_and_nothing_else(
    files: Files,
) -> None:
    """Whatever the parameters say, and however the commit is named."""
    files.commit({"a": "one"})
    await files.reconcile()
    other = files.commit({"a": "two"})
    for words in (("update-ref", "refs/heads/main", f"{other}~1"), ("tag", "v7", other), ("branch", "side", other)):
        git(*words, cwd=files.repo.bare)
    for commit in (other, "v7", "side"):
        state = await files.reconcile(commit=commit, force=True, override="now", only=["file/a"])
        assert state.is_failed() and f"{other[:8]} is not on main, the deployed branch" in str(state.message)
    assert (await files.reconcile(commit="v7", plan_only=True)).is_completed()
    assert (await files.reconcile(commit="side", rehearse_only=True)).is_completed()
    assert files.there() == {"a": "one"}
    assert [event.what for event in events(files.repo.bare)] == [What.BEGUN, What.GOOD]


async def test_a_fourth_kind_is_reverted_in_reverse_order_with_its_own_record(files: Files) -> None:
    files.commit({"a": "one", "m": "one"})
    await files.reconcile()
    files.commit({"a": "two", "m": "two", "z": "too late"})
    state = await files.reconcile()
    assert state.is_failed() and "file/z: roll-out failed: it came too late" in str(state.message)
    assert files.there() == {"a": "one", "m": "one"}
    assert str(state.message).endswith("file/z, file/m, file/a reverted")
    good = DeployedFile.of(files.entry("a").good)
    assert good is not None and good.size == 3 and files.entry("a").intent is None
    assert files.entry("z").good is None and files.entry("z").reverted is not None


async def test_jobs_follow_what_a_roll_out_did(files: Files, prefect_server: PrefectServer) -> None:
    await deployments.ensure_pool(prefect_server.api, deployments.POOL)
    history = History(files.repo.bare)
    try:
        good = files.repo.commit(
            {
                "jobs/up.run": "#!/bin/sh\n",
                "jobs/up.conf": "ON=deployed\n",
                "jobs/down.run": "#!/bin/sh\n",
                "jobs/down.conf": "ON=failed, reverted\n",
                "files/a": "one",
                "files/m": "one",
            }
        )
        await files.reconcile()
        (up,) = history.open()
        assert (up.label, up.reason) == ("up:1", f"deployed: {good[:8]}")
        assert up.parameters["TOTO_DEPLOYED"] == "file/a file/m" and up.parameters["TOTO_COMMIT"] == good
        await files.reconcile()
        assert len(history.open()) == 1, "nothing was deployed, so nothing follows"
        files.repo.commit({"files/a": "two", "files/z": "too late", "jobs/down.conf": "ON=failed\n"})
        await files.reconcile()
        _, down = history.open()
        assert down.reason.startswith("failed, reverted: "), "the jobs are those of the commit that is deployed"
        assert (down.parameters["TOTO_FAILED"], down.parameters["TOTO_REVERTED"]) == ("file/z", "file/a file/z")
        assert down.parameters["TOTO_DEPLOYED"] == ""
        await files.reconcile(rehearse_only=True)
        assert len(history.open()) == 2
    finally:
        for each in (await queue.deployed(prefect_server.api.call, files.repo.bare)).values():
            await prefect_server.api.call("DELETE", f"/deployments/{each['id']}")


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("refused", ["files", "revert"])
async def test_what_was_touched_is_reverted_though_prefect_refuses_a_stage(
    files: Files, monkeypatch: pytest.MonkeyPatch, refused: str, when: str
) -> None:
    """Prefect cannot be made to fail at one instant of a run: a stage that raises stands in for it."""

    def refusing(name: str, about: Callable[[Run], str]) -> Callable[[Callable[[Run], Awaitable[None]]], Stage]:
        if name != refused:
            return stage(name, about)

        def make(work: Callable[[Run], Awaitable[None]]) -> Stage:
            async def staged(run: Run) -> Run:
                if when == "after":
                    run = await stage(name, about)(work)(run)
                raise RuntimeError("Prefect answers 503")

            return staged

        return make

    files.commit({"a": "one"})
    await files.reconcile()
    monkeypatch.setattr("flows.stages.stage", refusing)
    monkeypatch.setattr("flows.revert.stage", refusing)
    files.commit({"a": "two", "z": "too late" if refused == "revert" else "fine"})
    state = await files.reconcile()
    assert state.is_failed()
    assert files.there() == {"a": "one"}
    assert not Ledger(files.repo.bare).read().open_intents
    if refused == "files":
        assert "Prefect answers 503" in str(state.message)


async def test_prefect_stores_no_plan_among_the_parameters_of_a_roll_out(
    files: Files, prefect_server: PrefectServer
) -> None:
    files.commit({"a": "one"})
    state = await files.reconcile()
    runs = await prefect_server.api.call(
        "POST", "/flow_runs/filter", {"flows": {"name": {"any_": ["roll out file", "files"]}}}
    )
    assert state.is_completed()
    assert {run["parameters"].get("verdict") for run in runs if run["name"] == "a"} >= {"<Verdict>"}
    assert {run["parameters"].get("run") for run in runs} >= {"<Run>"}


async def test_a_fourth_kind_that_fails_its_rehearsal_touches_nothing(files: Files) -> None:
    files.commit({"a": "one", "b": "bad"})
    state = await files.reconcile()
    assert state.is_failed() and "nothing was touched" in str(state.message)
    assert files.there() == {}


async def test_what_stops_nothing_is_a_warning_unless_it_is_named(files: Files) -> None:
    files.commit({"a": "one", "x": "bad"})
    state = await files.reconcile()
    assert state.is_completed() and str(state.message).endswith(
        "file/a deployed; file/x failed, a warning since machines.yaml does not list it"
    )
    assert files.there() == {"a": "one"} and files.entry("x") == Entry()
    state = await files.reconcile(only=["file/x"])
    assert state.is_failed() and "file/x: rehearsal failed: it is bad" in str(state.message)


async def logged(server: PrefectServer, run: str, text: str) -> list[str]:
    """What the run has logged, as soon as `text` is there: its lines come in batches."""
    async with asyncio.timeout(60):
        while True:
            found = await server.api.call("POST", "/logs/filter", {"logs": {"flow_run_id": {"any_": [run]}}})
            lines = [line["message"] for line in found]
            if any(text in line for line in lines):
                return lines
            await asyncio.sleep(0.2)


async def stuck(files: Files) -> None:
    """Have file/a be half done: its roll-out failed, and so did its revert."""
    files.commit({"a": "one", "b": "one", "z": "one"})
    await files.reconcile()
    files.commit({"a": "stuck, too late"})
    state = await files.reconcile()
    assert state.is_failed() and str(state.message).endswith("file/a COULD NOT BE REVERTED")
    assert files.there()["a"] == "stuck, too late" and files.entry("a").intent is not None


async def test_a_commit_that_goes_on_from_what_cannot_be_put_back_is_deployed(files: Files) -> None:
    await stuck(files)
    files.commit({"a": "two"})
    state = await files.reconcile()
    assert state.is_completed(), state.message
    assert files.there() == {"a": "two", "b": "one", "z": "one"}
    assert files.entry("a").intent is None
    good = DeployedFile.of(files.entry("a").good)
    assert good is not None and good.size == 3


@pytest.mark.parametrize("fix", ["bad", "still stuck, too late"])
async def test_what_cannot_be_put_back_blocks_only_itself_and_what_comes_after_it(
    files: Files, prefect_server: PrefectServer, fix: str
) -> None:
    """z comes after a. Whether the fix does not pass its rehearsal or its roll-out, b is deployed."""
    await stuck(files)
    files.commit({"a": fix, "b": "two", "z": "two"})
    state = await files.reconcile()
    assert state.is_failed()
    assert files.there() == {"a": fix if "stuck" in fix else "stuck, too late", "b": "two", "z": "one"}
    assert files.entry("a").intent is not None and files.entry("z").intent is None
    lines = await logged(prefect_server, str(state.state_details.flow_run_id), "ssh toto accept file/a --repo ")
    assert any("file/b deployed" in line or "the others were rolled out" in line for line in lines), lines
    files.commit({"a": "three"})
    assert (await files.reconcile()).is_completed()
    assert files.there() == {"a": "three", "b": "two", "z": "two"}


async def test_the_present_state_of_what_cannot_be_put_back_is_accepted_by_name_and_reason(
    files: Files, prefect_server: PrefectServer
) -> None:
    await stuck(files)
    with tags("user:alice"):
        state = await accept(files.repo.bare, "file/a", "the disk is new\n\x1b[31m", return_state=True)
    assert state.is_completed(), state.message
    assert state.message == "file/a: it holds 'stuck, too late': taken as good"
    entry = files.entry("a")
    assert entry.intent is None and entry.accepted is not None
    assert (entry.accepted.by, entry.accepted.why) == ("alice", "the disk is new")
    good = DeployedFile.of(entry.good)
    assert good is not None and good.size == len("stuck, too late")
    newest = events(files.repo.bare)[-1]
    assert (newest.what, newest.why) == (What.ACCEPTED, "alice: the disk is new")
    assert files.there()["a"] == "stuck, too late", "nothing of it is touched"
    files.commit({"a": "two", "z": "too late"})
    assert str((await files.reconcile()).message).endswith("file/z, file/a reverted")
    assert files.there() == {"a": "stuck, too late", "b": "one", "z": "one"}, "later runs go back to what was accepted"
    assert not Ledger(files.repo.bare).read().open_intents


async def test_a_push_accepts_what_is_there_before_its_commit_is_planned(files: Files) -> None:
    await stuck(files)
    files.commit({"a": "still stuck, too late", "b": "two"})
    refused = await files.reconcile(accept=["file/a"], reason="it is well", rehearse_only=True)
    assert refused.is_failed() and "accepts nothing" in str(refused.message) and files.entry("a").intent is not None
    files.commit({"a": "two", "b": "two"})
    with tags("user:bob"):
        assert (await files.reconcile(accept=["file/a"], reason="it is well")).is_completed()
    assert files.there() == {"a": "two", "b": "two", "z": "one"}
    said = [each.why for each in events(files.repo.bare) if each.what is What.ACCEPTED]
    assert said == ["bob: it is well"]


@pytest.mark.parametrize(
    ("target", "why", "says"),
    [
        ("file/a", " \n", "takes a reason"),
        ("file/y", "so", "toto has deployed nothing of it"),
        ("web9", "so", "toto has deployed nothing of it"),
        ("file/../../a", "so", "toto has deployed nothing of it"),
        ("tape/a", "so", "no kind of target 'tape'"),
    ],
)
async def test_what_cannot_be_accepted_is_said_and_changes_nothing(
    files: Files, target: str, why: str, says: str
) -> None:
    await stuck(files)
    before = Ledger(files.repo.bare).read().commit
    state = await accept(files.repo.bare, target, why, "root", return_state=True)
    assert state.is_failed() and says in str(state.message)
    assert Ledger(files.repo.bare).read().commit == before


async def test_what_cannot_be_asked_is_accepted_only_when_it_has_left_the_commit(files: Files) -> None:
    await stuck(files)
    (files.to / "a").unlink()
    state = await accept(files.repo.bare, "file/a", "it burnt down", "root", return_state=True)
    assert state.is_failed() and "cannot be read, so it is not accepted: it is away" in str(state.message)
    assert files.entry("a").intent is not None
    files.commit({"a": None})
    state = await accept(files.repo.bare, "file/a", "it burnt down", "root", return_state=True)
    assert state.is_completed() and "the record of it is gone" in str(state.message), state.message
    assert Target("file", "a") not in Ledger(files.repo.bare).read().entries
    assert (await files.reconcile()).is_completed()


async def test_what_fails_of_a_target_that_is_well_still_stops_the_others(files: Files) -> None:
    await stuck(files)
    files.commit({"a": "two", "b": "bad", "z": "two"})
    state = await files.reconcile()
    assert state.is_failed() and files.there() == {"a": "stuck, too late", "b": "one", "z": "one"}


async def test_a_target_that_went_forward_is_put_back_with_the_others_when_one_fails(files: Files) -> None:
    await stuck(files)
    files.commit({"a": "two", "z": "too late"})
    state = await files.reconcile()
    assert state.is_failed() and "file/z: roll-out failed" in str(state.message)
    assert str(state.message).endswith("file/z, file/a reverted")
    assert files.there()["z"] == "one" and not Ledger(files.repo.bare).read().open_intents


async def test_a_fourth_kind_can_be_selected_retired_and_looked_at_for_drift(files: Files) -> None:
    files.commit({"a": "one", "b": "one"})
    await files.reconcile(only=["file/a"])
    assert files.there() == {"a": "one"}
    await files.reconcile(only=["toy"])
    assert files.there() == {"a": "one", "b": "one"}
    assert (await drift(files.repo.bare, return_state=True)).is_completed()
    (files.to / "a").write_text("by hand")
    state = await drift(files.repo.bare, return_state=True)
    assert state.is_failed() and "file/a: drift check failed: it was changed outside" in str(state.message)
    files.commit({"a": None})
    await files.reconcile()
    assert "a" not in [target.name for target in Ledger(files.repo.bare).read().entries]
    assert files.there()["a"] == "by hand", "nothing of it is touched"


async def test_nothing_is_rolled_out_without_the_verdict_on_that_very_target(files: Files) -> None:
    commit = files.commit({"a": "one", "b": "two"})
    a, b = (await make.make(files.repo.bare, commit, "r")).orders
    for steps in flow_kinds.STEPS.values():
        with pytest.raises(TypeError):
            await steps.roll_out(quote(a))  # type: ignore[call-arg, misc]
    foreign = Verdict.passed(b, 3, summary="")
    with pytest.raises(ValueError, match="the verdict is on file/b"):
        await flow_kinds.STEPS["file"].roll_out(quote(a), foreign)
    assert files.there() == {}


async def test_a_ledger_of_a_kind_that_is_not_known_is_an_error(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    files.commit({"a": "one"})
    await files.reconcile()
    monkeypatch.delitem(kinds.KINDS, "file")
    state = await files.reconcile()
    assert state.is_failed() and "this version of toto has no kind of target 'file'" in str(state.message)
    assert files.entry("a").good is not None
