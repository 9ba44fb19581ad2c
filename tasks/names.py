"""Names flow runs by the repo, the commit, what the run does, and where it came from.

The functions are for `flow_run_name=` of flows. The git host's hook (`toto/git_host/hooks/post-receive`) names the runs
that it starts in the same way, so the name that it prints is the one in the UI.
"""

import re
from pathlib import Path
from typing import Final

from prefect import runtime
from prefect.context import FlowRunContext
from prefect.logging import get_logger

from toto.base.errors import TotoError
from toto.infra_repo import git

SHORT: Final = 8  # hex digits of a commit
LONG: Final = 60  # characters of a repo's name, or of what was asked for as a commit
TARGETS: Final = 40  # characters of the targets together
LONGEST: Final = 200  # characters of a whole name
PLAIN: Final = frozenset({"reconcile", "toto"})  # the old and new name of the deployment that deploys a whole commit
RENAMED: Final = {"host": "deploy-host"}
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069]+")
_HASH: Final = re.compile(r"[0-9a-f]{8,64}")


def of_reconcile() -> str:
    """The name of a run of reconcile, such as `infra 3f1c9b2a (push)` or `infra 3f1c9b2a: deploy-host web1 (ui)`.

    A run that already has such a name keeps it.
    """
    asked = runtime.flow_run.parameters
    repo = Path(asked["repo"])
    start = f"{_repo(repo)} {_commit(repo, asked.get('commit'))}"
    given = runtime.flow_run.name or ""
    if given.startswith((f"{start} (", f"{start}: ")):
        return _clean(given, LONGEST)
    what = _what()
    return f"{start}{f': {what}' if what else ''} ({_origin()})"


def of_build() -> str:
    """The name of a run of build, such as `build infra 3f1c9b2a`."""
    repo = Path(runtime.flow_run.parameters["repo"])
    return f"build {_repo(repo)} {_commit(repo, runtime.flow_run.parameters.get('commit'))}"


def of_job() -> str:
    """The name of a run of a job, such as `backup infra 3f1c9b2a`."""
    asked = runtime.flow_run.parameters
    repo = Path(asked["repo"])
    return f"{_clean(asked['job'], LONG)} {_repo(repo)} {_commit(repo, asked.get('commit'))}"


def of_flow() -> str:
    """The name of a run of any other flow: the flow's name and the repo, such as `settle infra`."""
    return f"{runtime.flow_run.flow_name} {_repo(Path(runtime.flow_run.parameters['repo']))}"


def _repo(repo: Path) -> str:
    return _clean(repo.name.removesuffix(".git"), LONG)


def _commit(repo: Path, asked: str | None) -> str:
    """The first digits of the commit; the requested text when the repo does not have the commit."""
    try:
        return git.resolve(repo, asked or "HEAD")[:SHORT]
    except (TotoError, OSError, ValueError):  # the run itself reports what is wrong
        if asked is None:
            return "newest commit"
        return asked[:SHORT] if _HASH.fullmatch(asked) else _clean(asked, LONG)


def _what() -> str:
    """What the run does; empty when it deploys the whole commit."""
    asked = runtime.flow_run.parameters
    targets = _clean(" ".join(asked.get("only") or ()), TARGETS)
    if asked.get("plan_only"):
        word = "plan"
    elif asked.get("rehearse_only"):
        word = "rehearse"
    else:
        word = _deployment() or ("only" if targets else "")
    return f"{word} {targets}".strip()


def _deployment() -> str:
    """The name of the run's deployment; empty for the plain one, and for a run without one (from a notebook)."""
    try:
        name = runtime.deployment.name or ""
    except Exception as error:  # a run must not fail because of its name
        get_logger(__name__).warning("could not read the deployment of this run: %s", error)
        return ""
    return "" if name in PLAIN else RENAMED.get(name, _clean(name, TARGETS))


def _origin() -> str:
    """Where the run came from. (A schedule that was changed in the UI loses the parameter that says so.)"""
    context = FlowRunContext.get()
    if context is not None and context.flow_run is not None and context.flow_run.auto_scheduled:
        return "schedule"
    return str(runtime.flow_run.parameters.get("origin") or "ui")


def _clean(text: str, most: int) -> str:
    """One line without control characters, of `most` characters at most."""
    line = _CONTROL.sub(" ", text).strip()
    return line if len(line) <= most else line[: most - 3] + "..."
