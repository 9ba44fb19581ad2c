"""Terraform's tasks in real flows: exactly the plan of the rehearsal is applied, or none."""

import contextlib
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import uuid4

import pytest
from prefect import flow
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings

from blocks import TerraformCredentials
from flows.accept import accept
from flows.reconcile import reconcile
from flows.terraform import rehearse, roll_out
from tasks.terraform import PlanMoved, apply, plan_root
from tests.conftest import PrefectServer
from tests.repos import InfraRepo, git
from toto.base.errors import InputError
from toto.ledger import steps
from toto.ledger.ledger import Intent, Ledger
from toto.plan import make as plan
from toto.plan.root import DeployedRoot, RootBefore, RootOrder
from toto.plan.verdict import Verdict
from toto.terraform.plan import Planned
from toto.terraform.session import TerraformFailed

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


@flow(persist_result=False)
async def tried(of: RootOrder) -> Verdict[Planned]:
    return await rehearse(of)


async def on_a_branch(repo: InfraRepo, run: str, text: str) -> RootOrder:
    """The order of a run for a commit that is not on the deployed branch."""
    git("checkout", "--quiet", "-B", "side", cwd=repo.work)
    (repo.work / "terraform/main.tf").write_text(text)
    git("commit", "--quiet", "--all", "-m", "side", cwd=repo.work)
    git("push", "--quiet", "--force", "origin", "side", cwd=repo.work)
    (made,) = (await plan.make(repo.bare, git("rev-parse", "side", cwd=repo.work), run)).orders
    git("checkout", "--quiet", "main", cwd=repo.work)
    assert isinstance(made, RootOrder)
    return made


async def test_a_branch_that_is_not_deployed_gets_no_credentials(repo: InfraRepo) -> None:
    first = await order(repo, "first", "1", "1")
    assert first.deploys
    await applied(first, await planned(first))
    text = (
        'variable "password" {\n  default = "none"\n}\nresource "terraform_data" "a" {\n  input = "1"\n}\n'
        'resource "terraform_data" "b" {\n  input = "<${var.password}>"\n}\n'
    )
    await TerraformCredentials(variables={"TF_VAR_password": "the-deployers"}).asave("toto", overwrite=True)
    try:
        side = await on_a_branch(repo, "guest", text)
        assert not side.deploys
        guest = await tried(side)
        assert guest.summary == "2 to create (planned without credentials, as if nothing were there)"
        assert '"<none>"' in guest.difference and guest.found is None
        readers = TerraformCredentials(variables={"TF_VAR_password": "the-readers"})
        await readers.asave("main-read-only", overwrite=True)
        reads = await tried(await on_a_branch(repo, "reads", text))
        assert reads.summary == "1 to update (planned with credentials that only read)"
        with pytest.raises(InputError, match="is not on the deployed branch, and gets no credentials"):
            await roll_out(side, guest)
    finally:
        for name in ("toto", "main-read-only"):
            with contextlib.suppress(ValueError):
                await TerraformCredentials.adelete(name)


async def test_a_plan_that_lacks_credentials_is_no_failure_and_a_wrong_root_is(repo: InfraRepo) -> None:
    await order(repo, "first", "1", "1")
    closed = 'terraform {\n  backend "http" {\n    address = "http://127.0.0.1:9/"\n    retry_max = 0\n  }\n}\n'
    found = await tried(await on_a_branch(repo, "closed", closed))
    assert found.summary == "not planned: it cannot be without credentials, which this run does not get"
    with pytest.raises(TerraformFailed, match="Unsupported argument"):
        await tried(await on_a_branch(repo, "wrong", closed + 'resource "terraform_data" "a" {\n  no = 1\n}\n'))


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


async def test_the_present_state_of_a_root_is_accepted_and_later_runs_go_on_from_it(repo: InfraRepo) -> None:
    """A run died in an apply; toto cannot put the root back, and what it left is good enough."""
    await order(repo, "first", "1", "1")
    assert (await reconcile(repo.bare, return_state=True)).is_completed()
    ((target, entry),) = Ledger(repo.bare).read().entries.items()
    assert entry.good is not None
    half = await order(repo, "half", "1", "2")
    await applied(half, await planned(half))
    desired = DeployedRoot(identity="x", commit=half.commit, run=str(uuid4()), at=entry.good.at)
    left = Intent(desired=desired, before=RootBefore(), run=desired.run, owner="elsewhere/0/1-1", at=desired.at)
    await Ledger(repo.bare).write(target, steps.intend(left), "intent")
    state = await accept(repo.bare, str(target), "it is well", "alice", return_state=True)
    assert state.is_completed() and "with 2 resources: taken as good" in str(state.message), state.message
    entry = Ledger(repo.bare).read().get(target)
    good = DeployedRoot.of(entry.good)
    assert good is not None and good.serial > 0 and good.commit == half.commit and entry.intent is None
    state = await reconcile(repo.bare, return_state=True)
    assert str(state.message).endswith(f"{target.label} recorded"), "its plan is empty: nothing is applied"
    assert Ledger(repo.bare).read().get(target).accepted is None
