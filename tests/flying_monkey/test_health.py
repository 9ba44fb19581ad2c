"""A machine's own checks: a strict reading of TAP."""

import pytest

from flying_monkey.health import tap


@pytest.mark.parametrize(
    "text",
    [
        "1..1\nok 1 - it answers",
        "TAP version 14\nok 1\nok 2 - x # SKIP not here\n1..2\n",
        "1..2\nok\nnot ok 2 - known # TODO later\n# a comment\n",
        "1..1\n    not ok 1 - of a subtest\n    1..1\nok 1 - in all\n  ---\n  seconds: 3\n  ...\n",
        "1..0 # SKIP nothing to check here",
    ],
)
def test_a_check_passes(text: str) -> None:
    assert tap(text) == ""


@pytest.mark.parametrize(
    ("text", "problem", "words"),
    [
        ("", "", "it printed no TAP"),
        ("all is well\n", "", "it printed no TAP"),
        ("ok 1\n", "", "there is no plan (a line like 1..3)"),
        ("1..3\nok 1\nok 2\n", "", "it planned 3 and ran 2"),
        ("1..1\nok 1\n1..1\n", "", "it has two plans"),
        ("1..2\nok 1\nok 3\n", "", "test 2 has the number 3"),
        ("1..2\nok 1\nnot ok 2 - the front page\n", "", "1 of 2 failed: 2 - the front page"),
        ("1..2\nok 1\nBail out! no database\n", "", "it bailed out: no database"),
        ("1..1\nok 1\n", "it exited with status 3", "it exited with status 3"),
        ("1..1\nokay\n", "", "it planned 1 and ran 0"),
        ("", "it did not end within 5 s", "it printed no TAP; it did not end within 5 s"),
        ("1..1\nnot ok " + "x" * 9_999, "", "1 of 1 failed: "),
    ],
)
def test_a_check_fails_and_says_why(text: str, problem: str, words: str) -> None:
    said = tap(text, problem)
    assert said.startswith(words) and len(said) <= 300
