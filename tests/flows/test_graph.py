"""What the UI draws of a run is what the run does: its stages in a line, and no other edge."""

import asyncio
from typing import Any

import pytest

from tests.conftest import PrefectServer
from tests.flows.test_kinds import Files, files
from tests.graph import chain, complete, edges, labels
from tests.toy.kind import FileKind

__all__ = ["files"]  # the fixture


async def drawn(server: PrefectServer, state: Any) -> dict[str, Any]:
    """The graph of a run, once Prefect has all of it."""
    async with asyncio.timeout(60):
        while True:
            graph = await server.api.call("GET", f"/flow_runs/{state.state_details.flow_run_id}/graph-v2")
            if complete(graph):
                return dict(graph)
            await asyncio.sleep(0.2)


async def test_a_run_is_drawn_as_its_stages_in_a_line(files: Files, prefect_server: PrefectServer) -> None:
    commit = files.commit({"a": "one", "b": "two"})[:8]
    graph = await drawn(prefect_server, await files.reconcile())
    stages = [f"detect / {commit}", "rehearse / file/a, file/b", "files / a, b", "notify"]
    assert labels(graph) == stages
    assert edges(graph) == chain(*stages)
    inside = {}
    for node in dict(graph["nodes"]).values():
        if node["kind"] == "flow-run":
            inside[node["label"]] = await prefect_server.api.call("GET", f"/flow_runs/{node['id']}/graph-v2")
    assert {name: sorted(labels(each)) for name, each in inside.items()} == {
        stages[0]: [],
        stages[1]: ["rehearse file / a", "rehearse file / b"],
        stages[2]: ["roll out file / a", "roll out file / b"],
    }
    assert all(edges(each) == [] for each in inside.values())


async def test_only_what_changed_or_does_not_evaluate_is_a_task_of_its_own(
    files: Files, prefect_server: PrefectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FileKind, "evaluated", True)

    async def detected(commit: str) -> dict[str, Any]:
        whole = await drawn(prefect_server, await files.reconcile())
        (stage,) = [node for _, node in whole["nodes"] if node["label"] == f"detect / {commit[:8]}"]
        graph = await prefect_server.api.call("GET", f"/flow_runs/{stage['id']}/graph-v2")
        return dict(graph)

    graph = await detected(files.commit({"a": "one", "b": "one"}))
    assert sorted(labels(graph)) == ["evaluate 2 hosts", "evaluate file/a", "evaluate file/b"]
    assert labels(await detected(files.repo.commit({"README": "more"}))) == ["evaluate 2 hosts"]
    graph = await detected(files.commit({"b": "two", "c": "broken"}))
    assert sorted(labels(graph)) == ["evaluate 3 hosts", "evaluate file/b", "evaluate file/c"]
    assert edges(graph) == [("evaluate 3 hosts ⊃", "evaluate file/c")]
    assert [node["label"] for _, node in graph["nodes"] if node["state_type"] == "FAILED"] == ["evaluate file/c"]


async def test_a_run_that_is_reverted_is_drawn_so(files: Files, prefect_server: PrefectServer) -> None:
    commit = files.commit({"a": "one", "z": "too late"})[:8]
    graph = await drawn(prefect_server, await files.reconcile())
    stages = [f"detect / {commit}", "rehearse / file/a, file/z", "files / a, z", "revert / file/a, file/z", "notify"]
    assert edges(graph) == chain(*stages)
    assert [node["label"] for node in dict(graph["nodes"]).values() if node["state_type"] == "FAILED"] == [stages[2]]


async def test_a_run_that_stops_before_the_roll_out_is_drawn_so(files: Files, prefect_server: PrefectServer) -> None:
    commit = files.commit({"a": "bad"})[:8]
    graph = await drawn(prefect_server, await files.reconcile())
    assert edges(graph) == chain(f"detect / {commit}", "rehearse / file/a", "notify")
    assert {node["label"]: node["state_type"] for node in dict(graph["nodes"]).values()} == {
        f"detect / {commit}": "COMPLETED",
        "rehearse / file/a": "FAILED",
        "notify": "COMPLETED",
    }


@pytest.mark.parametrize("only", [[], [" "]])
async def test_a_form_with_no_target_in_it_deploys_nothing(
    files: Files, prefect_server: PrefectServer, only: list[str]
) -> None:
    state = await files.reconcile(only=only)
    assert state.is_failed()
    assert state.message == "no target is named, so nothing is deployed; put names or tags in `only`"


async def test_a_run_with_nothing_to_do_is_drawn_so(files: Files, prefect_server: PrefectServer) -> None:
    graph = await drawn(prefect_server, await files.reconcile())
    assert [label.split(" ")[0] for label in labels(graph)] == ["detect", "notify"]
    assert len(edges(graph)) == 1
