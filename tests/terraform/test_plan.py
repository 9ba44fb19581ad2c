"""What is shown of a plan: every kind of change, and no secret. (What real terraform prints is in test_session.)"""

from pathlib import Path
from typing import Any

import pytest

from toto.terraform.plan import (
    HASHED,
    Action,
    Change,
    Planned,
    PlanRefused,
    State,
    changes_of,
    outputs_of,
    refuse,
    state_of,
    wants_approval,
)

POISON = 'hunter2\nsecond "line"'
SECRETS = (POISON, "hunter2", "4242")


def change_of(change: dict[str, Any], **entry: Any) -> Change | None:
    found = changes_of([{"address": "a.b", **entry, "change": {"before": None, "after": None, **change}}], SECRETS)
    return found[0] if found else None


@pytest.mark.parametrize(
    ("actions", "entry", "change", "action", "line"),
    [
        (["create"], {}, {}, Action.CREATE, "+ a.b"),
        (["update"], {}, {}, Action.UPDATE, "~ a.b"),
        (
            ["delete"],
            {"action_reason": "delete_because_no_resource_config"},
            {},
            Action.DESTROY,
            "- a.b (delete because no resource config)",
        ),
        (
            ["delete", "create"],
            {"action_reason": "replace_because_cannot_update"},
            {"replace_paths": [["a"], ["b", 0]]},
            Action.REPLACE,
            "-/+ a.b (because of a, b.0)",
        ),
        (
            ["create", "delete"],
            {"action_reason": "replace_because_tainted"},
            {},
            Action.REPLACE,
            "-/+ a.b (replace because tainted)",
        ),
        (["delete"], {"deposed": "1234"}, {}, Action.DESTROY, "- a.b (what is left of an earlier replacement)"),
        (["forget"], {}, {}, Action.FORGET, ". a.b"),
        (["no-op"], {"previous_address": "a.old"}, {}, Action.MOVE, "> a.b (was a.old)"),
        (["no-op"], {}, {"importing": {"id": "7"}}, Action.IMPORT, "< a.b (imported)"),
        (["update"], {}, {"importing": {"id": "7"}}, Action.UPDATE, "~ a.b (imported)"),
    ],
)
def test_every_action_has_its_word(
    actions: list[str], entry: dict[str, Any], change: dict[str, Any], action: Action, line: str
) -> None:
    found = change_of({"actions": actions, **change}, **entry)
    assert found is not None and (found.action, found.lines) == (action, [line])


@pytest.mark.parametrize("actions", [["no-op"], ["read"]])
def test_what_changes_nothing_is_not_shown(actions: list[str]) -> None:
    assert change_of({"actions": actions}) is None


@pytest.mark.parametrize(
    ("change", "details"),
    [
        ({"before": {"a": 1, "b": "x"}, "after": {"a": 2, "b": "x"}}, ["a: 1 → 2"]),
        ({"before": {"a": None}, "after": {"a": "ü\n"}}, ['a: "ü\\n"']),
        ({"before": {"a": "x"}, "after": {"a": None}}, ['a: "x" → null']),
        (
            {"before": {"t": {"N": "x"}, "l": [1, 2]}, "after": {"t": {"N": "y"}, "l": [1]}},
            ["l[1]: 2 → null", 't.N: "x" → "y"'],
        ),
        ({"before": {"t": {}, "l": [1]}, "after": {"t": {"N": "x"}, "l": []}}, ['t.N: "x"', "l[0]: 1 → null"]),
        ({"before": {"t": None}, "after": {"t": {}}}, ["t: {}"]),
        ({"before": {"a": "x"}, "after": {}, "after_unknown": {"a": True}}, ['a: "x" → (known after apply)']),
        (
            {"before": {"t": {"N": "x"}}, "after": {}, "after_unknown": {"t": True}},
            ["t: (known after apply)", 't.N: "x" → (known after apply)'],
        ),
        (
            {
                "before": {"a": "secret"},
                "after": {"a": "other"},
                "before_sensitive": {"a": True},
                "after_sensitive": {},
            },
            ["a: (sensitive value) → (sensitive value)"],
        ),
        (
            {
                "before": {"t": {"k1": "x", "k2": "x"}},
                "after": {"t": {"k1": "y", "k2": "y"}},
                "after_sensitive": {"t": True},
            },
            ["t: (sensitive value) → (sensitive value)"],
        ),
        (
            {"before": {"a": "x"}, "after": {"a": "y"}, "after_sensitive": True},
            ["value: (sensitive value) → (sensitive value)"],
        ),
        (
            {"before": {}, "after": {"a": POISON, "b": f"<{POISON}>", "n": 14242, "hunter2": 1}},
            ['a: "******"', 'b: "<******>"', "******: 1", "n: 1******"],
        ),
        ({"before": {}, "after": {"a": "x" * 1000}}, ['a: "' + "x" * 99 + " … " + "x" * 99 + '"']),
    ],
)
def test_what_changes_is_shown_and_secrets_are_not(change: dict[str, Any], details: list[str]) -> None:
    found = change_of({"actions": ["update"], **change})
    assert found is not None and sorted(found.details) == sorted(details)


def test_no_half_of_a_secret_is_shown_when_it_is_cut() -> None:
    secret = "s3cr3t" * 60
    (found,) = changes_of(
        [{"address": "a.b", "change": {"actions": ["create"], "before": None, "after": {"a": f"begin {secret} end"}}}],
        [secret],
    )
    assert found.details == ('a: "begin ****** end"',)


def test_of_many_attributes_the_first_are_shown() -> None:
    found = change_of({"actions": ["create"], "after": {f"a{number:04}": number for number in range(5000)}})
    assert found is not None and len(found.details) == 41 and found.details[-1] == "… and 4960 more"


def test_outputs_are_shown() -> None:
    found = outputs_of(
        {
            "b": {
                "actions": ["update"],
                "before": "x",
                "after": "y",
                "after_unknown": False,
                "before_sensitive": False,
                "after_sensitive": False,
            },
            "a": {
                "actions": ["create"],
                "before": None,
                "after": "y",
                "after_unknown": False,
                "before_sensitive": False,
                "after_sensitive": True,
            },
            "c": {"actions": ["no-op"], "before": 1, "after": 1},
        },
        SECRETS,
    )
    assert [change.lines for change in found] == [
        ["+ output.a", "    value: (sensitive value)"],
        ["~ output.b", '    value: "x" → "y"'],
    ]


def test_a_state_lists_what_it_manages() -> None:
    document = {
        "serial": 7,
        "lineage": "l",
        "resources": [
            {"mode": "managed", "type": "a", "name": "b", "instances": [{}]},
            {
                "mode": "managed",
                "type": "a",
                "name": "n",
                "instances": [{"index_key": 0}, {"index_key": 0, "deposed": "1"}],
            },
            {
                "module": 'module.m["x"]',
                "mode": "managed",
                "type": "a",
                "name": "k",
                "instances": [{"index_key": 'q"${u}%{ü'}, {"index_key": "hunter2"}],
            },
            {"mode": "data", "type": "a", "name": "d", "instances": [{}]},
        ],
    }
    state = state_of(document, SECRETS)
    assert tuple(state.ids) == state.resources
    assert state.model_copy(update={"ids": {}}) == State(
        serial=7,
        lineage="l",
        resources=("a.b", "a.n[0]", 'module.m["x"].a.k["q\\"$${u}%%{ü"]', 'module.m["x"].a.k["******"]'),
    )
    assert state_of(None, ()).empty and state_of({"serial": 0, "lineage": "", "resources": []}, ()).empty


def test_an_objects_id_is_told_unless_it_may_be_a_secret() -> None:
    def id_of(lineage: str = "l", **instance: Any) -> str:
        resources = [{"mode": "managed", "type": "a", "name": "b", "instances": [instance]}]
        return state_of({"serial": 1, "lineage": lineage, "resources": resources}, SECRETS).ids["a.b"]

    secret = [[{"type": "get_attr", "value": "id"}]]
    assert id_of(attributes={"id": "i-1", "size": 1}) == id_of(attributes={"id": "i-1", "size": 2}) == "i-1"
    for attributes, marked in (({"id": "hunter2"}, []), ({"id": "i-1"}, secret), ({"path": "p"}, []), ({"id": ""}, [])):
        hashed = id_of(attributes=attributes, sensitive_attributes=marked)
        assert hashed.startswith(HASHED) and not any(each and each in hashed for each in attributes.values())
        assert hashed == id_of(attributes=attributes, sensitive_attributes=marked)
        assert hashed != id_of("other", attributes=attributes, sensitive_attributes=marked)
    assert id_of(attributes={"path": "p"}) != id_of(attributes={"path": "q"})


def planned(*changes: tuple[str, Action]) -> Planned:
    return Planned(
        root="web",
        file=Path("x"),
        before=State(),
        empty=not changes,
        terraform="1.11.4",
        changes=tuple(Change(address=address, action=action) for address, action in changes),
    )


MIXED = planned(
    ("a.new", Action.CREATE),
    ("a.other", Action.UPDATE),
    ("a.again", Action.REPLACE),
    ("a.gone", Action.DESTROY),
    ("a.left", Action.FORGET),
    ("a.moved", Action.MOVE),
)


@pytest.mark.parametrize(
    ("prevent", "doomed"),
    [
        ((), ()),
        (("destroy",), ("a.again", "a.gone")),
        (("replace",), ("a.again",)),
        (("destroy", "replace"), ("a.again", "a.gone")),
    ],
)
def test_a_plan_is_refused_for_what_it_destroys(prevent: tuple[str, ...], doomed: tuple[str, ...]) -> None:
    if not doomed:
        refuse(MIXED, prevent)
        return
    with pytest.raises(PlanRefused) as refused:
        refuse(MIXED, prevent)
    assert refused.value.addresses == doomed
    assert str(refused.value).startswith(
        f"terraform/web: the plan would destroy what the settings protect: {', '.join(doomed)}\nnext: "
    )


def test_who_must_approve() -> None:
    grows = planned(("a.new", Action.CREATE), ("a.other", Action.UPDATE))
    assert [wants_approval(MIXED, word) for word in ("never", "destroy", "always")] == [False, True, True]
    assert [wants_approval(grows, word) for word in ("never", "destroy", "always")] == [False, False, True]
    assert not wants_approval(planned(), "always")


def test_a_plan_is_summed_up_in_a_line() -> None:
    assert MIXED.summary == "1 to create, 1 to update, 1 to replace, 1 to destroy, 1 to forget, 1 to move"
    assert MIXED.destroyed == ("a.again", "a.gone") and MIXED.created == ("a.new", "a.again")
    assert planned().summary == "nothing to change"
    assert planned().model_copy(update={"outputs": (Change(address="output.a", action=Action.CREATE),)}).summary == (
        "1 output to change"
    )


def test_plans_that_do_the_same_are_the_same() -> None:
    moved = MIXED.model_copy(update={"before": State(serial=9), "file": Path("y")})
    assert MIXED.same(moved) and not MIXED.same(planned(("a.new", Action.CREATE)))
