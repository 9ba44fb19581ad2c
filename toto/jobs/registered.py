"""The deployments of Prefect by which the jobs of a commit are started: one a job, with its form and its schedule.

They are the deployed commit's: what is new is added, what is different is changed, what is gone is removed.
"""

import hashlib
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

from toto.jobs.folder import Job, Jobs

FLOW: Final = "job"
ENTRYPOINT: Final = "flows.jobs.job"
TAG: Final = "job"
ON: Final = "on:"  # the tag of a job that begins after a deployment begins with it
Call: TypeAlias = Callable[[str, str, object], Awaitable[Any]]
"""sends a request (method, path, body) to Prefect's API, and returns the answer"""


@dataclass(frozen=True)
class Registered:
    """The names of the jobs whose deployments were added, changed and removed."""

    added: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = (("added", self.added), ("changed", self.changed), ("removed", self.removed))
        return "; ".join(f"{what}: {', '.join(names)}" for what, names in parts if names)


def name_of(repo: Path, job: str) -> str:
    """The name of a job's deployment, such as `infra:backup`: neither name has a colon, so no two have the same."""
    return f"{repo.name.removesuffix('.git')}:{job}"


async def register(call: Call, repo: Path, commit: str, jobs: Jobs, pool: str = "toto") -> Registered:
    """Make the deployments of a repo's jobs what the commit says. One that says the same is left as it is."""
    prefix = name_of(repo, "")
    found = await call("POST", "/deployments/filter", filter_of(repo))
    there = {each["name"].removeprefix(prefix): each for each in found}
    added, changed = [], []
    if jobs.jobs:
        flow = (await call("POST", "/flows/", {"name": FLOW}))["id"]
    for name, job in jobs.jobs.items():
        wanted = _deployment(repo, commit, jobs, job) | {"flow_id": flow, "work_pool_name": pool}
        if name not in there:
            added.append(name)
        elif there[name]["version"] != wanted["version"]:
            changed.append(name)
        elif there[name]["parameters"].get("commit") != commit:
            # The job itself is the same: what people have made of its schedule stays.
            parameters = there[name]["parameters"] | {"commit": commit}
            await call("PATCH", f"/deployments/{there[name]['id']}", {"parameters": parameters})
            continue
        else:
            continue
        await call("POST", "/deployments/", wanted)
    removed = [name for name in there if name not in jobs.jobs]
    for name in removed:
        await call("DELETE", f"/deployments/{there[name]['id']}", None)
    return Registered(tuple(added), tuple(changed), tuple(removed))


def filter_of(repo: Path, *tags: str) -> dict[str, Any]:
    """What finds the deployments of a repo's jobs that have these tags."""
    return {"deployments": {"tags": {"all_": [TAG, _tag(repo), *tags]}}}


def _tag(repo: Path) -> str:
    return f"repo:{repo.name.removesuffix('.git')}"


def _deployment(repo: Path, commit: str, jobs: Jobs, job: Job) -> dict[str, Any]:
    about = {
        "name": name_of(repo, job.name),
        "entrypoint": ENTRYPOINT,
        "description": job.conf.description,
        "tags": ["toto", TAG, _tag(repo), *(ON + each for each in job.conf.on), *jobs.groups_of(job.name)],
        "parameters": {
            "repo": str(repo.resolve()),
            "job": job.name,
            "parameters": {each.name: each.default for each in job.conf.params if each.default is not None},
        },
        "parameter_openapi_schema": _form(job),
        "enforce_parameter_schema": True,
        "pull_steps": [],
        "schedules": [
            {
                "schedule": {"cron": each.cron, "timezone": each.zone},
                "active": True,
                "parameters": {"reason": "schedule"},
            }
            for each in job.conf.schedule
        ],
    }
    version = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    return {**about, "version": version, "parameters": {**about["parameters"], "commit": commit}}  # type: ignore[dict-item]


def _form(job: Job) -> dict[str, Any]:
    """The form of a job's parameters, as JSON Schema. What is not declared may be given, too."""
    fields: dict[str, Any] = {}
    for place, each in enumerate((*job.conf.params, *job.conf.matrix)):
        of_matrix = each in job.conf.matrix
        field: dict[str, Any] = {"type": "string", "title": each.name, "position": place}
        about = each.description or ("a run for each, when left out" if of_matrix else "")
        field |= {"description": about} if about else {}
        field |= {"default": each.default} if each.default is not None and not of_matrix else {}
        field |= {"enum": list(each.choices)} if each.choices else {}
        fields[each.name] = field
    parameters = {
        "type": "object",
        "title": "parameters",
        "position": 0,
        "properties": fields,
        "required": [each.name for each in job.conf.params if each.default is None],
        "additionalProperties": {"type": "string"},
    }
    reason = {"type": "string", "title": "reason", "position": 1, "default": "", "description": "why it is started"}
    return {
        "type": "object",
        "title": "Parameters",
        "properties": {"parameters": parameters, "reason": reason},
        "required": ["parameters"] if parameters["required"] else [],
    }
