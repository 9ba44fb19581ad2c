"""Whether a plan undoes what a run did, and nothing else. (What real terraform makes of it is in tests/flows.)"""

import json
from pathlib import Path

import pytest

from toto.terraform.plan import Action, Change, Deed, Planned, State
from toto.terraform.revert import CannotGoBack, WayBack, seen, way_back

GOOD = "0123456789abcdef"
C, U, R, D, F, M, I = (  # noqa: E741
    Action.CREATE,
    Action.UPDATE,
    Action.REPLACE,
    Action.DESTROY,
    Action.FORGET,
    Action.MOVE,
    Action.IMPORT,
)


def state(serial: int = 2, **ids: str) -> State:
    return State(serial=serial, lineage="l", resources=tuple(ids), ids=ids)


def plan(now: State, *deeds: Deed) -> Planned:
    changes = tuple(Change(address=each.address, action=each.action) for each in deeds)
    return Planned(
        root="main", file=Path("x"), before=now, empty=not deeds, terraform="1", changes=changes, deeds=deeds
    )


def deed(action: Action, address: str = "a", **more: str) -> Deed:
    return Deed(address=address, action=action, **more)


def imported(action: Action = I, id: str = "1", left: str = "", address: str = "a") -> Deed:
    return Deed(address=address, action=action, id=id, left=left, imported=True)


@pytest.mark.parametrize(
    ("done", "now", "back", "wrong"),
    [
        (deed(C, left="1"), state(a="1"), deed(D), []),
        (deed(C), state(a="1"), deed(D), []),  # nobody saw what it left: toto died in it
        (deed(C, left="1"), state(a="2"), deed(D), ["destroy a, which this run did not create"]),
        (deed(C, id="1"), state(a="1"), deed(D), ["destroy a, which this run did not create"]),
        (deed(C, left="1"), state(a="1"), Deed(address="a", action=D, deposed=True), ["destroy a, which"]),
        (deed(U, id="1", left="1"), state(a="1"), deed(D), ["destroy a, which this run did not create"]),
        (None, state(a="1"), deed(D), ["destroy a, which this run did not create"]),
        (deed(R, id="1", left="2"), state(a="2"), deed(R), []),
        (deed(R, id="1", left="1"), state(a="1"), deed(R), ["destroy a, which this run did not create"]),
        (deed(D, id="1"), state(), deed(C), []),
        (deed(D, id="1", left="1"), state(), deed(C), ["create a, which this run did not destroy"]),
        (deed(R, id="1", left="2"), state(), deed(C), ["create a, which this run did not destroy"]),
        (deed(F, id="1"), state(), deed(C), ["create a, which this run did not destroy"]),
        (deed(M, "b", was="a", id="1", left="1"), state(), deed(C), ["create a, which this run did not destroy"]),
        (None, state(), deed(C), ["create a, which this run did not destroy"]),
        (deed(U, id="1", left="1"), state(a="1"), deed(U), []),
        (deed(U, id="1", left="1"), state(a="2"), deed(U), ["change a, which this run did not change"]),
        (deed(U, id="hash:1", left="hash:2"), state(a="hash:3"), deed(U), ["change a, which this run did not"]),
        (deed(D, id="1"), state(a="2"), deed(U), ["change a, which this run did not change"]),
        (deed(M, "b", was="a", id="1", left="1"), state(b="1"), deed(M, "a", was="b"), []),
        (deed(M, "b", was="a", id="1", left="1"), state(b="1"), deed(M, "c", was="b"), ["move b to c"]),
        (deed(M, "b", was="a", id="1", left="1"), state(b="1"), deed(U, "a", was="b"), ["change a, which this"]),
        (None, state(b="1"), deed(M, "a", was="b"), ["move b to a"]),
        (deed(F, id="1"), state(), imported(), []),
        (deed(F, id="1"), state(), imported(U), ["import a and change it", "change a, which this run"]),
        (deed(F, id="1"), state(), imported(id="2"), ["import a and change it"]),
        (imported(left="1"), state(a="1"), deed(F), []),
        (imported(left="1"), state(a="1"), deed(F, "t.toto_way_back_0", was="a"), []),
        (deed(C, left="1"), state(a="1"), deed(F, "x", was="a"), ["move a to x", "forget x, which this run did not"]),
        (imported(left="1"), state(a="2"), deed(F), ["forget a, which this run did not import"]),
        (imported(left="1"), state(a="1"), deed(D), ["destroy a, which this run did not create"]),
        (deed(C, left="1"), state(a="1"), deed(F), ["forget a, which this run did not import"]),
    ],
)
def test_a_way_back_may_undo_what_the_run_did_and_nothing_else(
    done: Deed | None, now: State, back: Deed, wrong: list[str]
) -> None:
    found = WayBack(GOOD, (done,) if done else (), now).wrong(plan(now, back))
    assert len(found) == len(wrong), found
    assert all(is_.startswith(said) for is_, said in zip(found, wrong, strict=True)), found


def test_the_blocks_undo_what_was_done_and_only_that() -> None:
    deeds = (
        deed(M, 'b["x"]', was="a"),
        deed(M, "not_moved_yet", was="still_there"),
        imported(address='module.m["x"].t.i[0]'),
        imported(address='module.m["x"].t.i["a]"]'),
        imported(address="module.n.t.i"),
        imported(Action.REPLACE, address="was_replaced"),
        deed(F, "f", id="${x}%{y}"),
        deed(F, "still", id="1"),
        deed(F, "without_id", id="hash:1"),
    )
    there = ('b["x"]', "still_there", 'module.m["x"].t.i[0]', 'module.m["x"].t.i["a]"]', "module.n.t.i", "still")
    assert json.loads(WayBack(GOOD, deeds, state(2, **dict.fromkeys(there, "1"))).blocks) == {
        "moved": [
            {"from": 'b["x"]', "to": "a"},
            {"from": 'module.m["x"].t.i[0]', "to": "t.toto_way_back_0"},  # its other instances stay
            {"from": 'module.m["x"].t.i["a]"]', "to": "t.toto_way_back_1"},
        ],
        "removed": [
            {"from": each, "lifecycle": {"destroy": False}}
            for each in ("t.toto_way_back_0", "t.toto_way_back_1", "module.n.t.i")
        ],
        "import": [{"to": "f", "id": "$${x}%%{y}"}],
    }
    assert WayBack(GOOD, deeds, state(still="1")).blocks != "{}"
    assert WayBack(GOOD, (), state(a="1")).blocks == "{}"


def test_a_first_deployment_is_undone_by_destroying_and_forgetting_its_own() -> None:
    deeds = (deed(C, left="1"), deed(C, "b", left="2"), imported(address="i", left="3"), deed(C, "late"))
    now = state(a="1", b="4", i="3", theirs="5")
    way = way_back(None, State(), deeds, now, target="terraform/main")
    assert way is not None and (way.destroy, way.forget) == (("a",), ("i",))
    whole = way.with_forgotten(plan(now, deed(D)))
    assert whole.summary == "1 to destroy, 1 to forget" and way.wrong(whole) == []
    assert way.with_forgotten(None).lines == [". i"]
    assert way.wrong(way.with_forgotten(None)) == ["leave a, which this run created"]
    assert way.words(whole) == "what was there before toto, 2 resources"
    assert way_back(None, now, deeds, now, target="t") is None


@pytest.mark.parametrize(
    "done",
    [
        deed(U, id="1", left="1"),
        deed(R, id="1", left="2"),
        deed(D, id="1"),
        deed(F, id="1"),
        deed(M, was="b", id="1", left="1"),
        None,
    ],
)
def test_without_a_last_good_what_was_there_before_cannot_be_put_back(done: Deed | None) -> None:
    deeds = None if done is None else (done,)
    with pytest.raises(CannotGoBack, match=r"toto had not deployed it before|an older version of toto"):
        way_back(None, state(1, b="1"), deeds, state(a="1"), target="terraform/main")


def test_without_a_last_good_what_was_not_done_needs_no_way_back() -> None:
    deeds = (deed(R, id="1", left="1"), deed(D, "d", id="1", left="1"), deed(M, "m", was="b"), imported(U, address="i"))
    way = way_back(None, state(1, a="1", b="1", d="1"), deeds, state(a="1", b="1", d="1", i="1"), target="t")
    assert way is not None and (way.destroy, way.forget) == ((), ("i",))
    assert way.words(way.with_forgotten(None)).endswith("; forgotten again, but as this run changed them: i")


def test_what_is_seen_after_an_apply_is_in_the_deeds() -> None:
    deeds = (deed(C), deed(D, "d", id="1"), Deed(address="a", action=D, deposed=True))
    assert seen(deeds, state(a="9")) == (deed(C, left="9"), deed(D, "d", id="1"), deeds[2])


@pytest.mark.parametrize(
    ("done", "now", "back", "words"),
    [
        (deed(C, left="1"), state(a="1"), deed(D), "as at 01234567 (1 to destroy)"),
        (deed(D, id="1"), state(), deed(C), "(1 to create); created anew, without their old data: a"),
        (deed(R, id="1", left="2"), state(a="2"), deed(R), "(1 to replace); created anew, without their old data: a"),
        (deed(R, id="1", left="2"), state(a="2"), None, "(nothing to change); created anew, without their old data: a"),
        (deed(R, id="1", left="1"), state(a="1"), None, "(nothing to change)"),
        (
            deed(R, "b", was="a", id="1", left="2"),
            state(b="2"),
            deed(M, "a", was="b"),
            "(1 to move); created anew, without their old data: a",
        ),
        (deed(D, id="1"), state(), None, "(nothing to change); destroyed, and not in the last good: a"),
        (deed(D, id="1", left="1"), state(), None, "(nothing to change)"),
        (deed(C, left="1"), state(), None, "; no longer where this run created them, so not destroyed: a"),
        (deed(F, id="1"), state(), None, "; forgotten, and not in the last good: a"),
        (deed(F, id="1"), state(), imported(), "as at 01234567 (1 to import)"),
    ],
)
def test_the_words_say_what_is_not_as_it_was(done: Deed, now: State, back: Deed | None, words: str) -> None:
    planned = plan(now, *([back] if back else []))
    assert WayBack(GOOD, (done,), now).words(planned).endswith(words)
