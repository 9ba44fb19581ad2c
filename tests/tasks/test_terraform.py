"""Terraform's tasks in real flows: exactly the plan of the rehearsal is applied, or none."""

import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from prefect import flow
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings

from tasks.terraform import PlanMoved, apply, plan_root
from tests.conftest import PrefectServer
from tests.repos import InfraRepo
from toto.plan import make as plan
from toto.plan.root import RootOrder
from toto.terraform.plan import Planned

pytestmark = pytest.mark.skipif(shutil.which("terraform") is None, reason="NOT TESTED: terraform is not on PATH")


@pytest.fixture
async def repo(
    prefect_server: PrefectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[InfraRepo]:
    monkeypatch.setenv("TOTO_STATE", str(tmp_path / "state"))
    with temporary_settings({PREFECT_API_URL: prefect_server.api_url, PREFECT_HOME: tmp_path / "prefect"}):
        yield InfraRepo(tmp_path / "repo")


async def order(repo: InfraRepo, run: str, a: str, b: str) -> RootOrder:
    """A commit of a root with two resources, and the order of a run for it."""
    text = "".join(
        f'resource "terraform_data" "{name}" {{ input = "{value}" }}\n'
        for name, value in zip("ab", (a, b), strict=True)
    )
    commit = repo.commit({"machines.yaml": "machines: []\n", "terraform/main.tf": text})
    (made,) = (await plan.make(repo.bare, commit, run)).orders
    assert isinstance(made, RootOrder)
    return made


@flow(persist_result=False)
async def planned(of: RootOrder) -> Planned:
    return await plan_root(of)


@flow(persist_result=False)
async def applied(of: RootOrder, what: Planned) -> int:
    return (await apply(of, what)).serial


async def test_a_plan_that_would_be_different_by_now_is_not_applied(repo: InfraRepo) -> None:
    first = await order(repo, "first", "1", "1")
    await applied(first, await planned(first))
    ours = await order(repo, "ours", "2", "1")
    rehearsed = await planned(ours)
    other = await order(repo, "other", "1", "2")
    serial = await applied(other, await planned(other))
    with pytest.raises(PlanMoved, match="the state has changed since the rehearsal") as moved:
        await applied(ours, rehearsed)
    assert "terraform_data.b" in str(moved.value), "it would revert what the other has done"
    state = await planned(other)
    assert state.empty and state.before.serial == serial, "nothing was applied"


async def test_a_plan_that_would_be_the_same_is_made_again_and_applied(repo: InfraRepo) -> None:
    first = await order(repo, "first", "1", "1")
    await applied(first, await planned(first))
    ours, other = await order(repo, "ours", "2", "1"), await order(repo, "other", "1", "2")
    rehearsed = await planned(ours)
    serial = await applied(other, await planned(other))
    back = await order(repo, "back", "1", "1")  # the state is as it was, by two serials later
    assert await applied(back, await planned(back)) > serial
    assert await applied(ours, rehearsed) > serial + 1
    assert (await planned(ours)).empty
