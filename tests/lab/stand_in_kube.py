"""A STAND-IN for a Kubernetes API server, in memory, for the demo where no real one is at hand. No cluster.

As much of the API as helm 3 and helm 4 use to install, upgrade, test, roll back and uninstall: discovery, objects,
selectors, patches, watches. Nothing is validated, no controller runs, no pod is made: what is written is Ready at
once, or is what the annotation `lab/fate` asks for (see `tests.lab.kube`, which starts it).

`python -m tests.lab.stand_in_kube DIRECTORY ADDRESS`, where DIRECTORY has the files `tokens` and
`certs/apiserver.{crt,key}` of a kube-apiserver. Standard library only.
"""

import base64
import copy
import hmac
import itertools
import json
import re
import ssl
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final, TypeAlias
from urllib.parse import parse_qsl, urlsplit

Json: TypeAlias = dict[str, Any]

# Group and version, then the kinds in it; those with a "*" have no namespace.
KINDS: Final = {
    "v1": "Namespace* ConfigMap Secret Service ServiceAccount Pod PersistentVolumeClaim",
    "apps/v1": "Deployment StatefulSet DaemonSet ReplicaSet",
    "batch/v1": "Job CronJob",
    "networking.k8s.io/v1": "Ingress NetworkPolicy",
    "policy/v1": "PodDisruptionBudget",
    "autoscaling/v2": "HorizontalPodAutoscaler",
    "rbac.authorization.k8s.io/v1": "Role RoleBinding ClusterRole* ClusterRoleBinding*",
}
PATH: Final = re.compile(r"/apis?/((?:[^/]+/)?v\d\w*)(?:/namespaces/([^/]+)(?=/[a-z]))?/([a-z]+)(?:/([^/]+))?")
VERSION: Final = {"major": "1", "minor": "33", "gitVersion": "v1.33.0+stand-in"}


class Refused(Exception):
    """The API says no: with an HTTP status, its reason, a message."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.body = {
            "kind": "Status",
            "apiVersion": "v1",
            "status": "Failure",
            "code": code,
            "reason": reason,
            "message": message,
        }


@dataclass(frozen=True)
class Key:
    """Where an object is, or (without a name) a collection of them."""

    api: str
    kind: str
    namespace: str
    name: str = ""

    def holds(self, other: "Key") -> bool:
        return (self.api, self.kind) == (other.api, other.kind) and self.namespace in ("", other.namespace)


def plural(kind: str) -> str:
    return re.sub("y$", "ie", kind.lower()) + ("es" if kind.endswith("ss") else "s")


def key_of(path: str) -> Key:
    if found := PATH.fullmatch(path):
        api, namespace, wanted, name = found.groups("")
        for kind in KINDS.get(api, "").replace("*", "").split():
            if plural(kind) == wanted:
                return Key(api, kind, namespace, name)
    raise Refused(404, "NotFound", f"the stand-in has no {path}")


class Store:
    """All objects, and every change of them since the start."""

    def __init__(self) -> None:
        self.lock = threading.Condition()
        self.objects: dict[Key, Json] = {}
        self.events: list[tuple[Key, Json]] = []  # an event's number is its place here, from 1
        self.write(Key("v1", "Namespace", "", "default"), {})

    def get(self, key: Key) -> Json:
        if key not in self.objects:
            group = key.api.rpartition("/")[0]
            raise Refused(404, "NotFound", f'{plural(key.kind)}{"." * bool(group)}{group} "{key.name}" not found')
        return self.objects[key]

    def members(self, collection: Key) -> list[Json]:
        if collection.kind == "ReplicaSet":
            return [replica_set(each) for each in self.members(replace(collection, kind="Deployment"))]
        return [value for key, value in self.objects.items() if collection.holds(key)]

    def write(self, key: Key, value: Json, dry: bool = False) -> Json:
        """Store an object, new or again, as a server and its controllers would leave it."""
        if key.namespace:
            self.get(Key("v1", "Namespace", "", key.namespace))
        old = self.objects.get(key)
        value = copy.deepcopy(value) | {"apiVersion": key.api, "kind": key.kind}
        meta = value["metadata"] = (
            (value.get("metadata") or {}) | {"name": key.name} | ({"namespace": key.namespace} if key.namespace else {})
        )
        settle(value)
        if old:
            meta |= {name: old["metadata"][name] for name in ("uid", "creationTimestamp", "generation")}
        else:
            now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            meta |= {"uid": str(uuid.uuid4()), "creationTimestamp": now, "generation": 0}
        meta["generation"] += old is None or old.get("spec") != value.get("spec")
        if "status" in value:
            value["status"]["observedGeneration"] = meta["generation"]
        if not dry:
            self._send_event("MODIFIED" if old else "ADDED", key, value)
            self.objects[key] = value
        return value

    def delete(self, key: Key) -> Json:
        gone = copy.deepcopy(self.get(key))
        if key.kind == "Namespace":
            for each in [each for each in self.objects if each.namespace == key.name]:
                self.delete(each)
        del self.objects[key]
        self._send_event("DELETED", key, gone)
        return gone

    def _send_event(self, event: str, key: Key, value: Json) -> None:
        with self.lock:
            self.events.append((key, {"type": event, "object": value}))
            value["metadata"]["resourceVersion"] = str(len(self.events))
            self.lock.notify_all()


def settle(value: Json) -> None:
    """Defaults and status: all has happened already, unless its fate says otherwise."""
    kind, spec = value["kind"], value.get("spec") or {}
    pod = spec.get("template") or value
    fate = ((pod.get("metadata") or {}).get("annotations") or {}).get("lab/fate")
    if kind in ("Deployment", "StatefulSet", "DaemonSet"):
        wanted = spec.setdefault("replicas", 1)
        ready = 0 if fate in ("stuck", "failed") else wanted
        spec.setdefault(
            "strategy" if kind == "Deployment" else "updateStrategy",
            {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0}},
        )
        value["status"] = {
            **dict.fromkeys(
                (
                    "replicas",
                    "updatedReplicas",
                    "currentReplicas",
                    "desiredNumberScheduled",
                    "currentNumberScheduled",
                    "updatedNumberScheduled",
                ),
                wanted,
            ),
            **dict.fromkeys(("readyReplicas", "availableReplicas", "numberReady", "numberAvailable"), ready),
            "conditions": [
                {"type": "Available", "status": str(ready == wanted)},
                {"type": "Progressing", "status": "True", "reason": "NewReplicaSetAvailable"},
            ],
        }
    elif kind == "Pod":
        ends = spec.get("restartPolicy", "Always") != "Always" and fate != "stuck"
        value["status"] = {
            "phase": "Running" if not ends else "Failed" if fate == "failed" else "Succeeded",
            "conditions": [{"type": "Ready", "status": str(not ends and not fate)}],
        }
    elif kind == "Job":
        ended = "Complete" if not fate else "Failed" if fate == "failed" else "Suspended"
        value["status"] = {"succeeded": int(not fate), "conditions": [{"type": ended, "status": "True"}]}
    elif kind == "Service":
        spec.setdefault("clusterIP", "10.0.0.1")
    elif kind in ("Namespace", "PersistentVolumeClaim"):
        value["status"] = {"phase": "Active" if kind == "Namespace" else "Bound"}
    elif kind == "Secret":
        given = {name: base64.b64encode(text.encode()).decode() for name, text in value.pop("stringData", {}).items()}
        value["data"] = (value.get("data") or {}) | given


def replica_set(deployment: Json) -> Json:
    """The one that a deployment would have made: helm 3 asks for it."""
    meta, template = deployment["metadata"], deployment["spec"]["template"]
    return deployment | {
        "kind": "ReplicaSet",
        "metadata": meta
        | {
            "name": f"{meta['name']}-1",
            "uid": f"{meta['uid']}-1",
            "labels": template["metadata"].get("labels", {}),
            "ownerReferences": [
                {
                    "apiVersion": "apps/v1",
                    "kind": "Deployment",
                    "name": meta["name"],
                    "uid": meta["uid"],
                    "controller": True,
                }
            ],
        },
    }


def merged(old: Any, patch: Any) -> Any:
    """A merge patch (RFC 7386), or a strategic one: of that, "$setElementOrder" says which lists are merged."""
    if not isinstance(patch, dict):
        return patch
    new = {key: value for key, value in old.items() if key in patch.get("$retainKeys", old)} if old else {}
    for key, value in patch.items():
        if value is None:
            new.pop(key, None)
        elif isinstance(value, list) and (order := patch.get(f"$setElementOrder/{key}")) is not None:
            new[key] = merged_list(new.get(key) or [], value, order)
        elif not key.startswith("$"):
            new[key] = merged(new.get(key), value)
    return new


def merged_list(old: list[Any], patch: list[Any], order: list[Any]) -> list[Any]:
    """Elements are known by the one key that `order` has of them, and come in that order."""
    if not order or not isinstance(order[0], dict):
        return order
    [name] = order[0]
    elements = {each[name]: each for each in old}
    for each in patch:
        elements[each[name]] = merged(elements.get(each[name]), each)
    return [elements[each[name]] for each in order]  # what is to be deleted is not in it


def decoded(body: bytes) -> Json:
    """A request's body: JSON, or a Secret in protobuf, which is how helm stores its releases."""
    if not body.startswith(b"k8s\0"):
        return dict(json.loads(body or b"{}"))
    fields = list(protobuf(dict(protobuf(body[4:]))[2]))
    metadata = list(protobuf(dict(fields)[1]))
    labels = [dict(protobuf(value)) for number, value in metadata if number == 11]
    data = [dict(protobuf(value)) for number, value in fields if number == 2]
    return {
        "type": dict(fields).get(3, b"Opaque").decode(),
        "metadata": {
            "name": dict(metadata)[1].decode(),
            "labels": {each[1].decode(): each[2].decode() for each in labels},
        },
        "data": {each[1].decode(): base64.b64encode(each[2]).decode() for each in data},
    }


def protobuf(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The fields of a message that are strings, bytes or messages: number and content."""
    rest = iter(data)

    def number() -> int:
        low = next(rest)
        return low if low < 128 else low - 128 + 128 * number()

    for tag in rest:  # (no field of a Secret has a number above 15)
        length = number()
        if tag % 8 == 2:
            yield tag // 8, bytes(itertools.islice(rest, length))


def selected(value: Json, query: Json) -> bool:
    """Whether an object has the labels and the name that are asked for; only NAME=VALUE can be asked."""
    meta = value["metadata"]
    asked = [(meta.get("labels") or {}, each) for each in query.get("labelSelector", "").split(",")]
    asked += [({"metadata.name": meta["name"]}, each) for each in query.get("fieldSelector", "").split(",")]
    return all(have.get(each.partition("=")[0]) == each.partition("=")[2] for have, each in asked if each)


def discovery(path: str) -> Json | None:
    """The pages that say what there is."""
    api = re.sub("^/apis?/", "", path)
    if api in KINDS:
        return {
            "kind": "APIResourceList",
            "groupVersion": api,
            "resources": [
                {
                    "name": plural(kind.rstrip("*")),
                    "singularName": "",
                    "kind": kind.rstrip("*"),
                    "namespaced": not kind.endswith("*"),
                    "verbs": ["create", "delete", "get", "list", "patch", "update", "watch"],
                }
                for kind in KINDS[api].split()
            ],
        }
    versions = [{"groupVersion": api, "version": api.rpartition("/")[2]} for api in KINDS if "/" in api]
    groups = [
        {"name": each["groupVersion"].partition("/")[0], "versions": [each], "preferredVersion": each}
        for each in versions
    ]
    pages: dict[str, Json] = {
        "/readyz": {},
        "/version": VERSION,
        "/openapi/v3": {"paths": {}},
        "/api": {"kind": "APIVersions", "versions": ["v1"]},
        "/apis": {"kind": "APIGroupList", "groups": groups},
    }
    return pages.get(path)


class Handler(BaseHTTPRequestHandler):
    """The requests of one connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # 40 ms a request
    token = ""
    store = Store()

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        query = dict(parse_qsl(url.query, keep_blank_values=True))
        try:
            if not hmac.compare_digest(self.headers.get("Authorization", ""), f"Bearer {self.token}"):
                raise Refused(401, "Unauthorized", "Unauthorized")
            if url.path == "/openapi/v2":  # in protobuf, of which nothing is a document without a schema
                self.answer(200, b"", "application/octet-stream")
            elif (page := discovery(url.path)) is not None:
                self.answer(200, page)
            elif query.get("watch") in ("true", "1"):
                self.watch(key_of(url.path), query)
            else:
                with self.store.lock:
                    code, found = self.verb(key_of(url.path), query, decoded(body) if self.command != "DELETE" else {})
                self.answer(code, found)
        except Refused as error:
            self.answer(error.code, error.body)

    do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

    def verb(self, key: Key, query: Json, body: Json) -> tuple[int, Json]:
        dry = "dryRun" in query
        match self.command:
            case "GET" if not key.name:
                return 200, {
                    "kind": f"{key.kind}List",
                    "apiVersion": key.api,
                    "metadata": {"resourceVersion": str(len(self.store.events))},
                    "items": [each for each in self.store.members(key) if selected(each, query)],
                }
            case "POST":
                key = replace(key, name=body["metadata"]["name"])
                if key in self.store.objects:
                    raise Refused(409, "AlreadyExists", f'{plural(key.kind)} "{key.name}" already exists')
                return 201, self.store.write(key, body, dry)
            case "PATCH" if self.headers.get("Content-Type") == "application/apply-patch+yaml":
                # (The yaml is JSON. Whoever applies is the only one who does: what it leaves out is gone.)
                return 200, self.store.write(key, body, dry)
        found = self.store.get(key)
        match self.command:
            case "PUT" | "PATCH":
                return 200, self.store.write(key, body if self.command == "PUT" else merged(found, body), dry)
            case "DELETE" if not dry:
                return 200, self.store.delete(key)
        return 200, found

    def answer(self, code: int, body: Json | bytes, kind: str = "application/json") -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def watch(self, collection: Key, query: Json) -> None:
        """Tell each change of a collection since a version, until the time is over or nobody listens."""
        if "sendInitialEvents" in query:  # what older servers refuse too: the client lists first, then watches
            raise Refused(422, "Invalid", "sendInitialEvents: not in the stand-in")
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        deadline = time.monotonic() + float(query.get("timeoutSeconds") or 60)
        seen, store = int(query.get("resourceVersion") or 0), self.store
        while (left := deadline - time.monotonic()) > 0:
            with store.lock:
                store.lock.wait_for(lambda: len(store.events) > seen, min(left, 1))  # noqa: B023
                news, seen = store.events[seen:], len(store.events)
            try:
                for key, event in news:
                    if collection.holds(key) and selected(event["object"], query):
                        self.wfile.write(json.dumps(event).encode() + b"\n")
            except OSError:
                return


def main(directory: Path, address: str) -> None:
    Handler.token = (directory / "tokens").read_text().partition(",")[0]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "certs/apiserver.crt", directory / "certs/apiserver.key")
    server = ThreadingHTTPServer((address, 6443), Handler)
    # (The handshake is the business of the connection's own thread.)
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    print("this is a STAND-IN for a Kubernetes API server: it runs nothing of what it is given", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
