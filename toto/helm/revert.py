"""Reverting a release: making it what it was."""

from dataclasses import dataclass

from toto.helm.cluster import Helm
from toto.helm.release import Release


@dataclass(frozen=True)
class RevertedRelease:
    """What a release is once it is reverted: its revision (0 where it is not installed), and that in words."""

    revision: int
    words: str


async def revert(helm: Helm, failed: Release, to: int, good: Release | None = None) -> RevertedRelease:
    """Make a release what it was at revision `to`; 0: it was not installed, and is removed.

    `failed` is the release as its roll-out was to make it, `good` as the last good commit has it. Where these are in
    two namespaces they are two releases: the one that failed is removed, and the good one was never touched.
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
