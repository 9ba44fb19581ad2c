"""What toto does with a release on a cluster: inspect, render, upgrade, test, roll back, repair.

`toto.helm.release` reads what a commit wants, `toto.helm.diff` compares manifests. What a method returns or raises
contains nothing of a Secret, and no value whose key sounds like one; only `render` returns everything.

Pushed charts never meet the cluster: helm renders them in a cell. What it rendered becomes the text of a chart of
toto's own, and that one is compared, checked by the cluster, and deployed.
"""

import contextlib
import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import yaml

from toto.base import files, paths, process
from toto.base.errors import InputError, TotoError
from toto.cell import folders, tool
from toto.cell.cell import Cell
from toto.helm import diff as manifests
from toto.helm.command import (
    IN_CELL,
    ChartUnavailable,
    ClusterUnreachable,
    Command,
    HelmError,
    ReleaseBusy,
    ReleaseFailed,
    ReleaseMissing,
    RenderFailed,
    environment,
)
from toto.helm.diff import Change, Difference, Key, Resource
from toto.helm.release import Release, sensitive

PATIENCE: Final = 30.0  # seconds that reading from the cluster may take
LARGEST: Final = 64_000_000  # bytes of a remote chart

# Places in a cell.
_REPO: Final = Path("/repo")
_CHART: Final = Path("/chart.tgz")
_PULLED: Final = Path("/pulled")
_LOGINS: Final = Path("/logins")

_INSTALL: Final = ("--install", "--reset-values")  # without it helm may reuse the values of the revision before
_ROLLED_BACK: Final = "Rollback to "
_RUN: Final = "toto/run"  # the annotation of a chart of toto's own with the id of the run that deploys it
_HOOK: Final = "helm.sh/hook"
_POLICY: Final = "helm.sh/resource-policy"
_PENDING: Final = ("pending-install", "pending-upgrade", "pending-rollback", "uninstalling")
_WORKLOADS: Final = ("Deployment", "StatefulSet", "DaemonSet", "Job", "ReplicaSet")

# One field a line; text that may contain anything is in hexadecimal. Only helm 4 knows APPLIES.
_STORED: Final = (
    "{{with .Release}}{{.Version}}\n{{.Info.Status}}\n{{.Chart.Metadata.Name}}-{{.Chart.Metadata.Version}}\n"
    '{{printf "%x" .Info.Description}}\n{{.Info.LastDeployed.Unix}}\nAPPLIES\n'
    f'{{{{with .Chart.Metadata.Annotations}}}}{{{{printf "%x" (index . "{_RUN}")}}}}{{{{end}}}}\n'
    '{{printf "%x" .Manifest}}'
    "{{range .Hooks}}\n{{.Name}}\t{{.Events}}\t{{.LastRun.StartedAt.UnixNano}}\t{{.LastRun.Phase}}\t"
    '{{printf "%x" .Manifest}}{{end}}{{end}}'
)

# What `helm template` prints before the templates: each file of `crds/`, under its name.
_CRDS: Final = re.compile(
    r"(?:---\n# Source: [^\n/]+/(?:charts/[^\n/]+/)*crds/.*?\n(?=---\n# Source: |\Z))+", re.DOTALL
)

# A chart that tells what the cluster can do, for charts that are rendered without it.
_CAPABILITIES: Final = {
    "Chart.yaml": "apiVersion: v2\nname: capabilities\nversion: 0.0.0\n",
    "templates/capabilities.yaml": """\
apiVersion: v1
kind: ConfigMap
metadata: {name: capabilities}
data:
  kube: {{ .Capabilities.KubeVersion.Version | quote }}
  apis: {{ toJson .Capabilities.APIVersions | quote }}
""",
}

# A chart that reads live resources with helm's own client, which understands everything in a kubeconfig.
_LIVE: Final = {
    "Chart.yaml": "apiVersion: v2\nname: live\nversion: 0.0.0\n",
    "templates/live.yaml": """\
{{- $found := list }}
{{- range .Values.wanted }}{{ $found = append $found (lookup .apiVersion .kind .namespace .name) }}{{ end -}}
apiVersion: v1
kind: ConfigMap
metadata: {name: live}
data: {live: {{ toJson $found | quote }}}
""",
}


@dataclass(frozen=True)
class Revision:
    """One revision of a release. `status` and `description` are helm's own; `chart` looks like `web-1.2.3`."""

    number: int
    status: str
    chart: str
    description: str
    at: datetime


@dataclass(frozen=True)
class Deployed(Revision):
    """A revision of a release, as helm stores it, by default the newest.

    `digest` is the SHA-256 of its manifests, `tests` are its chart's, by name. `run` is the id of the run of toto's
    that made it, or made what it was rolled back to; "" for what toto did not make, or an older version did.
    """

    digest: str
    tests: tuple[str, ...] = ()
    run: str = ""

    @property
    def pending(self) -> bool:
        """Whether a helm is working on it, or was killed while it did."""
        return self.status in _PENDING

    def made_by(self, run: str) -> bool:
        """Whether a run of toto's made it, or it is a rollback, which brings nothing new."""
        rolls_back = self.status == "pending-rollback" or self.description.startswith(("Rollback to ", 'Rollback "'))
        return rolls_back or (run != "" and self.run == run)


@dataclass(frozen=True)
class Tested:
    """The result of one test of a chart. `said` is the test's log and helm's output, when it failed."""

    name: str
    passed: bool
    said: str = ""


@dataclass(frozen=True)
class _Hook:
    name: str
    events: str
    started: str
    phase: str
    manifest: str

    @property
    def is_test(self) -> bool:
        return not {"test", "test-success"}.isdisjoint(self.events.strip("[]").split())


@dataclass(frozen=True)
class _Stored:
    """What helm stores of the newest revision. It contains secrets and must not leave this module."""

    deployed: Deployed
    applies: str
    resources: dict[Key, Resource]
    hooks: tuple[_Hook, ...]

    @property
    def everything(self) -> dict[Key, Resource]:
        return self.resources | manifests.parse("\n---\n".join(hook.manifest for hook in self.hooks))

    @property
    def secrets(self) -> list[str]:
        return manifests.secrets(self.everything.values())


@dataclass
class Helm:
    """helm and one cluster. With `kubeconfig` None it is the cluster that the environment names.

    `state` is the folder for charts and helm's caches (None: in toto's state directory). `scratch` is the run's own
    folder, which holds what a release renders to, Secrets included, while helm works on it (None: `state`). `patience`
    is how many seconds reading from the cluster may take. Every method that connects to the cluster raises
    `ClusterUnreachable`.
    """

    binary: str = "helm"
    kubeconfig: Path | None = None
    state: Path | None = None
    patience: float = PATIENCE
    scratch: Path | None = None
    _version: tuple[int, int] = field(default=(0, 0), init=False)
    _able: tuple[str, ...] | None = field(default=None, init=False)

    async def major(self) -> int:
        """helm's major version, 3 or 4. Raises `HelmError` when helm is older than 3.13, `CommandNotFound`."""
        if self._version == (0, 0):
            version = str(await self._command(None).version()).strip()
            found = re.match(r"v(\d+)\.(\d+)\.", version)
            if found is None or (int(found[1]), int(found[2])) < (3, 13):
                raise HelmError(f"{self.binary} is of version {version}", hint="toto needs helm 3.13 or newer")
            self._version = int(found[1]), int(found[2])
        return self._version[0]

    async def check_dependencies(self, release: Release, tree: Path) -> None:
        """Raise `RenderFailed` when what the chart depends on is not in its `charts/`, or in a different version.

        (Helm renders a chart with a dependency of a wrong version, and says nothing.)
        """
        if release.remote:
            return
        command, place = await self._in_cell(release, tree)
        rest, wrong = [(release.chart, place)], list[str]()
        while rest and not wrong:
            chart, place = rest.pop()
            folder = tree / chart
            if folder.is_dir() and not any(_depends(folder / name) for name in ("Chart.yaml", "requirements.yaml")):
                continue
            listed = (await command.run(["dependency", "list", place, "--max-col-width", 0])).decode()
            for line in listed.splitlines()[1:]:  # the columns are name, version, repository, status
                cells = [each.strip() for each in line.split("\t")]
                if len(cells) == 4 and cells[3] not in ("ok", "unpacked"):
                    wrong.append(f"{cells[0]} {cells[1]} ({cells[3]})")
            rest += [(str(each.relative_to(tree)), _REPO / each.relative_to(tree)) for each in _unpacked(folder)]
        if wrong:
            raise RenderFailed(
                f"{chart}/charts/ does not have what Chart.yaml wants: {', '.join(wrong)}",
                target=release.label,
                hint=f"run `helm dependency update {chart}`, and commit {chart}/charts/ and Chart.lock",
            )

    async def current(self, release: Release) -> Deployed | None:
        """The newest revision; None when the release is not installed."""
        stored = await self._stored(release)
        return None if stored is None else stored.deployed

    async def newest(self, release: Release) -> Deployed | None:
        """The same, also when it was uninstalled and its history was kept; None when helm has nothing of that name."""
        stored = await self._stored(release, also_uninstalled=True)
        return None if stored is None else stored.deployed

    async def since(self, release: Release, revision: int) -> list[Deployed]:
        """The revisions after `revision` that helm still keeps, oldest first."""
        found = []
        for each in await self.history(release):
            if each.number > revision and (stored := await self._stored(release, each.number, also_uninstalled=True)):
                found.append(stored.deployed)
        return found

    async def history(self, release: Release) -> list[Revision]:
        """The revisions that helm still keeps, oldest first."""
        stored = await self._stored(release)
        if stored is None:
            return []
        return [
            Revision(
                each["revision"],
                each["status"],
                each["chart"],
                process.mask(each["description"], stored.secrets),
                datetime.fromisoformat(each["updated"]),
            )
            for each in await self._command(release).history(release.name, namespace=release.namespace)
        ]

    async def last_whole(self, release: Release) -> int:
        """The newest revision that was deployed without a failure, of those that helm still keeps; 0 for none.

        Helm later marks a failed revision as superseded; only its description still says that it failed.
        """
        return max(
            (
                each.number
                for each in await self.history(release)
                if each.status == "deployed" or (each.status == "superseded" and " failed: " not in each.description)
            ),
            default=0,
        )

    async def lint(self, release: Release, tree: Path) -> tuple[str, ...]:
        """The warnings of `helm lint`. Raises `RenderFailed`, `ChartUnavailable`."""
        command, chart = await self._in_cell(release, tree)
        done = await command.attempt(["lint", chart, "--quiet", *_values(release)])
        said = _by_names_of_the_repo(command.clean(f"{done.stdout}\n{done.stderr}"), release, tree)
        if done.status != 0:
            raise RenderFailed(said, target=release.label, hint=f"fix {release.chart} or its values, and push again")
        return tuple(line for line in said.splitlines() if line.startswith("[WARNING]"))

    async def render(self, release: Release, tree: Path) -> str:
        """Everything that the chart renders to, with hooks, tests and Secrets. Do not show or store it.

        It is rendered with the cluster's capabilities, and the cluster checks it. When the cluster does not answer,
        helm's default capabilities are used. Raises `RenderFailed`, `ChartUnavailable`.
        """
        stored = None
        with contextlib.suppress(ClusterUnreachable):
            stored = await self._stored(release)
        async with self._checked(release, tree, stored) as (_, rendered):
            return rendered

    async def render_alone(self, release: Release, tree: Path) -> str:
        """The same without asking the cluster anything. Raises `RenderFailed`, `ChartUnavailable`."""
        return (await self._rendered(release, tree, new=True, able=()))[0]

    async def difference(self, release: Release, tree: Path) -> Difference:
        """What an upgrade would change in the release's manifests. Raises what `render` raises."""
        stored = await self._stored(release)
        async with self._checked(release, tree, stored) as (chart, rendered):
            found = manifests.compare(stored.everything if stored else {}, manifests.parse(rendered))
            crds = await self._differing_crds(release, chart)
            return replace(
                found,
                added=(*(() if stored else crds.removed), *found.added),
                crds=_left_by_helm(crds, stored),
                applies=release.crds == "apply",
            )

    async def drift(self, release: Release) -> Difference:
        """Where the live resources differ from the release's manifests; `removed` are those that do not exist."""
        stored = await self._stored(release)
        if stored is None:
            return Difference(removed=(f"the release {release.name}",))
        live = zip(stored.resources, await self._live(release, stored.resources.values()), strict=True)
        return manifests.drift(stored.resources, {key: found for key, found in live if found})

    async def outside_change(self, release: Release, recorded: int, digest: str = "") -> str | None:
        """What somebody did to the release without toto since toto left it at revision `recorded` (0: none), in words.

        None means nothing. `digest` is the digest of that revision; it tells apart a release that was installed anew.
        """
        now = await self.current(release)
        if now is None:
            return f"it was deleted outside toto, which had left revision {recorded}" if recorded else None
        if not recorded:
            what = now.chart if now.status == "deployed" else f"{now.chart}, {now.status}"
            return f"it is there already, at revision {now.number} ({what}), and not by toto"
        if now.number < recorded or (now.number == recorded and digest not in ("", now.digest)):
            return (
                f"it was deleted and installed anew outside toto: it is at revision {now.number} ({now.chart}), "
                f"toto had left revision {recorded}"
            )
        since = [_described(each) for each in await self.history(release) if each.number > recorded]
        if since:
            return f"outside toto it was {', then '.join(since)}; toto had left revision {recorded}"
        return None if now.status == "deployed" else f"it is {now.status} at revision {recorded}, and not by toto"

    async def upgrade(self, release: Release, tree: Path, *, description: str = "toto", run: str = "") -> Deployed:
        """Install or upgrade, wait, and return the new revision; `description` shows in `helm history`.

        `run` is the id of the run that does it: by that, a revert finds out later what is its own.

        It does not revert on a failure: call `rollback`, or `uninstall` when nothing was installed before.
        Raises `ReleaseFailed`; before anything is touched `RenderFailed`, `ChartUnavailable`, `ReleaseBusy`.
        """
        stored = await self._stored(release)
        try:
            async with self._checked(release, tree, stored, run) as (chart, rendered):
                secrets = [*manifests.secrets(manifests.parse(rendered).values()), *sensitive(release, tree)]
                if release.crds == "apply" and _left_by_helm(await self._differing_crds(release, chart), stored):
                    await self._apply_crds(release, chart)
                await self._changing(release, secrets).run(
                    [
                        "upgrade",
                        release.name,
                        chart,
                        "--namespace",
                        release.namespace,
                        *_INSTALL,
                        *_waiting(release),
                        *(["--create-namespace"] if release.create_namespace else []),
                        "--description",
                        description,
                        *_forced(stored),
                    ]
                )
        except ReleaseFailed as error:
            pods: list[str] = []
            with contextlib.suppress(TotoError):
                pods = await self._not_ready(release)
            raise ReleaseFailed(
                "\n".join([error.message, *pods]),
                target=release.label,
                hint=f"check the pods, or `{release.by_hand('history')}`",
            ) from None
        return await self._now(release)

    async def rollback(self, release: Release, revision: int, *, wait: bool = True) -> Deployed:
        """Roll back to a revision and return the new revision that this makes. Raises `ReleaseFailed`.

        Without `wait` it need not become ready: to a revision that had failed.
        """
        stored = await self._stored(release)
        if stored is None:
            raise ReleaseMissing(
                f"cannot be rolled back to revision {revision}: it is not installed any more",
                target=release.label,
                hint="push again: that installs it",
            )
        waiting = _waiting(release if wait else release.model_copy(update={"wait": False}))
        await self._changing(release, stored.secrets).run(
            ["rollback", release.name, revision, "--namespace", release.namespace, *waiting, *_forced(stored)]
        )
        return await self._now(release)

    async def uninstall(self, release: Release, *, keep_history: bool = False) -> bool:
        """Remove the release, its history unless that is kept, but not the namespace; False when it was not installed.

        Raises `ReleaseFailed`.
        """
        stored = await self._stored(release)
        if stored is not None:
            await self._changing(release, stored.secrets).run(
                [
                    *(
                        "uninstall",
                        release.name,
                        "--namespace",
                        release.namespace,
                        "--timeout",
                        f"{release.timeout:g}s",
                    ),
                    *(["--wait"] if release.wait else []),
                    *(["--keep-history"] if keep_history else []),
                ]
            )
        return stored is not None

    async def kept(self, release: Release, to: int = 0) -> tuple[str, ...]:
        """What stays when the release is uninstalled, or rolled back to revision `to`: the chart has helm keep it."""
        stored = await self._stored(release)
        older = await self._stored(release, to) if to else None
        there = older.resources if older else {}
        return tuple(
            str(key)
            for key, each in (stored.resources if stored else {}).items()
            if key not in there and (each["metadata"].get("annotations") or {}).get(_POLICY) == "keep"
        )

    async def test(self, release: Release) -> tuple[Tested, ...]:
        """Run the chart's own tests and return their results; none when it has none or release.yaml says `test: false`.

        A test that fails is a result and raises nothing.
        """
        before = await self._stored(release)
        if before is None or not before.deployed.tests or not release.test:
            return ()
        command = self._changing(release, before.secrets)
        done = await command.attempt(
            ["test", release.name, "--namespace", release.namespace, "--logs", "--timeout", f"{release.timeout:g}s"]
        )
        after = await self._stored(release)
        # Its exit status is no verdict: helm also fails when it cannot read a test's log.
        said = command.clean(f"{done.stdout.partition('POD LOGS: ')[2]}\n{done.stderr}")
        began = {hook.name: hook.started for hook in before.hooks}
        passed = {
            hook.name
            for hook in (after.hooks if after else ())
            if hook.phase == "Succeeded" and hook.started != began.get(hook.name)
        }
        return tuple(Tested(name, name in passed, "" if name in passed else said) for name in before.deployed.tests)

    async def repair(self, release: Release, good: int = 0, *, patience: float | None = None) -> str | None:
        """Repair a release that a killed helm left pending; return what was done, in words, or None for nothing.

        It is rolled back to revision `good`, else to the newest whole revision.
        Raises `ReleaseBusy` when it has been pending for less than `patience` seconds (None: the release's timeout),
        because that helm may be alive, and when no revision is whole: toto did not make it, so it removes nothing of
        it. Otherwise it raises what `rollback` raises.
        """
        now = await self.current(release)
        if now is None or not now.pending:
            return None
        age = (datetime.now(UTC) - now.at).total_seconds()
        if age < (release.timeout if patience is None else patience):
            raise ReleaseBusy(
                f"it has been {now.status} for {age:.0f} s: that helm may be alive",
                target=release.label,
                hint="wait for it to end; if it was killed, a later run repairs what it left",
            )
        left = f"a helm that was killed had left it {now.status} at revision {now.number}"
        kept = {each.number for each in await self.history(release)}
        to = good if good in kept else await self.last_whole(release)
        if not to or now.status == "uninstalling":
            raise ReleaseBusy(
                f"{left}, and {'no revision of it was ever whole' if not to else 'what is left of it is not whole'}: "
                "toto removes nothing that it cannot prove to have made",
                target=release.label,
                hint=f"`{release.by_hand('uninstall')}`, and push again",
            )
        back = await self.rollback(release, to)
        return f"{left}; it was rolled back to revision {to}, as revision {back.number}"

    @property
    def _state(self) -> Path:
        return self.state or paths.state_home() / "helm"

    def _command(
        self,
        release: Release | None,
        *,
        timeout: float = 0,
        failure: type[TotoError] = HelmError,
        secrets: Sequence[str] = (),
    ) -> Command:
        label = None if release is None else release.label
        if self.kubeconfig is not None and not self.kubeconfig.is_file():
            raise ClusterUnreachable(f"there is no kubeconfig {self.kubeconfig}", target=label)
        return Command(
            self.binary,
            environment(self._state, self.kubeconfig),
            timeout=timeout or self.patience,
            failure=failure,
            target=label,
            secrets=secrets,
        )

    def _changing(self, release: Release, secrets: Sequence[str]) -> Command:
        # The release's timeout limits each of helm's waits; this one limits a helm that hangs nevertheless.
        return self._command(
            release, timeout=4 * release.timeout + self.patience, failure=ReleaseFailed, secrets=secrets
        )

    async def _now(self, release: Release) -> Deployed:
        if (now := await self.current(release)) is None:
            raise ReleaseMissing("somebody deleted it right after it was deployed", target=release.label)
        return now

    async def _stored(self, release: Release, revision: int = 0, *, also_uninstalled: bool = False) -> _Stored | None:
        """What helm stores of a revision, the newest when it is 0; None when there is none."""
        template = _STORED.replace("APPLIES", "{{.ApplyMethod}}" if await self.major() > 3 else "")
        try:
            output = await self._command(release).run(
                [
                    *("get", "all", release.name, "--namespace", release.namespace, "--template", template),
                    *(["--revision", revision] if revision else []),
                ]
            )
        except ReleaseMissing:
            return None
        number, status, chart, description, at, applies, run, manifest, *rest = output.decode().split("\n")
        if status == "uninstalled" and not also_uninstalled:  # and its history was kept
            return None
        hooks = tuple(
            _Hook(name, events, started, phase, _unhex(text))
            for name, events, started, phase, text in (line.split("\t") for line in rest if line)
        )
        deployed = Deployed(
            int(number),
            status,
            chart,
            _unhex(description),
            datetime.fromtimestamp(int(at), UTC),
            digest=hashlib.sha256(manifest.encode()).hexdigest(),
            tests=tuple(hook.name for hook in hooks if hook.is_test),
            run=_unhex(run),
        )
        stored = _Stored(deployed, applies, manifests.parse(_unhex(manifest)), hooks)
        clean = process.mask(deployed.description, stored.secrets)
        return replace(stored, deployed=replace(deployed, description=clean))

    @contextlib.asynccontextmanager
    async def _checked(
        self, release: Release, tree: Path, stored: _Stored | None, run: str = ""
    ) -> AsyncIterator[tuple[Path, str]]:
        """A chart of toto's own that holds what the release's chart renders to, and that text.

        The cluster has checked it, if it answers. Raises `RenderFailed`, `ChartUnavailable`.
        """
        able: Sequence[str] = ()
        with contextlib.suppress(ClusterUnreachable):
            able = await self._capabilities(release)
        rendered, crds = await self._rendered(release, tree, new=stored is None, able=able)
        with self._own_chart("rendered") as chart:
            await self._wrap(release, tree, rendered, crds, chart, run)
            if able:
                secrets = [*(stored.secrets if stored else ()), *sensitive(release, tree)]
                await self._check(release, chart, rendered, stored, secrets)
            yield chart, rendered

    async def _capabilities(self, release: Release) -> Sequence[str]:
        """The words that tell helm what the cluster can do. Raises `ClusterUnreachable`."""
        if self._able is None:
            with self._own_chart("capabilities", _CAPABILITIES) as chart:
                output = await self._command(release, timeout=2 * self.patience).run(
                    [
                        *("upgrade", "toto-capabilities", chart, "--namespace", release.namespace),
                        *_INSTALL,
                        *("--dry-run=server", "--output", "json"),
                    ]
                )
            (said,) = manifests.parse(json.loads(output)["manifest"]).values()
            apis = json.loads(said["data"]["apis"])
            self._able = (
                *("--kube-version", said["data"]["kube"]),
                *(word for each in apis for word in ("--api-versions", each)),
            )
        return self._able

    async def _rendered(self, release: Release, tree: Path, *, new: bool, able: Sequence[str]) -> tuple[str, str]:
        """What the release's chart renders to, in a cell, and what is in its `crds/`."""
        command, chart = await self._in_cell(release, tree)
        words = ["template", release.name, chart, "--namespace", release.namespace, "--include-crds"]
        try:
            output = await command.run([*words, *_values(release), *able, *([] if new else ["--is-upgrade"])])
        except RenderFailed as error:
            raise RenderFailed(
                _by_names_of_the_repo(error.message, release, tree),
                target=error.target,
                hint=f"fix {release.chart} or its values, and push again",
            ) from None
        text = output.decode()
        crds = _CRDS.match(text)
        return (text[crds.end() :], crds[0]) if crds else (text, "")

    async def _check(
        self, release: Release, chart: Path, rendered: str, stored: _Stored | None, secrets: Sequence[str]
    ) -> None:
        """Have the cluster check a chart of toto's own, and look whether what it would create is there already.

        It cannot check resources of kinds that the chart itself will bring. Raises `RenderFailed`.
        """
        wanted, coming = manifests.parse(rendered), await self._kinds_to_come(release, chart, stored)
        checked = {key: each for key, each in wanted.items() if (key.group, key.kind) not in coming}
        command = self._command(release, timeout=2 * self.patience, failure=RenderFailed, secrets=secrets)
        texts = {"Chart.yaml": (chart / "Chart.yaml").read_text(), "templates/all.yaml": _template(checked.values())}
        with self._own_chart("checked", texts) as part:
            words = [release.name, chart if checked == wanted else part, "--namespace", release.namespace]
            try:
                with contextlib.suppress(ClusterUnreachable):
                    try:
                        await command.run(["upgrade", *words, *_INSTALL, "--dry-run=server", "--output", "json"])
                    except ReleaseBusy:  # then helm does not even simulate an upgrade
                        validate = ["--validate"] if await self.major() == 3 else []
                        await command.run(["template", *words, "--dry-run=server", "--is-upgrade", *validate])
                    await self._check_new(release, checked, stored)
            except RenderFailed as error:
                raise RenderFailed(
                    error.message, target=error.target, hint=error.hint or _advice(error.message, release, chart)
                ) from None

    async def _check_new(self, release: Release, wanted: Mapping[Key, Resource], stored: _Stored | None) -> None:
        """Raise `RenderFailed` for resources that the release does not have, and that are there all the same.

        Helm refuses those without its labels. Those with them, which a release of that name has left, it takes over;
        a revert would delete them.
        """
        new = {
            key: each
            for key, each in wanted.items()
            if (stored is None or key not in stored.resources)
            and key.name
            and _HOOK not in (about := each["metadata"].get("annotations") or {})
            and about.get(_POLICY) != "keep"
        }
        there = (
            {key for key, live in zip(new, await self._live(release, new.values()), strict=True) if live}
            if new
            else set()
        )
        for each in (await self.history(release))[::-1] if there and stored else ():
            if older := await self._stored(release, each.number):
                there -= older.resources.keys()
        if there:
            raise RenderFailed(
                f"{', '.join(map(str, sorted(there)))}: there already, with the labels of a release of this name, and "
                "this release does not have it: toto could not give it back",
                target=release.label,
                hint="delete it, or have the chart keep it: the annotation `helm.sh/resource-policy: keep`",
            )

    async def _kinds_to_come(self, release: Release, chart: Path, stored: _Stored | None) -> set[tuple[str, str]]:
        """The kinds (with their group) that are not there yet, and that the chart's `crds/` will bring."""
        if stored is not None and release.crds != "apply":
            return set()
        missing = (await self._differing_crds(release, chart)).removed
        return {
            (str(each["spec"]["group"]), str(each["spec"]["names"]["kind"]))
            for key, each in _crds_of(chart).items()
            if str(key) in missing
        }

    async def _differing_crds(self, release: Release, chart: Path) -> Difference:
        """The CRDs of a chart's `crds/` that the cluster does not have (`removed`), or has different."""
        wanted = _crds_of(chart)
        if not wanted:
            return Difference()
        live = zip(wanted, await self._live(release, wanted.values()), strict=True)
        return manifests.drift(wanted, {key: found for key, found in live if found})

    async def _apply_crds(self, release: Release, chart: Path) -> None:
        """Create and change the CRDs of a chart's `crds/`, by a release that is gone again afterwards.

        Nothing ever deletes them: that would delete all their resources. Raises `ReleaseFailed`.
        """
        if await self.major() == 3 and self._version < (3, 17):
            raise ReleaseFailed("`crds: apply` needs helm 3.17 or newer", target=release.label)
        name = f"toto-crds-{hashlib.sha256(release.name.encode()).hexdigest()[:10]}"
        for each in (wanted := _crds_of(chart)).values():
            each["metadata"]["annotations"] = {**(each["metadata"].get("annotations") or {}), _POLICY: "keep"}
        facts = "apiVersion: v2\nname: toto-crds\nversion: 0.0.0\n"
        command = self._changing(release, ())
        with self._own_chart("crds", {"Chart.yaml": facts, "templates/all.yaml": _template(wanted.values())}) as own:
            await command.run(
                [
                    *("upgrade", name, own, "--namespace", release.namespace, *_INSTALL, "--take-ownership"),
                    *(["--create-namespace"] if release.create_namespace else []),
                    "--wait",
                    *("--timeout", f"{release.timeout:g}s"),
                    *(["--force-conflicts"] if await self.major() > 3 else []),
                ]
            )
        await command.run(["uninstall", name, "--namespace", release.namespace])

    @contextlib.contextmanager
    def _own_chart(self, name: str, texts: Mapping[str, str] | None = None) -> Iterator[Path]:
        """A folder for a chart of toto's own, with its files, while the block lasts."""
        place = self.scratch or self._state
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{name}.", dir=place) as made:
            for file, text in (texts or {}).items():
                Path(made, file).parent.mkdir(exist_ok=True)
                Path(made, file).write_text(text)
            yield Path(made)

    async def _wrap(self, release: Release, tree: Path, rendered: str, crds: str, chart: Path, run: str) -> None:
        """Write a chart that renders to exactly `rendered`, under the name and version of the release's chart."""
        command, place = await self._in_cell(release, tree)
        (said, *_) = manifests.load((await command.run(["show", "chart", place])).decode())
        facts = {key: said[key] for key in ("name", "version", "appVersion") if key in said}
        for name, text in {
            "Chart.yaml": yaml.safe_dump({"apiVersion": "v2", "annotations": {_RUN: run}} | facts),
            "templates/all.yaml": _escaped(rendered),
            **({"crds/all.yaml": crds} if crds.strip() else {}),
        }.items():
            (chart / name).parent.mkdir(exist_ok=True)
            (chart / name).write_text(text)

    async def _in_cell(self, release: Release, tree: Path) -> tuple[Command, Path]:
        """helm in a cell that sees the commit's files, and the path of the release's chart there.

        The cell has no network, no kubeconfig and no cluster. Raises `ChartUnavailable`.
        """
        helm, chart = await tool.tool(self.binary), await self._chart(release, tree)
        cell = Cell(
            read={**helm.read, _REPO: tree, **({_CHART: chart} if release.remote else {})},
            store=helm.store,
            limits=tool.limits(),
        )
        command = Command(
            helm.program,
            IN_CELL,
            timeout=2 * self.patience,
            failure=RenderFailed,
            target=release.label,
            secrets=sensitive(release, tree),
            cell=cell,
        )
        return command, _CHART if release.remote else _REPO / release.chart

    async def _live(self, release: Release, wanted: Iterable[Resource]) -> list[Resource]:
        """The live resource for each of `wanted`, in the same order; {} for one that does not exist."""
        asked = [
            {
                "apiVersion": each["apiVersion"],
                "kind": each["kind"],
                "name": each["metadata"].get("name", ""),
                "namespace": each["metadata"].get("namespace") or release.namespace,
            }
            for each in wanted
        ]
        with self._own_chart("live", _LIVE) as chart:
            output = await self._command(release, timeout=2 * self.patience).run(
                ["template", "live", chart, "--namespace", release.namespace, "--dry-run=server", "--values", "-"],
                json.dumps({"wanted": asked}).encode(),
            )
        (answer,) = manifests.parse(output.decode()).values()
        live: list[Resource] = json.loads(answer["data"]["live"])
        return live

    async def _not_ready(self, release: Release) -> list[str]:
        """The release's pods that are not ready, and why."""
        stored = await self._stored(release)
        workloads = tuple(f"{key.name}-" for key in stored.resources if key.kind in _WORKLOADS) if stored else ()
        (pods,) = await self._live(release, [{"apiVersion": "v1", "kind": "Pod", "metadata": {}}])
        return [
            f"pod {pod['metadata']['name']}: {why}"
            for pod in pods.get("items") or ()
            if pod["metadata"]["name"].startswith(workloads) and (why := _why_not_ready(pod["status"]))
        ]

    async def _chart(self, release: Release, tree: Path) -> Path:
        """The chart's folder or archive. A remote chart is fetched once, so the rehearsed chart is the deployed one."""
        if not release.remote:
            return tree / release.chart
        words = [release.chart, "--version", str(release.version), *(["--repo", release.repo] if release.repo else [])]
        store = self._state / "charts"
        kept = store / hashlib.sha256(json.dumps(words).encode()).hexdigest()[:16]
        if not any(kept.glob("*.tgz")):
            store.mkdir(mode=0o700, parents=True, exist_ok=True)
            archive = await self._pulled(release, words)
            kept.mkdir(exist_ok=True)
            files.write_bytes(kept / "chart.tgz", archive, 0o644)
        return next(kept.glob("*.tgz"))

    async def _pulled(self, release: Release, words: Sequence[str]) -> bytes:
        """A remote chart, fetched in a cell that has the internet and toto's logins to registries."""
        helm = await tool.tool(self.binary)
        async with tool.internet() as network:
            with tempfile.TemporaryDirectory(prefix="new.", dir=self._state / "charts") as fresh:
                pulled, logins = Path(fresh) / "pulled", Path(fresh) / "logins"
                pulled.mkdir()
                if (ours := self._state / "config").is_dir():
                    shutil.copytree(ours, logins)
                logins.mkdir(exist_ok=True)
                folders.own(Path(fresh), network.user)
                cell = Cell(
                    read={**helm.read, _LOGINS: logins},
                    write={_PULLED: pulled},
                    store=helm.store,
                    network=network,
                    limits=tool.limits(),
                    user=network.user,
                )
                await Command(
                    helm.program,
                    {**helm.env, **IN_CELL, "HELM_CONFIG_HOME": str(_LOGINS)},
                    timeout=4 * self.patience,
                    failure=ChartUnavailable,
                    target=release.label,
                    cell=cell,
                ).run(["pull", *words, "--destination", _PULLED])
                for each in pulled.iterdir():
                    if (archive := folders.read_regular(pulled, each.name, most=LARGEST)) is not None:
                        return archive
        raise ChartUnavailable(
            f"helm pulled no chart, or one of more than {LARGEST / 1e6:.0f} MB", target=release.label
        )


def _forced(stored: _Stored | None) -> list[str]:
    """Helm 4 applies on the server, where a field belongs to who changed it last. Force it: the repo wins."""
    return ["--force-conflicts"] if stored is not None and stored.applies == "ssa" else []


def _waiting(release: Release) -> list[str]:
    return ["--timeout", f"{release.timeout:g}s", *(["--wait", "--wait-for-jobs"] if release.wait else [])]


def _values(release: Release) -> list[str]:
    # Helm splits the argument at commas outside of quotes, like a line of CSV.
    files = [str(_REPO / each).replace('"', '""') for each in release.values]
    return [word for each in files for word in ("--values", f'"{each}"')]


def _escaped(text: str) -> str:
    return text.replace("{{", '{{ "{{" }}')


def _template(resources: Iterable[Resource]) -> str:
    return _escaped(yaml.safe_dump_all(resources))


def _crds_of(chart: Path) -> dict[Key, Resource]:
    """The CRDs in a chart of toto's own."""
    file = chart / "crds/all.yaml"
    found = manifests.parse(file.read_text()) if file.exists() else {}
    return {key: each for key, each in found.items() if key.kind == "CustomResourceDefinition"}


def _left_by_helm(crds: Difference, stored: _Stored | None) -> tuple[Change, ...]:
    """Those of the differing CRDs that helm leaves as they are: it only brings new ones, and with a new release."""
    missing = [Change(each, ("it is not in the cluster",)) for each in crds.removed] if stored else []
    return (*missing, *crds.changed)


def _depends(file: Path) -> bool:
    """Whether a Chart.yaml, or the requirements.yaml of older charts, says that the chart depends on others."""
    try:
        said = manifests.load(file.read_text(errors="replace"))
    except (OSError, InputError):  # helm says what is wrong with it
        return False
    return any(isinstance(each, dict) and each.get("dependencies") for each in said)


def _unpacked(chart: Path) -> list[Path]:
    """The charts in a chart's `charts/` that are folders."""
    return sorted(each.parent for each in chart.glob("charts/*/Chart.yaml") if not each.parent.is_symlink())


def _advice(words: str, release: Release, chart: Path) -> str:
    """What to do when the cluster refuses what a chart renders to."""
    if "cannot be imported into the current release" in words:
        return f"it is not this release's: remove it or rename it in {release.chart}, or give it helm's labels yourself"
    if "no matches for kind" in words and release.crds != "apply" and _crds_of(chart):
        return f"fix {release.chart}; if its crds/ has that kind: `crds: apply` in {release.file} brings it"
    return f"fix {release.chart} or its values, and push again"


def _unhex(digits: str) -> str:
    return bytes.fromhex(digits).decode(errors="replace")


def _described(revision: Revision) -> str:
    back = revision.description.startswith(_ROLLED_BACK)
    what = (
        f"rolled back to revision {revision.description.removeprefix(_ROLLED_BACK)}"
        if back
        else f"upgraded to {revision.chart}"
    )
    at = revision.at.astimezone(UTC)
    return f"{what} (revision {revision.number}, {revision.status}, {at:%Y-%m-%d %H:%M} UTC)"


def _by_names_of_the_repo(text: str, release: Release, tree: Path) -> str:
    """Helm's text with paths as they are in the repo."""

    def ours(match: re.Match[str]) -> str:
        path = f"{release.chart}/{match[1]}"
        return path if (tree / path).exists() else match[0]

    return re.sub(r"[\w.-]+/((?:charts/[\w.-]+/)*templates/[\w./-]+)", ours, text.replace(f"{_REPO}/", ""))


def _why_not_ready(status: dict[str, Any]) -> str:
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
