"""What was built of a commit's hosts: GC roots that keep it, and the rows in which a run tells of it."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from toto.base import paths
from toto.fleet import artifacts

BUILT: Final = "built"
FAILED: Final = "does not build"
NOT_EVALUATED: Final = "does not evaluate"


def folder(repo: Path) -> Path:
    """The folder of what was built: one of each commit, the GC roots of its hosts in it."""
    return paths.repo_state(repo) / "built"


def root(repo: Path, commit: str, host: str) -> Path:
    """The GC root of a host of a commit; its folder is as new as its newest build."""
    place = paths.private_folder(folder(repo) / commit)
    place.touch()
    return place / host


def key(repo: str) -> str:
    """The key of the artifacts with the builds of a repo."""
    return artifacts.of_repo("builds", repo)


def row(host: str, result: str, *, why: str = "", path: str = "", size: int = 0) -> dict[str, str]:
    """The row of a host: `why` it was not built, or who built it; `size` is that of its closure, in bytes."""
    return {"target": host, "result": result, "why": why, "path": path, "bytes": str(size or "")}


@dataclass(frozen=True)
class Built:
    """The builds of one commit: rows by host, the run, and when it ended (UTC)."""

    commit: str
    rows: Mapping[str, Mapping[str, str]]
    run: str
    at: str

    @classmethod
    def of(cls, artifacts: Iterable[Mapping[str, Any]]) -> "list[Built]":
        """The commits' builds, from the artifacts, the newest first; what a later run built of a commit counts."""
        found: dict[str, Built] = {}
        for each in artifacts:
            commit, rows = str(each["description"]), {row["target"]: row for row in json.loads(each["data"])}
            newer = found.get(commit)
            run, at = each.get("flow_run_id") or "", each.get("created") or ""
            found[commit] = (
                cls(commit, {**rows, **newer.rows}, newer.run, newer.at) if newer else cls(commit, rows, run, at)
            )
        return list(found.values())
