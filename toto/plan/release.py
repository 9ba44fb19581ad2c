"""Helm releases as a kind of target: the hash of its chart, values and release.yaml identifies a release."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from toto.base.errors import InputError
from toto.helm import manifest
from toto.helm import release as releases
from toto.helm.cluster import Helm
from toto.helm.release import Release
from toto.helm.revert import Place
from toto.infra_repo import git
from toto.ledger.ledger import Before, Deployed, Ledger
from toto.ledger.target import Target
from toto.plan.changes import Change, Desired, Told
from toto.plan.kind import Found, Kind, Source
from toto.plan.order import Order


class DesiredRelease(Desired):
    """What a commit wants a release to be, and in which `namespace`."""

    namespace: str


class DeployedRelease(Deployed):
    """What a release is, by toto's own roll-out.

    `revision` is the helm revision that the roll-out made, `namespace` where; "" in what older versions recorded.
    `baseline` has a mark for each field that differed from the manifests just after it, such as those that the cluster
    sets itself: see `toto.helm.drift`.
    """

    revision: int = 0
    namespace: str = ""
    baseline: tuple[str, ...] = ()


class ReleaseBefore(Before):
    """What a release was before a roll-out: see `toto.helm.revert.Place`. `crds` are those that the run applies."""

    revision: int = 0
    newest: int | None = None
    status: str = ""
    crds: tuple[str, ...] = ()

    @property
    def place(self) -> Place:
        return Place(self.revision, self.newest, self.status)


class ReleaseOrder(Order):
    """One helm release's part of a plan."""

    release: Release

    @property
    def last(self) -> DeployedRelease | None:
        """Its last good, in the namespace where it is to be; None when toto has never deployed it there."""
        last = DeployedRelease.of(self.change.last)
        return last if last is not None and last.namespace == self.release.namespace else None


class ReleaseKind(Kind[Release]):
    """Helm releases."""

    name, one, many = "helm", "release", "releases"

    async def discover(self, source: Source) -> list[Found[Release]]:
        return [
            Found(Target(self.name, release.name), release, release.tags, release.after)
            for release in releases.discover(source.tree)
        ]

    def told(self, source: Source, found: Sequence[Found[Release]], deployed: Collection[str]) -> list[Told]:
        """What in `helm/` looks like a release and is none."""
        there = [each.subject for each in found]
        return [Told(place=place, what=what) for place, what in releases.left_aside(source.tree, there)]

    async def identify(self, source: Source, found: Found[Release]) -> Desired:
        identity = await releases.identity(source.repo, source.commit, source.tree, found.subject)
        return DesiredRelease(
            target=found.target, file=found.subject.file, identity=identity, namespace=found.subject.namespace
        )

    async def order(self, source: Source, found: Found[Release], change: Change) -> ReleaseOrder:
        """Look at what the chart depends on, and whether the release is where it was.

        Raises `RenderFailed` when `charts/` lacks a dependency, `InputError` when the release has moved.
        """
        release = found.subject
        if change.last is not None:
            change = change.model_copy(update={"last": await _with_namespace(source, release.name, change.last)})
        await Helm().check_dependencies(release, source.tree)
        was = await _place_before(source, release, change)
        if was is not None and was.place == release.was:
            note = f"it was {was.place}, which stays in the cluster as it is"
            change = change.model_copy(update={"note": "; ".join(filter(None, (change.note, note)))})
        elif was is not None:
            raise InputError(
                f"its place changed from {was.place} to {release.place}, while {was.place} still holds revision "
                f"{was.revision}, which toto deployed: there would be two",
                target=release.label,
                hint=f"change it back, or write `was: {was.place}` into {release.file}: then it is installed anew, and "
                f"the old one stays until somebody runs `helm --namespace {was.namespace} uninstall {was.name}`",
            )
        return source.order(ReleaseOrder, change, release=release)

    def deployed(self, desired: Desired, **facts: Any) -> DeployedRelease:
        assert isinstance(desired, DesiredRelease)
        return DeployedRelease(identity=desired.identity, namespace=desired.namespace, **facts)


@dataclass(frozen=True)
class _Was:
    """Where toto left a release, and at which revision."""

    namespace: str
    name: str
    revision: int

    @property
    def place(self) -> str:
        return f"{self.namespace}/{self.name}"


async def _place_before(source: Source, release: Release, change: Change) -> _Was | None:
    """Where the release was, when toto left it at a different place: another namespace, or another name of its folder.

    A release of the ledger that has left the commit was renamed when `was` names it, or when git takes a file of its
    folder for the same as one of the new folder.
    """
    if (last := DeployedRelease.of(change.last)) is not None:
        return None if last.namespace == release.namespace else _Was(last.namespace, release.name, last.revision)
    for target, entry in Ledger(source.repo).read().entries.items():
        if (
            target.kind != ReleaseKind.name
            or entry.good is None
            or (source.tree / _folder(target.name) / releases.FILE).is_file()
        ):
            continue
        good = await _with_namespace(source, target.name, entry.good)
        was = _Was(good.namespace, target.name, good.revision)
        if was.place == release.was or await _renamed(source, good.commit, target.name, release.name):
            return was
    return None


def _folder(name: str) -> str:
    return f"helm/{name}"


async def _with_namespace(source: Source, name: str, last: Deployed) -> DeployedRelease:
    """A record of a release with its namespace. (Older versions recorded none: then the commit says it.)"""
    good = DeployedRelease.of(last)
    if good.namespace:
        return good
    done = await git.git(source.repo, "show", f"{good.commit}:{_folder(name)}/{releases.FILE}", check=False)
    said = next(iter(manifest.load(done.stdout)), None) if done.status == 0 else None
    namespace = said.get("namespace", "default") if isinstance(said, dict) else "default"
    return good.model_copy(update={"namespace": str(namespace)})


async def _renamed(source: Source, commit: str, old: str, new: str) -> bool:
    done = await git.git(
        source.repo,
        *("diff-tree", "-r", "-z", "-M", "--diff-filter=R", "--name-only", commit, source.commit),
        *("--", _folder(old), _folder(new)),
        check=False,
    )
    return bool(done.stdout)
