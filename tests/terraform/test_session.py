"""Terraform, the real one: roots and their identities; plans, applies, locks, failures, cancels, drift."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests import postgres, terraform_provider
from tests.repos import InfraRepo
from toto.base import paths, process
from toto.base.errors import InputError
from toto.base.process import LineSink
from toto.infra_repo import git, settings
from toto.infra_repo.settings import SettingsError
from toto.terraform import session as terraform
from toto.terraform.plan import Action, Planned, PlanRefused, State, refuse
from toto.terraform.revert import seen, way_back
from toto.terraform.session import STATE, ApplyFailed, PlanStale, Root, Session, StateLocked, TerraformFailed

pytestmark = pytest.mark.minutes(1)

needs_terraform = pytest.mark.skipif(shutil.which("terraform") is None, reason="THERE IS NO TERRAFORM on this machine")
needs_postgres = pytest.mark.skipif(shutil.which("postgres") is None, reason="there is no PostgreSQL on this machine")
POISON = 'hunter2 "quoted"\nsecond line of it'

DEMO = f'terraform {{\n  required_providers {{\n    demo = {{ source = "{terraform_provider.SOURCE}" }}\n  }}\n}}\n'


def pg(schema: str | None = None) -> str:
    return f'terraform {{\n  backend "pg" {{\n    schema_name = {json.dumps(schema)}\n  }}\n}}\n'


def data(name: str, input_: str, more: str = "") -> str:
    return f'resource "terraform_data" "{name}" {{\n  input = {json.dumps(input_)}\n{more}}}\n'


def shell(command: str) -> str:
    return f'  provisioner "local-exec" {{\n    command = {json.dumps(command)}\n  }}\n'


def file(name: str, path: Path, content: str, more: str = "") -> str:
    return (
        f'resource "demo_file" "{name}" {{\n  path = {json.dumps(str(path))}\n'
        f"  content = {json.dumps(content)}\n{more}}}\n"
    )


def slow_after_a() -> str:
    """A resource that is not done before it is ended; it says by `began` that it has begun."""
    return data("slow", "1", "  depends_on = [terraform_data.a]\n" + shell("echo > /state/began; sleep 1000"))


def terraform_of(pid: int) -> int:
    """The process id of the terraform that applies, in a cell that a process has started."""
    (found,) = [
        each
        for each in process.descendants(pid)
        if b"\0apply\0" in Path(f"/proc/{each}/cmdline").read_bytes()
        and Path(f"/proc/{each}/comm").read_text() == "terraform\n"
    ]
    return found


@pytest.fixture(scope="session")
def provider(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return terraform_provider.install(tmp_path_factory.mktemp("provider"))


@pytest.fixture
async def own_database() -> AsyncIterator[postgres.Postgres]:
    """One that may crash."""
    async with postgres.running() as server:
        yield server


class Fleet:
    """An infra repo, and sessions of its commits, each in a throw-away tree of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.repo = InfraRepo(folder / "repo")
        self.trees = 0

    @property
    def bare(self) -> Path:
        return self.repo.bare

    def home(self, name: str = "main") -> Path:
        return paths.repo_state(self.bare) / "terraform" / name

    async def tree(self, files: Mapping[str, str | None]) -> tuple[str, Path]:
        """Commit files, and check the commit out."""
        commit = self.repo.commit(dict(files))
        self.trees += 1
        tree = self.folder / f"tree{self.trees}"
        await git.checkout(self.bare, commit, tree)
        return commit, tree

    async def session(
        self,
        files: Mapping[str, str | None] | str,
        name: str = "main",
        *,
        run: str = "1",
        env: Mapping[str, str] | None = None,
        on_line: LineSink | None = None,
        **changed: Any,
    ) -> Session:
        """Commit files (a text: of `terraform/main.tf`), and a session of a root of them."""
        _, tree = await self.tree({"terraform/main.tf": files} if isinstance(files, str) else files)
        chosen = settings.load(tree).terraform.model_copy(update=changed)
        root = {root.name: root for root in terraform.discover(tree, chosen)}[name]
        return Session(self.bare, root, tree, self.folder / "runs" / run, chosen, env or {}, on_line)

    async def applied(self, files: Mapping[str, str | None] | str, **options: Any) -> State:
        session = await self.session(files, **options)
        return await session.apply(await session.plan())


@pytest.fixture
def fleet(tmp_path: Path, provider: Path, monkeypatch: pytest.MonkeyPatch) -> Fleet:
    monkeypatch.setenv("TOTO_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("TF_CLI_CONFIG_FILE", str(provider))
    monkeypatch.setenv("TOTO_CELL_READ", ":".join(map(str, terraform_provider.needs(provider))))
    return Fleet(tmp_path)


async def appears(path: Path) -> str:
    """The text of a file, once its last line is there."""
    async with asyncio.timeout(60):
        while not (path.exists() and path.read_text().endswith("\n")):
            await asyncio.sleep(0.02)
    return path.read_text().strip()


@contextlib.asynccontextmanager
async def applying(session: Session, marker: Path) -> AsyncIterator[asyncio.Task[State]]:
    """An apply that has come as far as to write `marker`."""
    task = asyncio.create_task(session.apply(await session.plan()))
    try:
        await appears(marker)
        yield task
    finally:
        task.cancel()
        await asyncio.wait([task])


# Roots


async def roots(fleet: Fleet, files: Mapping[str, str]) -> list[Root]:
    _, tree = await fleet.tree(files)
    return terraform.discover(tree, settings.load(tree).terraform)


async def test_the_folder_itself_is_one_root_when_it_has_files(fleet: Fleet) -> None:
    assert await roots(fleet, {"terraform/x.tf.json": "{}", "terraform/web/main.tf": ""}) == [
        Root(name="main", path="terraform")
    ]


async def test_each_folder_with_files_is_a_root(fleet: Fleet) -> None:
    (fleet.repo.work / "terraform").mkdir()
    (fleet.repo.work / "terraform/link").symlink_to("web.a")
    found = await roots(
        fleet,
        {
            "terraform/web.a/main.tf": "",
            "terraform/db/x.tf.json": "{}",
            "terraform/empty/README": "",
            "terraform/modules/vpc/main.tf": "",
            "terraform/.hidden/main.tf": "",
            "terraform/not/.hidden.tf": "",
            "terraform/README": "",
        },
    )
    assert [(root.name, root.path) for root in found] == [("db", "terraform/db"), ("web.a", "terraform/web.a")]


async def test_without_terraform_there_are_no_roots(fleet: Fleet) -> None:
    assert await roots(fleet, {"hosts/a.nix": ""}) == []
    assert await roots(fleet, {"terraform/README": ""}) == []


async def test_a_folder_whose_name_is_not_allowed_is_reported(fleet: Fleet) -> None:
    with pytest.raises(InputError, match=r"terraform/a b: a root's name should be"):
        await roots(fleet, {"terraform/a b/main.tf": ""})


async def test_named_roots_come_in_their_order_with_their_settings(fleet: Fleet) -> None:
    found = await roots(
        fleet,
        {
            "toto.toml": """
        [terraform]
        prevent = ["destroy"]
        [terraform.roots.app]
        after = ["net", "db"]
        approve = "always"
        [terraform.roots.db]
        path = "infra/the db"
        prevent = []
        after = ["net"]
        workspace = "prod"
        var_files = ["infra/prod.tfvars"]
        backend_config = ["infra/pg.hcl", "schema_name=x y"]
        tags = ["data"]
        watch = ["files"]
        [terraform.roots.net]
        """,
            "terraform/net/main.tf": "",
            "terraform/app/main.tf": "",
            "infra/the db/main.tf": "",
            "infra/pg.hcl": "",
            "infra/prod.tfvars": "",
            "files/a": "",
            "terraform/other/main.tf": "",
        },
    )
    assert [root.name for root in found] == ["net", "db", "app"]
    assert found[1] == Root(
        name="db",
        path="infra/the db",
        workspace="prod",
        var_files=("infra/prod.tfvars",),
        after=("net",),
        backend_config=("infra/pg.hcl", "schema_name=x y"),
        tags=("data",),
        watch=("files",),
    )
    assert (found[0].prevent, found[0].approve, found[2].approve) == (("destroy",), "never", "always")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[terraform.roots.a]\nafter = ['b']", ["toto.toml: terraform.roots.a.after: there is no root 'b'"]),
        (
            "[terraform.roots.a]\nafter = ['a']",
            ["toto.toml: terraform.roots.a.after: this goes round in a circle: a after a"],
        ),
        (
            "[terraform.roots.a]\nafter = ['c']\n[terraform.roots.'b.x']\npath='terraform/a'\nafter = ['a']\n"
            "[terraform.roots.c]\npath='terraform/a'\nafter = ['b.x']",
            ["toto.toml: terraform.roots.a.after: this goes round in a circle: a after c after b.x after a"],
        ),
        (
            "[terraform.roots.'x.y']",
            ["toto.toml: terraform.roots.'x.y'.path: there are no .tf files in 'terraform/x.y'"],
        ),
        (
            "[terraform.roots.a]\npath = 'README'",
            ["toto.toml: terraform.roots.a.path: there are no .tf files in 'README'"],
        ),
        (
            "[terraform.roots.a]\nvar_files = ['v']\nwatch = ['w']\nbackend_config = ['b', 'a=b']",
            [
                "toto.toml: terraform.roots.a.var_files: there is no 'v' in the repo",
                "toto.toml: terraform.roots.a.backend_config: there is no 'b' in the repo",
                "toto.toml: terraform.roots.a.watch: there is no 'w' in the repo",
            ],
        ),
    ],
)
async def test_what_is_wrong_with_roots_is_reported_with_its_key(fleet: Fleet, text: str, words: list[str]) -> None:
    with pytest.raises(SettingsError) as caught:
        await roots(fleet, {"toto.toml": text, "terraform/a/main.tf": "", "README": ""})
    assert list(caught.value.problems) == words


# Identities

REPO = {
    "toto.toml": """
        [terraform.roots.app]
        var_files = ["vars/app.tfvars"]
        backend_config = ["vars/backend.hcl"]
        watch = ["files"]
        """,
    "terraform/app/main.tf": 'module "a" {\n  source = "../../modules/a"\n}\n',
    "terraform/app/sub/template": "",
    "modules/a/main.tf.json": '{"module": {"b": {"source": "../b"}, "remote": {"source": "example.org/a/b/c"}}}',
    "modules/b/main.tf": 'module "a" {\n  source = "../a" # a circle, which terraform refuses\n}\n',
    "modules/c/main.tf": "",
    "vars/app.tfvars": "",
    "vars/backend.hcl": "",
    "vars/other": "",
    "files/deep/x": "",
    "linked/versions.tf": "",
    "README": "",
    "terraform/other/main.tf": "",
}


def aside(tree: Path) -> dict[str, str]:
    chosen = settings.load(tree).terraform
    return dict(terraform.left_aside(tree, chosen, terraform.discover(tree, chosen)))


async def test_a_folder_that_another_calls_as_a_module_is_no_root_and_that_is_told(fleet: Fleet) -> None:
    files = {
        "terraform/net/main.tf": "",
        "terraform/shop/main.tf": 'module "net" {\n  source = "../net"\n}\n',
        "terraform/shop/own/main.tf": "",
        "terraform/web/main.tf": 'module "own" {\n  source = "./own"\n}\nmodule "gone" {\n  source = "../../.."\n}\n',
        "terraform/web/own/main.tf": "",
        "terraform/deep/er/main.tf": "",
    }
    assert [root.name for root in await roots(fleet, files)] == ["shop", "web"]
    told = aside(fleet.folder / "tree1")
    assert list(told) == ["terraform/deep/er", "terraform/net", "terraform/shop/own"]
    assert told["terraform/net"] == (
        "is no root, since terraform/shop calls it as a module: name all roots in toto.toml, this one by "
        "[terraform.roots.net] with path = 'terraform/net'"
    )
    assert "since only folders directly in it are, if it has no .tf files itself" in told["terraform/deep/er"]
    named = {"toto.toml": "[terraform.roots.net]\n[terraform.roots.shop]\n"}
    assert [root.name for root in await roots(fleet, named)] == ["net", "shop"] and aside(fleet.folder / "tree2") == {}


async def test_folders_below_a_root_and_names_that_hurt_are_told(fleet: Fleet) -> None:
    files = {"terraform/main.tf": "", "terraform/a b\n/main.tf": "", "terraform/modules/m/main.tf": ""}
    calls = 'module "m" {\n  source = "./modules/m"\n}\n'
    assert [root.name for root in await roots(fleet, {**files, "terraform/main.tf": calls})] == ["main"]
    ((place, what),) = aside(fleet.folder / "tree1").items()
    assert place.isprintable() and what.isprintable() and "[terraform.roots.a-b]" in what


async def test_terraform_is_off_when_its_roots_are_none(fleet: Fleet) -> None:
    off = {"toto.toml": "[terraform]\nroots = {}\n", "terraform/main.tf": ""}
    assert await roots(fleet, off) == []
    (told,) = aside(fleet.folder / "tree1").items()
    assert told[0] == "terraform" and told[1].startswith("terraform is off, by `[terraform] roots = {}` in toto.toml")
    old = settings.load(fleet.folder / "tree1", deployed=True).terraform
    assert old.named is None, "it was the same as left out in an older version, which may have deployed it"


@pytest.mark.parametrize(
    ("toml", "problem"),
    [
        ('[terraform.roots.a]\nwas = "b"\n[terraform.roots.b]\n', "there is still a root 'b', whose state that is"),
        ('[terraform.roots.a]\nwas = "x"\n[terraform.roots.b]\nwas = "x"\n', "two roots cannot go on with the state"),
    ],
)
async def test_a_state_has_one_root(fleet: Fleet, toml: str, problem: str) -> None:
    with pytest.raises(SettingsError, match=problem):
        await roots(fleet, {"toto.toml": toml, "terraform/a/x.tf": "", "terraform/b/x.tf": ""})


async def identity(fleet: Fleet, files: Mapping[str, str | None], name: str = "app") -> str:
    commit, tree = await fleet.tree(files)
    found = {root.name: root for root in terraform.discover(tree, settings.load(tree).terraform)}
    return await terraform.identity(fleet.bare, commit, tree, found[name])


async def test_an_identity_changes_with_what_the_root_is_made_of_and_with_nothing_else(fleet: Fleet) -> None:
    (fleet.repo.work / "terraform/app").mkdir(parents=True)
    (fleet.repo.work / "terraform/app/versions.tf").symlink_to("../../linked/versions.tf")
    toml = REPO["toto.toml"]
    last = await identity(fleet, REPO)
    for name, text in (
        ("README", "x"),
        ("modules/c/main.tf", "#"),
        ("vars/other", "x"),
        ("linked/other", "x"),
        ("terraform/other/main.tf", "#"),
        ("toto.toml", toml + 'tags = ["x"]\nprevent = ["destroy"]\napprove = "always"\n'),
    ):
        assert await identity(fleet, {name: text}) == last, name
    for name, text in (
        ("terraform/app/main.tf", REPO["terraform/app/main.tf"] + "#"),
        ("modules/a/x.tf", "#"),
        ("terraform/app/sub/template", "x"),
        ("modules/b/sub/x", "#"),
        ("vars/app.tfvars", "#"),
        ("vars/backend.hcl", "#"),
        ("files/deep/x", "x"),
        ("linked/versions.tf", "#"),
        ("toto.toml", toml + 'workspace = "other"\n'),
        ("toto.toml", toml.replace('"files"', '"README"')),
        ("toto.toml", toml.replace('hcl"', 'hcl", "a=b"')),
    ):
        now = await identity(fleet, {name: text})
        assert now != last, name
        last = now
    assert await identity(fleet, REPO) == await identity(fleet, {"README": "y"})


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("../../../../outside", "the source of module 'x' is not in the repo: '../../../../outside'"),
        ("/etc", "the source of module 'x' is not in the repo: '/etc'"),
        ("../nowhere", "the source of module 'x' is not a folder: '../nowhere'"),
    ],
)
async def test_a_module_outside_the_repo_is_reported_with_its_line(fleet: Fleet, source: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        await identity(fleet, {"terraform/app/main.tf": f'# the\n# app\nmodule "x" {{\n  source = "{source}"\n}}\n'})
    assert str(caught.value).startswith(f"terraform/app/main.tf:4: {words}\n")


async def test_any_name_has_an_identity(fleet: Fleet) -> None:
    files = {
        "toto.toml": '[terraform.roots."a.b-C_d"]\npath = "wéird ~^:*? dir/${x}"\nwatch = ["the file\\\\"]',
        "wéird ~^:*? dir/${x}/main.tf": 'module "x" {\n  source = "../mö dule"\n}\n',
        "wéird ~^:*? dir/mö dule/main.tf": "",
        "the file\\": "",
    }
    first = await identity(fleet, files, "a.b-C_d")
    assert await identity(fleet, {"wéird ~^:*? dir/mö dule/main.tf": "#"}, "a.b-C_d") != first


# Plans and applies


@needs_terraform
async def test_exactly_the_saved_plan_is_applied(fleet: Fleet) -> None:
    session = await fleet.session(data("a", "planned") + 'output "o" {\n  value = terraform_data.a.output\n}\n')
    planned = await session.plan()
    assert not planned.empty and planned.before == State() and planned.before.empty
    assert planned.lines == [
        "+ terraform_data.a",
        "    id: (known after apply)",
        '    input: "planned"',
        "    output: (known after apply)",
        "+ output.o",
        "    value: (known after apply)",
    ]
    assert planned.file.stat().st_mode & 0o777 == 0o600 and planned.file.parent.stat().st_mode & 0o777 == 0o700
    (session.tree / "terraform/main.tf").write_text(data("b", "later"))
    state = await session.apply(planned)
    assert state.resources == ("terraform_data.a",) and state.serial > 0 and state == await session.state()
    assert '"planned"' in (fleet.home() / "terraform.tfstate").read_text()


@needs_terraform
async def test_a_state_outlives_the_tree_and_nothing_to_do_is_an_empty_plan(fleet: Fleet) -> None:
    text = data("a", "1")
    state = await fleet.applied(text)
    shutil.rmtree(fleet.folder / "tree1")
    planned = await (await fleet.session(text, run="2")).plan()
    assert planned.empty and planned.lines == [] and planned.before == state and planned.summary == "nothing to change"
    assert not list(fleet.folder.glob("tree*/**/*.tfstate*"))


@needs_terraform
async def test_a_stale_plan_is_not_applied_and_a_new_one_may_be_the_same(fleet: Fleet) -> None:
    await fleet.applied(data("a", "1") + data("b", "1"))
    session = await fleet.session(data("a", "2") + data("b", "1"))
    planned, again = await session.plan(), await session.plan()
    assert planned.file != again.file and planned.same(again)
    other = await fleet.session(data("a", "1") + data("b", "2"), run="2")
    moved = await other.apply(await other.plan())
    with pytest.raises(PlanStale, match="terraform/main: the state has changed since the plan was made\nnext: plan it"):
        await session.apply(planned)
    assert await session.state() == moved
    replanned = await session.plan()
    assert not replanned.same(planned)  # it would now revert b as well
    assert replanned.addresses(Action.UPDATE) == ("terraform_data.a", "terraform_data.b")


@needs_terraform
async def test_a_plan_of_a_different_state_is_stale_as_well(fleet: Fleet) -> None:
    await fleet.applied(data("a", "1"))
    session = await fleet.session(data("a", "2"))
    planned = await session.plan()
    (fleet.home() / "terraform.tfstate").unlink()
    await fleet.applied(data("z", "1"), run="2")
    with pytest.raises(PlanStale):
        await session.apply(planned)


@needs_terraform
async def test_what_a_plan_destroys_is_known_and_refused(fleet: Fleet) -> None:
    await fleet.applied(data("gone", "1") + data("again", "1", "  triggers_replace = 1\n") + data("stays", "1"))
    planned = await (
        await fleet.session(data("again", "1", "  triggers_replace = 2\n") + data("stays", "2") + data("new", "1"))
    ).plan()
    assert planned.summary == "1 to create, 1 to update, 1 to replace, 1 to destroy"
    assert planned.destroyed == ("terraform_data.again", "terraform_data.gone")
    assert planned.created == ("terraform_data.again", "terraform_data.new")
    assert "-/+ terraform_data.again (because of triggers_replace)" in planned.lines
    assert "    triggers_replace: 1 → 2" in planned.lines


@needs_terraform
async def test_a_new_root_is_reverted_by_destroying_what_it_created(fleet: Fleet) -> None:
    text = data("a", "1") + data("b", "1") + 'output "o" {\n  value = 1\n}\n'
    session = await fleet.session(text)
    planned = await session.plan()
    assert planned.before.empty
    await session.apply(planned)
    back = await session.plan(destroy=True)
    assert set(back.destroyed) == set(planned.created) and set(back.counts) == {Action.DESTROY}
    assert (await session.apply(back)).empty
    assert (await session.plan()).same(planned)


@needs_terraform
async def test_a_moved_resource_destroys_nothing(fleet: Fleet) -> None:
    await fleet.applied(data("old", "1"))
    planned = await (
        await fleet.session(data("new", "1") + "moved {\n  from = terraform_data.old\n  to = terraform_data.new\n}\n")
    ).plan()
    assert planned.lines == ["> terraform_data.new (was terraform_data.old)"] and not planned.empty


@needs_terraform
async def test_what_does_not_parse_is_reported_with_its_file_and_line(fleet: Fleet) -> None:
    session = await fleet.session(
        {
            "terraform/app/main.tf": 'module "m" {\n  source = "../../modules/m"\n}\n',
            "modules/m/main.tf": '\noutput "o" {\n  value = local.nothing\n}\n',
        },
        "app",
    )
    with pytest.raises(TerraformFailed) as caught:
        await session.plan()
    assert str(caught.value).startswith("terraform/app: Error: Reference to undeclared local value\n")
    assert "on modules/m/main.tf line 3, in output" in str(caught.value)
    assert not caught.value.killed


@needs_terraform
async def test_var_files_workspaces_and_names(fleet: Fleet) -> None:
    files = {
        "toto.toml": """
        [terraform.roots.one]
        path = "terraform/the äpp"
        var_files = ["the vars/a.tfvars", "the vars/b.tfvars"]
        [terraform.roots."two.x"]
        path = "terraform/the äpp"
        workspace = "other"
        var_files = ["the vars/b.tfvars", "the vars/a.tfvars"]
        """,
        "terraform/the äpp/main.tf": 'variable "v" {}\nresource "terraform_data" "a" {\n'
        '  input = "${terraform.workspace} ${var.v}"\n}\n',
        "the vars/a.tfvars": 'v = "a"\n',
        "the vars/b.tfvars": 'v = "b"\n',
    }
    for name, said in (("one", "default b"), ("two.x", "other a")):
        session = await fleet.session(files, name)
        planned = await session.plan()
        assert f'    input: "{said}"' in planned.lines
        assert (await session.apply(planned)).resources == ("terraform_data.a",)
        assert (await (await fleet.session(files, name, run="2")).plan()).empty
        assert not list(session.tree.rglob("*tfstate*"))
    assert (fleet.home("two.x") / "workspaces/other/terraform.tfstate").exists()


@needs_terraform
async def test_two_runs_may_plan_a_root_at_once(fleet: Fleet) -> None:
    await fleet.applied(data("a", "0"))
    sessions = [await fleet.session(data("a", str(number)), run=str(number)) for number in range(1, 4)]
    plans = await asyncio.gather(*(session.plan() for session in sessions))
    assert [f'    input: "0" → "{number}"' in planned.lines for number, planned in enumerate(plans, 1)] == [True] * 3


# What goes wrong


@needs_terraform
@pytest.mark.parametrize("path", ["", 'path = "x.tfstate"', 'path = "/var/lib/kept.tfstate"', 'path = "/state/x"'])
async def test_a_state_in_a_file_of_its_own_is_refused(fleet: Fleet, path: str) -> None:
    session = await fleet.session(f'terraform {{\n  backend "local" {{\n    {path}\n  }}\n}}\n' + data("a", "1"))
    with pytest.raises(InputError, match="its backend keeps the state in a file of its own") as caught:
        await session.plan()
    assert f"toto keeps the state in {fleet.home()}/terraform.tfstate" in str(caught.value)


@needs_terraform
async def test_a_state_that_is_committed_is_not_passed_over(fleet: Fleet) -> None:
    state = '{"version": 4, "serial": 3, "lineage": "x", "resources": []}'
    session = await fleet.session({"terraform/main.tf": data("a", "1"), "terraform/terraform.tfstate": state})
    with pytest.raises(
        InputError,
        match=rf"a state is committed[^\n]*\nnext: move terraform/terraform.tfstate to "
        rf"{fleet.home()}/terraform.tfstate",
    ):
        await session.plan()
    (fleet.home() / "terraform.tfstate").write_text(state)
    assert (await session.plan()).before == State(serial=3, lineage="x")


@needs_terraform
async def test_a_locked_state_is_waited_for_and_then_its_holder_is_named(fleet: Fleet, tmp_path: Path) -> None:
    text = data("a", "1") + data("slow", "1", shell("echo > /state/began; sleep 1000"))
    session = await fleet.session(text, lock_timeout=1)
    planned = await session.plan()
    async with applying(await fleet.session(text, run="2"), fleet.home() / "began"):
        for refused in (session.plan(), session.apply(planned)):
            with pytest.raises(StateLocked) as caught:
                await refused
            holder = caught.value.holder
            assert holder["Operation"] == "OperationTypeApply" and "@" in holder["Who"]
            lock = holder["ID"]
            assert str(caught.value) == (
                f"terraform/main: its state is locked by {holder['Who']} since {holder['Created']} "
                f"(OperationTypeApply, lock {lock}); waited 1 s\n"
                f"next: wait until that terraform is done; if it is dead, `terraform force-unlock {lock}`"
            )
        waiting: list[str] = []
        patient = await fleet.session(text, run="3", on_line=waiting.append)
        task = asyncio.create_task(patient.plan())
        async with asyncio.timeout(60):
            while not any("Acquiring state lock" in line for line in waiting):
                await asyncio.sleep(0.02)
    # The holder was cancelled: it saved what it had done, and unlocked. The plan is of that, not of what was before.
    assert "terraform_data.a" in (await task).before.resources and "terraform_data.a" not in (await task).created
    assert not list(fleet.home().glob(".*.lock.info"))


@needs_terraform
async def test_a_killed_terraform_is_reported_as_a_partial_apply(fleet: Fleet, tmp_path: Path) -> None:
    session = await fleet.session(data("a", "1") + slow_after_a())
    async with applying(session, fleet.home() / "began") as task:
        os.kill(terraform_of(os.getpid()), signal.SIGKILL)
        with pytest.raises(ApplyFailed, match="terraform was ended by SIGKILL") as caught:
            await task
    assert caught.value.partial
    assert "terraform_data.a" in (await session.state()).resources
    assert "terraform_data.a" not in (await session.plan()).created  # nobody holds the lock


@needs_terraform
async def test_what_a_killed_toto_has_applied_is_in_the_state_of_the_next(fleet: Fleet, tmp_path: Path) -> None:
    session = await fleet.session(data("a", "1") + slow_after_a())
    program = (
        "import asyncio, pathlib\nfrom toto.infra_repo.settings import Terraform\n"
        "from toto.terraform.session import Root, Session\n"
        f"session = Session(pathlib.Path({str(session.repo)!r}), Root(name='main', path='terraform'), "
        f"pathlib.Path({str(session.tree)!r}), pathlib.Path({str(session.scratch)!r}), Terraform())\n"
        "async def main() -> None:\n    await session.apply(await session.plan())\nasyncio.run(main())\n"
    )
    async with process.start([sys.executable, "-c", program]) as toto:
        await appears(fleet.home() / "began")
        pid = terraform_of(toto.pid)
        os.kill(toto.pid, signal.SIGKILL)
        async with asyncio.timeout(60):
            while process.started(pid) is not None:
                await asyncio.sleep(0.02)
    planned = await (await fleet.session({}, run="2", lock_timeout=5)).plan()
    assert "terraform_data.a" in planned.before.resources and "terraform_data.a" not in planned.created


@needs_terraform
async def test_an_apply_that_takes_too_long_is_ended_and_may_be_partial(fleet: Fleet) -> None:
    text = data("slow", "1", shell("sleep 1000").replace("{", "{\n    when = destroy", 1))
    await fleet.applied(text)
    session = await fleet.session(text)
    planned = await session.plan(destroy=True)
    hasty = Session(
        session.repo,
        session.root,
        session.tree,
        session.scratch,
        session.settings.model_copy(update={"timeout": 1, "lock_timeout": 1}),
    )
    with pytest.raises(ApplyFailed, match="did not end within 2 s") as caught:
        await hasty.apply(planned)
    assert caught.value.partial  # although the state is what it was: nobody waited until it was saved
    assert await session.state() == planned.before


@needs_terraform
async def test_a_failed_apply_says_whether_it_changed_anything(fleet: Fleet, tmp_path: Path) -> None:
    good, bad = file("a", STATE / "a", "1"), file("b", STATE / "b", "fail", "  depends_on = [demo_file.a]\n")
    session = await fleet.session(DEMO + good + bad)
    with pytest.raises(ApplyFailed) as caught:
        await session.apply(await session.plan())
    assert caught.value.partial and (fleet.home() / "a").read_text() == "1" and not (fleet.home() / "b").exists()
    assert str(caught.value).startswith("terraform/main: Error: cannot write the file\n")
    assert "with demo_file.b" in str(caught.value) and "on terraform/main.tf line 10" in str(caught.value)
    assert "no room for 'fail' in /state/b" in " ".join(str(caught.value).split())
    (fleet.home() / "a.locked").touch()
    back = await session.plan(destroy=True)
    assert back.before.resources == ("demo_file.a",)
    with pytest.raises(ApplyFailed, match="cannot delete the file") as held:
        await session.apply(back)
    assert not held.value.partial and await session.state() == back.before


@needs_terraform
async def test_what_was_changed_behind_terraforms_back_is_drift(fleet: Fleet, tmp_path: Path) -> None:
    text = DEMO + file("a", STATE / "a", "1") + file("b", STATE / "b", "1")
    await fleet.applied(text)
    session = await fleet.session(text, run="2")
    untouched = await session.plan()
    assert untouched.empty and untouched.drift == ()
    (fleet.home() / "a").write_text("another")
    (fleet.home() / "b").unlink()
    planned = await session.plan()
    assert [change.lines for change in planned.drift] == [
        ["~ demo_file.a", '    content: "1" → "another"', "    size: 1 → 7"],
        ["- demo_file.b"],
    ]
    assert planned.addresses(Action.UPDATE) == ("demo_file.a",) and planned.created == ("demo_file.b",)
    assert (fleet.home() / "a").read_text() == "another"
    await session.apply(planned)
    assert ((fleet.home() / "a").read_text(), (fleet.home() / "b").read_text()) == ("1", "1")


@needs_terraform
async def test_a_revert_says_what_cannot_come_back_as_it_was(fleet: Fleet) -> None:
    good = data("a", "1") + data("again", "1", "  triggers_replace = 1\n") + data("gone", "1")
    last = await fleet.applied(good)
    session = await fleet.session(data("a", "2") + data("again", "1", "  triggers_replace = 2\n") + data("new", "1"))
    forward = await session.plan()
    await session.apply(forward)
    revert = await fleet.session(good)
    back = await revert.plan()
    assert back.created == ("terraform_data.again", "terraform_data.gone")
    assert back.destroyed == ("terraform_data.again", "terraform_data.new")
    with pytest.raises(PlanRefused, match=r"the settings protect: terraform_data.again, terraform_data.new\n"):
        refuse(back, ["destroy"])
    state = await session.state()
    way = way_back("0123456789", forward.before, seen(forward.deeds, state), state, target="terraform/main")
    assert way is not None and way.wrong(back) == []
    assert way.words(back).endswith("; created anew, without their old data: terraform_data.again, terraform_data.gone")
    assert (await revert.apply(back)).resources == last.resources


# Secrets


@needs_terraform
async def test_no_secret_is_shown_anywhere(fleet: Fleet, tmp_path: Path) -> None:
    said: list[str] = []
    text = (
        DEMO + 'variable "secret" {\n  sensitive = true\n}\nvariable "open" {}\n'
        'variable "list" {\n  type = any\n}\n'
        'resource "terraform_data" "a" {\n  input = [var.secret, "<${var.open}>", var.list]\n}\n'
        'resource "terraform_data" "b" {\n  input = nonsensitive(var.secret)\n'
        + shell('echo "$TF_VAR_open"; echo "$TF_VAR_secret" >&2')
        + "}\n"
        'resource "demo_file" "f" {\n  path = "/state/f"\n  content = "x"\n  token = var.secret\n}\n'
        'output "s" {\n  value = var.secret\n  sensitive = true\n}\noutput "o" {\n  value = "${var.open}"\n}\n'
    )
    env = {
        "TF_VAR_secret": POISON,
        "TF_VAR_open": "0pen-p0ison",
        "TF_VAR_list": '["l1st-poison", {"k": 424242, "pem": "BEGIN\\npem-poison"}]',
    }
    session = await fleet.session(text, env=env, on_line=said.append)
    planned = await session.plan()
    state = await session.apply(planned)
    more = (await session.plan(destroy=True), repr(session), await session.state())
    (session.tree / "terraform/bad.tf").write_text(
        'resource "demo_file" "g" {\n  path = "/x"\n  content = "fail ${nonsensitive(var.secret)} ${var.open}"\n}\n'
    )
    with pytest.raises(ApplyFailed) as failed:
        await session.apply(await session.plan())
    everything = "\n".join(
        [
            *said,
            planned.model_dump_json(),
            repr(planned),
            *planned.lines,
            repr(state),
            repr(more),
            str(failed.value),
            repr(failed.value.__dict__),
        ]
    )
    assert "cannot write the file" in everything and "(sensitive value)" in everything and '"<******>"' in everything
    for poison in ("hunter2", "second line", "0pen-p0ison", "l1st-poison", "424242", "pem-poison"):
        assert poison not in everything
    assert POISON.splitlines()[1] in (fleet.home() / "terraform.tfstate").read_text()  # it was given all the same
    for place in (fleet.home(), planned.file.parent):
        assert place.stat().st_mode & 0o077 == 0


@needs_terraform
async def test_nothing_of_totos_own_environment_reaches_terraform(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PREFECT_API_KEY", "TOTO_SECRET", "AWS_SECRET_ACCESS_KEY", "TF_VAR_a", "TF_LOG", "TF_CLI_ARGS"):
        monkeypatch.setenv(name, "own-poison")
    await fleet.applied(data("a", "1", shell("env > /state/env")), env={"AWS_REGION": "x"})
    names = {line.partition("=")[0] for line in (fleet.home() / "env").read_text().splitlines()}
    assert {"PATH", "HOME", "AWS_REGION", "TF_DATA_DIR"} <= names
    assert "own-poison" not in (fleet.home() / "env").read_text()


# A state elsewhere


@needs_terraform
@needs_postgres
async def test_a_lock_whose_backend_names_nobody_is_reported_as_such(
    fleet: Fleet, tmp_path: Path, database: postgres.Postgres
) -> None:
    files = {
        "toto.toml": '[terraform.roots.main]\npath = "terraform"\nbackend_config = ["pg.hcl"]\n',
        "pg.hcl": 'schema_name = "locks"\n',
        "terraform/main.tf": pg()
        + data("a", "1", shell("echo > /state/began; while [ ! -e /state/go ]; do sleep 0.05; done")),
    }
    env = {"PG_CONN_STR": database.network_dsn}
    said: list[str] = []
    async with applying(await fleet.session(files, env=env), fleet.home() / "began") as task:
        with pytest.raises(StateLocked, match="the backend does not say who") as caught:
            await (await fleet.session(files, env=env, run="2", lock_timeout=1)).plan()
        assert caught.value.holder == {}
        patient = asyncio.create_task((await fleet.session(files, env=env, run="3", on_line=said.append)).plan())
        async with asyncio.timeout(60):
            while not any("Acquiring state lock" in line for line in said):
                await asyncio.sleep(0.02)
        (fleet.home() / "go").touch()
        assert (await task).resources == ("terraform_data.a",)
        assert (await patient).empty
    assert not fleet.home().joinpath("terraform.tfstate").exists()


@needs_terraform
@needs_postgres
async def test_a_cancelled_apply_saves_its_state_and_unlocks_it(
    fleet: Fleet, tmp_path: Path, database: postgres.Postgres
) -> None:
    text = (
        pg("cancelled") + data("a", "1") + slow_after_a() + data("never", "1", "  depends_on = [terraform_data.slow]\n")
    )
    session = await fleet.session(text, env={"PG_CONN_STR": database.network_dsn})
    async with applying(session, fleet.home() / "began") as task:
        pid = terraform_of(os.getpid())
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert process.started(pid) is None
    left = await session.state()  # which nothing but terraform's own end had saved there yet
    assert "terraform_data.a" in left.resources and "terraform_data.never" not in left.resources
    again = await fleet.session(text, run="2", env=session.env, lock_timeout=1)
    assert "terraform_data.a" not in (await again.plan()).created


@needs_terraform
@needs_postgres
@pytest.mark.parametrize("cancelled", [False, True])
async def test_a_state_that_could_not_be_saved_is_kept_and_saved_by_the_next_run(
    fleet: Fleet, tmp_path: Path, own_database: postgres.Postgres, cancelled: bool
) -> None:
    text = pg(f"lost{cancelled}") + data(
        "a", "1", shell("echo > /state/began; while [ ! -e /state/go ]; do sleep 0.05; done")
    )
    session = await fleet.session(text, env={"PG_CONN_STR": own_database.network_dsn})
    async with applying(session, fleet.home() / "began") as task:
        await own_database.crash()
        try:
            if cancelled:
                task.cancel()
                await asyncio.wait([task])
            else:
                (fleet.home() / "go").touch()
                with pytest.raises(ApplyFailed, match="Failed to save state") as caught:
                    await task
        finally:
            await own_database.start()
    (kept,) = fleet.home().glob("errored-*.tfstate")
    if not cancelled:
        assert caught.value.partial
        assert f"terraform could not save the state: toto keeps it in {kept}" in str(caught.value)
    assert kept.stat().st_mode & 0o777 == 0o600 and not (session.tree / "terraform/errored.tfstate").exists()
    shutil.rmtree(session.tree)
    planned = await (await fleet.session(text, env={"PG_CONN_STR": own_database.network_dsn}, run="2")).plan()
    assert planned.before.resources == ("terraform_data.a",) and planned.empty is not cancelled and not kept.exists()


@needs_terraform
async def test_a_state_that_was_not_saved_is_not_passed_over(fleet: Fleet) -> None:
    await fleet.applied(data("a", "1"))
    session = await fleet.session(data("a", "1"))
    kept = fleet.home() / "errored-2026-01-01T00:00:00Z.tfstate"
    kept.write_text('{"version": 4, "serial": 1, "lineage": "another", "resources": []}')
    with pytest.raises(TerraformFailed, match="the state lacks what an earlier apply did") as caught:
        await session.plan()
    assert f"compare the state with {kept}, which" in str(caught.value) and kept.exists()


@needs_terraform
@needs_postgres
async def test_a_kill_with_a_remote_state_may_lose_what_was_done_and_is_reported_as_partial(
    fleet: Fleet, tmp_path: Path, database: postgres.Postgres
) -> None:
    text = pg("killed") + data("a", "1") + slow_after_a()
    session = await fleet.session(text, env={"PG_CONN_STR": database.network_dsn})
    async with applying(session, fleet.home() / "began") as task:
        os.kill(terraform_of(os.getpid()), signal.SIGKILL)
        with pytest.raises(ApplyFailed) as caught:
            await task
    assert caught.value.partial  # whatever the state says: terraform writes it there every 20 s only
    assert isinstance(await session.plan(), Planned)  # and the lock went with the connection
