"""What a terraform root needs to be again what it was."""

from pathlib import Path

import pytest

from toto.terraform.plan import Action, Change, Planned, State
from toto.terraform.revert import CannotGoBack, WayBack, way_back

NONE, ONE, BOTH = State(), State(serial=3, resources=("a",)), State(serial=5, resources=("a", "b"))
GOOD = "0123456789abcdef"


@pytest.mark.parametrize(
    ("good", "before", "now", "way"),
    [
        (None, NONE, NONE, None),
        (None, ONE, ONE, None),
        (None, NONE, BOTH, WayBack("", frozenset(), frozenset("ab"))),
        (None, NONE, State(serial=1), WayBack("", frozenset(), frozenset())),
        (GOOD, ONE, ONE, WayBack(GOOD, frozenset("a"), frozenset())),  # outputs and the like may be another's
        (GOOD, ONE, BOTH, WayBack(GOOD, frozenset("a"), frozenset("b"))),
        (GOOD, BOTH, ONE, WayBack(GOOD, frozenset("ab"), frozenset())),
    ],
)
def test_the_way_back(good: str | None, before: State, now: State, way: WayBack | None) -> None:
    assert way_back(good, before, now, target="terraform/main") == way
    assert way is None or way.destroy == (good is None)


def test_a_root_that_toto_had_not_deployed_is_left_to_people() -> None:
    with pytest.raises(CannotGoBack, match=r"terraform/main: toto had not deployed it.*\nnext: .*serial 3, with 1 res"):
        way_back(None, ONE, BOTH, target="terraform/main")


@pytest.mark.parametrize(
    ("commit", "actions", "words"),
    [
        ("", {"a": Action.DESTROY}, "empty again"),
        (GOOD, {"b": Action.DESTROY}, "as at 01234567 (1 to destroy)"),
        (
            GOOD,
            {"a": Action.REPLACE, "c": Action.CREATE},
            "as at 01234567 (1 to create, 1 to replace); created anew, without their old data: a",
        ),
    ],
)
def test_the_words_say_what_the_root_is_then(commit: str, actions: dict[str, Action], words: str) -> None:
    planned = Planned(
        root="main",
        file=Path("x"),
        before=BOTH,
        empty=False,
        terraform="1",
        changes=tuple(Change(address=address, action=action) for address, action in actions.items()),
    )
    assert WayBack(commit, frozenset("a"), frozenset("b")).words(planned) == words
