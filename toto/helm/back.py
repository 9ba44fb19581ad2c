"""Making a release what it was."""

from dataclasses import dataclass

from toto.helm.cluster import Helm
from toto.helm.release import Release


@dataclass(frozen=True)
class Back:
    """What a release is once it was put back: its revision (0 where it is not installed), and that in words."""

    revision: int
    words: str


async def put_back(helm: Helm, failed: Release, to: int, good: Release | None = None) -> Back:
    """Make a release what it was at revision `to`; 0: it was not installed, and is removed.

    `failed` is the release as its roll-out was to make it, `good` as the last good commit has it. Where these are in
    two namespaces they are two releases: the one that failed is removed, and the good one was never touched.
    Raises `ReleaseFailed`, `ReleaseMissing`, `ClusterUnreachable`.
    """
    if to == 0 or (good is not None and good.namespace != failed.namespace):
        await helm.uninstall(failed)
        return Back(to, f"uninstalled from namespace {failed.namespace}" if to else "uninstalled")
    now = await helm.current(failed)
    if now is not None and now.number == to and now.status == "deployed":
        return Back(to, f"at revision {to}, as it was")
    revision = (await helm.rollback(failed, to)).number
    return Back(revision, f"rolled back to revision {to}, as revision {revision}")
