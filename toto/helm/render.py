"""Renders a pushed chart with helm in a cell, which has no cluster and no kubeconfig; fetches the remote ones."""

import asyncio
import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import yaml

from toto.base import files
from toto.base.errors import InputError
from toto.cell import folders, tool
from toto.cell.cell import Cell
from toto.helm import manifest, own, secret
from toto.helm.command import IN_CELL, ChartUnavailable, Command, RenderFailed
from toto.helm.release import Release
from toto.helm.secret import Masks
from toto.helm.stored import RUN

LARGEST: Final = 64_000_000  # bytes of a remote chart

# Places in a cell.
_REPO: Final = Path("/repo")
_CHART: Final = Path("/chart.tgz")
_PULLED: Final = Path("/pulled")
_LOGINS: Final = Path("/logins")


@dataclass(frozen=True)
class Rendered:
    """What a release's chart renders to, with hooks, tests and Secrets, and what is in its `crds/`."""

    text: str
    crds: str


@dataclass(frozen=True)
class Renderer:
    """helm in cells. `state` is the folder that keeps remote charts, `patience` as for `toto.helm.cluster.Helm`."""

    binary: str
    state: Path
    patience: float

    async def check_dependencies(self, release: Release, tree: Path) -> None:
        """Raise `RenderFailed` when what the chart depends on is not in its `charts/`, or in a different version.

        (Helm renders a chart with a dependency of a wrong version, and says nothing.)
        """
        if release.remote:
            return
        command, place = await self._in_cell(release, tree, Masks())
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

    async def lint(self, release: Release, tree: Path) -> tuple[str, ...]:
        """The warnings of `helm lint`. Raises `RenderFailed`, `ChartUnavailable`."""
        command, chart = await self._in_cell(release, tree, Masks.worth(*await self.secrets(release, tree)))
        done = await command.attempt(["lint", chart, "--quiet", *_values(release)])
        said = _by_names_of_the_repo(command.clean(f"{done.stdout}\n{done.stderr}"), release, tree)
        if done.status != 0:
            raise RenderFailed(said, target=release.label, hint=f"fix {release.chart} or its values, and push again")
        return tuple(line for line in said.splitlines() if line.startswith("[WARNING]"))

    async def render(
        self, release: Release, tree: Path, *, new: bool, kube: str = "", kinds: Collection[str] = ()
    ) -> Rendered:
        """What a chart renders to, on a cluster of version `kube` that has `kinds` (none: as helm takes for granted).

        A new release brings the kinds of its chart's `crds/`, so it finds them among the cluster's. Raises
        `RenderFailed`, `ChartUnavailable`.
        """
        command, chart = await self._in_cell(release, tree, Masks.worth(*await self.secrets(release, tree)))
        words = ["template", release.name, chart, "--namespace", release.namespace, "--include-crds", *_values(release)]
        words += [*([] if new else ["--is-upgrade"]), *(["--kube-version", kube] if kube else [])]
        try:
            text, crds = own.apart((await command.run([*words, *_apis(kinds)])).decode())
            brought = own.kinds_of(own.crds(crds).values()) if new or release.crds == "apply" else set()
            if more := brought - {*kinds}:
                groups = {each.rpartition("/")[0] for each in more}
                text, crds = own.apart((await command.run([*words, *_apis([*kinds, *groups, *more])])).decode())
        except RenderFailed as error:
            raise RenderFailed(
                _by_names_of_the_repo(error.message, release, tree),
                target=error.target,
                hint=f"fix {release.chart} or its values, and push again",
            ) from None
        return Rendered(text, crds)

    async def wrap(self, release: Release, tree: Path, rendered: Rendered, chart: Path, run: str) -> None:
        """Write a chart that renders to exactly `rendered`, under the name and version of the release's chart."""
        command, place = await self._in_cell(release, tree, Masks())
        (said, *_) = manifest.load((await command.run(["show", "chart", place])).decode())
        facts = {key: said[key] for key in ("name", "version", "appVersion") if key in said}
        own.write(
            chart,
            {
                "Chart.yaml": yaml.safe_dump({"apiVersion": "v2", "annotations": {RUN: run}} | facts),
                "templates/all.yaml": own.escaped(rendered.text),
                **({"crds/all.yaml": rendered.crds} if rendered.crds.strip() else {}),
            },
        )

    async def secrets(self, release: Release, tree: Path) -> tuple[set[str], set[str]]:
        """The texts that the release's values call secret, and the words in them that are none.

        Raises `ChartUnavailable`.
        """
        archive = await self.chart(release, tree) if release.remote else None
        return await asyncio.to_thread(secret.of_values, release, tree, archive)

    async def chart(self, release: Release, tree: Path) -> Path:
        """The chart's folder or archive. A remote chart is fetched once, so the rehearsed chart is the deployed one.

        Raises `ChartUnavailable`.
        """
        if not release.remote:
            return tree / release.chart
        words = [release.chart, "--version", str(release.version), *(["--repo", release.repo] if release.repo else [])]
        store = self.state / "charts"
        kept = store / hashlib.sha256(json.dumps(words).encode()).hexdigest()[:16]
        if not any(kept.glob("*.tgz")):
            store.mkdir(mode=0o700, parents=True, exist_ok=True)
            archive = await self._pulled(release, words)
            kept.mkdir(exist_ok=True)
            files.write_bytes(kept / "chart.tgz", archive, 0o644)
        return next(kept.glob("*.tgz"))

    async def _in_cell(self, release: Release, tree: Path, masks: Masks) -> tuple[Command, Path]:
        """helm in a cell that sees the commit's files, and the path of the release's chart there.

        The cell has no network, no kubeconfig and no cluster. Raises `ChartUnavailable`.
        """
        helm, chart = await tool.tool(self.binary), await self.chart(release, tree)
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
            secrets=masks.texts,
            cell=cell,
        )
        return command, _CHART if release.remote else _REPO / release.chart

    async def _pulled(self, release: Release, words: Sequence[str]) -> bytes:
        """A remote chart, fetched in a cell that has the internet and toto's logins to registries."""
        helm = await tool.tool(self.binary)
        async with tool.internet() as network:
            with tempfile.TemporaryDirectory(prefix="new.", dir=self.state / "charts") as fresh:
                pulled, logins = Path(fresh) / "pulled", Path(fresh) / "logins"
                pulled.mkdir()
                if (ours := self.state / "config").is_dir():
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


def _values(release: Release) -> list[str]:
    # Helm splits the argument at commas outside of quotes, like a line of CSV.
    names = [str(_REPO / each).replace('"', '""') for each in release.values]
    return [word for each in names for word in ("--values", f'"{each}"')]


def _apis(kinds: Collection[str]) -> list[str]:
    return [word for each in kinds for word in ("--api-versions", each)]


def _depends(file: Path) -> bool:
    """Whether a Chart.yaml, or the requirements.yaml of older charts, says that the chart depends on others."""
    try:
        said = manifest.load(file.read_text(errors="replace"))
    except (OSError, InputError):  # helm says what is wrong with it
        return False
    return any(isinstance(each, dict) and each.get("dependencies") for each in said)


def _unpacked(chart: Path) -> list[Path]:
    """The charts in a chart's `charts/` that are folders."""
    return sorted(each.parent for each in chart.glob("charts/*/Chart.yaml") if not each.parent.is_symlink())


def _by_names_of_the_repo(text: str, release: Release, tree: Path) -> str:
    """Helm's text with paths as they are in the repo."""

    def ours(match: re.Match[str]) -> str:
        path = f"{release.chart}/{match[1]}"
        return path if (tree / path).exists() else match[0]

    return re.sub(r"[\w.-]+/((?:charts/[\w.-]+/)*templates/[\w./-]+)", ours, text.replace(f"{_REPO}/", ""))
