"""Sorting things by their `after`, and reporting circles."""

import pytest

from toto.base.after import MOST, in_order


@pytest.mark.parametrize(
    ("after", "order"),
    [
        ({}, []),
        ({"b": "", "a": ""}, ["b", "a"]),
        ({"a": "b", "b": "c", "c": ""}, ["c", "b", "a"]),
        ({"z": "", "guest": "host", "host": "", "a": ""}, ["z", "host", "a", "guest"]),
        ({"a": "x", "b": "a"}, ["a", "b"]),
    ],
)
def test_each_comes_after_what_it_names_else_as_given(after: dict[str, str], order: list[str]) -> None:
    assert in_order({name: others.split() for name, others in after.items()}) == (order, [])


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        ({"a": "a"}, ["a after a"]),
        ({"a": "b", "b": "a", "c": "a"}, ["a after b after a"]),
        ({"a": "b", "b": "c", "c": "a"}, ["a after b after c after a"]),
        ({"a": "b", "b": "a", "c": "d", "d": "c"}, ["a after b after a", "c after d after c"]),
    ],
)
def test_each_circle_is_reported_once(after: dict[str, str], expected: list[str]) -> None:
    _, circles = in_order({name: others.split() for name, others in after.items()})

    def turned(text: str) -> list[str]:
        *names, _ = text.removeprefix("this goes round in a circle: ").split(" after ")
        first = names.index(min(names))
        return names[first:] + names[:first]

    assert sorted(turned(str(each)) for each in circles) == sorted(map(turned, expected))
    assert all(each.name == each.names[0] == each.names[-1] for each in circles)


def test_only_so_many_circles_are_reported() -> None:
    names = [f"n{number}" for number in range(12)]
    assert len(in_order(dict.fromkeys(names, names))[1]) == MOST
