"""Reverts a release: rolls it back to the revision before, or uninstalls it."""

from dataclasses import dataclass

from toto.helm.cluster import Helm
from toto.helm.release import Release


@dataclass(frozen=True)
class RevertedRelease:
    """What a release is after its revert: its revision (0 when it is not installed), and that in words."""

    revision: int
    words: str


async def revert(helm: Helm, failed: Release, to: int, good: Release | None = None) -> RevertedRelease:
    """Roll a release back to revision `to`; 0 means that it was not installed, so it is removed.

    `failed` is the release of the commit that was rolled out, `good` the one of the last good commit. When they are in
    different namespaces they are two releases: the failed one is removed, and the good one was never touched.
    Raises `ReleaseFailed`, `ReleaseMissing`, `ClusterUnreachable`.
    """
    if to == 0 or (good is not None and good.namespace != failed.namespace):
        await helm.uninstall(failed)
        return RevertedRelease(to, f"uninstalled from namespace {failed.namespace}" if to else "uninstalled")
    now = await helm.current(failed)
    if now is not None and now.number == to and now.status == "deployed":
        return RevertedRelease(to, f"at revision {to}, as it was")
    revision = (await helm.rollback(failed, to)).number
    return RevertedRelease(revision, f"rolled back to revision {to}, as revision {revision}")
