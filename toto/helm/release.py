"""Reads the helm releases of a commit, `helm/NAME/release.yaml`, and computes the identity of each.

`toto.helm.cluster` deploys them.
"""

import hashlib
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, StrictBool, StrictStr

from toto.base.after import in_order
from toto.base.errors import InputError
from toto.base.model import Fields, shown
from toto.base.yaml_file import FileError, Reading, Unreadable, read_text
from toto.infra_repo import git
from toto.infra_repo.fields import Distinct, Word
from toto.infra_repo.settings import Seconds

FILE: Final = "release.yaml"
MOST_FOLDERS: Final = 10_000  # in which toto looks for what is no release

_LABEL: Final = r"[a-z0-9]([a-z0-9-]*[a-z0-9])?"


class ReleaseFileError(FileError):
    """A release.yaml is wrong. `problems` has a line for each mistake, as `file:line: field: what`."""


def _check_name(name: str) -> str:
    if len(name) > 53 or not re.fullmatch(rf"{_LABEL}(\.{_LABEL})*", name):
        raise ValueError(
            f"a release's name should be 1 to 53 lower case letters, digits, '-' and '.', not {shown(name)}"
        )
    return name


def _check_namespace(name: str) -> str:
    if len(name) > 63 or not re.fullmatch(_LABEL, name):
        raise ValueError(f"should be 1 to 63 lower case letters, digits and '-', not {shown(name)}")
    return name


def _check_was(place: str) -> str:
    namespace, slash, name = place.partition("/")
    if not slash:
        raise ValueError(f"should be like 'default/page': the namespace and the name before, not {shown(place)}")
    return f"{_check_namespace(namespace)}/{_check_name(name)}"


def _check_repo(url: str) -> str:
    if not re.fullmatch(r"(https|oci)://[^\s@]+", url):
        raise ValueError(
            f"should be like 'https://charts.example.org' or 'oci://registry.example.org/charts', "
            f"without a user's name, not {shown(url)}"
        )
    return url


def _check_version(version: str) -> str:
    if not re.fullmatch(r"v?\d+\.\d+\.\d+(-[0-9A-Za-z.-]+)?(\+[0-9A-Za-z.-]+)?", version):
        raise ValueError(f"should be one exact version like '1.2.3', not {shown(version)}")
    return version


class ReleaseFile(Fields):
    """The fields of a release.yaml."""

    chart: Word | None = None
    """where the chart is: a path from the release's folder, or, with a leading '/', from the root of the repo; the name
    of the chart in `repo`; or an `oci://` address. Left out: the release's folder itself, or its folder `chart`"""
    repo: Annotated[StrictStr, AfterValidator(_check_repo)] | None = None
    """the address of a remote chart's repository, `https://…` or `oci://…`"""
    version: Annotated[StrictStr, AfterValidator(_check_version)] | None = None
    """the exact version of a remote chart"""
    namespace: Annotated[StrictStr, AfterValidator(_check_namespace)] = "default"
    """the namespace that it is installed in"""
    create_namespace: StrictBool = True
    """create the namespace when it does not exist"""
    values: Annotated[tuple[Word, ...], Distinct] | None = None
    """files of values; a later one overrides an earlier one. Paths are as for `chart`. Left out: the `values.yaml` in
    the release's folder, unless that is the chart's own"""
    timeout: Seconds = 300
    """seconds that each of helm's waits may take: for a hook, for the resources, for a test"""
    wait: StrictBool = True
    """wait until the resources are ready and the jobs are done"""
    after: Annotated[tuple[Word, ...], Distinct] = ()
    """releases that are rolled out before this one"""
    tags: Annotated[tuple[Word, ...], Distinct] = ()
    """words to select releases by"""
    test: StrictBool = True
    """run the chart's own tests after an upgrade"""
    crds: Literal["tell", "apply"] = "tell"
    """what becomes of new and changed CRDs in the chart's `crds/`, which helm leaves out of an upgrade: `tell` says so
    in the plan, `apply` creates and changes them; nothing deletes them"""
    was: Annotated[StrictStr, AfterValidator(_check_was)] | None = None
    """the namespace and name that it had before, `NAMESPACE/NAME`: what is there stays, and the new one is installed"""


class Release(ReleaseFile):
    """A release as a commit wants it. Paths are relative to the tree: `file`, `values`, and `chart` unless `remote`."""

    name: str
    file: str
    chart: str
    values: tuple[str, ...] = ()

    @property
    def remote(self) -> bool:
        return self.version is not None

    @property
    def label(self) -> str:
        """Its name in messages: `helm/web`."""
        return f"helm/{self.name}"

    @property
    def place(self) -> str:
        """Where it is in the cluster: `namespace/name`."""
        return f"{self.namespace}/{self.name}"

    def by_hand(self, verb: str) -> str:
        """The command that a person types."""
        return f"helm --namespace {self.namespace} {verb} {self.name}"


def discover(tree: Path) -> list[Release]:
    """The releases of a tree, `helm/NAME/release.yaml`: each after those in its `after`, otherwise sorted by name.

    Raises `ReleaseFileError` with all mistakes in all of them.
    """
    tree = tree.resolve()
    readings: dict[str, Reading] = {}
    found: dict[str, Release] = {}
    for path in sorted(tree.glob(f"helm/*/{FILE}")):
        name = path.parent.name
        readings[name] = reading = Reading(f"helm/{name}/{FILE}")
        try:
            release = _read(reading, tree, path)
        except Unreadable as problem:
            reading.problem(problem.line, str(problem))
        else:
            found |= {name: release} if release else {}
    for release in found.values():
        for number, other in enumerate(release.after):
            if other not in readings:
                reading = readings[release.name]
                reading.problem(reading.line(("after", number)), "after", f"there is no release {shown(other)}")
    order, circles = in_order({name: found[name].after for name in found})
    for circle in circles:
        reading = readings[circle.name]
        reading.problem(reading.line(("after",)), "after", str(circle))
    if problems := [what for reading in readings.values() for _, what in sorted(reading.problems)]:
        raise ReleaseFileError(problems)
    return [found[name] for name in order]


def left_aside(tree: Path, found: Sequence[Release]) -> Iterator[tuple[str, str]]:
    """What in `helm/` looks like a release and is none, each with why and what to do; in the first `MOST_FOLDERS`."""
    files, charts = {each.file for each in found}, {each.chart for each in found}
    for folder, inside, names in itertools.islice(os.walk(tree / "helm"), MOST_FOLDERS):
        place = str(Path(folder).relative_to(tree))
        inside[:] = sorted(each for each in inside if not each.startswith("."))
        others = [f"{place}/{name}" for name in (FILE, "release.yml") if name in names]
        for other in others:
            if other not in files:
                yield _printable(other), f"is no release: only helm/NAME/{FILE} is one; rename it, or move it there"
        if "Chart.yaml" in names:
            inside.clear()
            if place.count("/") == 1 and place not in charts and not others:
                what = f"is a chart, and no release: a {FILE} in it, which may be empty, makes it one"
                yield _printable(place), what


def _printable(place: str) -> str:
    return place if place.isprintable() else shown(place)


def _read(reading: Reading, tree: Path, path: Path) -> Release | None:
    folder = path.parent
    try:
        _check_name(folder.name)
    except ValueError as error:
        reading.problem(1, str(error))
    data = reading.document(read_text(path, missing=""))
    said = reading.validated(ReleaseFile, {} if data is None else data)
    if said is None:
        return None

    def wrong(what: str, *place: str | int) -> None:
        reading.problem(reading.line(place), str(place[0]), what)

    def inside(text: str, *place: str | int) -> str:
        """The path in the tree that a text names; "" when it is wrong."""
        named = _real(tree / text.lstrip("/") if text.startswith("/") else folder / text)
        if not named.is_relative_to(tree) or named == tree:
            wrong(f"{shown(text)} leads out of the repo", *place)
        elif not os.access(named, os.R_OK):
            wrong(f"there is no {shown(str(named.relative_to(tree)), 200)}", *place)
        else:
            return str(named.relative_to(tree))
        return ""

    chart = said.chart or ""
    if said.repo is not None or chart.startswith("oci://"):
        if not chart:
            wrong("a repo needs a chart: its name there", "repo")
        if said.version is None:
            wrong("is missing: a remote chart needs one exact version, to stay the same", "version")
        chart = f"{said.repo.rstrip('/')}/{chart}" if said.repo and said.repo.startswith("oci://") else chart
    else:
        if said.version is not None:
            wrong("is only for a remote chart; a chart in the repo has its version in Chart.yaml", "version")
        chart = inside(chart or ("." if (folder / "Chart.yaml").exists() else "chart"), "chart")
        if chart and not chart.endswith(".tgz") and not (tree / chart / "Chart.yaml").is_file():
            wrong(f"there is no Chart.yaml in {chart}", "chart")
    own = chart == f"helm/{folder.name}"
    values = said.values
    if values is None:
        values = ("values.yaml",) if (folder / "values.yaml").exists() and not own else ()
    release = Release(
        **said.model_dump(exclude={"chart", "values"}),
        name=folder.name,
        file=reading.file,
        chart=chart,
        values=tuple(inside(text, "values", number) for number, text in enumerate(values)),
    )
    if not reading.problems:
        for link in (each for each in _sources(tree, release) if not each.is_relative_to(tree)):
            wrong(f"a link in it leads out of the repo, to {link}", "chart")
    return release


def _sources(tree: Path, release: Release) -> set[Path]:
    """All files and folders of a release, with the targets of links in them."""
    found: set[Path] = set()
    rest = [tree / each for each in (release.file, *release.values, *([] if release.remote else [release.chart]))]
    while rest:
        path = _real(rest.pop())
        if path not in found and os.access(path, os.R_OK):
            found.add(path)
            rest += (
                Path(folder, name)
                for folder, folders, files in os.walk(path)
                for name in (*folders, *files)
                if Path(folder, name).is_symlink()
            )
    return found


def _real(path: Path) -> Path:
    """The real path. (Not by `resolve`, which raises for links that form a circle.)"""
    return Path(os.path.realpath(path))


async def identity(repo: Path, commit: str, tree: Path, release: Release) -> str:
    """The hash (SHA-256, hex) of a release's files: its chart, its values, its release.yaml. It does not start helm.

    Raises `InputError` when `tree` is not the tree of `commit`.
    """
    tree = tree.resolve()
    sources = _sources(tree, release)
    names = sorted(str(path.relative_to(tree)) for path in sources if sources.isdisjoint(path.parents))
    listed = await git.git(repo, "ls-tree", "-z", "--full-tree", commit, "--", *names)
    objects = [each for each in listed.stdout.split("\0") if each]
    if len(objects) != len(names):
        raise InputError(f"the commit {commit[:12]} does not have all of {', '.join(names)}", target=release.label)
    return hashlib.sha256("\0".join(objects).encode()).hexdigest()
