"""What counts as a pass: documents as test frameworks print them, and documents with mistakes."""

import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toto.rehearsal import tap

PASSING = {
    "bats": "1..3\nok 1 nginx answers\nok 2 skipped one # skip no net\nok 3 addition using bc in 12ms\n",
    "Test::More": "ok 1 - fine \\# not a directive\nok 2 # skip no net\nok 3 - an object of class 'X' isa 'X'\n1..3\n",
    "node:test": "TAP version 13\n# Subtest: outer\n    # Subtest: inner\n    ok 1 - inner\n"
    "      ---\n      duration_ms: 0.5\n      ...\n"
    "    1..1\nok 1 - outer\n  ---\n  duration_ms: 2\n\n  note: after a blank line\n  ...\n"
    "1..1\n# tests 1\n# pass 1\n# fail 0\n",
    "pg_prove": "1..2\nok 1 - Column users.name should be type text\nok 2 - Should have the correct search_path\n",
    "TAP14": "TAP version 14\n1..1\n    1..1\n    ok 1 - in\nok 1 - out\n",
    "no numbers": "1..2\nok\nok\n",
    "todo": "1..2\nok 1\nnot ok 2 - later # TODO not written yet\n",
    "skip all": "1..0 # SKIP no database here\n",
    "CRLF": "TAP version 13\r\n1..1\r\nok 1 - dos\r\n  ---\r\n  a: 1\r\n  ...\r\n",
    "BOM": "\ufeff1..1\nok 1\n",
    "noise": "starting\nokay, here we go\n1..1\nok 1\n   deep\n        deeper\n",
    "Test2 buffered": "ok 1 - outer {\n    ok 1 - in\n    1..1\n}\nok 2\n1..2\n",
    "todo subtest": "    not ok 1 - in # TODO x\n    1..1\nok 1 - out\n1..1\n",
}

FAILING = {
    "nothing": ("", "it printed nothing"),
    "no TAP": ("hello\n", "it printed no TAP"),
    "okay": ("okay 1\n", "it printed no TAP"),
    "okay with a plan": ("1..1\nokay 1\n", "it planned 1 test and ran 0"),
    "lone ok": ("ok\n", "there is no plan (a line like 1..3): it may have stopped half way"),
    "plan missing": ("ok 1\nok 2\n", "there is no plan (a line like 1..3): it may have stopped half way"),
    "too few": ("1..3\nok 1\nok 2\n", "it planned 3 tests and ran 2"),
    "too many": ("1..1\nok 1\nok 2\n", "it planned 1 test and ran 2"),
    "plan of none": ("1..0\nok 1\n", "it planned 0 tests and ran 1"),
    "not ok": ("1..2\nok 1\nnot ok 2 - nginx\n", "1 of 2 tests failed: 2 nginx"),
    "not ok skip": ("1..1\nnot ok 1 - x # SKIP y\n", "1 of 1 test failed: 1 x"),
    "todo-list is no todo": ("1..1\nnot ok 1 - the # todo-list\n", "1 of 1 test failed: 1 the # todo-list"),
    "escaped todo": ("1..1\nnot ok 1 - the \\# TODO\n", "1 of 1 test failed: 1 the # TODO"),
    "bail out": ("1..2\nok 1\nBail out! database is gone\n", "bailed out: database is gone"),
    "bail out below": ("    Bail out!\n1..1\nok 1\n", "bailed out: no reason given"),
    "duplicates": ("1..2\nok 1\nok 1\n", "test number 1 comes twice"),
    "disorder": ("1..2\nok 2\nok 1\n", "test 2 comes where 1 was due; test 1 comes where 3 was due"),
    "a gap": ("1..2\nok 1\nok 3\n", "test 3 comes where 2 was due"),
    "two plans": ("1..1\nok 1\n1..1\n", "there is a second plan, 1..1"),
    "plan in the middle": ("ok 1\n1..2\nok 2\n", "there are tests after the plan at the end"),
    "version 12": ("TAP version 12\n1..1\nok 1\n", "it speaks TAP version 12; 13 and 14 are understood"),
    "two documents": ("1..1\nok 1\nTAP version 13\n", "there is a version line in the middle: two documents in one"),
    "subtest fails": (
        "    not ok 1 - in\n    1..1\nok 1 - out\n1..1\n",
        "test 1 is ok, but not its subtest: not ok 1 - in",
    ),
    "subtest planned more": (
        "    1..2\n    ok 1\nok 1\n1..1\n",
        "test 1 is ok, but not its subtest: it planned 2 tests and ran 1",
    ),
    "deep subtest": (
        "        not ok 1 - deep\n    ok 1\n    1..1\nok 1\n1..1\n",
        "test 1 is ok, but not its subtest: test 1 is ok, but not its subtest: not ok 1 - deep",
    ),
    "orphan subtest": (
        "1..0\n    not ok 1 - in\n",
        "a subtest at the end has no test that it belongs to: not ok 1 - in",
    ),
    "buffered subtest": (
        "ok 1 - out {\n    not ok 1\n    1..1\n}\n1..1\n",
        "test 1 is ok, but not its subtest: not ok 1",
    ),
    "open YAML": ("1..1\nok 1\n  ---\n  a: 1\n", "the YAML block of test 1 has no end"),
    "broken YAML": ("1..2\nok 1\n  ---\n  a: 1\nok 2\n", "the YAML block of test 1 has no end"),
    "ok inside YAML": ("1..1\n  ---\nnot ok 1\n  ---\n  ok 2\n  ...\n", "1 of 1 test failed: 1"),
    "a line separator is no line end": ("1..2\nok 1 a\u2028ok 2 b\x0bok 2\n", "it planned 2 tests and ran 1"),
    "colour": ("1..1\n\x1b[32mok 1\x1b[0m\n", "it planned 1 test and ran 0"),
}


@pytest.mark.parametrize("text", PASSING.values(), ids=PASSING.keys())
def test_a_good_document_passes(text: str) -> None:
    report = tap.parse(text, 0)
    assert report.problems == ()
    assert report.passed


@pytest.mark.parametrize(("text", "summary"), FAILING.values(), ids=FAILING.keys())
def test_a_bad_document_fails_in_plain_words(text: str, summary: str) -> None:
    report = tap.parse(text, 0)
    assert not report.passed
    assert report.summary == summary


@pytest.mark.parametrize(
    ("text", "status", "summary"),
    [
        ("1..1\nok 1\n", 3, "it exited with status 3 though every test passed"),
        ("1..1\nok 1\n", -11, "it was ended by SIGSEGV"),
        ("1..1\nnot ok 1\n", 1, "1 of 1 test failed: 1"),
        ("1..1\nnot ok 1\n", -9, "1 of 1 test failed: 1; it was ended by SIGKILL"),
        ("", 127, "it printed nothing; it exited with status 127"),
        ("1..0 # SKIP x\n", 1, "it exited with status 1"),
        ("1..1\nok 1\n", -999, "it was ended by signal 999"),
    ],
)
def test_the_exit_status_must_agree_with_the_tests(text: str, status: int, summary: str) -> None:
    assert tap.parse(text, status).summary == summary
    assert not tap.parse(text, status).passed


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("ok 1 - a", tap.Test(1, True, "a")),
        ("ok 1 a # b", tap.Test(1, True, "a # b")),
        ("ok 1 issue #12 is closed", tap.Test(1, True, "issue #12 is closed")),
        (r"ok 1 - back\\slash \# hash", tap.Test(1, True, r"back\slash # hash")),
        ("ok 1 - # SKIP", tap.Test(1, True, "", "skip")),
        ("ok 1 a # skip because b", tap.Test(1, True, "a", "skip", "because b")),
        ("not ok 1 a # Todo: b", tap.Test(1, False, "a # Todo: b")),
        ("not ok 1 a # one # TODO b", tap.Test(1, False, "a # one", "todo", "b")),
        ("ok 7seas", tap.Test(1, True, "7seas")),
        ("ok 99999999999 x", tap.Test(1, True, "99999999999 x")),
        ("ok", tap.Test(1, True, "")),
    ],
)
def test_a_line_is_read_whole(line: str, expected: tap.Test) -> None:
    assert tap.parse(line).tests == (expected,)


def test_diagnostics_and_yaml_stay_with_their_test() -> None:
    report = tap.parse(
        "1..2\nnot ok 1 - a\n# (in test file x.bats, line 3)\n#  `false' failed\nok 2\n  ---\n  a: |\n\n    b\n  ...\n"
    )
    assert report.tests[0].diagnostics == ("# (in test file x.bats, line 3)", "#  `false' failed")
    assert report.tests[1].yaml == "a: |\n\n  b"
    assert report.plan == 2 and len(report.failed) == 1


def test_a_summary_counts_what_was_excused() -> None:
    assert tap.parse("1..3\nok 1\nok 2 # skip\nnot ok 3 # TODO\n").summary == "3 tests passed (1 skipped, 1 todo)"
    assert tap.parse("1..0 # SKIP no net").summary == "skipped: no net"
    assert tap.parse("1..0 # SKIP no net").skipped_all == "no net"


def test_problems_are_bounded() -> None:
    report = tap.parse("ok 1\n" * 5000)
    assert len(report.problems) < 30
    assert len(report.summary) <= 300


@pytest.mark.slow
def test_a_hundred_thousand_lines_are_read() -> None:
    lines = "".join(f"ok {n} - number {n} # SKIP x\n  ---\n  a: b\n  ...\n" for n in range(1, 25_001))
    assert tap.parse("1..25000\n" + lines, 0).passed


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        " " * 10_000_000,
        "# " * 5_000_000,
        "ok 1 " + "# " * 5_000_000,
        "1.." + "9" * 1_000_000,
        "ok " + "1" * 1_000_000,
        "    " * 1000 + "ok 1",
        "\\" * 1_000_000,
        "TAP version " + "1" * 10_000,
        "ok 1\n  ---\n" + "  a\n" * 500_000,
    ],
)
def test_no_line_is_too_long(text: str) -> None:
    assert not tap.parse(text).passed


fragments = st.sampled_from(
    [
        "ok",
        "not ok",
        " 1",
        " 2",
        "1..",
        "2",
        "\n",
        "\n    ",
        "\n  ---\n",
        "  ...\n",
        "# TODO",
        "# skip",
        "#",
        "Bail out!",
        "TAP version ",
        "13",
        "{",
        "}",
        "\r\n",
        "\\",
        " - ",
        "\0",
        "\ud800",
    ]
)


@settings(max_examples=400, deadline=None)
@given(
    text=st.text() | st.binary().map(lambda data: data.decode(errors="replace")) | st.lists(fragments).map("".join),
    status=st.none() | st.integers(),
)
def test_anything_is_judged(text: str, status: int | None) -> None:
    report = tap.parse(text, status)
    assert isinstance(report.passed, bool)
    assert report.summary and "\n" not in report.summary
    if report.passed:
        assert report.plan == len(report.tests) and not status


@pytest.mark.skipif(not shutil.which("perl"), reason="no perl")
def test_what_test_more_prints_is_read() -> None:
    script = 'use Test::More; ok 1, "a # b"; subtest s => sub { plan tests => 1; ok 0, "in" }; done_testing'
    done = subprocess.run(["perl", "-e", script], capture_output=True, text=True, check=False)
    report = tap.parse(done.stdout, done.returncode)
    assert report.problems == ()
    assert [str(test) for test in report.tests] == ["ok 1 - a # b", "not ok 2 - s"]


@pytest.mark.skipif(not shutil.which("node"), reason="no node")
def test_what_node_test_prints_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.mjs").write_text(
        "import test from 'node:test';\n"
        "test('o', async t => { await t.test('i', () => {}) });\n"
        "test('s', {skip: 'why'}, () => {}); test('t', {todo: true}, () => { throw 1 });\n"
    )
    done = subprocess.run(
        ["node", "--test-reporter=tap", "a.mjs"], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    report = tap.parse(done.stdout)
    assert report.problems == ()
    assert [test.directive for test in report.tests] == [None, "skip", "todo"]
