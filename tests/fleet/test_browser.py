"""The page of the fleet in a real browser (Debian's chromium), for eyes, keyboards and screen readers."""

import json
import shutil
from collections.abc import AsyncIterator
from typing import Any, Final

import pytest
import pytest_asyncio
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Browser, Page, async_playwright

from tests.fleet.conftest import DNS, World
from tests.ledger.test_ledger import intent
from toto.fleet import builds, results
from toto.ledger import steps

pytestmark = [pytest.mark.minutes(1), pytest.mark.asyncio(loop_scope="module")]

RULES: Final = {"runOnly": {"type": "tag", "values": ["wcag2a", "wcag2aa", "wcag21aa", "wcag22aa", "best-practice"]}}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("THE PAGE OF THE FLEET IS NOT SEEN IN A BROWSER: chromium is not on PATH")
    async with async_playwright() as playwright:
        opened = await playwright.chromium.launch(
            executable_path=program, args=["--no-sandbox"]
        )  # (the tests are root)
        yield opened
        await opened.close()


async def opened(browser: Browser, world: World, place: str, **how: Any) -> Page:
    assert world.api.auth is not None
    name, _, password = world.api.auth.partition(":")
    context = await browser.new_context(http_credentials={"username": name, "password": password}, **how)
    page = await context.new_page()
    await page.goto(f"{world.url}{place}", wait_until="domcontentloaded")
    return page


async def furnished(world: World) -> None:
    await world.keep(
        results.row("web1", "deployed", took="rehearse 41 s, roll out 12 s"),
        results.row("web2", "rehearsal failed", "web.sh: not ok 3 - it answers on port 80"),
        results.row(results.OTHERS, results.AS_WANTED),
    )
    rows = [{"script": "web.sh", "result": "ok", "tests": "3"}, {"script": "ssh.sh", "result": "ok", "tests": "1"}]
    for key, kind, data in (
        ("difference-infra--host--web1", "markdown", "```diff\n~ nginx 1.26 -> 1.27\n+ curl 8\n```"),
        ("console-infra--host--web1", "markdown", f"```text\n{'[  OK  ] Started a unit.' * 40}\n```"),
        ("no-internet-infra--host--web1", "table", json.dumps(rows)),
        (
            "compliance-infra--host--web1",
            "table",
            json.dumps([{"result": "failed", "check": "inspec/base", "id": "ssh"}]),
        ),
    ):
        await world.api.call("POST", "/artifacts/", {"key": key, "type": kind, "data": data})
    built = [builds.row("web1", builds.BUILT, size=5_000_000), builds.row("web2", builds.FAILED, why="an error")]
    made = {"key": builds.key("infra"), "type": "table", "data": json.dumps(built), "description": "c" * 40}
    await world.api.call("POST", "/artifacts/", made)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
async def test_nothing_keeps_anybody_from_reading_it(browser: Browser, world: World, scheme: Any, width: int) -> None:
    await furnished(world)
    for place in ("/fleet/", "/fleet/infra/host/web1", "/fleet/infra/builds"):
        page = await opened(browser, world, place, color_scheme=scheme, viewport={"width": width, "height": 800})
        found = await Axe().run(page, options=RULES)
        assert found.violations_count == 0, found.generate_report()
        assert await page.evaluate("document.documentElement.scrollWidth") <= width, "only tables scroll sideways"
        await page.context.close()


async def test_it_follows_the_fleet_and_keeps_what_a_reader_had(browser: Browser, world: World) -> None:
    page = await opened(browser, world, "/fleet/")
    errors: list[str] = []
    page.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
    await page.get_by_role("status").get_by_text("live").wait_for()
    await page.get_by_role("link", name="web1").focus()
    await world.book.write(DNS, steps.intend(intent("run-9")), "dns: intent")
    await page.get_by_role("rowheader", name="terraform/dns").wait_for(timeout=20_000)
    assert await page.evaluate("document.activeElement.textContent") == "web1"
    await world.book.write(DNS, lambda _: None, "dns: gone")
    assert errors == []
    await page.context.close()


async def test_it_works_by_keyboard_and_without_javascript(browser: Browser, world: World) -> None:
    page = await opened(browser, world, "/fleet/", java_script_enabled=False)
    await page.keyboard.press("Tab")
    await page.keyboard.press("Enter")
    assert page.url.endswith("#main")
    await page.get_by_role("link", name="web1").focus()
    await page.keyboard.press("Enter")
    await page.wait_for_url("**/fleet/infra/host/web1")
    assert await page.get_by_role("heading", level=1).inner_text() == "web1 infra"
    await page.get_by_role("link", name="fleet").focus()
    await page.keyboard.press("Enter")
    await page.wait_for_url("**/fleet/")
    await page.context.close()
