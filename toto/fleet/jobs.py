"""The jobs of a repo as the page of the fleet shows them: a table, and the state and the badge of each.

A job's state and badge are there without a login where its `.conf` says `PUBLIC=yes`; they tell no reason, parameter
or log.
"""

import re
from itertools import islice
from pathlib import Path
from typing import Any, Final

from toto.base.moment import moment
from toto.jobs.history import History, Run, State

_RUNS: Final = 20  # that a job's state tells
_PATH: Final = re.compile(r".*/(?P<repo>[^/]+)/jobs/(?P<job>[^/]+)\.(?:svg|json)")
_COLOURS: Final = {State.SUCCESS: "#2d7d32", State.FAILED: "#b3261e", State.ABORTED: "#8a5a00"}
_OTHER: Final = "#555"
_LETTER: Final = 7  # of a badge, pixels
_BADGE: Final = """\
<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="20" role="img" aria-label="{job}: {state}">
<title>{job}: {state}</title>
<rect width="{width}" height="20" rx="3" fill="#333"/>
<rect x="{left}" width="{right}" height="20" rx="3" fill="{colour}"/>
<g fill="#fff" font-family="Verdana,Geneva,sans-serif" font-size="11" text-anchor="middle">
<text x="{middle}" y="14">{job}</text>
<text x="{beside}" y="14">{state}</text>
</g>
</svg>
"""


def asked(path: str) -> tuple[str, str] | None:
    """The repo and the job of which a path wants state or badge."""
    found = _PATH.fullmatch(path)
    return (found["repo"], found["job"]) if found else None


def is_public(repo: Path, job: str) -> bool:
    """Whether a job's state may be shown to everybody."""
    return bool(History(repo).registered().get(job, {}).get("public"))


def listed(repo: Path) -> list[dict[str, Any]]:
    """All registered jobs, each with its newest run, or None."""
    history = History(repo)
    return [
        {"job": name, "description": about["description"], "run": next(history.runs(name), None)}
        for name, about in sorted(history.registered().items())
    ]


def state(repo: Path, job: str) -> dict[str, Any] | None:
    """A job's state as JSON, with its newest runs; None when there is no such job."""
    history = History(repo)
    if job not in history.registered():
        return None
    runs = list(islice(history.runs(job), _RUNS))
    return {"job": job, "state": _last(runs), "runs": [_row(each) for each in runs]}


def badge(repo: Path, job: str) -> str | None:
    """A job's badge, as SVG: how the newest run that has ended did; None when there is no such job."""
    history = History(repo)
    if job not in history.registered():
        return None
    said = _last(islice(history.runs(job), _RUNS))
    left, right = (len(word) * _LETTER + 10 for word in (job, said))
    return _BADGE.format(
        job=job,  # (a job's name has no character that is special here)
        state=said,
        colour=_COLOURS.get(said, _OTHER),  # type: ignore[call-overload]
        width=left + right,
        left=left,
        right=right,
        middle=left / 2,
        beside=left + right / 2,
    )


def _last(runs: Any) -> str:
    return next((str(each.state) for each in runs if each.state.ended), "unknown")


def _row(run: Run) -> dict[str, Any]:
    return {
        "number": run.number,
        "state": str(run.state),
        "started": moment(run.started) if run.started else None,
        "seconds": round(run.seconds, 1),
    }
