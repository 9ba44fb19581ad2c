"""The graph of a run as Prefect's UI draws it: `graph-v2` of the API."""

import itertools
from typing import Any

Edges = list[tuple[str, str]]


def edges(graph: dict[str, Any]) -> Edges:
    """The edges of a graph, by the labels of their nodes, sorted; one that is there twice is there twice.

    A subflow's label is its flow's name and its run's, `hosts / web1`. That a task runs within a task is
    `(within, task)`, written as `("sandbox ⊃", "no-internet tests")`.
    """
    nodes = {id: node for id, node in graph["nodes"]}
    found = [(nodes[parent["id"]]["label"], node["label"]) for node in nodes.values() for parent in node["parents"]]
    found += [
        (f"{nodes[outer['id']]['label']} ⊃", node["label"])
        for node in nodes.values()
        for outer in node["encapsulating"]
    ]
    return sorted(found)


def labels(graph: dict[str, Any]) -> list[str]:
    """The labels of a graph's nodes, in the order in which they began."""
    return [node["label"] for _, node in sorted(graph["nodes"], key=lambda each: each[1]["start_time"] or "")]


def complete(graph: dict[str, Any]) -> bool:
    """Whether the graph of a run has all that it will have: Prefect learns of tasks by events, a moment after them."""
    ends = {node["label"]: node["state_type"] in ("COMPLETED", "FAILED") for _, node in graph["nodes"]}
    return ends.get("notify", False) and all(ends.values())


def chain(*names: str) -> Edges:
    """The edges of nodes that come one after the other."""
    return sorted(itertools.pairwise(names))
