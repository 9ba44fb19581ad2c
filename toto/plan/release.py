"""Helm releases as a kind of target: the hash of its chart, values and release.yaml identifies a release."""

from typing import Any

from toto.helm import release as releases
from toto.helm.release import Release
from toto.ledger.ledger import Before, Deployed
from toto.ledger.target import Target
from toto.plan.changes import Change, Desired
from toto.plan.kind import Found, Kind, Source
from toto.plan.order import Order


class DeployedRelease(Deployed):
    """What a release is, by toto's own roll-out. `revision` is the helm revision that the roll-out made."""

    revision: int = 0


class ReleaseBefore(Before):
    """What a release was before a roll-out: the helm `revision` to revert to, 0 when it was not installed."""

    revision: int = 0


class ReleaseOrder(Order):
    """One helm release's part of a plan."""

    release: Release

    @property
    def last(self) -> DeployedRelease | None:
        """Its last good."""
        return DeployedRelease.of(self.change.last)


class ReleaseKind(Kind[Release]):
    """Helm releases."""

    name, one, many = "helm", "release", "releases"

    async def discover(self, source: Source) -> list[Found[Release]]:
        return [
            Found(Target(self.name, release.name), release, release.tags, release.after)
            for release in releases.discover(source.tree)
        ]

    async def identify(self, source: Source, found: Found[Release]) -> Desired:
        identity = await releases.identity(source.repo, source.commit, source.tree, found.subject)
        return Desired(target=found.target, file=found.subject.file, identity=identity)

    async def order(self, source: Source, found: Found[Release], change: Change) -> ReleaseOrder:
        return source.order(ReleaseOrder, change, release=found.subject)

    def deployed(self, desired: Desired, **facts: Any) -> DeployedRelease:
        return DeployedRelease(identity=desired.identity, **facts)
