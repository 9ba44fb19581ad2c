"""The results of runs, as a run keeps them for the page of the fleet: in a table artifact, a row a target."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from toto.fleet import artifacts

OTHERS: Final = "all others"  # the last row of a run that found all its other targets as its commit wants them
AS_WANTED: Final = "as wanted"


def key(repo: str) -> str:
    """The key of the artifacts of a repo's runs."""
    return artifacts.of_repo("targets", repo)


@dataclass(frozen=True)
class Result:
    """How a run ended for a target: in a word, and why; how long each step took; which run, and when (UTC)."""

    result: str
    why: str = ""
    took: str = ""
    run: str = ""
    at: str = ""

    @property
    def failed(self) -> bool:
        return "failed" in self.result or "COULD NOT" in self.result


def row(target: str, result: str, why: str = "", took: str = "") -> dict[str, str]:
    """A row of the table, for the target with this label."""
    return {"target": target, "result": result, "why": why, "took": took}


def newest(artifacts: Iterable[Mapping[str, Any]]) -> dict[str, Result]:
    """The newest result of each target, by label, from a repo's artifacts, the newest first.

    What a later run of the whole fleet found as wanted has none of its own: `OTHERS` is the result of all those.
    """
    found: dict[str, Result] = {}
    for artifact in artifacts:
        rows = artifact["data"]
        more = {"run": artifact.get("flow_run_id") or "", "at": artifact.get("created") or ""}
        for each in json.loads(rows) if isinstance(rows, str) else rows:
            found.setdefault(each["target"], Result(each["result"], each["why"], each["took"], **more))
        if OTHERS in found:
            break
    return found
