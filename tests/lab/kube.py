"""A real Kubernetes API server on loopback, for tests and the demo of helm: `async with cluster(directory) as …`.

etcd, kube-apiserver and kube-controller-manager are the real ones, in a network namespace: an address that the API
server dials, such as that of a chart's webhook, is none of the machine's own network. There is no kubelet and no
scheduler: a loop binds every pod to the one node and says of it what a kubelet would, so a Deployment becomes ready, a
Job completes and a test pod succeeds, while no container runs. `Cluster.fates`, or the annotation `lab/fate` of a pod,
says otherwise:

    stuck     runs, but never becomes ready; one that should end does not
    failed    has ended with an error

Ready after about 5 s, 480 MB. The two Kubernetes programs come from `setup/kube`, helm from `setup/helm`.
"""

import asyncio
import contextlib
import datetime
import ipaddress
import json
import logging
import os
import secrets
import shutil
import signal
import socket
import ssl
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import httpx
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from tests.lab.parts import Part
from toto.base import process
from toto.base.errors import TotoError
from toto.cell.namespace import namespace
from toto.cell.relay import serving

log = logging.getLogger(__name__)

SETUP: Final = Path(__file__).parents[2] / "setup/kube"
PROGRAMS: Final = ("kube-apiserver", "kube-controller-manager")
NODE: Final = "lab"
FATE: Final = "lab/fate"
_PORT: Final = 6443
_STORE_PORT: Final = 2379  # etcd's
PATIENCE: Final = 180.0  # seconds until everything answers; 5 are usual


class ClusterError(TotoError):
    """The lab's cluster is not to be had, has ended, or has refused a request."""


@dataclass
class Cluster:
    """A cluster that runs. Its methods may be called from any thread's event loop.

    `fates` maps the beginning of a pod's `namespace/name` to its fate; a change holds for running pods too,
    within two seconds.
    """

    directory: Path
    address: str
    token: str
    parts: dict[str, process.Running] = field(default_factory=dict)
    fates: dict[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"https://{self.address}:{_PORT}"

    @property
    def kubeconfig(self) -> Path:
        return self.directory / "kubeconfig"

    @property
    def ca(self) -> Path:
        return self.directory / "certs" / "apiserver.crt"

    @property
    def environment(self) -> dict[str, str]:
        """This process's environment for a helm that talks to this cluster, with no state but in `directory`."""
        return {key: value for key, value in os.environ.items() if not key.startswith(("HELM_", "KUBE"))} | {
            "KUBECONFIG": str(self.kubeconfig),
            "HELM_CACHE_HOME": str(self.directory / "helm/cache"),
            "HELM_CONFIG_HOME": str(self.directory / "helm/config"),
            "HELM_DATA_HOME": str(self.directory / "helm/data"),
            "KUBECACHEDIR": str(self.directory / "helm/kube"),
        }

    async def get(self, path: str) -> Any:
        """What is at `path` (such as /api/v1/namespaces/web/configmaps/page), or None."""
        return await self.request("GET", path)

    async def post(self, path: str, body: object) -> Any:
        return await self.request("POST", path, body)

    async def patch(self, path: str, body: object) -> Any:
        """A merge patch; None where there is nothing to patch."""
        return await self.request("PATCH", path, body)

    async def delete(self, path: str) -> Any:
        """None where there is nothing to delete. What depends on it goes a moment later."""
        return await self.request("DELETE", path)

    async def request(self, method: str, path: str, body: object = None) -> Any:
        """The answer's JSON, or None for "404 Not Found". Raises `ClusterError` for any other refusal."""
        async with self.client() as client:
            answer = await client.request(
                method,
                path,
                content=None if body is None else json.dumps(body),
                headers={"Content-Type": "application/merge-patch+json" if method == "PATCH" else "application/json"},
            )
        if answer.status_code == 404:
            return None
        if answer.is_error:
            raise ClusterError(f"{method} {path}: {answer.status_code} {answer.text}")
        return answer.json()

    def client(self) -> httpx.AsyncClient:
        """A client of the API, with the token."""
        return httpx.AsyncClient(
            base_url=self.url,
            verify=ssl.create_default_context(cafile=self.ca),
            timeout=60,
            trust_env=False,
            headers={"Authorization": f"Bearer {self.token}"},
        )

    def programs(self) -> list[Part]:
        """The programs, and whether they live."""
        return [Part(name, running.status, self.directory / f"{name}.log") for name, running in self.parts.items()]

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the API server: SIGSTOP makes it hang until SIGCONT, SIGKILL ends it."""
        os.kill(self.parts["kube-apiserver"].pid, number)


async def assets() -> Path:
    """The folder with the two Kubernetes programs. Raises `ClusterError`, which says what to do, when there is none."""
    if shutil.which("etcd") is None:
        raise ClusterError("the program `etcd` is not on PATH", hint="install it (Debian: etcd-server)")
    done = await process.run([SETUP, "unpack"], check=False, timeout=600)
    if done.status != 0:
        raise ClusterError(process.tail(done.stderr).removeprefix("toto: "))
    return Path(done.lines[-1])


@contextlib.asynccontextmanager
async def cluster(directory: Path) -> AsyncIterator[Cluster]:
    """Run a cluster for the length of the block; everything that it writes is in `directory` (made where absent).

    Raises `ClusterError` when the programs are not there, or do not come up.
    """
    programs = await assets()
    made = await _new(directory)
    async with contextlib.AsyncExitStack() as stack:
        network = await stack.enter_async_context(namespace())
        for port in (_STORE_PORT, _PORT):
            listening = socket.create_server((made.address, port))
            await stack.enter_async_context(serving(listening, partial(network.connect, port, made.address)))
        for name, argv in _commands(made, programs).items():
            await stack.enter_async_context(_part(made, name, [*network.inside, *argv]))
            if name == "etcd":
                await _until_answers(made, name, f"http://{made.address}:{_STORE_PORT}/health")
            if name == "kube-apiserver":
                await _until_answers(made, name, "/readyz")
                await _until_answers(made, name, "/api/v1/namespaces/default")
        await made.post("/api/v1/nodes", {"metadata": {"name": NODE}})
        pods = asyncio.create_task(_attend_pods(made))
        try:
            yield made
        finally:
            pods.cancel()
            await asyncio.wait([pods])


@contextlib.asynccontextmanager
async def stand_in(directory: Path) -> AsyncIterator[Cluster]:
    """The same, with one small stand-in for the three programs: see `tests.lab.stand_in_kube`. It knows no `fates`."""
    made = await _new(directory)
    _write_certificate(made)
    argv: list[process.Argument] = [sys.executable, "-m", "tests.lab.stand_in_kube", directory, made.address]
    async with _part(made, "kube-apiserver", argv):
        await _until_answers(made, "kube-apiserver", "/readyz")
        yield made


@contextlib.asynccontextmanager
async def cluster_or_stand_in(directory: Path, say: Callable[[str], None]) -> AsyncIterator[Cluster]:
    """For the demo: a cluster where one is to be had, else the stand-in; `say` prints which."""
    try:
        await assets()
    except ClusterError:
        say("no Kubernetes API server is at hand (`make kube` builds one): a small STAND-IN in memory answers helm")
        async with stand_in(directory) as made:
            yield made
        return
    say("a real Kubernetes API server answers helm (no kubelet: no container runs)")
    async with cluster(directory) as made:
        yield made


async def _new(directory: Path) -> Cluster:
    """A cluster that does not run yet: kubeconfig, token, and the key of the service accounts."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    # An address of its own: no port of it is anyone else's.
    address = ".".join(["127", *(str(secrets.choice(range(low, 255))) for low in (64, 1, 1))])
    made = Cluster(directory, address, secrets.token_hex(16))

    def write(name: str, text: str) -> None:
        (directory / name).touch(mode=0o600)
        (directory / name).write_text(text)

    write("tokens", f'{made.token},admin,1,"system:masters"\n')
    write(
        "kubeconfig",
        json.dumps(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "lab",
                "clusters": [{"name": "lab", "cluster": {"server": made.url, "certificate-authority": str(made.ca)}}],
                "users": [{"name": "admin", "user": {"token": made.token}}],
                "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "admin"}}],
            }
        ),
    )
    await process.run(
        ["ssh-keygen", "-q", "-t", "ecdsa", "-m", "PEM", "-N", "", "-f", directory / "service-account.key"], timeout=60
    )
    return made


def _write_certificate(made: Cluster) -> None:
    """A certificate that signs itself, for an hour-long life; kube-apiserver makes its own."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "stand-in")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = x509.CertificateBuilder(
        issuer_name=name,
        subject_name=name,
        public_key=key.public_key(),
        serial_number=x509.random_serial_number(),
        not_valid_before=now - datetime.timedelta(days=1),
        not_valid_after=now + datetime.timedelta(days=365),
        extensions=[
            x509.Extension(each.oid, True, each)
            for each in (
                x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(made.address))]),
                x509.BasicConstraints(ca=True, path_length=0),
            )
        ],
    ).sign(key, hashes.SHA256())
    made.ca.parent.mkdir(mode=0o700, exist_ok=True)
    made.ca.with_suffix(".key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    made.ca.write_bytes(certificate.public_bytes(Encoding.PEM))


@contextlib.asynccontextmanager
async def _part(made: Cluster, name: str, argv: Sequence[process.Argument]) -> AsyncIterator[None]:
    """One program of the cluster, for the length of the block; then it is killed: nothing of it is kept."""
    with (made.directory / f"{name}.log").open("ab") as log_file:
        async with process.start(argv, stdout=log_file.fileno(), stderr=log_file.fileno(), signals=()) as running:
            made.parts[name] = running
            yield


def _commands(made: Cluster, programs: Path) -> dict[str, list[process.Argument]]:
    """The three programs, in the order in which they start."""
    address, service_key = made.address, made.directory / "service-account.key"
    store = f"http://{address}:{_STORE_PORT}"
    return {
        "etcd": [
            "etcd",
            "--data-dir",
            made.directory / "etcd",
            "--listen-client-urls",
            store,
            "--advertise-client-urls",
            store,
            "--listen-peer-urls",
            f"http://{address}:2380",
            "--unsafe-no-fsync",
        ],
        "kube-apiserver": [
            programs / "kube-apiserver",
            "--etcd-servers",
            store,
            "--bind-address",
            address,
            "--advertise-address",
            address,
            "--secure-port",
            str(_PORT),
            "--cert-dir",
            made.ca.parent,
            "--token-auth-file",
            made.directory / "tokens",
            "--authorization-mode",
            "AlwaysAllow",
            "--service-cluster-ip-range",
            "10.0.0.0/24",
            "--service-account-issuer",
            "https://lab",
            "--service-account-signing-key-file",
            service_key,
            "--service-account-key-file",
            service_key,
            "--allow-privileged=true",
            "--endpoint-reconciler-type",
            "none",
            "--disable-admission-plugins",
            "ServiceAccount,TaintNodesByCondition",
        ],
        "kube-controller-manager": [
            programs / "kube-controller-manager",
            "--kubeconfig",
            made.kubeconfig,
            "--leader-elect=false",
            "--port",
            "0",
            "--secure-port",
            "0",
            "--service-account-private-key-file",
            service_key,
            "--kube-api-qps",
            "200",
            "--kube-api-burst",
            "400",
            "--controllers",
            "*,-nodeipam,-nodelifecycle,-cloud-node-lifecycle,-route,-service",
        ],
    }


async def _until_answers(made: Cluster, name: str, url: str) -> None:
    """Wait until `url` answers 200, as long as the part lives."""
    deadline = time.monotonic() + PATIENCE
    while not await _answers(made, url):
        status = made.parts[name].status
        if status is not None or time.monotonic() > deadline:
            said = process.tail((made.directory / f"{name}.log").read_text(errors="replace"))
            what = f"did not answer within {PATIENCE:g} s" if status is None else f"exited with status {status}"
            raise ClusterError(f"{name} {what}:\n{said}")
        await asyncio.sleep(0.05)


async def _answers(made: Cluster, url: str) -> bool:
    try:
        async with made.client() if url.startswith("/") else httpx.AsyncClient(trust_env=False) as client:
            return (await client.get(url)).is_success
    except (httpx.HTTPError, OSError):  # OSError: the API server has not made its certificate yet
        return False


async def _attend_pods(made: Cluster) -> None:
    """Be scheduler and kubelet, until cancelled."""
    # A watch without a version begins with all pods that there are: each is looked at again every two seconds.
    watch = {"watch": "true", "timeoutSeconds": "2"}
    async with made.client() as client:
        while True:
            with contextlib.suppress(httpx.HTTPError):  # the API server was ended, or hangs
                async with client.stream("GET", "/api/v1/pods", params=watch) as events:
                    async for line in events.aiter_lines():
                        event = json.loads(line)
                        if event["type"] in ("ADDED", "MODIFIED"):
                            await _attend(client, event["object"], made.fates)
            await asyncio.sleep(0.05)


async def _attend(client: httpx.AsyncClient, pod: dict[str, Any], fates: dict[str, str]) -> None:
    """The next step of a pod's life: bound to the node, then its status, at last gone."""
    name, namespace = pod["metadata"]["name"], pod["metadata"]["namespace"]
    path = f"/api/v1/namespaces/{namespace}/pods/{name}"
    if "deletionTimestamp" in pod["metadata"]:
        answer = await client.request("DELETE", path, json={"gracePeriodSeconds": 0})
    elif "nodeName" not in pod["spec"]:
        answer = await client.post(
            f"{path}/binding", json={"metadata": {"name": name}, "target": {"kind": "Node", "name": NODE}}
        )
    else:
        fate = pod["metadata"].get("annotations", {}).get(FATE, "")
        fate = next((each for start, each in list(fates.items()) if f"{namespace}/{name}".startswith(start)), fate)
        status = _status(pod["spec"], fate)
        if pod["status"]["phase"] in ("Succeeded", "Failed") or _gist(pod["status"]) == _gist(status):
            return
        answer = await client.patch(
            f"{path}/status", json={"status": status}, headers={"Content-Type": "application/merge-patch+json"}
        )
    if answer.is_error and answer.status_code not in (404, 409):  # gone or changed meanwhile
        log.warning("%s %s: %s", answer.request.method, path, answer.text)


def _status(spec: dict[str, Any], fate: str) -> dict[str, Any]:
    """What a kubelet would say of a pod."""
    ends = spec["restartPolicy"] != "Always" and fate != "stuck"
    ready = not ends and fate not in ("stuck", "failed")
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    state = {"terminated": {"exitCode": int(fate == "failed")}} if ends else {"running": {"startedAt": now}}
    conditions = {"PodScheduled": True, "Initialized": True, "ContainersReady": ready, "Ready": ready}
    return {
        "phase": "Running" if not ends else "Failed" if fate == "failed" else "Succeeded",
        "conditions": [
            {"type": kind, "status": str(holds), "lastTransitionTime": now} for kind, holds in conditions.items()
        ],
        "containerStatuses": [
            {
                "name": each["name"],
                "image": each["image"],
                "imageID": "",
                "ready": ready,
                "restartCount": 0,
                "state": state,
            }
            for each in spec["containers"]
        ],
    }


def _gist(status: dict[str, Any]) -> tuple[str, list[tuple[str, str]]]:
    return status["phase"], [(each["type"], each["status"]) for each in status.get("conditions", [])]
