"""What a message says, and that nothing that is in a commit or a test's output can bend it."""

import json

import pytest

from tests.report.test_report import after, report
from toto.base.errors import TotoError
from toto.infra_repo.git import Commit
from toto.report.message import MARKDOWN, SLACK, Message, Problem, clean
from toto.report.report import Report, Reverted, RunDied

COMMIT = Commit("1234567890" * 4, "a page of its own", "Ada", "ada@example.org")
LINK = "http://toto:4200/runs/flow-run/1"
TESTS = TotoError(
    "smoke tests failed: 10-page: 1 of 2 tests failed\n  not ok 2 - it says welcome\n    got: 502",
    target="b",
    hint="fix it, and push again",
)


def message(of: Report) -> Message:
    return Message.of(of, COMMIT, LINK)


def failed(text: str = str(TESTS)) -> Message:
    made = report("a", "b")
    made.failure("b", "rehearsal", TotoError(text))
    return message(made)


def test_a_failed_roll_out_reads_like_this() -> None:
    made = report("a", "b")
    made.outcome["a"] = "deployed"
    made.failure("b", "roll-out", TESTS)
    made.reverted = [Reverted("b", "/nix/store/x"), Reverted("a", "/nix/store/y")]
    assert (
        f"{message(made).title}\n\n{message(made).text()}"
        == """\
[infra] b: roll-out failed

b: roll-out failed: smoke tests failed: 10-page: 1 of 2 tests failed
    not ok 2 - it says welcome
      got: 502
next: fix it, and push again

b, a reverted

12345678 a page of its own (Ada)
http://toto:4200/runs/flow-run/1"""
    )


def test_an_error_of_several_hosts_reads_like_this() -> None:
    made = report("a", "b", "c")
    for name in ("a", "b", "c"):
        error = f"does not evaluate (hosts/{name}.nix):\nerror: option `x' is gone"
        made.failure(name, "evaluation", TotoError(error, target=name, hint=f"fix hosts/{name}.nix and push again"))
    sent = message(made)
    assert (
        f"{sent.title}\n\n{sent.text()}"
        == """\
[infra] a, b, c: evaluation failed

a, b, c: evaluation failed: does not evaluate (hosts/{a,b,c}.nix)
    error: option `x' is gone
next: fix hosts/{a,b,c}.nix and push again

nothing was touched

12345678 a page of its own (Ada)
http://toto:4200/runs/flow-run/1"""
    )
    alone = report("a")
    text = "does not evaluate (hosts/a.nix):\nerror: option `x' is gone"
    alone.failure("a", "evaluation", TotoError(text, target="a", hint="fix hosts/a.nix and push again"))
    assert message(alone).problems[0].key == sent.problems[0].key, "it is no news that others have it too"


def test_slack_reads_like_this() -> None:
    assert (
        failed().text(SLACK)
        == """\
*b: rehearsal failed: smoke tests failed: 10-page: 1 of 2 tests failed*
```
not ok 2 - it says welcome
  got: 502
```
next: fix it, and push again

*nothing was touched*

12345678 a page of its own (Ada)
<http://toto:4200/runs/flow-run/1|the run>"""
    )


def test_what_could_not_be_reverted_comes_first() -> None:
    made = report("a", "b")
    made.failure("b", "roll-out", TESTS)
    made.reverted = [Reverted("b", error="ssh does not reach it"), Reverted("a", "/nix/store/y")]
    assert message(made).title == "[infra] b COULD NOT BE REVERTED"
    assert message(made).text().startswith("b COULD NOT BE REVERTED: ssh does not reach it\n")


@pytest.mark.parametrize(
    ("outcome", "state", "title"),
    [
        ({"a": "deployed", "b": "verified"}, "done", "[infra] a deployed"),
        ({"a": "deployed", "b": "unreachable"}, "partial", "[infra] b: unreachable"),
        ({"a": "verified", "b": "verified"}, "done", "[infra] a, b verified"),
    ],
)
def test_what_became_of_a_run_is_in_the_title(outcome: dict[str, str], state: str, title: str) -> None:
    made = report("a", "b")
    made.outcome |= outcome
    assert (message(made).state, message(made).title) == (state, title)


def test_a_machine_that_does_not_answer_is_one_problem_in_sshs_words() -> None:
    made = report("a", "b")
    made.outcome |= {"a": "deployed", "b": "unreachable"}
    keys = set()
    for said in ("Connection timed out", "Connection refused"):
        made.away["b"] = f"b: ssh cannot connect to the machine: {said}\nnext: is 192.0.2.2 up?"
        keys.add(message(made).problems[0].key)
    assert len(keys) == 1
    assert message(made).summary == "1 of 2 hosts: a deployed; b unreachable"
    assert (
        message(made)
        .text()
        .startswith(
            "b: unreachable: ssh cannot connect to the machine: Connection refused\n"
            "next: is 192.0.2.2 up?\n\na deployed\n"
        )
    )


def test_who_is_held_back_and_why_is_said() -> None:
    made = report("a", "b")
    made.outcome["a"] = "unreachable"
    made.hold_behind(["b"], after)
    assert message(made).title == "[infra] a, b: not deployed"
    assert "b: held back: it comes after a, which was not rolled out" in message(made).text()


def test_of_many_failures_the_first_are_shown_and_the_others_named() -> None:
    made = report("a")
    for number in range(40):
        lines = (f"line {line} of {number} " * 100 for line in range(1000))
        made.failure(f"host{number}", "rehearsal", TotoError("\n".join(lines)))
    text = message(made).text()
    assert "and 37 more: host3, host4, host5, host6 and 33 more" in text
    assert message(made).title == "[infra] host0, host1, host2, host3 and 36 more: rehearsal failed"
    assert len(text) < 5000
    assert text.endswith(LINK)


def test_a_run_that_broke_off_says_its_error() -> None:
    sent = Message.broken_off("infra", TotoError("machines.yaml:7: web1: is wrong\nmachines.yaml:9: too"), COMMIT, LINK)
    assert sent.title == "[infra] the run failed"
    assert sent.text().startswith("the run failed: machines.yaml:7: web1: is wrong\n    machines.yaml:9: too\n")


NASTY = "x\r\nBcc: all@example.org\n\x1b[31m\u202e<!channel> `a` *b* ``` [c](http://d)\0\x07"


def test_nothing_that_is_in_a_commit_or_an_output_bends_a_message() -> None:
    made = Report(NASTY, "1234567890", report("a").changes)
    made.failure(NASTY, "roll-out", TotoError(f"{NASTY}\n{NASTY}"))
    made.reverted = [Reverted(NASTY, error=NASTY)]
    nasty = Message.of(made, Commit("12345678", NASTY, NASTY), LINK)
    assert "\n" not in nasty.title and nasty.title.isprintable()
    assert nasty.text().replace("\n", "").isprintable()
    for text in (nasty.text(SLACK), nasty.text(MARKDOWN)):
        assert text.count("```") == 4  # two blocks, of two problems
    assert "<!channel>" not in nasty.text(SLACK)
    assert "\nBcc" not in nasty.footer()
    json.dumps(nasty.as_json())


def test_colours_of_a_terminal_are_left_out() -> None:
    assert clean("\x1b[1;31mred\x1b[0m \x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\\tend") == "red link    end"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("s: 1 of 2 failed\n  not ok 2 - x\n    at 12:03", "s: 1 of 2 failed\n  not ok 2 - x\n    at 12:05", True),
        ("s: 1 of 2 failed\n  not ok 2 - welcome", "s: 1 of 2 failed\n  not ok 1 - runs", False),
        ("s: 2 failed\n  not ok 2 - a\n  not ok 1 - b", "s: 2 failed\n  not ok 1 - b\n  not ok 2 - a", True),
        ("did not end within 300 s", "did not end within 301 s", True),
        (f"`cp /nix/store/{'0' * 32}-a` failed", f"`cp /nix/store/{'1' * 32}-a` failed", True),
        (
            "does not evaluate (hosts/a.nix:3):\nerror: undefined variable 'x'",
            "does not evaluate (hosts/a.nix:3):\nerror: undefined variable 'y'",
            False,
        ),
        ("the disk is full", "the network is down", False),
    ],
)
def test_the_same_failure_has_the_same_key(one: str, other: str, same: bool) -> None:
    assert (Problem.of("a", "x failed", one).key == Problem.of("a", "x failed", other).key) is same


def test_a_different_target_or_stage_is_a_different_failure() -> None:
    keys = {Problem.of(target, what, "no").key for target in ("a", "b") for what in ("rehearsal failed", "x failed")}
    assert len(keys) == 4


def test_the_same_message_has_the_same_id() -> None:
    assert failed().id == failed().id != failed("another").id


def test_a_run_that_died_says_what_was_reverted() -> None:
    died = RunDied("infra 12345678 (push)", [Reverted("b", "/nix/store/x"), Reverted("a", error="no route to it")])
    sent = Message.broken_off("infra", died, COMMIT, LINK)
    assert sent.title == "[infra] a COULD NOT BE REVERTED"
    assert "the run failed: infra 12345678 (push) died in the middle" in sent.text()
    assert "b reverted; a COULD NOT BE REVERTED" in sent.text()
    assert "reverted" not in Message.broken_off("infra", RunDied("infra", []), COMMIT, LINK).text()
