"""The whole change set on real parts: terraform and helm beside two machines, one plan before and one revert after.

One fleet, one cluster, one Prefect server serve all tests of this file, in their order. What terraform's provisioner
and a chart do is steered by files outside the repo, and by the cluster's `fates`. A poison string goes in wherever a
secret can, and is searched for at the end in everything that toto wrote.
"""

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import AsyncIterator
from pathlib import Path

import nbformat
import pytest
import pytest_asyncio
from nbclient import NotebookClient

from tests.graph import Edges, chain, complete, edges
from tests.lab import setup
from tests.lab.fleet import EXAMPLE, PATIENCE, Fleet
from tests.lab.kube import Cluster
from tests.lab.test_whole import SETTINGS
from tests.repos import git
from toto.ledger.ledger import REF, Entry, Ledger
from toto.ledger.target import Target
from toto.plan.release import DeployedRelease
from toto.plan.root import DeployedRoot, RootBefore
from toto.server.environment import PROFILES

pytestmark = [pytest.mark.lab, pytest.mark.asyncio(loop_scope="module"), pytest.mark.minutes(4)]

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
POISON = "p0ison-Never-to-be-seen-7Q"
SAVE = """
import os
from blocks import TerraformCredentials
TerraformCredentials(variables={"TF_VAR_password": os.environ["POISON"]}).save("toto", overwrite=True)
"""
ROOT = """
variable "password" {
  type      = string
  sensitive = true
  default   = ""
}
resource "terraform_data" "kept" {
  input = sensitive(var.password)
}
resource "terraform_data" "record" {
  input            = "%(value)s"
  triggers_replace = "%(trigger)s"
  provisioner "local-exec" {
    command = "sh %(control)s/apply.sh"
  }
}
%(more)s
"""
CHART: dict[str, str] = {
    "release.yaml": "namespace: page\ncreate_namespace: true\ntimeout: 8\n",
    "Chart.yaml": "apiVersion: v2\nname: page\nversion: 0.1.0\n",
    "values.yaml": f"text: TEXT\npassword: {POISON}\n",
    "templates/page.yaml": """apiVersion: v1
kind: ConfigMap
metadata: {name: page}
data: {text: "{{ .Values.text }}"}
---
apiVersion: v1
kind: Secret
metadata: {name: page}
stringData: {password: "{{ .Values.password }}"}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: page}
spec:
  selector: {matchLabels: {app: page}}
  template:
    metadata: {labels: {app: page}, annotations: {text: "{{ .Values.text }}"}}
    spec: {containers: [{name: page, image: page}]}
""",
    "templates/test.yaml": """apiVersion: v1
kind: Pod
metadata: {name: page-test, annotations: {helm.sh/hook: test}}
spec: {restartPolicy: Never, containers: [{name: test, image: test}]}
""",
}


# The edges that the UI draws, by subflow ("": the run itself). Names of stages end with their targets.
_REHEARSAL = sorted(
    [
        ("build the system", "what changes"),
        ("build the VM", "sandbox"),
        ("build the VM", "no-internet tests"),
        ("no-internet tests", "with-internet tests"),
        ("sandbox ⊃", "no-internet tests"),
        ("sandbox ⊃", "with-internet tests"),
    ]
)
_ROLL_OUT = chain(
    "copy the closure",
    "inspect the machine",
    "try the way in",
    "intend",
    "activate: test",
    "smoke tests",
    "activate: switch",
    "post-switch tests",
    "add GC roots",
    "record",
    "clean up",
)
GREEN: dict[str, Edges] = {
    "": chain("detect", "rehearse / gate, web1, terraform/dns", "hosts / gate, web1", "terraform / dns", "notify"),
    "detect": [],
    "rehearse / gate, web1, terraform/dns": [],
    "rehearse host / gate": _REHEARSAL,
    "rehearse host / web1": _REHEARSAL,
    "rehearse root / dns": [],
    "hosts / gate, web1": [],
    "roll out host / gate": _ROLL_OUT,
    "roll out host / web1": _ROLL_OUT,
    "terraform / dns": [],
    "roll out root / dns": chain("intend", "apply", "record"),
}
RED: dict[str, Edges] = {
    "": chain(
        "detect",
        "rehearse / gate, web1, terraform/dns, helm/page",
        "hosts / gate, web1",
        "terraform / dns",
        "helm / page",
        "revert / gate, web1, terraform/dns, helm/page",
        "notify",
    ),
    "roll out release / page": chain("inspect the release", "intend", "upgrade", "the chart's tests"),
    "revert / gate, web1, terraform/dns, helm/page": [],
}


class World(Fleet):
    """Machines gate and web1, a terraform root `dns` and a release `page`."""

    def __init__(self, directory: Path, cluster: Cluster) -> None:
        super().__init__(directory, net=5)
        self.cluster, self.kubeconfig = cluster, cluster.kubeconfig
        self.control = directory / "control"
        self.control.mkdir()
        self.quick()

    @property
    def environment(self) -> dict[str, str]:
        return super().environment | {"TOTO_CELL_READ": str(self.control)}

    def quick(self) -> None:
        """What terraform's provisioner does: nothing, until a test sets something else."""
        (self.control / "apply.sh").write_text("true\n")

    def waits(self) -> None:
        """The provisioner says that it has begun, and waits until it is let go."""
        (self.control / "go").unlink(missing_ok=True)
        for begun in self._begun:
            begun.unlink()
        (self.control / "apply.sh").write_text(
            f"touch /state/begun\nwhile [ ! -e {self.control}/go ]; do sleep 0.1; done\n"
        )

    @property
    def _begun(self) -> list[Path]:
        return list(self.state.glob("repos/*/terraform/dns/begun"))

    async def begun(self) -> None:
        async with asyncio.timeout(PATIENCE):
            while not self._begun:
                await asyncio.sleep(0.1)

    def common(self, text: str) -> str:
        """The module that all hosts share, with another text in it: every host changes."""
        module = (EXAMPLE / "modules/common.nix").read_text().rstrip().removesuffix("}")
        return f'{module}  environment.etc."said".text = "{text}";\n}}\n'

    def release(self, text: str) -> dict[str, str | None]:
        """The release `page`: a Deployment, a ConfigMap with a text, a Secret, and a test."""
        return {f"helm/page/{name}": content.replace("TEXT", text) for name, content in CHART.items()}

    async def page(self) -> str | None:
        """The text that lives in the cluster."""
        found = await self.cluster.get("/api/v1/namespaces/page/configmaps/page")
        return found and str(found["data"]["text"])

    def reverted_in_order(self) -> list[str]:
        """Which targets the last revert reverted, in that order."""
        lines = self.git_log().splitlines()
        last = max(index for index, line in enumerate(lines) if line.endswith("to be reverted"))
        return [line.split(": reverted")[0] for line in lines[last:] if ": reverted to" in line]

    async def drawn(self, run: str) -> dict[str, Edges]:
        """The edges of a run's graph, and of each subflow's, once Prefect has all of them."""
        async with asyncio.timeout(60):
            while not complete(self.api("GET", f"/flow_runs/{run}/graph-v2")):
                await asyncio.sleep(0.2)
        found = {}
        rest = [("", run)]
        while rest:
            name, id = rest.pop()
            graph = self.api("GET", f"/flow_runs/{id}/graph-v2")
            nodes = [node for _, node in graph["nodes"]]
            for node in nodes:
                if node["label"].startswith("detect / "):
                    node["label"] = "detect"  # with the commit after it
            found[name] = edges(graph)
            rest += [(node["label"], node["id"]) for node in nodes if node["kind"] == "flow-run"]
        return found

    def request(self, deployment: str, **parameters: object) -> str:
        """Start a run of a deployment, as the UI does; its id."""
        found = self.api("GET", f"/deployments/name/{deployment}")
        run = self.api(
            "POST",
            f"/deployments/{found['id']}/create_flow_run",
            {"parameters": {"repo": str(self.repo), **parameters}},
        )
        return str(run["id"])

    def git_log(self) -> str:
        """The history of the ledger, the oldest first."""
        return git("log", "--reverse", "--format=%s", REF, cwd=self.repo)

    def root(self, value: str = "one", trigger: str = "t", more: str = "") -> dict[str, str | None]:
        return {
            "terraform/dns/main.tf": ROOT % {"value": value, "trigger": trigger, "control": self.control, "more": more}
        }

    def of(self, kind: str, name: str) -> Entry:
        return Ledger(self.repo).read().get(Target(kind, name))

    def state_files(self) -> list[Path]:
        return list(self.state.glob("repos/*/terraform/dns/terraform.tfstate"))

    def value(self) -> str:
        return str(self.terraform_state("dns")["terraform_data.record"]["input"]["value"])


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory, cluster: Cluster) -> AsyncIterator[World]:
    """The machines are on, and nothing is deployed yet; the hosts' tests are gone, so that a rehearsal is a boot."""
    if shutil.which("terraform") is None:
        warnings.warn("NOT TESTED: hosts, terraform and helm together: terraform is not on PATH", stacklevel=1)
        pytest.skip("terraform is not on PATH")
    await asyncio.to_thread(setup.setup)
    world = World(tmp_path_factory.mktemp("kinds"), cluster)
    try:
        await world.prepare(EXAMPLE)
        shutil.rmtree(world.work / "tests")
        (world.work / "hosts/web2.nix").unlink()
        manifest = (world.work / "machines.yaml").read_text()
        (world.work / "machines.yaml").write_text(manifest.split("  # web2")[0])
        (world.work / "toto.toml").write_text(SETTINGS)
        await asyncio.gather(world.start_server(), world.start_machines(["gate", "web1"]))
        await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-c", SAVE],
            check=True,
            env=world.environment | {"PREFECT_PROFILES_PATH": str(world.home / PROFILES), "POISON": POISON},
        )
        yield world
    finally:
        await asyncio.shield(world.stop())


async def test_a_new_root_is_planned_before_anything_is_touched_and_applied_after_the_hosts(world: World) -> None:
    run = await world.deploy("the fleet and a root", world.root())
    assert run.state == "COMPLETED", world.logs(run.id)
    assert "gate, web1, terraform/dns deployed" in run.message
    assert world.value() == "one"
    assert "+ terraform_data.record" in world.artifacts(run.id)["plan-infra--terraform--dns"]
    history = world.git_log()
    assert history.index("terraform/dns: intent to deploy") > history.index("web1: good at")
    assert await world.drawn(run.id) == GREEN
    good = DeployedRoot.of(world.of("terraform", "dns").good)
    assert good is not None and good.serial == json.loads(world.state_files()[0].read_text())["serial"]


async def test_a_readme_changes_no_root_and_a_comment_is_recorded_without_an_apply(world: World) -> None:
    before = world.state_files()[0].read_bytes()
    run = await world.deploy("readme", {"README.md": "hello\n"})
    assert "nothing to do" in run.message and world.subflows(run.id) == []
    commented = {name: f"# a comment\n{text}" for name, text in world.root().items()}
    run = await world.deploy("a comment", dict(commented))
    assert run.state == "COMPLETED" and "terraform/dns recorded" in run.message, run.message
    assert world.state_files()[0].read_bytes() == before


async def test_a_plan_only_run_shows_one_plan_of_all_kinds_and_does_nothing(world: World) -> None:
    world.commit("both", world.root("two") | {"modules/common.nix": world.common("plan only")})
    world.git("push", "toto", "main:refs/heads/other")
    ended = await world.ended(world.request("reconcile/reconcile", commit="other", plan_only=True))
    assert ended.message.endswith("plan only: gate, web1, terraform/dns would change")
    assert world.value() == "one"
    limited = world.request("reconcile/reconcile", commit="other", plan_only=True, only=["terraform"])
    assert (await world.ended(limited)).message.endswith("plan only: terraform/dns would change")
    world.git("reset", "--quiet", "--hard", "HEAD~1")


async def test_a_plan_that_destroys_what_it_must_not_stops_before_anything_is_touched(world: World) -> None:
    keep: dict[str, str | None] = {"toto.toml": SETTINGS + '[terraform]\nprevent = ["destroy"]\n'}
    run = await world.deploy("replace it", world.root("two", trigger="u") | keep)
    assert run.state == "FAILED"
    assert "terraform/dns: rehearsal failed" in run.message and "terraform_data.record" in run.message
    assert "nothing was touched" in run.message
    assert world.value() == "one"


async def test_an_approval_is_waited_for_and_a_no_touches_nothing(world: World) -> None:
    ask: dict[str, str | None] = {"toto.toml": SETTINGS + '[terraform]\napprove = "always"\napprove_timeout = 900\n'}
    world.commit("with an approval", world.root("two") | ask)
    for word, state in ((False, "FAILED"), (True, "COMPLETED")):
        run = world.push() if word is False else world.request("reconcile/reconcile")
        await world.until(run, {"PAUSED"})
        assert world.value() == "one", "nothing is touched while it waits"
        verb = "approve" if word else "reject"
        subprocess.run(
            [sys.executable, "-m", "toto.cli", verb, run, "--repos", world.repo.parent],
            env=world.environment,
            check=True,
        )
        ended = await world.ended(run)
        assert ended.state == state, ended.message
    assert world.value() == "two"
    await world.log_line(run, "(on toto itself)")
    await world.deploy("without", {"toto.toml": SETTINGS})


async def test_a_toto_killed_in_the_middle_of_an_apply_is_settled_by_the_next_start(world: World) -> None:
    world.waits()
    world.commit("a slow apply", world.root("three", trigger="v"))
    world.push()
    await world.begun()
    world.kill()
    world.quick()
    (world.control / "go").touch()
    intent = world.of("terraform", "dns").intent
    assert intent is not None and "terraform_data.record" in RootBefore.of(intent.before).resources
    await world.start_server()
    async with asyncio.timeout(PATIENCE):
        while world.of("terraform", "dns").intent is not None:
            await asyncio.sleep(0.5)
    assert world.value() == "two"
    run = await world.deploy("once more", {})
    assert run.state == "COMPLETED", world.logs(run.id)
    assert world.value() == "three"


async def test_a_new_release_is_installed_last_and_its_own_tests_are_run(world: World) -> None:
    run = await world.deploy("a release", world.release("one"))
    assert run.state == "COMPLETED", world.logs(run.id)
    assert "helm/page deployed" in run.message
    assert await world.page() == "one"
    await world.log_line(run.id, "ok page-test")
    assert POISON not in world.logs(run.id)
    good = DeployedRelease.of(world.of("helm", "page").good)
    assert good is not None and good.revision == 1


async def test_a_release_whose_own_test_fails_puts_everything_back_in_reverse(world: World) -> None:
    before = await world.systems()
    world.cluster.fates["page/page-test"] = "failed"
    run = await world.deploy(
        "everything changes, and the release fails its test",
        {"modules/common.nix": world.common("to be reverted"), **world.root("four"), **world.release("two")},
    )
    world.cluster.fates.clear()
    assert run.state == "FAILED"
    assert "helm/page: roll-out failed: the chart's tests failed: page-test" in run.message, run.message
    assert world.reverted_in_order() == ["helm/page", "terraform/dns", "web1", "gate"]
    drawn = await world.drawn(run.id)
    assert {name: drawn[name] for name in RED} == RED
    assert await world.systems() == before
    assert all(world.runs_its_good(name, system) for name, system in before.items())
    assert world.value() == "three"
    assert await world.page() == "one"
    good = DeployedRelease.of(world.of("helm", "page").good)
    assert good is not None and good.revision == 3, "rolled back, as a new revision"


@pytest.mark.exhaustive
async def test_a_rollback_that_fails_is_reported_and_stops_no_other(world: World) -> None:
    world.cluster.fates["page/page-"] = "stuck"
    run = await world.deploy(
        "the release never gets ready, and not on the way back either",
        {
            "modules/common.nix": (EXAMPLE / "modules/common.nix").read_text(),
            **world.root("five"),
            **world.release("three"),
        },
    )
    assert run.state == "FAILED"
    assert "helm/page COULD NOT BE REVERTED" in run.message, run.message
    assert world.value() == "three", "terraform went back all the same"
    assert world.of("helm", "page").intent is not None
    world.cluster.fates.clear()
    again = await world.deploy("the pods are well again", {})
    assert again.state == "COMPLETED", world.logs(again.id)
    assert await world.page() == "three" and world.value() == "five"
    assert world.of("helm", "page").intent is None


@pytest.mark.exhaustive
async def test_a_toto_killed_in_the_middle_of_an_upgrade_is_settled_by_the_next_start(world: World) -> None:
    world.cluster.fates["page/page-"] = "stuck"
    world.commit("killed while helm waits", world.release("four"))
    world.push()
    async with asyncio.timeout(PATIENCE):
        while await world.page() != "four":
            await asyncio.sleep(0.5)
    world.kill()
    world.cluster.fates.clear()
    assert world.of("helm", "page").intent is not None
    await world.start_server()
    async with asyncio.timeout(PATIENCE):
        while world.of("helm", "page").intent is not None:
            await asyncio.sleep(0.5)
    assert await world.page() == "three"
    run = await world.deploy("once more", {})
    assert run.state == "COMPLETED", world.logs(run.id)
    assert await world.page() == "four"


async def test_what_was_changed_outside_is_reported_and_undone_when_asked_for(world: World) -> None:
    run = await world.deploy("what it is to be", world.release("four"))
    assert run.state == "COMPLETED", world.logs(run.id)
    calm = await world.ended(world.request("drift/drift"))
    assert calm.state == "COMPLETED", calm.message
    await world.cluster.patch("/api/v1/namespaces/page/configmaps/page", {"data": {"text": "changed by hand"}})
    drift = await world.ended(world.request("drift/drift"))
    assert drift.state == "FAILED" and "helm/page: drift check failed: it was changed outside" in drift.message
    assert "ConfigMap" in world.artifacts(drift.id)["report-infra"]
    assert await world.page() == "changed by hand", "drift is reported and not touched"
    forced = await world.ended(world.request("reconcile/reconcile", force=True, only=["helm/page"]))
    assert forced.state == "COMPLETED", forced.message
    assert await world.page() == "four"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("plan", r"\| host/web1 \| deploy \|"),
        ("deploy", r"COMPLETED - \w+: web1 deployed"),
        ("history", r"\d+ events of 4 targets"),
    ],
)
async def test_a_notebook_runs_from_its_first_cell_to_its_last(world: World, name: str, says: str) -> None:
    """With TOTO_KEEP_NOTEBOOKS=notebooks what this fleet put out takes the place of what is in the checkout."""
    if name == "plan":
        world.commit("something to plan", {"modules/common.nix": world.common("planned"), **world.root("six")})
        world.git("push", "--push-option=skip", "toto", "main")
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    metadata = dict(notebook.metadata)
    env = world.environment | {
        "PREFECT_PROFILES_PATH": str(world.home / PROFILES),
        "PREFECT_HOME": str(world.home),
        "PREFECT_UI_URL": world.url,
    }
    await NotebookClient(notebook, timeout=300, kernel_name="python3", record_timing=False).async_execute(env=env)
    notebook.metadata = nbformat.from_dict(metadata)
    if kept := os.environ.get("TOTO_KEEP_NOTEBOOKS"):
        nbformat.write(notebook, Path(kept) / f"{name}.ipynb")
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "\n".join(output.get("text") or output.get("data", {}).get("text/markdown", "") for output in outputs)
    assert re.search(says, text), text
    assert any("image/png" in output.get("data", {}) for output in outputs) == (name != "plan")


async def test_no_secret_is_in_anything_that_toto_wrote(world: World) -> None:
    """The poison is where it belongs (the state, the cluster) and nowhere else."""
    await world.stop_server()
    assert POISON in world.state_files()[0].read_text()
    found = subprocess.run(
        [
            "grep",
            "--recursive",
            "--files-with-matches",
            "--text",
            POISON,
            world.state,
            world.home,
            world.repo,
            world.directory / "toto.log",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    # Where it belongs: terraform's state, and the exported values.yaml, which the operator has committed as it is.
    allowed = ("terraform.tfstate", "terraform.tfstate.backup", "/tree/helm/page/values.yaml")
    assert [line for line in found.stdout.splitlines() if not line.endswith(allowed)] == []
