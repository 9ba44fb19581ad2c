"""What a run says of itself: a headline for the list of runs, a page for the one who is paged."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

from tasks.report import as_markdown, markdown_table, plan_page
from tests.plan.test_changes import host, manifest
from toto.base.errors import TotoError
from toto.infra_repo.manifest import Machine, Manifest
from toto.infra_repo.settings import Settings
from toto.ledger.ledger import Snapshot
from toto.ledger.target import Target
from toto.machine.ssh import Unreachable
from toto.plan.changes import ChangeSet, Failure
from toto.plan.compare import compare
from toto.plan.order import Plan
from toto.report.report import Report, Reverted, Span

FLEET = manifest(
    Machine(name="a", address="192.0.2.1"),
    Machine(name="b", address="192.0.2.2", after=("a",)),
    Machine(name="c", address="192.0.2.3", after=("b",)),
)


def after(stuck: Iterable[str]) -> Mapping[str, str]:
    return Plan(
        repo=Path("/r"),
        run="r",
        commit="c",
        manifest=FLEET,
        settings=Settings(),
        changes=ChangeSet(commit="c", ledger=""),
        after={name: machine.after for name, machine in FLEET.machines.items()},
    ).held_behind(stuck)


def report(*names: str, failed: tuple[Failure, ...] = (), of: Manifest = FLEET) -> Report:
    wanted = [host(name) for name in names]
    change_set: ChangeSet = compare("1234567890", wanted, list(failed), of, Snapshot(""))
    return Report("infra", "1234567890", change_set.model_copy(update={"waiting": ()}))


def test_nothing_to_do_says_so() -> None:
    assert report().headline() == "12345678: nothing to do"


def test_a_plan_names_what_would_change() -> None:
    assert report("a", "b").headline() == "12345678: plan only: a, b would change"


def test_what_was_deployed_and_what_was_not_reached_is_said() -> None:
    made = report("a", "b", "c")
    made.outcome |= {"a": "unreachable", "c": "deployed"}
    assert made.hold_behind(["b"], after) == []
    assert made.headline() == (
        "12345678: 1 of 3 hosts: c deployed; a unreachable; b held back: it comes after a, which was not rolled out"
    )


def test_a_machine_that_was_not_reached_is_told_in_sshs_words_with_the_next_step() -> None:
    made = report("a", "b", "c")
    made.outcome |= {"a": "deployed", "b": "deployed", "c": "unreachable"}
    made.away["c"] = str(Unreachable("Connection timed out", target="c", hint="is 192.0.2.3 up?"))
    assert made.partial and not made.failed
    assert made.headline() == "12345678: 2 of 3 hosts: a, b deployed; c unreachable"
    assert (
        as_markdown(made)
        == f"""\
# 🟠 Partial

## c: unreachable

**Next:** is 192.0.2.3 up?

```text
ssh cannot connect to the machine: Connection timed out
```

## Targets

{
            markdown_table(
                ("target", "result", "more"), [("a", "deployed", ""), ("b", "deployed", ""), ("c", "unreachable", "")]
            )
        }"""
    )


def test_who_comes_after_what_is_held_is_held_too() -> None:
    made = report("a", "b", "c")
    made.outcome["a"] = "unreachable"
    assert made.hold_behind(["b"], after) == []
    assert made.hold_behind(["c"], after) == []


def test_who_comes_after_a_host_that_failed_its_rehearsal_is_held() -> None:
    made = report("a", "b")
    made.failure("a", "rehearsal", TotoError("no"))
    assert made.hold_behind(["b"], after) == []


def test_a_failed_rehearsal_says_that_nothing_was_touched() -> None:
    made = report("a", "b")
    made.failure("a", "rehearsal", TotoError("smoke tests failed: 10-page: 1 of 2\nmore", target="a"))
    assert made.failed and not made.failed_roll_out
    assert made.headline() == "12345678: a: rehearsal failed: smoke tests failed: 10-page: 1 of 2; nothing was touched"


def test_a_failed_evaluation_is_reported_in_its_own_words() -> None:
    failure = Failure(target=Target("host", "b"), message="b: does not evaluate (hosts/b.nix:3):\nerror")
    made = report("a", failed=(failure,))
    assert "b: evaluation failed: does not evaluate (hosts/b.nix:3)" in made.headline()


@pytest.mark.parametrize(
    ("back", "says"),
    [
        ([Reverted("b", to="/nix/store/x"), Reverted("a", to="/nix/store/y")], "b, a reverted"),
        (
            [Reverted("b", error="ssh does not reach it"), Reverted("a", to="/nix/store/y")],
            "a reverted; b COULD NOT BE REVERTED",
        ),
    ],
)
def test_a_revert_says_what_failed_and_what_was_reverted(back: list[Reverted], says: str) -> None:
    made = report("a", "b")
    made.outcome["a"] = "deployed"
    made.failure("b", "roll-out", TotoError("`switch` exited with status 4:\nweb.service failed", target="b"))
    made.reverted = back
    assert made.headline().endswith(says)
    page = as_markdown(made)
    assert "web.service failed" in page
    assert page.index("web.service failed") < page.index("## Reverted")
    for each in back:
        assert (each.error or each.to) in page


def test_the_report_of_a_revert_reads_like_this() -> None:
    made = report("a", "b", "c")
    made.outcome["a"] = "deployed"
    made.rehearsals |= {"a": "3 tests passed", "b": "2 tests passed"}
    made.failure("c", "rehearsal", TotoError("it did not boot within 300 s", target="c", hint="read its console"))
    made.failure(
        "b",
        "roll-out",
        TotoError("smoke tests failed:\n  not ok 1 - welcome", target="b", hint="fix it, and push again"),
    )
    made.reverted = [
        Reverted("b", "", "b: ssh does not reach it\nnext: is 192.0.2.2 up?"),
        Reverted("a", "/nix/store/y"),
    ]
    assert (
        as_markdown(made)
        == """\
# 🔴 12345678 failed: a reverted; b COULD NOT BE REVERTED

## b COULD NOT BE REVERTED

**Next:** is 192.0.2.2 up?

```text
ssh does not reach it
```

## b: roll-out failed

**Next:** fix it, and push again

```text
smoke tests failed:
  not ok 1 - welcome
```

## c: rehearsal failed

**Next:** read its console

```text
it did not boot within 300 s
```

## Reverted

| target | result | what it is now |
| --- | --- | --- |
| b | could not be reverted |  |
| a | reverted | /nix/store/y |

## Targets

| target | result | more |
| --- | --- | --- |
| a | deployed, reverted | 3 tests passed |
| b | roll-out failed, COULD NOT BE REVERTED |  |
| c | rehearsal failed |  |"""
    )


def test_the_plan_with_a_diff_reads_like_this() -> None:
    differences = {"a": "nothing in the closure", "b": "+ htop: 3.2\n- vim: 9.0\n~ ConfigMap/x\n    + data.y: 1"}
    assert (
        plan_page(report("a", "b").changes, differences)
        == """\
| target | action | why | what changes |
| --- | --- | --- | --- |
| host/a | deploy | new (by sudo) | nothing in the closure |
| host/b | deploy | new (by sudo) | see below |

## b

```diff
+ htop: 3.2
- vim: 9.0
~ ConfigMap/x
+     data.y: 1
```"""
    )


def test_the_cause_of_a_revert_is_what_failed_on_a_machine() -> None:
    made = report("a", "b")
    made.failure("a", "rehearsal", TotoError("no"))
    made.failure("b", "roll-out", TotoError("the page is empty"))
    assert made.cause.endswith(": b: roll-out failed: the page is empty (and 1 more)")


def test_the_timing_is_a_picture() -> None:
    made = report("a", "b")
    made.spans = [
        Span("bb", "rehearse", 10, 20),
        Span("a", "rehearse", 10, 40),
        Span("a", "roll out", 40, 50.04),
        Span("a", "reverted", 50.04, 50.05),
    ]
    assert (
        made.timing(8)
        == """\
bb: rehearse  ██          10.0 s
a: rehearse   ██████      30.0 s
a: roll out         ██    10.0 s
a: reverted           █    0.0 s"""
    )
    assert report("a").timing() == ""
    with made.timed("a", "verify"):
        pass
    assert made.spans[-1].step == "verify"


def test_of_many_targets_with_one_error_none_is_left_out() -> None:
    many = [f"host{number}" for number in range(9)]
    made = report(*many)
    for name in many:
        made.failure(name, "rehearsal", TotoError("the network is gone", target=name))
    page = as_markdown(made)
    assert page.count("the network is gone") == 1
    assert "## host0, host1, host2, host3 and 5 more: rehearsal failed" in page
    assert f"all 9: {', '.join(many)}" in page
