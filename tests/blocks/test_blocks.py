"""Blocks on a real Prefect server, and notifying by them from a flow: nothing secret is ever to be seen."""

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from prefect import flow, runtime
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, PREFECT_UI_URL, temporary_settings
from pydantic import ValidationError

import blocks
from blocks import (
    KubeAccess,
    MailVenue,
    NtfyVenue,
    SlackVenue,
    SshIdentity,
    TerraformCredentials,
    WebhookVenue,
    names,
    venues,
)
from blocks.access import AccessBlock
from blocks.base import TotoBlock
from tasks.notify import notify
from tests.conftest import PrefectServer
from tests.report.test_report import report
from tests.repos import InfraRepo as Repo
from tests.repos import git
from tests.venue_servers import HttpServer, http_server, smtp_server
from toto.base.errors import InputError, TotoError
from toto.infra_repo.manifest import Machine, Manifest
from toto.infra_repo.settings import Settings, Venues
from toto.report import notified
from toto.report.report import Report, Reverted
from toto.report.venues import Origin, VenueFailed
from toto.server import deployments

POISON = "POISON-abracadabra"
KEY = f"-----BEGIN OPENSSH PRIVATE KEY-----\n{POISON}\n-----END OPENSSH PRIVATE KEY-----"
REPO = Path("/nowhere/infra.git")
KINDS: list[type[TotoBlock]] = [getattr(blocks, name) for name in blocks.__all__]


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state of its own: it has the repos that names of blocks belong to."""
    monkeypatch.setenv("TOTO_STATE", str(tmp_path / "state"))


@pytest.fixture
async def prefect(prefect_server: PrefectServer, tmp_path: Path) -> AsyncIterator[PrefectServer]:
    """The session's server, for the client in this process."""
    with temporary_settings(
        {PREFECT_API_URL: prefect_server.api_url, PREFECT_HOME: tmp_path / "prefect", PREFECT_UI_URL: "http://ui"}
    ):
        yield prefect_server


@pytest.fixture
def web() -> Iterator[HttpServer]:
    with http_server() as running:
        yield running


def on_disk(*folders: Path) -> bytes:
    """Everything in some folders: a server's has its database, with what is not merged into it yet, and its log."""
    return b"".join(path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file())


async def logs(prefect: PrefectServer, run: str) -> list[str]:
    """A flow run's log, once its last words are there. (Prefect sends it in batches.)"""
    while True:
        found = await prefect.api.call(
            "POST", "/logs/filter", {"logs": {"flow_run_id": {"any_": [run]}}, "sort": "TIMESTAMP_ASC"}
        )
        lines = [str(each["message"]) for each in found]
        if any("Finished in state" in line or line == "the end" for line in lines):
            return lines
        await asyncio.sleep(0.1)


# The blocks


async def test_one_command_makes_the_forms_known(prefect: PrefectServer) -> None:
    await deployments.register_blocks(prefect.env)
    found = await prefect.api.call("POST", "/block_types/filter", {"limit": 200})
    assert {kind.get_block_type_slug() for kind in KINDS} == {
        each["slug"] for each in found if each["slug"].startswith("toto-")
    }
    schemas = await prefect.api.call("POST", "/block_schemas/filter", {"limit": 200})
    assert sum(each["block_type"]["slug"].startswith("toto-") for each in schemas) == len(KINDS)


async def test_a_block_of_a_kind_that_is_no_more_does_no_harm(prefect: PrefectServer) -> None:
    class Former(AccessBlock):
        """What an older toto had made known, and somebody has saved."""

        _block_type_name: ClassVar[str] = "Toto infra repo"
        path: str = ""

    await Former(path="/repos/infra.git").asave("toto", overwrite=True)
    try:
        await deployments.register_blocks(prefect.env)
        assert (await TerraformCredentials.of_repo(REPO)).environment() == {}
        assert await prefect.api.call("GET", "/block_types/slug/toto-infra-repo/block_documents") != []
    finally:
        kind = await prefect.api.call("GET", "/block_types/slug/toto-infra-repo")
        await prefect.api.call("DELETE", f"/block_types/{kind['id']}")


@pytest.mark.parametrize("kind", KINDS)
def test_a_form_explains_itself(kind: type[TotoBlock]) -> None:
    schema = kind.model_json_schema()
    assert schema["description"]
    for name, field in schema["properties"].items():
        assert field["title"] and field["description"].endswith((".", "}")), name


SECRETS: list[TotoBlock] = [
    SlackVenue(url=f"https://hooks.slack.com/services/{POISON}"),
    NtfyVenue(url="https://ntfy.sh/x", token=POISON),
    WebhookVenue(url="https://example.org/", secret=POISON),
    SshIdentity(private_key=KEY),
    MailVenue(sender="toto@example.org", password=POISON),
    TerraformCredentials(variables={"TOKEN": POISON}),
    KubeAccess(kubeconfig=f"clusters: [{POISON}]"),
]


@pytest.mark.parametrize("block", SECRETS, ids=lambda block: type(block).__name__)
async def test_a_secret_is_saved_encrypted_and_never_shown(prefect: PrefectServer, block: TotoBlock) -> None:
    await block.asave("poisoned", overwrite=True)
    loaded = await type(block).saved("poisoned")
    assert loaded is not None and loaded.model_dump() == block.model_dump()
    for shown in (repr(block), str(block), repr(loaded), str(loaded.model_dump()), loaded.model_dump_json()):
        assert POISON not in shown
    assert block.get_block_type_slug().encode() in on_disk(prefect.home)
    assert POISON.encode() not in on_disk(prefect.home)


async def test_what_is_not_saved_works_by_its_defaults(prefect: PrefectServer, tmp_path: Path) -> None:
    assert (await SshIdentity.of_repo(REPO)).file(tmp_path) is None
    assert (await KubeAccess.of_repo(REPO)).file(tmp_path) is None
    assert (await TerraformCredentials.of_repo(REPO, "dns")).environment() == {}


async def test_a_repo_has_blocks_of_its_own_and_one_of_them_those_that_are_shared(
    prefect: PrefectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOTO_STATE", str(tmp_path / "state"))
    infra, lab = tmp_path / "infra.git", tmp_path / "lab.git"
    infra.mkdir()
    saved = ["toto", "dns", "infra", "infra--dns", "lab", "lab--dns"]

    async def found(repo: Path, root: str | None = None) -> str:
        return (await TerraformCredentials.of_repo(repo, root)).environment().get("NAME", "")

    async def removed(name: str) -> None:
        kind = TerraformCredentials.get_block_type_slug()
        there = await prefect.api.call("GET", f"/block_types/slug/{kind}/block_documents/name/{name}")
        await prefect.api.call("DELETE", f"/block_documents/{there['id']}")

    for name in saved:
        await TerraformCredentials(variables={"NAME": name}).asave(name, overwrite=True)
    try:
        assert await found(infra, "dns") == "infra--dns"
        await removed("infra--dns")
        assert (await found(infra, "dns"), await found(infra)) == ("infra", "infra")
        await removed("infra")
        assert (await found(infra, "dns"), await found(infra)) == ("dns", "toto")  # as in 0.1.0: it is the only one
        lab.mkdir()
        assert (await found(infra, "dns"), await found(infra)) == ("", "")
        assert (await found(lab, "dns"), await found(lab)) == ("lab--dns", "lab")
        (tmp_path / "state" / "server.toml").write_text('shared_blocks = "infra"\n')
        assert (await found(infra, "dns"), await found(infra)) == ("dns", "toto")
        assert await found(infra, "lab") == "toto", "a root that is called like a repo gets nothing of that repo"
        assert await found(infra, "lab--dns") == "toto"
        assert await found(lab, "x") == "lab"
    finally:
        for name in ("toto", "dns", "lab", "lab--dns"):
            await removed(name)


@pytest.mark.parametrize(
    ("one", "other"), [("a.b", "a_b"), ("A", "a"), ("a--b", "a-b"), ("a-", "a"), ("a.b", "a-b"), ("_", "__")]
)
def test_different_repos_never_have_a_block_in_common(one: str, other: str, tmp_path: Path) -> None:
    for name in (one, other):
        (tmp_path / f"{name}.git").mkdir()  # so none of them is the only one
    for target in (None, "x", "b"):
        for another in (None, "x", "b", "b--x"):
            mine, theirs = (
                set(names.names(tmp_path / f"{repo}.git", root)) for repo, root in ((one, target), (other, another))
            )
            assert mine and theirs and not mine & theirs
            assert all(re.fullmatch(r"[a-z0-9]+(-{1,2}[a-z0-9]+)*", each) for each in mine | theirs)


async def test_a_wrong_block_is_reported_with_its_field(prefect: PrefectServer) -> None:
    """The UI saves what it is given: it is toto that looks."""
    await SlackVenue(url="https://example.org/").asave("wrong", overwrite=True)
    saved = await prefect.api.call("GET", "/block_types/slug/toto-venue-slack/block_documents/name/wrong")
    for data in ({"url": f"{POISON}"}, {"url": None}):
        await prefect.api.call("PATCH", f"/block_documents/{saved['id']}", {"data": data, "merge_existing_data": False})
        with pytest.raises(InputError, match=r"^block toto-venue-slack/wrong: url: .*\nnext: fix it in") as caught:
            await venues.named("wrong")
        assert POISON not in f"{caught.value}{caught.value.__cause__}"


def test_a_secret_becomes_a_file_that_only_its_owner_reads(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("untouched")
    (tmp_path / "identity").symlink_to(other)
    written = SshIdentity(private_key=KEY.replace("\n", "\r\n")).file(tmp_path)
    assert written is not None
    assert (written.read_text(), written.stat().st_mode & 0o777) == (f"{KEY}\n", 0o600)
    assert other.read_text() == "untouched"
    assert SshIdentity(path="~/key").file(tmp_path) == Path.home() / "key"


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (SshIdentity, {"private_key": f"ssh-ed25519 {POISON}"}),
        (SshIdentity, {"private_key": KEY.replace("\n", " ")}),
        (TerraformCredentials, {"variables": {f"{POISON}=": "x"}}),
        (TerraformCredentials, {"variables": {"a": [POISON]}}),
        (KubeAccess, {"kubeconfig": POISON}),
        (KubeAccess, {"kubeconfig": f"{{{POISON}"}),
        (MailVenue, {"sender": POISON}),
        (MailVenue, {"sender": "a@b", "to": [POISON]}),
        (SlackVenue, {"url": f"https://toto:{POISON}@example.org/"}),
        (SlackVenue, {"url": [POISON]}),
    ],
)
def test_what_is_wrong_is_refused_without_being_shown(kind: type[TotoBlock], wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        kind(**wrong)
    assert POISON not in str(caught.value)


async def test_a_name_stands_for_every_venue_saved_under_it(prefect: PrefectServer, web: HttpServer) -> None:
    await SlackVenue(url=f"{web.address}/slack").asave("both", overwrite=True)
    await NtfyVenue(url=f"{web.address}/ntfy").asave("both", overwrite=True)
    assert {type(each).__name__ for each in await venues.named("both")} == {"Slack", "Ntfy"}


def test_a_context_is_chosen_in_a_copy_of_the_kubeconfig(tmp_path: Path) -> None:
    config = "clusters: []\ncontexts: [{name: home}, {name: lab}]\ncurrent-context: home\n"
    (tmp_path / "kept").write_text(config)
    for access in (
        KubeAccess(kubeconfig=config, context="lab"),
        KubeAccess(path=str(tmp_path / "kept"), context="lab"),
    ):
        chosen = access.file(tmp_path)
        assert chosen is not None and "current-context: lab" in chosen.read_text()
        assert chosen.stat().st_mode & 0o077 == 0
    assert (tmp_path / "kept").read_text() == config
    assert KubeAccess(path=str(tmp_path / "kept")).file(tmp_path) == tmp_path / "kept"
    with pytest.raises(InputError, match="no context 'work' in the kubeconfig"):
        KubeAccess(kubeconfig=config, context="work").file(tmp_path)


@pytest.mark.parametrize("name", ["nobody", "../../admin", "a b", "A", "", "x" * 100])
async def test_a_name_that_is_no_venue_is_an_error(prefect: PrefectServer, name: str) -> None:
    with pytest.raises(VenueFailed, match=r"there is no venue of this name|is not a venue's name"):
        await venues.named(name)


async def test_a_message_can_be_tried(prefect: PrefectServer, web: HttpServer) -> None:
    await NtfyVenue(url=f"{web.address}/t").asave("tried", overwrite=True)
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "blocks", "nobody", "tried"],
        env=prefect.env,
        cwd=deployments.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "tried: sent\n")
    assert "nobody: there is no venue of this name\nnext: " in done.stderr
    assert len(web.requests) == 1


# Telling


class Fleet:
    """An infra repo, with a Slack venue `ops` for the fleet that is `web`."""

    def __init__(self, directory: Path, web: HttpServer) -> None:
        self.repo = Repo(directory)
        self.web = web
        self.settings = Settings(venues=Venues(fleet=("ops",), mail_pusher=("example.org",)))
        self.manifest = Manifest(machines={"b": Machine(name="b", address="192.0.2.1", venues=("nobody",))})
        self.commit = self.repo.commit({"toto.toml": '[venues]\nfleet = ["ops"]\n', "machines.yaml": "machines: []\n"})
        git("tag", "toto/last-good", self.commit, cwd=self.repo.bare)

    async def run(self, end: Report | Exception, origin: Origin = "schedule", **options: Any) -> str:
        """A flow that does nothing but notify; its id."""
        if isinstance(end, Report):
            options["of"] = (self.settings, self.manifest)

        @flow(name="notifies", log_prints=True)
        async def notifies() -> str:
            await notify(self.repo.bare, self.commit, end, origin, **options)
            print("the end")
            return str(runtime.flow_run.id)

        return await notifies()

    @property
    def heard(self) -> list[str]:
        return [json.loads(request.body)["text"] for request in self.web.requests]


def failing(why: str = "not ok 1 - welcome") -> Report:
    of = report("a", "b")
    of.failure("b", "roll-out", TotoError(f"smoke tests failed: s\n  {why}", target="b"))
    of.reverted = [Reverted("b", "/nix/store/x"), Reverted("a", "/nix/store/y")]
    return of


def working() -> Report:
    of = report("a", "b")
    of.outcome |= {"a": "deployed", "b": "deployed"}
    return of


@pytest.fixture
async def fleet(prefect: PrefectServer, tmp_path: Path, web: HttpServer) -> Fleet:
    await SlackVenue(url=f"{web.address}/{POISON}").asave("ops", overwrite=True)
    return Fleet(tmp_path / "fleet", web)


async def test_a_failure_is_notified_once_and_again_when_it_changes_and_when_it_is_over(fleet: Fleet) -> None:
    for end in (failing(), failing(), failing("not ok 2 - other"), working(), report()):
        await fleet.run(end)
    assert [text.splitlines()[0] for text in fleet.heard] == [
        "🔴 *[infra] b: roll-out failed*",
        "🔴 *[infra] b: roll-out failed*",
        "🟢 *[infra] b fine again*",
    ]
    assert await notified.read(fleet.repo.bare) == {}
    assert len(git("notes", "--ref=toto", "show", fleet.commit, cwd=fleet.repo.bare).splitlines()) == 3


async def test_a_venue_that_cannot_be_notified_is_a_warning_and_gets_it_the_next_time(
    fleet: Fleet, prefect: PrefectServer, tmp_path: Path
) -> None:
    fleet.web.answers = [(404, f"no_service {POISON}"), (200, "ok")]
    lines = await logs(prefect, await fleet.run(failing()))
    assert any(
        line.startswith(f"ops was not notified: ops: {fleet.web.address} answered 404: no_service ******")
        for line in lines
    )
    assert any(line.startswith("nobody was not notified: nobody: there is no venue of this name") for line in lines)
    assert lines[-1] == "the end"
    assert "ops" not in await notified.read(fleet.repo.bare)
    assert "ops was notified" in await logs(prefect, await fleet.run(failing()))
    assert set(await notified.read(fleet.repo.bare)) == {"ops"}
    assert POISON.encode() not in on_disk(prefect.home, tmp_path)


async def test_the_pusher_always_hears_and_the_link_leads_to_the_run(fleet: Fleet) -> None:
    async with smtp_server() as post:
        await MailVenue(host="127.0.0.1", port=post.port, security="none", sender="toto@example.org").asave(
            "pusher", overwrite=True
        )
        runs = [await fleet.run(failing(), "push") for _ in range(2)]
        await fleet.run(report(), "push")
    assert [mail["To"] for mail in post.mails] == ["op@example.org"] * 3
    assert [f"http://ui/runs/flow-run/{run}" in mail.get_content() for run, mail in zip(runs, post.mails, strict=False)]
    assert len(fleet.heard) == 2  # the failure, and that it is over


async def test_who_is_named_hears_and_a_branchs_rehearsal_is_nobody_elses(fleet: Fleet) -> None:
    await fleet.run(failing(), "push", named=["ops"], listening=False)
    await fleet.run(failing(), "notebook", named=["ops"], listening=False)
    assert len(fleet.heard) == 2
    assert await notified.read(fleet.repo.bare) == {}


async def test_what_a_check_for_drift_finds_good_is_not_what_a_run_found_wrong(fleet: Fleet) -> None:
    drifted = report()
    drifted.failure("terraform/dns", "drift check", TotoError("it was changed outside"))
    await fleet.run(failing())
    await fleet.run(report(), check="drift")
    await fleet.run(drifted, check="drift")
    await fleet.run(failing())
    await fleet.run(drifted, check="drift")
    await fleet.run(report(), check="drift")
    assert [text.splitlines()[0] for text in fleet.heard] == [
        "🔴 *[infra] b: roll-out failed*",
        "🔴 *[infra] terraform/dns: drift check failed*",
        "🟢 *[infra] terraform/dns fine again*",
    ]
    assert git("notes", "--ref=toto", "show", fleet.commit, cwd=fleet.repo.bare).count("\n") == 0


async def test_a_run_that_broke_off_is_notified_by_what_can_be_read(fleet: Fleet) -> None:
    good = fleet.commit
    fleet.commit = fleet.repo.commit({"machines.yaml": "machines: [}"})
    assert fleet.commit != good
    await fleet.run(InputError("machines.yaml:1: is not YAML"))
    assert "*the run failed: machines.yaml:1: is not YAML*" in fleet.heard[0]


async def test_nothing_that_goes_wrong_fails_the_run(
    fleet: Fleet, prefect: PrefectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet.commit = "1" * 40
    assert any(
        "nobody could be notified of the result: " in line for line in await logs(prefect, await fleet.run(failing()))
    )

    def broken(_url: str) -> None:
        raise RuntimeError(POISON)

    fleet.commit = git("rev-parse", "HEAD", cwd=fleet.repo.bare)
    monkeypatch.setattr("toto.report.venues.http_address", broken)
    lines = await logs(prefect, await fleet.run(failing()))
    assert "ops was not notified: unexpected RuntimeError" in lines or "ops was not notified: block" in str(lines)
    assert POISON not in str(lines)
