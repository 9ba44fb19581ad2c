"""Sorting things by their field `after`, which names what comes before them: machines, terraform roots, releases."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import Final

MOST: Final = 20  # circles that are reported


@dataclass(frozen=True)
class Circle:
    """Names that come after each other in a circle, as in "a after b after a"; its text is the error message."""

    names: tuple[str, ...]

    @property
    def name(self) -> str:
        """The name whose `after` the error is about."""
        return self.names[0]

    def __str__(self) -> str:
        return f"this goes round in a circle: {' after '.join(self.names)}"


def in_order(after: Mapping[str, Iterable[str]]) -> tuple[list[str], list[Circle]]:
    """The names in order, each after those that it names, else as they are given; and the circles, at most `MOST`.

    When there are circles, the order must not be used. Names that are not keys of `after` are ignored.
    """
    graph = {name: {other for other in others if other in after} for name, others in after.items()}
    place = {name: number for number, name in enumerate(after)}
    circles: list[Circle] = []
    while len(circles) < MOST:
        sorter = TopologicalSorter(graph)
        try:
            sorter.prepare()
        except CycleError as error:
            # graphlib names the circle the other way round, "each is before the next". Cut it, to find the next one.
            circle = Circle(tuple(reversed(error.args[1])))
            circles.append(circle)
            graph[circle.name] -= {circle.names[1]}
            continue
        order: list[str] = []
        while sorter:
            ready = sorted(sorter.get_ready(), key=place.__getitem__)
            sorter.done(*ready)
            order += ready
        return order, circles
    return list(after), circles
