"""A failed run takes back what it did to a terraform root, and nothing else: whole runs, real terraform, real files."""

import contextlib
import json
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from prefect.client.schemas.objects import State
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings

from blocks import TerraformCredentials
from flows import kinds as flow_kinds
from flows.kinds import Steps
from flows.reconcile import reconcile
from flows.revert import settle
from tasks.record import intend, record_reverted
from tasks.reversal import Reversal
from tests import postgres, terraform_provider
from tests.conftest import PrefectServer
from tests.repos import InfraRepo, git
from tests.toy import steps as toy
from tests.toy.kind import FileBefore, FileKind, FileOrder
from toto.base import paths
from toto.base.errors import TotoError
from toto.infra_repo import git as repos
from toto.infra_repo import settings
from toto.ledger import approvals, steps
from toto.ledger.ledger import Entry, Intent, Ledger, owner
from toto.ledger.target import Target
from toto.plan import kinds
from toto.plan.root import RootBefore
from toto.plan.verdict import Verdict
from toto.terraform import session as terraform
from toto.terraform.session import Session

pytestmark = [
    pytest.mark.minutes(3),
    pytest.mark.skipif(shutil.which("terraform") is None, reason="NOT TESTED: terraform is not on PATH"),
]
needs_postgres = pytest.mark.skipif(shutil.which("postgres") is None, reason="there is no PostgreSQL on this machine")
ROOT = Target("terraform", "dns")


def head(backend: str = "", version: str = "1.0.0") -> str:
    demo = json.dumps({"source": terraform_provider.SOURCE, "version": version})
    return f"terraform {{\n  required_providers {{\n    demo = {demo}\n  }}\n{backend}}}\n"


PG = '  backend "pg" {\n    schema_name = "back"\n  }\n'


def volume(name: str, content: str | None = None, more: str = "") -> str:
    return (
        f'resource "demo_volume" "{name}" {{\n  pool = "/state"\n  content = {json.dumps(content or name)}\n{more}}}\n'
    )


@pytest.fixture(scope="module")
def provider(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return terraform_provider.install(tmp_path_factory.mktemp("provider"), ("1.0.0", "2.0.0"))


class World:
    """An infra repo with the root `dns`, whose volumes are files, and a file that is rolled out after it and fails."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.repo = folder, InfraRepo(folder / "repo")
        self.to = folder / "to"
        self.to.mkdir()
        self.repo.commit({"machines.yaml": "machines: []\n", "files/TO": f"{self.to}\n"})
        self.env: dict[str, str] = {}
        self.meanwhile: Callable[[], Awaitable[object]] | None = None
        self.backend = ""
        self.sessions = 0

    @property
    def home(self) -> Path:
        return paths.repo_state(self.repo.bare) / "terraform" / "dns"

    def volumes(self) -> dict[str, str]:
        """What every volume holds, by its id."""
        return {f"/state/{each.name}": each.read_text() for each in self.home.glob("????????-*") if each.is_file()}

    def make(self, content: str) -> str:
        """A volume that somebody made without terraform; its id."""
        self.home.mkdir(parents=True, exist_ok=True)
        name = f"00000000-{content}"
        (self.home / name).write_text(content)
        return f"/state/{name}"

    def of(self) -> Entry:
        return Ledger(self.repo.bare).read().get(ROOT)

    async def push(self, *blocks: str, version: str = "1.0.0", **files: str | None) -> State[Any]:
        """Deploy these blocks."""
        text = head(self.backend, version) + "".join(blocks)
        named = {name.replace("__", "/"): each for name, each in files.items()}
        self.repo.commit(
            {"terraform/dns/main.tf": text, **{k.replace("toto_toml", "toto.toml"): v for k, v in named.items()}}
        )
        return await reconcile(self.repo.bare, return_state=True)

    async def fail(self, *blocks: str, version: str = "1.0.0", **files: str | None) -> str:
        """Deploy these blocks, and something that fails after them; the run's message."""
        state = await self.push(*blocks, version=version, files__late="late", **files)
        assert state.is_failed()
        self.repo.commit({"files/late": None})
        return str(state.message)

    async def colleague(self, *blocks: str) -> None:
        """Somebody applies these blocks from a checkout."""
        self.sessions += 1
        tree = self.folder / f"colleague{self.sessions}"
        await repos.checkout(self.repo.bare, git("rev-parse", "main", cwd=self.repo.bare), tree)
        (tree / "terraform/dns").mkdir(parents=True, exist_ok=True)
        (tree / "terraform/dns/main.tf").write_text(head(self.backend) + "".join(blocks))
        (root,) = terraform.discover(tree, settings.load(tree).terraform)
        session = Session(
            self.repo.bare, root, tree, tree.with_suffix(".runs"), settings.load(tree).terraform, self.env
        )
        await session.apply(await session.plan())

    async def addresses(self) -> dict[str, str]:
        """The state: the id of each address."""
        tree = self.folder / "looking"
        shutil.rmtree(tree, ignore_errors=True)
        await repos.checkout(self.repo.bare, git("rev-parse", "main", cwd=self.repo.bare), tree)
        (root,) = terraform.discover(tree, settings.load(tree).terraform)
        session = Session(self.repo.bare, root, tree, self.folder / "looks", settings.load(tree).terraform, self.env)
        await session.init()
        return dict((await session.state()).ids)

    def log(self) -> str:
        return git("log", "--format=%s", "refs/toto/ledger", cwd=self.repo.bare)


@pytest.fixture
async def world(
    prefect_server: PrefectServer, tmp_path: Path, provider: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[World]:
    monkeypatch.setenv("TOTO_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("TF_CLI_CONFIG_FILE", str(provider))
    monkeypatch.setenv("TOTO_CELL_READ", ":".join(map(str, terraform_provider.needs(provider))))
    world = World(tmp_path)

    @flow(name="roll out file", flow_run_name="{order.name}", persist_result=False, validate_parameters=False)
    async def roll_out(order: FileOrder, verdict: Verdict[int]) -> None:
        await intend(order, FileBefore(text=None))
        if world.meanwhile is not None:
            await world.meanwhile()
        raise TotoError("it came too late", target=order.label)

    async def revert(reversal: Reversal) -> str:
        entry = Ledger(reversal.repo).read().get(reversal.target)
        intent = steps.require_intent(entry, reversal.run)
        await record_reverted(reversal.repo, reversal.target, None, intent.desired, reversal.run, reversal.why)
        return "gone"

    monkeypatch.setitem(kinds.KINDS, "file", FileKind())
    monkeypatch.setitem(flow_kinds.STEPS, "file", Steps("files", toy.rehearse, roll_out, revert))  # type: ignore[arg-type]
    with temporary_settings({PREFECT_API_URL: prefect_server.api_url, PREFECT_HOME: tmp_path / "prefect"}):
        yield world


@pytest.fixture(params=["local", pytest.param("pg", marks=needs_postgres)])
async def anywhere(world: World, request: pytest.FixtureRequest) -> AsyncIterator[World]:
    """A world whose state is kept by toto, and one whose state is in PostgreSQL."""
    if request.param == "local":
        yield world
        return
    database: postgres.Postgres = request.getfixturevalue("database")
    async with database.on_loopback():
        world.backend, world.env = PG, {"PG_CONN_STR": database.network_dsn}
        await TerraformCredentials(variables=dict(world.env)).asave("toto", overwrite=True)
        try:
            yield world
        finally:
            await TerraformCredentials.adelete("toto")


async def test_all_that_a_run_did_is_undone_and_nothing_is_made_a_second_time(anywhere: World) -> None:
    world = anywhere
    there, shelved, forgotten = (world.make(each) for each in ("imported", "shelved", "forgotten"))
    old = [volume(each) for each in ("same", "changed", "old", "forgotten", "many")]
    # Blocks that are done stay in many configurations.
    done = [
        f'import {{\n  to = demo_volume.forgotten\n  id = "{forgotten}"\n}}\n',
        "moved {\n  from = demo_volume.older\n  to = demo_volume.old\n}\n",
    ]
    shelf = 'resource "demo_volume" "shelf" {\n  for_each = toset(%s)\n  pool = "/state"\n  content = each.key\n}\n'
    state = await world.push(*old, *done, volume("counted", more="  count = 2\n"), shelf % '["kept"]')
    assert state.is_completed(), state.message
    before, ids = world.volumes(), await world.addresses()
    message = await world.fail(
        volume("same"),
        volume("changed", "anew"),
        volume("new", "old"),
        "moved {\n  from = demo_volume.old\n  to = demo_volume.new\n}\n",
        "removed {\n  from = demo_volume.forgotten\n  lifecycle {\n    destroy = false\n  }\n}\n",
        volume("taken", "imported"),
        f'import {{\n  to = demo_volume.taken\n  id = "{there}"\n}}\n',
        volume("created"),
        volume("many", more='  for_each = toset(["a", "b"])\n'),
        'moved {\n  from = demo_volume.many\n  to = demo_volume.many["a"]\n}\n',
        volume("counted", more="  count = 3\n"),
        shelf % '["kept", "shelved"]',
        f'import {{\n  to = demo_volume.shelf["shelved"]\n  id = "{shelved}"\n}}\n',
    )
    assert "terraform/dns reverted" in message, message
    assert (world.volumes(), await world.addresses()) == (before, ids)
    assert world.of().intent is None


async def test_what_a_run_destroyed_is_created_anew_and_the_report_says_so(world: World) -> None:
    await world.push(volume("kept"), volume("gone"))
    assert "terraform/dns reverted" in await world.fail(volume("kept"))
    assert sorted(world.volumes().values()) == ["gone", "kept"]


async def test_what_only_a_trigger_has_replaced_is_another_one_and_the_report_says_so(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """The last good is content with the new one: the way back has nothing to do there."""
    await world.push(volume("data"), volume("cause", "1"))
    trigger = "  lifecycle {\n    replace_triggered_by = [demo_volume.cause]\n  }\n"
    assert "terraform/dns reverted" in await world.fail(volume("data", more=trigger), volume("cause", "2"))
    assert "(1 to update); created anew, without their old data: demo_volume.data" in caplog.text


async def test_what_a_colleague_applied_meanwhile_is_never_destroyed(anywhere: World) -> None:
    world = anywhere
    await world.push(volume("kept"))
    new = (volume("kept"), volume("created"))

    async def meanwhile() -> None:
        await world.colleague(*new, volume("theirs"))

    world.meanwhile = meanwhile
    message = await world.fail(*new)
    assert "terraform/dns COULD NOT BE REVERTED" in message
    assert sorted(world.volumes().values()) == ["created", "kept", "theirs"]
    assert (intent := world.of().intent) is not None
    world.meanwhile = None
    # The fix goes forward from what is there.
    assert (state := await world.push(*new, volume("theirs"))).is_completed(), state.message
    assert sorted(world.volumes().values()) == ["created", "kept", "theirs"]
    assert world.of().intent is None and intent.run in world.log()


async def test_an_error_that_cannot_go_back_has_both_plans_and_the_next_command(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    await world.push(volume("kept"))
    world.meanwhile = lambda: world.colleague(volume("kept"), volume("created"), volume("theirs"))
    await world.fail(volume("kept"), volume("created"))
    for words in (
        "terraform/dns COULD NOT BE REVERTED: terraform/dns: cannot go back by itself: the way back would destroy "
        "demo_volume.theirs, which this run did not create",
        "the way back:\n- demo_volume.created",
        "the plan of the run:\n+ demo_volume.created",
        "next: push a commit that goes on from what is there; or take what is there as good: ssh toto accept "
        "terraform/dns --repo infra --reason WHY",
    ):
        assert words in caplog.text


async def test_a_created_one_that_a_colleague_has_replaced_is_theirs(world: World) -> None:
    await world.push(volume("kept"))

    async def meanwhile() -> None:
        await world.colleague(volume("kept"))
        await world.colleague(volume("kept"), volume("created", "by the colleague"))

    world.meanwhile = meanwhile
    assert "terraform/dns COULD NOT BE REVERTED" in await world.fail(volume("kept"), volume("created"))
    assert sorted(world.volumes().values()) == ["by the colleague", "kept"]


async def test_a_first_deployment_that_imports_lets_go_of_it_and_destroys_only_its_own(anywhere: World) -> None:
    world = anywhere
    there = world.make("imported")
    message = await world.fail(
        volume("taken", "imported"), f'import {{\n  to = demo_volume.taken\n  id = "{there}"\n}}\n', volume("created")
    )
    assert "terraform/dns reverted" in message, message
    assert world.volumes() == {there: "imported"} and await world.addresses() == {}


async def test_a_root_that_was_there_before_toto_loses_nothing_in_its_first_deployment(world: World) -> None:
    await world.colleague(volume("theirs"), volume("changed"))
    before = world.volumes()
    assert "terraform/dns reverted" in await world.fail(volume("theirs"), volume("changed"), volume("created"))
    assert world.volumes() == before
    assert "terraform/dns COULD NOT BE REVERTED" in await world.fail(volume("theirs"), volume("changed", "anew"))
    assert world.volumes().keys() == before.keys() and world.of().intent is not None


async def test_what_was_forgotten_and_cannot_be_imported_is_not_made_a_second_time(world: World) -> None:
    """A `demo_file` has no id, and cannot be imported."""
    other = 'resource "demo_file" "f" {\n  path = "/state/f"\n  content = "1"\n}\n'
    await world.push(volume("kept"), other)
    (world.home / "f").write_text("2")
    message = await world.fail(
        volume("kept"), "removed {\n  from = demo_file.f\n  lifecycle {\n    destroy = false\n  }\n}\n"
    )
    assert "terraform/dns COULD NOT BE REVERTED" in message and (world.home / "f").read_text() == "2"


async def test_a_way_back_is_held_to_prevent(world: World, caplog: pytest.LogCaptureFixture) -> None:
    await world.push(volume("kept"))
    message = await world.fail(volume("kept"), volume("created"), toto_toml='[terraform]\nprevent = ["destroy"]\n')
    assert "terraform/dns COULD NOT BE REVERTED" in message
    assert (
        "cannot go back by itself: the plan would destroy what the settings protect: demo_volume.created" in caplog.text
    )
    assert sorted(world.volumes().values()) == ["created", "kept"]


async def test_a_way_back_waits_for_its_approval_without_holding_anything(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    await world.push(volume("kept"))
    message = await world.fail(volume("kept"), volume("created"), toto_toml='[terraform]\napprove = "destroy"\n')
    assert "terraform/dns COULD NOT BE REVERTED" in message
    intent = world.of().intent
    assert (
        intent is not None and f"`ssh toto approve {intent.run}` (or reject), then start settle/settle" in caplog.text
    )
    assert sorted(world.volumes().values()) == ["created", "kept"]
    await world.colleague(volume("kept"), volume("created"))  # the state is not locked
    assert (await settle(world.repo.bare, return_state=True)).is_failed(), "and asks only once"
    asked = approvals.read(world.repo.bare, intent.run)
    assert asked is not None and "- demo_volume.created" in asked.plans["terraform/dns, the way back"]
    await approvals.answer(world.repo.bare, intent.run, approved=True, by="boss")
    state = await settle(world.repo.bare, return_state=True)
    assert state.is_completed(), state.message
    assert sorted(world.volumes().values()) == ["kept"] and world.of().intent is None


async def test_an_approval_counts_only_for_the_plan_that_was_shown(world: World) -> None:
    await world.push(volume("kept"))
    both = (volume("kept"), volume("created"))
    await world.fail(*both, volume("second"), toto_toml='[terraform]\napprove = "destroy"\n')
    intent = world.of().intent
    assert intent is not None
    await approvals.answer(world.repo.bare, intent.run, approved=True, by="boss")
    await world.colleague(*both)
    assert (await settle(world.repo.bare, return_state=True)).is_failed()
    assert sorted(world.volumes().values()) == ["created", "kept"]
    await approvals.answer(world.repo.bare, intent.run, approved=False, by="boss")
    assert (await settle(world.repo.bare, return_state=True)).is_failed()
    assert sorted(world.volumes().values()) == ["created", "kept"]


async def test_an_intent_of_an_older_version_is_never_reverted_by_destroying(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    await world.push(volume("kept"))
    good = world.of().good
    assert good is not None
    new = (volume("kept"), volume("created"))
    commit = world.repo.commit({"terraform/dns/main.tf": head() + "".join(new)})
    old = steps.intend(
        Intent(
            desired=good.model_copy(update={"commit": commit}),
            before=RootBefore(serial=1, resources=("demo_volume.kept",)),
            run="00000000-0000-0000-0000-000000000001",
            owner=owner().rpartition("/")[0] + "/1-1",
            at="2024-01-01T00:00:00Z",
        )
    )
    await Ledger(world.repo.bare).write(ROOT, old, "an older version died here")
    assert (left := world.of().intent) is not None and "deeds" not in left.before.model_dump(exclude_none=True)
    await world.colleague(*new)
    assert (await settle(world.repo.bare, return_state=True)).is_failed()
    assert sorted(world.volumes().values()) == ["created", "kept"]
    assert "an older version of toto has not recorded what its run did" in caplog.text
    assert "- demo_volume.created" in caplog.text and "or take what is there as good: ssh toto accept" in caplog.text
    assert (state := await world.push(*new)).is_completed(), state.message
    assert world.of().intent is None and sorted(world.volumes().values()) == ["created", "kept"]


async def test_a_provider_whose_state_has_moved_on_keeps_no_fix_from_going_forward(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    await world.push(volume("kept"))
    before = world.volumes()
    message = await world.fail(volume("kept"), volume("created"), version="2.0.0")
    assert "terraform/dns COULD NOT BE REVERTED" in message
    assert "cannot go back by itself: Error: Resource instance managed by newer provider version" in caplog.text
    assert (state := await world.push(volume("kept"), version="2.0.0")).is_completed(), state.message
    assert world.volumes() == before and world.of().intent is None


async def test_a_root_that_is_renamed_takes_its_state_along_by_a_word_and_makes_no_second_one(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    await world.push(volume("kept"), volume("other"))
    before = world.volumes()
    (world.repo.work / "terraform/dns").rename(world.repo.work / "terraform/names")
    world.repo.commit({})
    state = await reconcile(world.repo.bare, return_state=True)
    assert state.is_failed() and "nothing was touched" in str(state.message)
    for words in (
        "terraform/names: its place changed from terraform/dns to terraform/names while terraform/dns still holds 2 ",
        'next: put it back, in terraform/names or toto.toml; or, to go on with its state: `was = "dns"` in '
        "[terraform.roots.names] of toto.toml",
        "left the commit: what its state holds stays there, and nobody manages it",
    ):
        assert words in caplog.text
    # With the word: a run that fails goes back to what it was by its old name, and one that does not goes on.
    word = {"toto.toml": '[terraform.roots.names]\nwas = "dns"\n'}
    more = head() + volume("kept") + volume("other", "anew") + volume("created")
    world.repo.commit({**word, "terraform/names/main.tf": more, "files/late": "late"})
    state = await reconcile(world.repo.bare, return_state=True)
    assert state.is_failed() and "terraform/names reverted" in str(state.message), state.message
    assert world.volumes() == before
    world.repo.commit({"files/late": None})
    state = await reconcile(world.repo.bare, return_state=True)
    assert state.is_completed(), state.message
    assert world.volumes().keys() > before.keys() and sorted(world.volumes().values()) == ["anew", "created", "kept"]
    assert [str(target) for target in Ledger(world.repo.bare).read().entries] == ["terraform/names"]
    # Renamed once more, with the line where it is.
    (world.repo.work / "terraform/names").rename(world.repo.work / "terraform/zones")
    before = world.volumes()
    changed = head() + volume("kept", "anew again") + volume("other", "anew")
    world.repo.commit(
        {
            "toto.toml": '[terraform.roots.zones]\nwas = "dns"\n',
            "terraform/zones/main.tf": changed + volume("created"),
            "files/late": "late",
        }
    )
    state = await reconcile(world.repo.bare, return_state=True)
    assert state.is_failed() and "terraform/zones reverted" in str(state.message), state.message
    assert world.volumes() == before
    (world.repo.work / "terraform/zones").rename(world.repo.work / "terraform/names")
    world.repo.commit({**word, "terraform/names/main.tf": more, "files/late": None})
    # And without it again, it would be a second one.
    world.repo.commit({"toto.toml": None})
    state = await reconcile(world.repo.bare, return_state=True, force=True)
    assert state.is_failed() and "its place changed from toto's own state \"dns\" to toto's own state" in caplog.text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("workspace", 'from toto\'s own state "dns" to toto\'s own state "dns", workspace prod while'),
        pytest.param(
            "backend", 'from toto\'s own state "dns" to backend pg, schema_name back while', marks=needs_postgres
        ),
    ],
)
async def test_a_root_whose_state_is_elsewhere_makes_no_second_one(
    world: World, caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest, change: str, words: str
) -> None:
    await world.push(volume("kept"))
    before = world.volumes()
    toml = "[terraform.roots.dns]\n" + ('workspace = "prod"\n' if change == "workspace" else "")
    async with contextlib.AsyncExitStack() as held:
        if change == "backend":
            database: postgres.Postgres = request.getfixturevalue("database")
            await held.enter_async_context(database.on_loopback())
            world.backend, world.env = PG, {"PG_CONN_STR": database.network_dsn}
            await TerraformCredentials(variables=dict(world.env)).asave("toto", overwrite=True)
            held.push_async_callback(TerraformCredentials.adelete, "toto")
        assert (await world.push(volume("kept"), toto_toml=toml)).is_failed()
        assert (
            f"its place changed {words}" in caplog.text
            and "still holds 1 resource\nnext: put it back, in terraf" in caplog.text
        )
        assert world.volumes() == before
        state = await world.push(volume("kept"), toto_toml=f'{toml}was = "dns"\n')
        assert state.is_completed(), state.message
        assert "holds stays there, and nobody manages it: 1 resource" in caplog.text
        assert len(world.volumes()) == 2 and world.volumes().keys() > before.keys()
        assert (await world.push(volume("kept"), volume("more"), toto_toml=toml)).is_completed()


async def test_a_ledger_of_an_older_version_shows_that_the_place_has_changed_too(world: World) -> None:
    await world.push(volume("kept"))
    good = world.of().good
    assert good is not None
    old = good.model_copy(update={"lineage": "", "resources": (), "place": ""})
    await Ledger(world.repo.bare).write(ROOT, lambda entry: entry.model_copy(update={"good": old}), "older")
    toml = '[terraform.roots.dns]\nworkspace = "prod"\n'
    assert (await world.push(volume("kept"), toto_toml=toml)).is_failed()
    assert sorted(world.volumes().values()) == ["kept"]
