"""The test scripts of a host: which are found, and the results of scripts that behave badly."""

import asyncio
import os
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.lab.fleet import command_of
from toto.base import process
from toto.base.errors import InputError
from toto.base.process import LineSink
from toto.cell.cell import INFRA, Cell
from toto.rehearsal.phase_run import Bench
from toto.rehearsal.results import PhaseResult, ScriptResult
from toto.rehearsal.run import run_phase, run_script
from toto.rehearsal.suite import Phase, Script, find
from toto.rehearsal.tap import parse

ENV = {"TOTO_HOST": "web1"}
GOOD = "echo 1..1; echo ok 1\n"


def write(path: Path, body: str = GOOD, *, shebang: str = "#!/bin/sh\n", mode: int = 0o755) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(shebang + body)
    path.chmod(mode)
    return path


async def run_body(
    tmp_path: Path,
    body: str,
    *,
    timeout: float = 20,
    keep: int = 100_000,
    shebang: str = "#!/bin/sh\n",
    on_line: LineSink | None = None,
) -> ScriptResult:
    path = write(tmp_path / "t", body, shebang=shebang)
    script = Script(Phase.SMOKE, "smoke/t", path)
    return await run_script(script, bench(tmp_path), tree=tmp_path, timeout=timeout, keep=keep, on_line=on_line)


def bench(tree: Path) -> Bench:
    tree.chmod(0o755)  # as an exported commit is: its folders on the way are toto's alone
    return Bench(Cell(read={INFRA: tree}), ENV)


def names(tree: Path, host: str = "web1") -> list[str]:
    return [script.name for script in find(tree, host).scripts]


def test_a_host_without_tests_has_an_empty_suite(tmp_path: Path) -> None:
    suite = find(tmp_path, "web1")
    assert suite.scripts == ()
    assert suite.digest() == find(tmp_path, "db1").digest()


def test_scripts_are_found_by_phase_and_sorted_by_name(tmp_path: Path) -> None:
    for name in (
        "tests/web1/post-switch/a",
        "tests/web1/no-internet/20-b",
        "tests/web1/no-internet/10 a ü",
        "test/web1/smoke/x",
        "tests/db1/smoke/y",
        "hosts/web1-test.sh",
        "machines/web1/web1-smoke-test.sh",
        "hosts/web1/test.sh",
    ):
        write(tmp_path / name)
    assert names(tmp_path) == [
        "no-internet/10 a ü",
        "no-internet/20-b",
        "web1-test.sh",
        "smoke/x",
        "web1-smoke-test.sh",
        "post-switch/a",
    ]
    assert [script.name for script in find(tmp_path, "web1").of(Phase.SMOKE)] == ["smoke/x", "web1-smoke-test.sh"]


def test_a_smoke_test_belongs_to_the_host_of_that_name(tmp_path: Path) -> None:
    write(tmp_path / "hosts/web-smoke-test.sh")
    assert names(tmp_path, "web") == ["web-smoke-test.sh"]
    write(tmp_path / "hosts/web-smoke.nix")
    assert names(tmp_path, "web") == []
    assert find(tmp_path, "web-smoke").scripts[0].phase == Phase.NO_INTERNET


def test_documents_dotfiles_and_helpers_are_no_scripts(tmp_path: Path) -> None:
    for name in ("README", "README.txt", "notes.md", ".env", "lib/helper.sh", "a"):
        write(tmp_path / "tests/web1/smoke" / name, mode=0o644 if name != "a" else 0o755)
    assert names(tmp_path) == ["smoke/a"]


def test_a_script_that_is_not_executable_is_refused_with_the_command_to_type(tmp_path: Path) -> None:
    write(tmp_path / "tests/web1/smoke/a", mode=0o644)
    with pytest.raises(InputError, match=r"tests/web1/smoke/a: .*not executable\n.*update-index --chmod=\+x tests/"):
        find(tmp_path, "web1")


def test_a_directory_that_is_almost_a_phase_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "tests/web1/no_internet/a")
    with pytest.raises(InputError, match="did you mean `no-internet`"):
        find(tmp_path, "web1")


@pytest.mark.parametrize(
    "link", ["tests/web1", "tests/web1/smoke", "tests/web1/smoke/a", "tests/web1/smoke/lib/x", "tests/lib"]
)
def test_a_link_out_of_the_tree_is_refused(tmp_path: Path, link: str) -> None:
    tree = tmp_path / "tree"
    write(tree / "tests/web1/no-internet/z" if "web1/" in link else tree / "test/web1/smoke/z")
    (tree / link).parent.mkdir(parents=True, exist_ok=True)
    write(tmp_path / "outside/a")
    (tree / link).symlink_to(tmp_path / "outside")
    with pytest.raises(InputError, match="leads out of the repository"):
        find(tree, "web1")


def test_links_within_the_tree_are_followed_and_circles_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "tests/web1/smoke/a")
    (tmp_path / "tests/web2").symlink_to("web1")
    assert names(tmp_path, "web2") == ["smoke/a"]
    (tmp_path / "tests/web1/smoke/round").symlink_to(".")
    with pytest.raises(InputError, match="circle"):
        find(tmp_path, "web1")
    (tmp_path / "tests/web1/smoke/round").unlink()
    (tmp_path / "tests/web1/smoke/b").symlink_to("nowhere")
    with pytest.raises(InputError, match="leads nowhere"):
        find(tmp_path, "web1")


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "tests/web1/smoke/a")
    os.mkfifo(tmp_path / "tests/web1/smoke/pipe")
    with pytest.raises(InputError, match="neither a file nor a directory"):
        find(tmp_path, "web1")


def test_a_host_name_cannot_lead_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        find(tmp_path, "../x")


def test_the_digest_follows_what_the_scripts_are(tmp_path: Path) -> None:
    script = write(tmp_path / "tests/web1/smoke/a")
    seen = {find(tmp_path, "web1").digest()}

    def changed() -> bool:
        digest = find(tmp_path, "web1").digest()
        fresh = digest not in seen
        seen.add(digest)
        return fresh

    assert not changed()
    script.touch()
    write(tmp_path / "tests/web1/README.md")
    write(tmp_path / "tests/db1/smoke/a")
    assert not changed()
    write(script, "echo 1..0\n")
    assert changed()
    helper = write(tmp_path / "tests/web1/smoke/lib/help", mode=0o644)
    assert changed()
    helper.chmod(0o755)
    assert changed()
    helper.rename(helper.with_name("help2"))
    assert changed()
    write(tmp_path / "tests/web1/data")
    assert changed()
    write(tmp_path / "tests/lib/common.sh")
    assert changed()
    quiet = find(tmp_path, "web1").digest([Phase.NO_INTERNET])
    write(script, "echo 1..0 # skip\n")
    assert changed()
    assert find(tmp_path, "web1").digest([Phase.NO_INTERNET]) == quiet


async def test_a_good_script_passes_and_runs_in_its_directory(tmp_path: Path) -> None:
    here = 'test "$TOTO_HOST $PWD" = "web1 /infra" || exit 1\n'
    result = await run_body(tmp_path, here + GOOD + "echo why >&2")
    assert result.passed and result.result == "passed"
    assert result.row()["tests"] == "1/1"
    assert "why\n" in result.output


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (":", "it printed nothing"),
        ("echo hello", "it printed no TAP"),
        ("echo 1..2; echo ok 1", "it planned 2 tests and ran 1"),
        (GOOD + "exit 3", "it exited with status 3 though every test passed"),
        (GOOD + "kill -SEGV $$", "it was ended by SIGSEGV"),
        ("echo 1..1 >&2; echo ok 1 >&2", "it printed nothing"),
        ("echo 1..1; echo not ok 1 - nginx; exit 1", "1 of 1 test failed: 1 nginx"),
    ],
)
async def test_a_bad_script_fails_with_its_reason(tmp_path: Path, body: str, reason: str) -> None:
    result = await run_body(tmp_path, body)
    assert not result.passed
    assert result.reason == reason


@pytest.mark.parametrize(
    ("shebang", "reason"),
    [
        ("", "names no interpreter"),
        ("#!/no/such/thing\n", "`#!/no/such/thing`, names an interpreter that is not here"),
        ("#!/bin/sh\r\n", "CR LF"),
        ("#!\n", "names an interpreter that is not here"),
        ("#!/usr/bin/env no-such-thing\n", "it exited with status 127"),
    ],
)
async def test_a_script_that_cannot_be_started_is_reported_with_its_first_line(
    tmp_path: Path, shebang: str, reason: str
) -> None:
    result = await run_body(tmp_path, GOOD, shebang=shebang)
    assert not result.passed
    assert reason in result.reason


async def test_a_script_that_is_gone_is_a_result(tmp_path: Path) -> None:
    script = Script(Phase.SMOKE, "x", tmp_path / "x")
    result = await run_script(script, bench(tmp_path), tree=tmp_path)
    assert result.reason == "it cannot be read: No such file or directory"
    write(tmp_path / "x", mode=0o644)
    assert (await run_script(script, bench(tmp_path), tree=tmp_path)).reason == "it is gone, or not executable"


async def test_a_hanging_script_is_ended_and_keeps_what_it_said(tmp_path: Path) -> None:
    result = await run_body(tmp_path, "echo 1..2; echo not ok 1 - early; sleep 1000; echo ok 2", timeout=1)
    assert result.reason == "it did not end within 1 s and was ended; failed so far: not ok 1 - early"
    assert "early" in result.output


async def test_a_daemon_that_keeps_stdout_open_delays_nothing(tmp_path: Path) -> None:
    result = await run_body(tmp_path, GOOD + "sleep 1000 & setsid sleep 1000 &\n", timeout=60)
    assert result.passed, "it was ended after its 60 s: somebody waited for the daemons"


@pytest.mark.slow
async def test_endless_output_is_judged_whole_and_kept_in_part(tmp_path: Path) -> None:
    body = (
        "echo 1..2; echo ok 1 - first; yes '# some diagnostic line of output' | head -c 100000000\n"
        "echo; echo ok 2 - last\n"
    )
    result = await run_body(tmp_path, body, timeout=600, keep=10_000)
    assert result.passed, result.reason
    assert len(result.output) < 11_000
    assert "ok 1 - first" in result.output and "ok 2 - last" in result.output and "bytes left out" in result.output


async def test_one_endless_line_is_kept_in_part(tmp_path: Path) -> None:
    result = await run_body(tmp_path, "head -c 20000000 /dev/zero; echo; " + GOOD, keep=10_000)
    assert result.passed
    assert len(result.output) < 60_000


async def test_a_cancel_ends_the_script(tmp_path: Path) -> None:
    begun = asyncio.Event()
    task = asyncio.create_task(
        run_body(tmp_path, "echo begun; setsid sleep 12345 & sleep 12345\n", timeout=60, on_line=lambda _: begun.set())
    )
    await asyncio.wait_for(begun.wait(), 120)
    started: set[int] = set()
    async with asyncio.timeout(120):  # both sleeps begin a moment after the line
        while len(started) < 2:
            started = {pid for pid in process.descendants(os.getpid()) if command_of(pid).startswith(b"sleep\x0012345")}
            await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with asyncio.timeout(120):
        while any(process.started(pid) for pid in started):
            await asyncio.sleep(0.05)


async def test_a_phase_runs_every_script_and_reports_each_result(tmp_path: Path) -> None:
    write(
        tmp_path / "tests/web1/smoke/1 bad ü",
        "echo 1..2; echo 'not ok 1 - <&> \\033[1m'\necho '# got 5'; echo ok 2 '# SKIP x'",
    )
    write(tmp_path / "tests/web1/smoke/2 good")
    write(tmp_path / "tests/web1/smoke/3 skipped", "echo 1..0 '# SKIP no net'")
    write(tmp_path / "tests/web1/smoke/4 silent", "echo out of luck >&2")
    results: list[ScriptResult] = []
    phase = await run_phase(
        find(tmp_path, "web1"), Phase.SMOKE, bench(tmp_path), tree=tmp_path, timeout=20, on_result=results.append
    )
    assert tuple(results) == phase.results
    assert not phase.passed
    assert [row["result"] for row in phase.rows()] == ["failed", "passed", "skipped", "failed"]
    assert phase.rows()[0]["tests"] == "1/2"
    lines = phase.failure_lines()
    assert "    # got 5" in lines and "smoke/4 silent: it printed nothing" in lines and "    out of luck" in lines
    assert phase.failure_lines(2)[1].startswith("… and ")
    suites = ElementTree.fromstring(phase.junit_xml().encode())
    assert [(each.get("tests"), each.get("failures"), each.get("errors"), each.get("skipped")) for each in suites] == [
        ("2", "1", "0", "1"),
        ("1", "0", "0", "0"),
        ("1", "0", "0", "1"),
        ("1", "0", "1", "0"),
    ]
    assert "\x1b" not in phase.junit_xml()


def test_a_phase_without_scripts_passes() -> None:
    assert PhaseResult("web1", Phase.SMOKE).passed


def test_junit_is_xml_whatever_a_script_printed() -> None:
    ugly = "".join(map(chr, [*range(32), 0xFFFE, 0xFFFF, 0xD800, 0x1F600])) + '<]]>&"'
    script = Script(Phase.SMOKE, ugly, Path("x"))
    result = ScriptResult(script, parse(f"1..1\nnot ok 1 {ugly}\n# {ugly}\n"), 1.0, ugly, ugly)
    ElementTree.fromstring(PhaseResult("h", Phase.SMOKE, (result,)).junit_xml().encode())
