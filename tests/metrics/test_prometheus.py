"""Whether Prometheus understands it: real ones, of Debian, with real servers of toto and of node_exporter."""

import asyncio
import base64
import contextlib
import json
import os
import re
import shutil
import signal
import ssl
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from prefect import flow, task
from prefect.settings import PREFECT_API_URL, PREFECT_LOGGING_TO_API_ENABLED, temporary_settings

from flying_monkey import metrics as agent
from tests.conftest import PrefectServer, free_port
from tests.flying_monkey.test_metrics import STATE
from tests.metrics.fleet import SmallFleet
from toto.api import certificate
from toto.base import resources
from toto.jobs import folder, registered
from toto.metrics import token
from toto.metrics.dashboards import dashboards
from toto.server import deployments

ROOT: Final = Path(__file__).parents[2]
MONITORING: Final = ROOT / "monitoring"


def test_the_alerts_fire_for_what_they_are_for() -> None:
    for words in (
        ["check", "rules", "alerts.yml"],
        ["test", "rules", *(each.name for each in MONITORING.glob("*_test.yml"))],
        ["check", "config", "--syntax-only", "prometheus.yml"],
    ):
        done = subprocess.run(["promtool", *words], cwd=MONITORING, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def test_every_alert_is_tested_and_has_a_section_in_the_runbook() -> None:
    tests = "".join(each.read_text() for each in MONITORING.glob("*_test.yml"))
    text = (ROOT / "docs/operations.md").read_text()
    anchors = {
        re.sub(r"[^a-z0-9 -]", "", line.lower()).replace(" ", "-") for line in re.findall(r"^#+ (.*)$", text, re.M)
    }
    for rule in rules():
        file, _, anchor = rule["annotations"]["runbook_url"].partition("#")
        assert file == "docs/operations.md" and anchor in anchors, rule
        assert f"alertname: {rule['alert']}\n        exp_alerts:\n" in tests, rule["alert"]
        assert rule["labels"]["severity"] in {"page", "ticket"}


def test_the_example_of_an_alertmanager_is_one() -> None:
    if (amtool := shutil.which("amtool")) is None:
        pytest.skip("monitoring/alertmanager.yml IS NOT CHECKED: there is no amtool")
    file = str(MONITORING / "alertmanager.yml")
    subprocess.run([amtool, "check-config", file], check=True, capture_output=True)
    for severity in {rule["labels"]["severity"] for rule in rules()}:
        words = [amtool, "config", "routes", "test", f"--config.file={file}", f"severity={severity}"]
        assert subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip() == severity


def get(url: str, **headers: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@contextlib.contextmanager
def started(*argv: str | Path, log: Path) -> Iterator[None]:
    """A program that ends with the block, and with this process."""
    with log.open("wb") as sink:
        words = ["setpriv", "--pdeathsig", "KILL", *argv]
        running = subprocess.Popen(words, stdout=sink, stderr=sink, env={"PATH": os.environ["PATH"]})
    try:
        yield
    finally:
        running.send_signal(signal.SIGTERM)
        running.wait(20)


def configuration(toto: str, authority: str, more: dict[str, str]) -> str:
    """monitoring/prometheus.yml with what an operator changes in it."""
    tls = f"tls_config: {{ca_file: {authority}}}"
    changes = {
        "scheme: https": f"scheme: https\n    {tls}",
        "basic_auth: *toto": f"basic_auth: *toto, {tls}",
        "toto.example.org": toto,
        "127.0.0.1:9093": "127.0.0.1:1",
        **more,
    }
    text = (MONITORING / "prometheus.yml").read_text()
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    return text


class Prometheus:
    """A Prometheus at a port of the loopback, by monitoring/prometheus.yml with what an operator changes in it."""

    def __init__(self, folder: Path, toto: str, node_exporter: int) -> None:
        self.folder, self.port, self.log = folder, free_port(), folder / "prometheus.log"
        authority = str(certificate.authority())
        more = {
            "/etc/prometheus/toto.token": str(token.file()),
            "alerts.yml": str(MONITORING / "alerts.yml"),
            "$1:9100": f"$1:{node_exporter}",
            "30s": "3s",  # an answer may take as long
        }
        (folder / "prometheus.yml").write_text(configuration(toto, authority, more))

    def running(self) -> contextlib.AbstractContextManager[None]:
        return started(
            "prometheus",
            f"--config.file={self.folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={self.folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{self.port}",
            log=self.log,
        )

    def query(self, expression: str) -> list[dict[str, Any]]:
        words = urllib.parse.urlencode({"query": expression})
        status, text = get(f"http://127.0.0.1:{self.port}/api/v1/query?{words}")
        if status == 503:  # it has only begun
            return []
        assert status == 200, f"{expression}: {text}"
        found: list[dict[str, Any]] = json.loads(text)["data"]["result"]
        return [each for each in found if each["value"][1] != "NaN"]

    async def until(self, expression: str, seconds: float = 120) -> list[dict[str, Any]]:
        """What a query finds, once it finds something."""
        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(OSError, KeyError):
                if found := await asyncio.to_thread(self.query, expression):
                    return found
            assert time.monotonic() < deadline, f"nothing for {expression}:\n{self.log.read_text()[-3000:]}"
            await asyncio.sleep(0.5)


@contextlib.asynccontextmanager
async def with_tls(port: int, *names: str) -> AsyncIterator[int]:
    """A port of the loopback that does TLS for `port`, as a proxy does: by a certificate of toto's own authority."""
    made = certificate.own(["127.0.0.1", *names])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(made.certificate, made.key)

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def joined(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answers, asks = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(copy(reader, asks), copy(answers, writer))

    async with await asyncio.start_server(joined, "127.0.0.1", 0, ssl=context) as server:
        yield server.sockets[0].getsockname()[1]


@task
def phase() -> None:
    """Stands in for the work of one."""
    time.sleep(0.1)


@flow(name="detect", validate_parameters=False)
def stage(run: object) -> None:
    """A stage, as those of toto: a subflow that is given no repository."""
    phase.with_options(task_run_name="evaluate web1")()
    phase.with_options(task_run_name="sandbox")()


@flow(name="reconcile")
def whole(repo: str) -> None:
    """Stands in for a run."""
    stage(object())


@pytest.fixture
async def served(
    prefect_server: PrefectServer, tiny_project: Path, host_key: Path, monkeypatch: pytest.MonkeyPatch
) -> SmallFleet:
    """A small fleet on the session's server, with a worker that lives, as far as Prefect knows."""
    monkeypatch.setenv("TOTO_STATE", str(prefect_server.home))
    fleet = SmallFleet(prefect_server.home / "repos", host_key)
    await fleet.make()
    api = prefect_server.api
    await deployments.deploy(prefect_server.env, root=tiny_project)
    await api.call("POST", "/work_pools/toto/workers/heartbeat", {"name": "here"})
    (made := prefect_server.home / "infra/jobs").mkdir(parents=True)
    (made / "backup.run").touch()
    await registered.register(api.call, fleet.bare, "c" * 40, folder.read(made.parent))
    await api.call("POST", "/v2/concurrency_limits/", {"name": resources.SANDBOXES, "limit": 2})
    return fleet


async def test_every_panel_has_an_answer_from_a_prometheus_that_has_read_toto_and_a_machine(
    served: SmallFleet, prefect_server: PrefectServer, tmp_path: Path
) -> None:
    toto = prefect_server.api_url.removesuffix("/api")
    assert [get(f"{toto}{path}")[0] for path in ("/metrics", "/metrics/machines")] == [401, 401]
    assert get(f"{toto}/metrics", Authorization=f"Bearer {token.file().read_text()}")[0] == 401
    password = base64.b64encode(f"prometheus:{token.file().read_text()}".encode()).decode()
    status, text = get(f"{toto}/metrics", Authorization=f"Basic {password}")
    assert status == 200 and 'toto_metrics_complete{part="runs"} 1.0' in text, text
    subprocess.run(["promtool", "check", "metrics"], input=text.encode(), check=True)
    agent.write(tmp_path / "flying-monkey.prom", {**STATE, "contact": time.time()})
    exporter = free_port()
    async with with_tls(int(toto.rpartition(":")[2])) as port:
        prometheus = Prometheus(tmp_path, f"127.0.0.1:{port}", exporter)
        await looked_at(prometheus, served, prefect_server, tmp_path, exporter)


async def looked_at(
    prometheus: Prometheus, served: SmallFleet, prefect_server: PrefectServer, tmp_path: Path, exporter: int
) -> None:
    """What the Prometheus finds, of runs too that end while it looks, is what the panels ask for."""
    with (
        started(
            "prometheus-node-exporter",
            f"--web.listen-address=127.0.0.1:{exporter}",
            f"--collector.textfile.directory={tmp_path}",
            log=tmp_path / "exporter.log",
        ),
        prometheus.running(),
    ):
        await prometheus.until('toto_runs_total{action="deploy"}')
        await prometheus.until('up{job="node", machine="web1", repo="infra"} == 1')
        await a_run(prefect_server, str(served.bare), "FAILED")
        backup = {"deployment": "job/infra:backup", "job": "backup"}
        await a_run(prefect_server, str(served.bare), "COMPLETED", **backup)
        await a_run(prefect_server, str(served.bare), "FAILED", **backup, name="Aborted")
        await prometheus.until('toto_job_last_failed{repo="infra", name="backup"} == 1')
        await prometheus.until('increase(toto_job_runs_total{name="backup", result="aborted"}[1m]) > 0')
        with temporary_settings({PREFECT_API_URL: prefect_server.api_url, PREFECT_LOGGING_TO_API_ENABLED: False}):
            await asyncio.to_thread(whole, str(served.bare))
        await prometheus.until('increase(toto_runs_total{action="deploy", result="failed"}[1m]) > 0')
        await prometheus.until('increase(toto_phase_duration_seconds_count{phase="sandbox"}[1m]) > 0')
        await prometheus.until('toto_evaluation_seconds{host="web1", repo="infra"} > 0.05')
        variables = {"$repo": ".*", "$machine": "web1", "$__rate_interval": "1m"}
        for name, dashboard in dashboards().items():
            for panel in dashboard["panels"]:
                for query in panel["targets"]:
                    expression = query["expr"]
                    for variable, value in variables.items():
                        expression = expression.replace(variable, value)
                    found = await prometheus.until(expression)
                    for label in re.findall(r"{{(\w+)}}", query["legendFormat"]):
                        assert all(label in each["metric"] for each in found), f"{name}: {panel['title']}: {found}"
        await prometheus.until('ALERTS{alertname="RunFailed", alertstate="firing", repo="infra"}')
        assert await prometheus.until('ALERTS{alertname="HalfDone", alertstate="pending", target="web2"}')
        await registered.register(prefect_server.api.call, served.bare, "d" * 40, folder.read(tmp_path))
        await prometheus.until('absent(toto_job_last_failed{repo="infra"})')  # the job is gone


async def a_run(
    prefect_server: PrefectServer,
    repo: str,
    state: str,
    *,
    deployment: str = "reconcile/reconcile",
    name: str | None = None,
    **parameters: str,
) -> None:
    """A run of a deployment that has ended so."""
    api = prefect_server.api
    found = await api.call("GET", f"/deployments/name/{deployment}")
    asked = {"parameters": {"repo": repo, **parameters}}
    run = await api.call("POST", f"/deployments/{found['id']}/create_flow_run", asked)
    for each in ({"type": "RUNNING"}, {"type": state, "name": name}):
        await api.call("POST", f"/flow_runs/{run['id']}/set_state", {"state": each, "force": True})
