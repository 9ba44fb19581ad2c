"""A run that asks for an approval waits for an answer by name, whatever is pressed in the UI."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prefect.client.schemas.objects import State

from tests.conftest import PrefectServer
from tests.flows.test_kinds import Files, files, logged
from tests.repos import git
from toto.base import paths
from toto.ledger import approvals
from toto.ledger.approvals import Asked

__all__ = ["files"]


async def asked(repo: Path) -> tuple[str, Asked]:
    """The run that waits for an approval, and what it asks."""
    async with asyncio.timeout(60):
        while True:
            for run in git("ls-tree", "--name-only", approvals.REF, cwd=repo).split() if has_approvals(repo) else ():
                found = approvals.read(repo, run.removesuffix(".json"))
                if found and found.waits:
                    return run.removesuffix(".json"), found
            await asyncio.sleep(0.2)


def has_approvals(repo: Path) -> bool:
    return approvals.REF in git("for-each-ref", "--format=%(refname)", cwd=repo)


async def until(server: PrefectServer, run: str, met: Callable[[dict[str, Any]], bool]) -> None:
    async with asyncio.timeout(60):
        while not met(await server.api.call("GET", f"/flow_runs/{run}")):
            await asyncio.sleep(0.2)


@pytest.mark.parametrize("approved", [True, False])
async def test_a_run_goes_on_with_a_recorded_answer_and_not_before(
    files: Files, prefect_server: PrefectServer, approved: bool
) -> None:
    files.commit({"a": "please ask", "b": "one"})
    work = asyncio.create_task(files.reconcile())
    run, question = await asked(files.repo.bare)
    assert question.plans == {"file/a": "it will hold 'please ask'"}
    await logged(prefect_server, run, f"for an approval: ssh toto approve {run}")
    await until(prefect_server, run, lambda found: found["state_type"] == "PAUSED")
    await prefect_server.api.call("POST", f"/flow_runs/{run}/resume", {"run_input": {"approve": True, "by": "eve"}})
    await logged(prefect_server, run, "so it approves nothing: ssh toto approve")
    await until(prefect_server, run, lambda found: found["state_type"] == "PAUSED")
    assert files.there() == {}
    await approvals.answer(files.repo.bare, run, approved=approved, by="alice")
    state: State[Any] = await work
    if approved:
        assert state.is_completed() and files.there() == {"a": "please ask", "b": "one"}
        await logged(prefect_server, run, "file/a: approved by alice at 20")
    else:
        assert state.is_failed() and "its plan was rejected by alice" in str(state.message)
        assert files.there() == {}
    assert f"{run} {'approved' if approved else 'rejected'} by alice" in git(
        "log", "--format=%s", approvals.REF, cwd=files.repo.bare
    )


async def test_the_resume_button_approves_where_the_server_says_so(files: Files, prefect_server: PrefectServer) -> None:
    (paths.state_home() / "server.toml").write_text("resume_button = true\n")
    files.commit({"a": "please ask"})
    work = asyncio.create_task(files.reconcile())
    run, _ = await asked(files.repo.bare)
    await until(prefect_server, run, lambda found: found["state_type"] == "PAUSED")
    await prefect_server.api.call("POST", f"/flow_runs/{run}/resume", {"run_input": {"approve": True, "by": "alice"}})
    assert (await work).is_completed()
    found = approvals.read(files.repo.bare, run)
    assert found and found.answer and found.answer.by == "alice (Resume button)"


async def test_a_run_that_nobody_answers_fails_and_takes_no_answer_any_more(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.toy.steps.PATIENCE", 1)
    files.commit({"a": "please ask"})
    state = await files.reconcile()
    assert state.is_failed() and "nobody approved its plan within 1 s" in str(state.message)
    [run] = git("ls-tree", "--name-only", approvals.REF, cwd=files.repo.bare).split()
    with pytest.raises(approvals.NothingAsked, match="does not any more"):
        await approvals.answer(files.repo.bare, run.removesuffix(".json"), approved=True, by="alice")
    assert files.there() == {}
