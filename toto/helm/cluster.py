"""What toto does with a release on a cluster: inspect, compare, upgrade, test, roll back, repair.

`toto.helm.release` reads what a commit wants, `toto.helm.render` renders it, `toto.helm.diff` compares manifests and
`toto.helm.stored` reads what helm keeps. What a method returns or raises contains nothing of a Secret, and no value
that the chart's values call a secret; only `render` returns everything.

Pushed charts never meet the cluster: helm renders them in a cell. What it rendered becomes the text of a chart of
toto's own, and that one is compared, checked by the cluster, and deployed.
"""

import contextlib
import hashlib
import json
import logging
import re
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from toto.base import paths
from toto.base.errors import TotoError
from toto.helm import diff, manifest, own, ready
from toto.helm import drift as drifts
from toto.helm import stored as storage
from toto.helm.command import (
    ClusterUnreachable,
    Command,
    HelmError,
    ReleaseBusy,
    ReleaseFailed,
    ReleaseMissing,
    RenderFailed,
    environment,
)
from toto.helm.diff import KEEP, Change, Difference, Field
from toto.helm.manifest import Key, Resource
from toto.helm.release import Release
from toto.helm.render import Renderer
from toto.helm.secret import Masks
from toto.helm.stored import Deployed, Revision, Stored

log = logging.getLogger(__name__)

PATIENCE: Final = 30.0  # seconds that reading from the cluster may take
NOTHING: Final = Masks()
_HOOK: Final = "helm.sh/hook"
_INSTALL: Final = ("--install", "--reset-values")  # without it helm may reuse the values of the revision before
_RESOURCE_SECONDS: Final = 0.25  # that the cluster may take for each resource, besides `patience`
# What helm says of a resource that stayed in the cluster when its release no longer had it. It then writes the
# revision all the same, so that the next rollback finds it.
_NOT_ITS_OWN: Final = re.compile(r'(no|original object) \S+ with the name "[^"]*" (not )?found')

_CUSTOM: Final = re.compile(r'no matches for kind "[^"]*" in version "[\w-]+\.[\w.-]+/')


@dataclass(frozen=True)
class Tested:
    """The result of one test of a chart. `said` is the test's log and helm's output, when it failed."""

    name: str
    passed: bool
    said: str = ""


@dataclass(frozen=True)
class Able:
    """What a cluster can do: its version, and its kinds as helm names them, such as `apps/v1/Deployment`."""

    kube: str
    kinds: frozenset[str]


@dataclass(frozen=True)
class _Checked:
    """A chart of toto's own with what a release renders to, and that text.

    `secrets` are what the release's values call secret, with the words that are none. `unchecked` says what the cluster
    could not check yet, in words.
    """

    chart: Path
    rendered: str
    secrets: tuple[set[str], set[str]]
    unchecked: tuple[str, ...]


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
    _able: Able | None = field(default=None, init=False)

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
        """Raise `RenderFailed` when what the chart depends on is not in its `charts/`, or in a different version."""
        await self._renderer.check_dependencies(release, tree)

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
                stored.masks(each["description"]),
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
        return await self._renderer.lint(release, tree)

    async def render(self, release: Release, tree: Path) -> str:
        """Everything that the chart renders to, with hooks, tests and Secrets. Do not show or store it.

        It is rendered with the cluster's capabilities, and the cluster checks it. When the cluster does not answer,
        helm's default capabilities are used. Raises `RenderFailed`, `ChartUnavailable`.
        """
        stored = None
        with contextlib.suppress(ClusterUnreachable):
            stored = await self._stored(release)
        async with self._checked(release, tree, stored) as checked:
            return checked.rendered

    async def render_alone(self, release: Release, tree: Path) -> str:
        """The same without asking the cluster anything. Raises `RenderFailed`, `ChartUnavailable`."""
        return (await self._renderer.render(release, tree, new=True)).text

    async def difference(
        self, release: Release, tree: Path, *, before: Sequence[Release] = (), masks: Iterable[str] = ()
    ) -> Difference:
        """What an upgrade would change in the release's manifests. Raises what `render` raises.

        `before` are the releases that are rolled out before this one: a kind that one of them brings need not be in the
        cluster yet. `masks` are further texts that are secret, such as those of the values that were deployed.
        """
        stored = await self._stored(release)
        async with self._checked(release, tree, stored, before=before) as checked:
            secrets, public = checked.secrets
            found = diff.compare(stored.text if stored else "", checked.rendered, {*secrets, *masks}, public)
            crds = await self._differing_crds(release, checked.chart)
            return replace(
                found,
                added=(*(() if stored else crds.removed), *found.added),
                crds=_left_by_helm(crds, stored),
                applies=release.crds == "apply",
                unchecked=checked.unchecked,
            )

    async def secrets(self, release: Release, tree: Path) -> set[str]:
        """The texts that the release's values call secret. Raises `ChartUnavailable`."""
        return (await self._renderer.secrets(release, tree))[0]

    async def drift(self, release: Release, *, known: Collection[str] = (), masks: Iterable[str] = ()) -> Difference:
        """Where the live resources differ from the release's manifests; `removed` are those that do not exist.

        `known` is the baseline of when it was deployed: those differences are left out. `masks` are texts that are
        secret besides what Secrets hold.
        """
        return (await self._drift(release, known=known, masks=masks)).difference

    async def baseline(self, release: Release) -> tuple[str, ...]:
        """Marks of where the live resources differ from the manifests already, just after a good roll-out."""
        return (await self._drift(release)).marks

    async def _drift(self, release: Release, *, known: Collection[str] = (), masks: Iterable[str] = ()) -> drifts.Drift:
        stored = await self._stored(release)
        if stored is None:
            return drifts.Drift(Difference(removed=(f"the release {release.name}",)))
        kinds = (await self._capabilities(release)).kinds
        there = {key: each for key, each in stored.resources.items() if own.kind_of(each) in kinds}
        live = await self._live(release, there)
        absent = stored.resources.keys() - there.keys()
        return drifts.drift(stored.resources, live, known=known, absent=absent, masks=masks)

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
        since = [str(each) for each in await self.history(release) if each.number > recorded]
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
            async with self._checked(release, tree, stored, run) as checked:
                resources = manifest.parse(checked.rendered).values()
                masks = diff.masks_of([*resources, *(stored.everything.values() if stored else ())], *checked.secrets)
                chart = checked.chart
                if release.crds == "apply" and _left_by_helm(await self._differing_crds(release, chart), stored):
                    await self._apply_crds(release, chart)
                await self._changing(release, masks).run(
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
            waits: list[str] = []
            with contextlib.suppress(TotoError):
                waits = await self._not_ready(release)
            raise ReleaseFailed(
                "\n".join([error.message, *waits]),
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
        command = self._changing(release, stored.masks)
        words = ["rollback", release.name, revision, "--namespace", release.namespace, *waiting, *_forced(stored)]
        try:
            await command.run(words)
        except ReleaseFailed as error:
            if _NOT_ITS_OWN.search(error.message) is None:
                raise
            log.info("%s: %s; once more", release.label, error.message)
            await command.run(words)
        return await self._now(release)

    async def uninstall(self, release: Release, *, keep_history: bool = False) -> bool:
        """Remove the release, its history unless that is kept, but not the namespace; False when it was not installed.

        Raises `ReleaseFailed`.
        """
        stored = await self._stored(release)
        if stored is not None:
            await self._changing(release, stored.masks).run(
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
            if key not in there and manifest.annotations(each).get(KEEP) == "keep"
        )

    async def test(self, release: Release) -> tuple[Tested, ...]:
        """Run the chart's own tests and return their results; none when it has none or release.yaml says `test: false`.

        A test that fails is a result and raises nothing.
        """
        before = await self._stored(release)
        if before is None or not before.tests or not release.test:
            return ()
        command = self._changing(release, before.masks)
        done = await command.attempt(
            ["test", release.name, "--namespace", release.namespace, "--logs", "--timeout", f"{release.timeout:g}s"]
        )
        after = await self._stored(release)
        # Its exit status is no verdict: helm also fails when it cannot read a test's log.
        passed = before.passed(after)
        said = [command.clean(f"{done.stdout.partition('POD LOGS: ')[2]}\n{done.stderr}")]
        if len(passed) < len(before.tests):
            with contextlib.suppress(TotoError):
                said += await self._not_ready(release, tests=True)
        return tuple(Tested(name, name in passed, "" if name in passed else "\n".join(said)) for name in before.tests)

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

    @property
    def _place(self) -> Path:
        """The folder for charts of toto's own."""
        return self.scratch or self._state

    @property
    def _renderer(self) -> Renderer:
        return Renderer(self.binary, self._state, self.patience)

    def _command(
        self,
        release: Release | None,
        *,
        timeout: float = 0,
        failure: type[TotoError] = HelmError,
        masks: Masks = NOTHING,
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
            secrets=masks.texts,
        )

    def _changing(self, release: Release, masks: Masks) -> Command:
        self._able = None  # a release may bring kinds
        # The release's timeout limits each of helm's waits; this one limits a helm that hangs nevertheless.
        return self._command(release, timeout=4 * release.timeout + self.patience, failure=ReleaseFailed, masks=masks)

    async def _now(self, release: Release) -> Deployed:
        if (now := await self.current(release)) is None:
            raise ReleaseMissing("somebody deleted it right after it was deployed", target=release.label)
        return now

    async def _stored(self, release: Release, revision: int = 0, *, also_uninstalled: bool = False) -> Stored | None:
        """What helm stores of a revision, the newest when it is 0; None when there is none."""
        try:
            output = await self._command(release).run(
                [
                    *("get", "all", release.name, "--namespace", release.namespace),
                    *("--template", storage.template(await self.major())),
                    *(["--revision", revision] if revision else []),
                ]
            )
        except ReleaseMissing:
            return None
        found = storage.read(output.decode())
        if found.deployed.status == "uninstalled" and not also_uninstalled:  # and its history was kept
            return None
        return found

    @contextlib.asynccontextmanager
    async def _checked(
        self, release: Release, tree: Path, stored: Stored | None, run: str = "", *, before: Sequence[Release] = ()
    ) -> AsyncIterator[_Checked]:
        """A chart of toto's own that holds what the release's chart renders to.

        The cluster has checked it, if it answers. Raises `RenderFailed`, `ChartUnavailable`.
        """
        able = None
        with contextlib.suppress(ClusterUnreachable):
            able = await self._capabilities(release)
        facts = (able.kube, able.kinds) if able else ("", ())
        rendered = await self._renderer.render(release, tree, new=stored is None, kube=facts[0], kinds=facts[1])
        secrets = await self._renderer.secrets(release, tree)
        with own.chart(self._place, "rendered") as chart:
            await self._renderer.wrap(release, tree, rendered, chart, run)
            checked = _Checked(chart, rendered.text, secrets, ())
            if able:
                wanted = manifest.parse(rendered.text)
                coming = own.kinds_of(own.crds_of(chart).values()) if not stored or release.crds == "apply" else set()
                missing = {own.kind_of(each) for each in wanted.values()} - able.kinds - coming
                brought = await self._brought(release, tree, missing, before) if missing else {}
                left = coming - able.kinds | brought.keys()
                known = {key: each for key, each in wanted.items() if own.kind_of(each) not in left}
                await self._check(release, checked, known, stored)
                checked = replace(checked, unchecked=_unchecked(wanted, brought))
            yield checked

    async def _brought(
        self, release: Release, tree: Path, missing: Collection[str], before: Sequence[Release]
    ) -> dict[str, str]:
        """Which of the kinds that are missing is brought by a release that is rolled out before this one, and by which.

        One that is named in `after` may bring them when it runs, as operators do.
        """
        brought: dict[str, str] = {}
        for each in before:
            with contextlib.suppress(TotoError):  # its own rehearsal says what is wrong with it
                rendered = await self._renderer.render(each, tree, new=True)
                kinds = own.kinds_of(own.crds(manifest.joined([rendered.text, rendered.crds])).values())
                brought |= {kind: each.name for kind in missing if kind in kinds and kind not in brought}
        named = [each.name for each in before if each.name in release.after]
        return {kind: named[-1] for kind in missing if named} | brought

    async def _capabilities(self, release: Release) -> Able:
        """What the cluster can do. Raises `ClusterUnreachable`."""
        if self._able is None:
            with own.chart(self._place, "capabilities", own.CAPABILITIES) as chart:
                output = await self._command(release, timeout=2 * self.patience).run(
                    [
                        *("upgrade", "toto-capabilities", chart, "--namespace", release.namespace),
                        *_INSTALL,
                        *("--dry-run=server", "--output", "json"),
                    ]
                )
            (said,) = manifest.parse(json.loads(output)["manifest"]).values()
            self._able = Able(said["data"]["kube"], frozenset(json.loads(said["data"]["apis"])))
        return self._able

    async def _check(
        self, release: Release, checked: _Checked, wanted: Mapping[Key, Resource], stored: Stored | None
    ) -> None:
        """Have the cluster check resources of a chart of toto's own, and look whether what is new is there already.

        `wanted` leaves out those of kinds that are not there yet. Raises `RenderFailed`.
        """
        masks = diff.masks_of([*wanted.values(), *(stored.everything.values() if stored else ())], *checked.secrets)
        timeout = 2 * self.patience + _RESOURCE_SECONDS * len(wanted)
        command = self._command(release, timeout=timeout, failure=RenderFailed, masks=masks)
        facts = (checked.chart / "Chart.yaml").read_text()
        whole = len(wanted) == len(manifest.parse(checked.rendered))
        texts = {"Chart.yaml": facts, "templates/all.yaml": own.template(wanted.values())}
        with own.chart(self._place, "checked", texts) as part:
            words = [release.name, checked.chart if whole else part, "--namespace", release.namespace]
            try:
                with contextlib.suppress(ClusterUnreachable):
                    try:
                        await command.run(["upgrade", *words, *_INSTALL, "--dry-run=server", "--output", "json"])
                    except ReleaseBusy:  # then helm does not even simulate an upgrade
                        validate = ["--validate"] if await self.major() == 3 else []
                        await command.run(["template", *words, "--dry-run=server", "--is-upgrade", *validate])
                    await self._check_new(release, wanted, stored)
            except RenderFailed as error:
                raise RenderFailed(
                    error.message,
                    target=error.target,
                    hint=error.hint or _advice(error.message, release, checked.chart),
                ) from None

    async def _check_new(self, release: Release, wanted: Mapping[Key, Resource], stored: Stored | None) -> None:
        """Raise `RenderFailed` for resources that the release does not have, and that are there all the same.

        Helm refuses those without its labels. Those with them, which a release of that name has left, it takes over;
        a revert would delete them.
        """
        new = {
            key: each
            for key, each in wanted.items()
            if (stored is None or key not in stored.resources)
            and key.name
            and _HOOK not in (about := manifest.annotations(each))
            and about.get(KEEP) != "keep"
        }
        there = {*(await self._live(release, new))} if new else set()
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

    async def _differing_crds(self, release: Release, chart: Path) -> Difference:
        """The CRDs of a chart's `crds/` that the cluster does not have (`removed`), or has different."""
        wanted = own.crds_of(chart)
        if not wanted:
            return Difference()
        return drifts.drift(wanted, await self._live(release, wanted), to_come=True).difference

    async def _apply_crds(self, release: Release, chart: Path) -> None:
        """Create and change the CRDs of a chart's `crds/`, by a release that is gone again afterwards.

        Nothing ever deletes them: that would delete all their resources. Raises `ReleaseFailed`.
        """
        if await self.major() == 3 and self._version < (3, 17):
            raise ReleaseFailed("`crds: apply` needs helm 3.17 or newer", target=release.label)
        name = f"toto-crds-{hashlib.sha256(release.name.encode()).hexdigest()[:10]}"
        for each in (wanted := own.crds_of(chart)).values():
            each["metadata"]["annotations"] = {**manifest.annotations(each), KEEP: "keep"}
        facts = "apiVersion: v2\nname: toto-crds\nversion: 0.0.0\n"
        command = self._changing(release, NOTHING)
        texts = {"Chart.yaml": facts, "templates/all.yaml": own.template(wanted.values())}
        with own.chart(self._place, "crds", texts) as made:
            await command.run(
                [
                    *("upgrade", name, made, "--namespace", release.namespace, *_INSTALL, "--take-ownership"),
                    *(["--create-namespace"] if release.create_namespace else []),
                    "--wait",
                    *("--timeout", f"{release.timeout:g}s"),
                    *(["--force-conflicts"] if await self.major() > 3 else []),
                ]
            )
        await command.run(["uninstall", name, "--namespace", release.namespace])

    async def _live(self, release: Release, wanted: Mapping[Key, Resource]) -> dict[Key, Resource]:
        """The live resource for each of `wanted` that exists."""
        found = {
            (*place, each["metadata"]["name"]): each
            for place, there in (await self._ask(release, wanted.values())).items()
            for each in there
        }
        return {
            key: found[place]
            for key, each in wanted.items()
            if (place := (each["apiVersion"], key.kind, key.namespace or release.namespace, key.name)) in found
        }

    async def _ask(self, release: Release, wanted: Iterable[Resource]) -> dict[tuple[str, str, str], list[Resource]]:
        """What is live of `wanted`, by version, kind and namespace; all of a kind where one has no name."""
        asked = own.questions(wanted, release.namespace)
        with own.chart(self._place, "live", own.LIVE) as chart:
            output = await self._command(release, timeout=2 * self.patience + _RESOURCE_SECONDS * len(asked)).run(
                ["template", "live", chart, "--namespace", release.namespace, "--dry-run=server", "--values", "-"],
                json.dumps({"wanted": asked}).encode(),
            )
        return own.answers(output.decode(), asked)

    async def _not_ready(self, release: Release, *, tests: bool = False) -> list[str]:
        """What of the release, or of its tests, is not ready, and why."""
        if (stored := await self._stored(release)) is None:
            return []
        among = manifest.parse(manifest.joined(hook.manifest for hook in stored.tests.values())) if tests else None
        waited = [each for each in (among or stored.everything).values() if each["kind"] in ready.WAITED_FOR]
        places = {str(each["metadata"].get("namespace") or release.namespace) for each in waited}
        pods = [{"apiVersion": "v1", "kind": "Pod", "metadata": {"namespace": each}} for each in sorted(places)]
        live = await self._ask(release, [*(each for each in waited if each["kind"] != "Pod"), *pods])
        every = [each for (_, kind, _), there in live.items() if kind == "Pod" for each in there]
        named = {each["metadata"].get("name") for each in waited if each["kind"] == "Pod"}
        others = [each for (_, kind, _), there in live.items() if kind != "Pod" for each in there]
        return ready.why_not([*(each for each in every if each["metadata"]["name"] in named), *others], every)


def _forced(stored: Stored | None) -> list[str]:
    """Helm 4 applies on the server, where a field belongs to who changed it last. Force it: the repo wins."""
    return ["--force-conflicts"] if stored is not None and stored.applies == "ssa" else []


def _waiting(release: Release) -> list[str]:
    return ["--timeout", f"{release.timeout:g}s", *(["--wait", "--wait-for-jobs"] if release.wait else [])]


def _left_by_helm(crds: Difference, stored: Stored | None) -> tuple[Change, ...]:
    """Those of the differing CRDs that helm leaves as they are: it only brings new ones, and with a new release."""
    missing = [Change(each, (Field(("it is not in the cluster",)),)) for each in crds.removed] if stored else []
    return (*missing, *crds.changed)


def _advice(words: str, release: Release, chart: Path) -> str:
    """What to do when the cluster refuses what a chart renders to."""
    if "cannot be imported into the current release" in words:
        return f"it is not this release's: remove it or rename it in {release.chart}, or give it helm's labels yourself"
    if "no matches for kind" in words and release.crds != "apply" and own.crds_of(chart):
        return f"fix {release.chart}; if its crds/ has that kind: `crds: apply` in {release.file} brings it"
    if _CUSTOM.search(words) and not release.after:
        return f"fix {release.chart} or its values; if a different release brings that kind: `after` in {release.file}"
    return f"fix {release.chart} or its values, and push again"


def _unchecked(wanted: Mapping[Key, Resource], brought: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(
        f"{key} cannot be checked yet: the cluster has no {kind}, which helm/{brought[kind]}, rolled out before, is to "
        "bring"
        for key, each in wanted.items()
        if (kind := own.kind_of(each)) in brought
    )
