"""Says why a release is not ready, by the live resources: its pods, what has too few of them, what waits for others."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

from toto.helm.manifest import Resource

MOST: Final = 20  # lines
WORKLOADS: Final = ("Deployment", "StatefulSet", "DaemonSet", "Job", "ReplicaSet")
WAITED_FOR: Final = (*WORKLOADS, "Pod", "Service", "PersistentVolumeClaim")


def why_not(live: Iterable[Resource], pods: Sequence[Resource]) -> list[str]:
    """A line for each pod that is not ready, and for each of the `live` resources that is not for another reason."""
    lines: list[str] = []
    for each in live:
        if each["kind"] == "Pod":
            lines += _of_pods([each])
        elif each["kind"] in WORKLOADS:
            lines += _of_pods(_own(each, pods)) or _of_workload(each)
        else:
            lines += _of_other(each)
    unique = list(dict.fromkeys(lines))
    return unique if len(unique) <= MOST else [*unique[:MOST], f"… and {len(unique) - MOST} more that are not ready"]


def _own(workload: Resource, pods: Sequence[Resource]) -> list[Resource]:
    """The pods that a workload selects."""
    labels = ((workload.get("spec") or {}).get("selector") or {}).get("matchLabels") or {}
    if workload["kind"] == "Job":
        labels = {"job-name": workload["metadata"]["name"]}
    return [
        pod
        for pod in pods
        if labels
        and labels.items() <= (pod["metadata"].get("labels") or {}).items()
        and pod["metadata"].get("namespace") == workload["metadata"].get("namespace")
    ]


def _of_pods(pods: Iterable[Resource]) -> list[str]:
    return [f"pod {pod['metadata']['name']}: {why}" for pod in pods if (why := _why_not(pod.get("status") or {}))]


def _of_workload(each: Resource) -> Iterator[str]:
    spec, status = each.get("spec") or {}, each.get("status") or {}
    name = f"{each['kind']} {each['metadata']['name']}"
    said = [
        str(one.get("message"))
        for one in status.get("conditions") or ()
        if one.get("message") and (one.get("type"), one.get("status")) in _TROUBLE
    ]
    if each["kind"] == "Job":
        wanted, done, word = spec.get("completions") or 1, status.get("succeeded") or 0, "have succeeded"
    elif each["kind"] == "DaemonSet":
        wanted, done, word = status.get("desiredNumberScheduled") or 0, status.get("numberReady") or 0, "are ready"
    else:
        wanted, done, word = spec.get("replicas", 1), status.get("readyReplicas") or 0, "are ready"
    if done < wanted:
        yield f"{name}: {done} of {wanted} {word}{': ' if said else ''}{'; '.join(said)}"


_TROUBLE: Final = {("ReplicaFailure", "True"), ("Available", "False"), ("Progressing", "False"), ("Failed", "True")}


def _of_other(each: Resource) -> Iterator[str]:
    name = f"{each['kind']} {each['metadata']['name']}"
    match each:
        case {"kind": "Service", "spec": {"type": "LoadBalancer"}}:
            if not ((each.get("status") or {}).get("loadBalancer") or {}).get("ingress"):
                yield f"{name}: no load balancer has given it an address (does the cluster have one?)"
        case {"kind": "PersistentVolumeClaim"}:
            if (phase := (each.get("status") or {}).get("phase")) != "Bound":
                yield f"{name}: it is {phase or 'not there'}: no volume is bound to it"


def _why_not(status: dict[str, Any]) -> str:
    """Why a pod is not ready, by its status; "" when it is ready or has finished."""
    conditions = {each["type"]: each for each in status.get("conditions") or ()}
    if status.get("phase") == "Succeeded" or conditions.get("Ready", {}).get("status") == "True":
        return ""
    for each in (*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())):
        match each:
            case {"state": {"waiting": dict(said)}}:
                return f"{each['name']} waits: {said.get('reason', '')} {said.get('message', '')}".strip()
            case {"state": {"terminated": {"exitCode": int(code)}}} if code != 0:
                return f"{each['name']} ended with status {code}"
            case {"state": {"running": _}, "ready": False}:
                return f"{each['name']} runs but is not ready"
    return str(conditions.get("PodScheduled", {}).get("message") or f"it is {status.get('phase', 'not there')}")
