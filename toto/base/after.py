"""The order of things that name in `after` what they come after: machines, terraform roots, helm releases."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import Final

MOST: Final = 20  # circles that are told of


@dataclass(frozen=True)
class Circle:
    """Names that come after each other in a circle, as in "a after b after a"; prints as the complaint about it."""

    names: tuple[str, ...]

    @property
    def name(self) -> str:
        """Whose `after` the complaint is about."""
        return self.names[0]

    def __str__(self) -> str:
        return f"this goes round in a circle: {' after '.join(self.names)}"


def in_order(after: Mapping[str, Iterable[str]]) -> tuple[list[str], list[Circle]]:
    """The names, each as late as what it comes after makes it and else as they are given; and the circles.

    Where there are circles the order is of no use. A name that is not in `after` itself counts for nothing.
    """
    graph = {name: {other for other in others if other in after} for name, others in after.items()}
    place = {name: number for number, name in enumerate(after)}
    circles: list[Circle] = []
    while len(circles) < MOST:
        sorter = TopologicalSorter(graph)
        try:
            sorter.prepare()
        except CycleError as error:
            # graphlib tells it the other way round, "each is before the next". Without one of its steps: the next one.
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
