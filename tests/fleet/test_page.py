"""The page of the fleet, by a real Prefect server and repositories: as a person, a script and a stranger see it."""

import asyncio
import json
import os
import re
import shutil
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
import websockets

from tests.conftest import free_port
from tests.fleet.conftest import DNS, HOSTILE, WEB1, WEB2, World
from tests.ledger.test_ledger import deployed, intent, note
from tests.repos import InfraRepo, git
from tests.test_cli import items
from toto.api import certificate
from toto.base import process
from toto.fleet import builds, results
from toto.fleet.state import Fleet
from toto.fleet.words import ago
from toto.jobs.history import History, State
from toto.ledger import steps
from toto.ledger.ledger import Ledger
from toto.ledger.target import Target
from toto.machine import condition, documents
from toto.machine.condition import Condition
from toto.plan.changes import Action, Change, ChangeSet, Desired, Why
from toto.report.report import Report

pytestmark = [pytest.mark.minutes(1), pytest.mark.asyncio(loop_scope="module")]


async def test_a_stranger_gets_nothing(world: World) -> None:
    pages = ("/fleet", "/fleet/", "/fleet/infra/host/web1", "/fleet/events", "/fleet/-/static/style.css", "/fleet/x")
    async with httpx.AsyncClient(base_url=world.url, follow_redirects=True) as client:
        for page in pages:
            for auth in (None, ("toto", "wrong"), ("", "")):
                refused = await client.get(page, auth=auth)
                assert refused.status_code == 401 and "web1" not in refused.text
                assert refused.headers["www-authenticate"].startswith("Basic")
        for word in ("Basic !!!", "Bearer toto:secret", "Basic"):
            assert (await client.get("/fleet/", headers={"Authorization": word})).status_code == 401
        assert (await client.get("/fleet/", headers={"Host": "evil.example.org"})).status_code == 400
    async with world.client() as client:
        for method in ("POST", "PUT", "DELETE", "PATCH"):
            assert (await client.request(method, "/fleet/")).status_code == 405, "it is read-only"


async def test_what_strangers_wrote_is_text(world: World) -> None:
    await world.keep(results.row("web2", f"rehearsal failed {HOSTILE}", f"not ok 3 - {HOSTILE}"))
    async with world.client() as client:
        for page in ("/fleet/", "/fleet/infra/host/web1", "/fleet/infra/host/web2"):
            got = await client.get(page)
            assert got.status_code == 200
            assert "<script>alert" not in got.text and "\x1b" not in got.text and "&lt;script&gt;alert(1)" in got.text
            policy = got.headers["content-security-policy"]
            assert "script-src 'self'" in policy and "default-src 'none'" in policy and "unsafe" not in policy
            assert len(re.findall("<script", got.text)) == 1 and "style=" not in got.text


async def test_what_needs_a_person_comes_first_and_each_target_says_why(world: World) -> None:
    web1, web2 = await world.line(WEB1), await world.line(WEB2)
    assert (web2["state"], web2["why"]) == ("reverted", "a test failed")
    assert (web1["state"], web1["commit"]["author"], web1["system"][:11]) == ("good", "op", "/nix/store/")
    assert [each["target"] for each in (await world.fleet())["targets"]] == ["host/web2", "host/web1"]
    documents.note_contact(documents.Place.of(world.repo.bare, "web1"))
    now = time.time()
    condition.note(world.repo.bare, "web1", Condition(at=now, drift=(f"it runs {HOSTILE}",), reboot_needed=True))
    web1 = await world.line(WEB1)
    assert (web1["drift"], web1["reboot_needed"]) == ([f"it runs {HOSTILE}"], True)
    assert datetime.fromisoformat(web1["heard"]).timestamp() == pytest.approx(now, abs=60)
    async with world.client() as client:
        page = (await client.get("/fleet/")).text
    assert "reboot needed" in page and "1 to look at" in page and "<script>alert" not in page
    condition.note(world.repo.bare, "web1", None)


async def test_the_result_of_the_newest_run_counts(world: World) -> None:
    await world.keep(results.row("web1", "rehearsal failed", "web.sh: not ok 2 - it answers"))
    web1 = await world.line(WEB1)
    assert (web1["last"]["result"], web1["last"]["why"]) == ("rehearsal failed", "web.sh: not ok 2 - it answers")
    await world.keep(results.row("terraform/dns", "evaluation failed", "dns.tf:3"))
    assert (await world.line(WEB1))["last"]["result"] == "rehearsal failed", "that run had nothing to do with it"
    assert (await world.line(DNS))["state"] == "not deployed", "its first run failed"
    await world.keep(results.row(results.OTHERS, results.AS_WANTED))
    assert (await world.line(WEB1))["last"]["result"] == "as wanted"
    assert "terraform/dns" not in {each["target"] for each in (await world.fleet())["targets"]}, "it is no more"


async def test_what_is_held_back_waits_or_is_frozen_is_said(world: World) -> None:
    held, waits = (
        results.row("web1", "held back", "its window is closed"),
        results.row("web3", "waiting", "no hosts/web3.nix"),
    )
    await world.keep(held, waits)
    web1, web3 = await world.line(WEB1), await world.line(Target("host", "web3"))
    assert (web1["last"]["result"], web1["last"]["why"], web1["mood"]) == ("held back", "its window is closed", "warn")
    assert (web3["state"], web3["last"]["result"], web3["mood"]) == ("not deployed", "waiting", "warn")
    await world.keep(results.row(results.OTHERS, results.AS_WANTED))
    machines = "machines:\n- {name: web1, address: 10.0.0.1, freeze: they move house}\n"
    world.repo.commit({"machines.yaml": machines})
    web1 = await world.line(WEB1)
    async with world.client() as client:
        page = (await client.get("/fleet/")).text
    world.repo.commit({"machines.yaml": None})
    assert web1["frozen"]["why"] == "they move house" and web1["mood"] == "warn" and "they move house" in page
    assert (await world.line(WEB1))["frozen"] is None


async def test_a_report_has_a_result_for_each_target() -> None:
    desired = [Desired(target=each, file=f"{each}.nix", identity="x") for each in (WEB1, WEB2)]
    changes = tuple(Change(desired=each, why=Why.CHANGED, action=Action.DEPLOY) for each in desired)
    report = Report("infra", "c" * 40, ChangeSet(commit="c" * 40, ledger="", changes=changes, unchanged=(DNS,)))
    with report.timed("web1", "rehearse"):
        report.failure("web1", "rehearsal", ValueError("web1: tests failed\nweb.sh: not ok 2 - it answers"))
    report.outcome["web2"] = "deployed"
    assert report.results() == [
        results.row("web1", "rehearsal failed", "web1: rehearsal failed: tests failed", "rehearse 0 s"),
        results.row("web2", "deployed"),
        results.row(results.OTHERS, results.AS_WANTED),
    ]
    part = replace(report, changes=report.changes.model_copy(update={"whole": False}), failures=[])
    assert results.OTHERS not in {each["target"] for each in part.results()}


async def test_one_target_has_its_history_tests_and_console(world: World) -> None:
    table = [{"script": "web.sh", "result": "ok", "test": HOSTILE}]
    console = "line\n" * 300 + HOSTILE
    shown = {
        "difference-infra--host--web1": ("markdown", "```diff\n+ nginx 1.27\n- nginx 1.26\n```"),
        "console-infra--host--web1": ("markdown", f"```text\n{console}\n```"),
        "no-internet-infra--host--web1": ("table", json.dumps(table)),
        "compliance-infra--host--web1": ("table", json.dumps([{"result": "failed", "why": HOSTILE}])),
        "console-other--host--web1": ("markdown", "```text\nof a different repo's web1\n```"),
    }
    for key, (kind, data) in shown.items():
        await world.api.call("POST", "/artifacts/", {"key": key, "type": kind, "data": data})
    async with world.client() as client:
        found = (await client.get("/fleet/infra/host/web1?format=json")).json()
        page = (await client.get("/fleet/infra/host/web1")).text
        assert (await client.get("/fleet/infra/host/web9")).status_code == 404
        assert (await client.get("/fleet/other/host/web1")).status_code == 404
        assert (await client.get("/fleet/infra/..%2f..%2fhost/web1")).status_code == 404
    assert [each["what"] for each in found["history"]] == ["good", "begun"]
    assert found["tests"] == {"no-internet": table} and found["difference"] == "+ nginx 1.27\n- nginx 1.26"
    assert found["compliance"] == [{"result": "failed", "why": HOSTILE}] and "1 controls of its last check" in page
    assert found["console"] == console and "of a different" not in page
    assert '<span class="added">+ nginx 1.27</span>' in page and "Console of its last rehearsal" in page
    assert "https://grafana.example.org" in page


async def test_what_was_built_is_shown_by_commit_and_host(world: World) -> None:
    first = [builds.row("web1", builds.BUILT, why="built by pi 3", path="/nix/store/x", size=3_000_000)]
    second = [
        builds.row("web1", builds.BUILT, why="built by toto 1", path="/nix/store/y", size=5_000_000),
        builds.row("web2", builds.FAILED, why=HOSTILE),
    ]
    for commit, rows in (("1" * 40, first), ("2" * 40, second)):
        made = {"key": builds.key("infra"), "type": "table", "data": json.dumps(rows), "description": commit}
        await world.api.call("POST", "/artifacts/", made)
    async with world.client() as client:
        found = (await client.get("/fleet/infra/builds", headers={"Accept": "application/json"})).json()
        page = (await client.get("/fleet/infra/builds")).text
        assert (await client.get("/fleet/other/builds")).status_code == 404
    assert [each["commit"][0] for each in found] == ["2", "1"]
    assert [each["rows"]["web1"]["bytes"] for each in found] == ["5000000", "3000000"]
    assert found[0]["rows"]["web2"]["result"] == builds.FAILED and "web2" not in found[1]["rows"]
    for said in ("5 MB", "3 MB", "built by pi 3", builds.FAILED, "22222222"):
        assert said in page, page
    assert "<script>alert" not in page


async def test_a_change_is_told_to_who_follows(world: World) -> None:
    async with world.client() as client, client.stream("GET", "/fleet/events") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        lines = stream.aiter_lines()
        assert await anext(lines) == "retry: 5000"
        await world.book.write(DNS, steps.intend(intent("run-9")), "dns: intent")
        async with asyncio.timeout(120):
            async for line in lines:
                if line == "event: change":
                    break
    (dns,) = (each for each in (await world.fleet())["targets"] if each["target"] == str(DNS))
    assert dns["state"] == "being changed"
    await world.book.write(DNS, lambda _: None, "dns: gone")


class _Text(HTMLParser):
    """The words and the links of a page, as a browser without JavaScript and pictures has them."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value for name, value in attrs if tag == "a" and name == "href" and value]


async def test_every_link_leads_somewhere(world: World) -> None:
    async with world.client() as client:
        for page in ("/fleet/", "/fleet/infra/host/web1"):
            text = _Text()
            text.feed((await client.get(page)).text)
            own = {each for each in text.links if each.startswith("/")}
            assert {"/fleet/", "/runs"} <= own
            for link in own:
                assert (await client.get(link, headers={"Accept": "text/html"})).status_code == 200, link


async def test_a_ledger_that_cannot_be_read_is_told_and_the_others_are_shown(world: World) -> None:
    broken = InfraRepo(world.state / "more")
    place = world.state / "repos/broken.git"
    commit = broken.commit({"host/web9.json": "{broken"})
    git("update-ref", "refs/toto/ledger", commit, cwd=broken.bare)
    broken.bare.rename(place)
    try:
        await asyncio.sleep(1.1)
        found = await world.fleet()
        assert any(each.startswith("broken: its ledger cannot be read") for each in found["errors"])
        assert {each["target"] for each in found["targets"]} >= {"host/web1", "host/web2"}
    finally:
        place.rename(world.state / "gone")


async def test_a_fleet_of_a_thousand_is_read_once_and_then_only_what_changed(world: World, tmp_path: Path) -> None:
    repo = InfraRepo(tmp_path)
    entry = json.dumps({"good": json.loads(deployed("/nix/store/x").model_dump_json())})
    files: dict[str, str | None] = {f"host/web{number}.json": entry for number in range(1_000)}
    commit = repo.commit(files)
    git("update-ref", "refs/toto/ledger", commit, cwd=repo.bare)
    fleet = Fleet(tmp_path, world.api)
    assert len((await fleet.now()).lines) == 1_000
    before = Ledger(repo.bare).read().entries
    await Ledger(repo.bare).write(Target("host", "web7"), steps.not_reached(note("run-2")), "web7")
    fleet._read_at = 0
    lines = (await fleet.now()).lines
    after = Ledger(repo.bare).read().entries
    assert {str(target) for target in after if after[target] is not before[target]} == {"host/web7"}
    assert (lines[0].label, lines[0].state) == ("web7", "unreachable")


@asynccontextmanager
async def nginx(world: World, folder: Path) -> AsyncIterator[int]:
    """A real nginx in front of toto, as nix/toto.nix configures it; its port for https."""
    program = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        pytest.skip("THE PROXY IS NOT TRIED: there is no nginx on PATH")
    made, plain, port = certificate.own(["toto.example.org"]), free_port(), free_port()
    text = (Path(__file__).parent / "nginx.conf").read_text()
    text = re.sub(r"^listen \[.*\n|^http2 on;\n", "", text, flags=re.M)  # (an older nginx says that otherwise)
    for right, here in (
        ("pid /run/nginx/nginx.pid;", f"pid {folder}/pid; user root;" if os.geteuid() == 0 else f"pid {folder}/pid;"),
        ("error_log stderr;", f"error_log {folder}/error.log;"),
        ("http {", f"http {{ access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;"
         f"fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;"),
        ("0.0.0.0:80 ", f"127.0.0.1:{plain} "),
        ("0.0.0.0:443 ssl", f"127.0.0.1:{port} ssl http2"),
        ("http://127.0.0.1:4200", world.url),
        ("/etc/toto/cert.pem", str(made.certificate)),
        ("/etc/toto/key.pem", str(made.key)),
    ):  # fmt: skip
        assert text.count(right) == 1, right
        text = text.replace(right, here)
    (folder / "conf").write_text(text)
    async with process.start([program, "-p", folder, "-c", folder / "conf", "-e", folder / "error.log"]) as running:
        async with asyncio.timeout(60):
            while True:
                assert running.status is None, (folder / "error.log").read_text()
                with suppress(OSError):
                    (await asyncio.open_connection("127.0.0.1", port))[1].close()
                    break
                await asyncio.sleep(0.1)
        yield port


# What a client says of a proxy that there was not.
FORGED: Final = {
    **{"X-Forwarded-Host": "evil.example.org", "X-Forwarded-Server": "evil.example.org", "X-Forwarded-Proto": "http"},
    **{"X-Forwarded-For": "127.0.0.1", "X-Real-IP": "127.0.0.1", "Forwarded": "for=127.0.0.1;host=evil.example.org"},
    **{"X-Forwarded-Port": "1", "X-Forwarded-Prefix": "/evil"},
}


async def test_all_of_it_works_through_nginx_as_the_module_sets_it_up(world: World, tmp_path: Path) -> None:
    certificate.own(["toto.example.org"])
    trusted = ssl.create_default_context(cafile=certificate.authority())
    name = {"Host": "toto.example.org"}
    more = {"sni_hostname": "toto.example.org"}
    async with (
        nginx(world, tmp_path) as port,
        httpx.AsyncClient(
            base_url=f"https://127.0.0.1:{port}", headers=name, verify=trusted, timeout=60, trust_env=False
        ) as client,
    ):
        assert (await client.get("/fleet/", extensions=more)).status_code == 401
        assert (await client.get("/api/admin/version", extensions=more)).status_code == 401
        client.auth = httpx.BasicAuth("toto", "secret")
        assert "web1" in (await client.get("/fleet/", extensions=more)).text
        assert (await client.get("/api/admin/version", extensions=more)).status_code == 200
        assert "<html" in (await client.get("/runs", headers={"Accept": "text/html"}, extensions=more)).text
        # Where it is sent to is where it came from, by https, whatever it says of that itself.
        for own in ({}, FORGED):
            moved = await client.get("/api/health/", headers=own, extensions=more)
            assert (moved.status_code, moved.headers["location"]) == (307, "https://toto.example.org/api/health")
        strange = await client.get("/fleet/", headers=FORGED | {"Host": "evil.example.org"}, extensions=more)
        assert strange.status_code == 400
        async with client.stream("GET", "/fleet/events", extensions=more) as stream:
            lines = stream.aiter_lines()
            async with asyncio.timeout(60):
                assert await anext(lines) == "retry: 5000", "nothing holds it back"
            await world.book.write(DNS, steps.intend(intent("run-9")), "dns: intent")
            async with asyncio.timeout(120):
                async for line in lines:
                    if line == "event: change":
                        break
        await world.book.write(DNS, lambda _: None, "dns: gone")
        for origin, lets_in in (("https://toto.example.org", True), ("https://evil.example.org", False)):
            opened = websockets.connect(
                "wss://toto.example.org/api/events/out", host="127.0.0.1", port=port, ssl=trusted, proxy=None,
                origin=websockets.Origin(origin), subprotocols=[websockets.Subprotocol("prefect")],
            )  # fmt: skip
            if not lets_in:
                with pytest.raises(websockets.InvalidStatus):
                    await opened
                continue
            async with opened as socket:
                await socket.send(json.dumps({"type": "auth", "token": "toto:secret"}))
                async with asyncio.timeout(60):
                    assert json.loads(await socket.recv())["type"] == "auth_success"


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0 s ago"), (59, "59 s ago"), (60, "1 min ago"), (119, "2 min ago"), (7_300, "2 h ago"), (200_000, "2 d ago")],
)
async def test_ages_are_in_words(seconds: float, said: str) -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    assert ago(now - timedelta(seconds=seconds), now) == said
    assert ago((now - timedelta(seconds=seconds)).isoformat().replace("+00:00", "Z"), now) == said


async def test_a_job_s_badge_and_state_are_public_where_its_conf_says_so(world: World) -> None:
    history = History(world.repo.bare)
    history.register({name: {"description": HOSTILE, "public": name == "open"} for name in ("open", "closed", "new")})
    for name in ("open", "closed"):
        begun = history.begin(history.queue(name, reason=HOSTILE, parameters={"A": "secret"}), "default")
        history.end(begun, State.FAILED, HOSTILE)
    async with httpx.AsyncClient(base_url=world.url) as stranger:
        badge = await stranger.get("/fleet/infra/jobs/open.svg")
        assert badge.headers["content-type"] == "image/svg+xml" and "open: failed" in badge.text
        state = await stranger.get("/fleet/infra/jobs/open.json")
        assert (state.json()["state"], state.json()["runs"][0]["number"]) == ("failed", 1)
        assert "secret" not in state.text and "alert" not in state.text
        for path in ("closed.svg", "closed.json", "nothing.svg", "../jobs", "", "..%2fopen.svg"):
            assert (await stranger.get(f"/fleet/infra/jobs/{path}")).status_code == 401
        for path in ("/fleet/other/jobs/open.svg", "/fleet/infra/jobs", "/fleet/infra/host/open.svg"):
            assert (await stranger.get(path)).status_code == 401
    async with world.client() as client:
        assert "new: unknown" in (await client.get("/fleet/infra/jobs/new.svg")).text
        assert (await client.get("/fleet/infra/jobs/nothing.svg")).status_code == 404
        page = (await client.get("/fleet/infra/jobs")).text
        assert "closed:1" in page and "<script>alert" not in page
        assert len((await client.get("/fleet/infra/jobs?format=json")).json()) == 3


async def test_the_command_reads_the_page_of_a_toto_on_a_different_machine(world: World, tmp_path: Path) -> None:
    there = {"TOTO_URL": world.url.replace("://", f"://{world.api.auth}@")}

    async def read(*words: str) -> list[dict[str, Any]]:
        return await asyncio.to_thread(items, tmp_path, *words, **there)

    assert {each["target"]: each["state"] for each in await read("status")} == {
        each["target"]: each["state"] for each in (await world.fleet())["targets"]
    }
    assert await read("status", "--repo", "none") == []
    history = await read("log", "web1", "-n", "5")
    assert history and {each["target"] for each in history} == {"host/web1"} and len(history) <= 5
    assert history == await read("log", "web1", "-n", "5", "--repo", "infra")
    assert await read("log", "--author", "nobody") == []
    (wrong,) = await read("log", "--repo", "none")
    assert "say which repository" in wrong["message"]
    there["TOTO_URL"] = world.url.replace("://", "://toto:wrong@")
    (refused,) = await read("status")
    assert "is TOTO_URL right?" in refused["hint"] and refused["status"] == 2
