"""Reverts a release: takes back what one run did to it, and nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC

from toto.helm.cluster import Helm
from toto.helm.command import ReleaseFailed
from toto.helm.release import Release
from toto.helm.stored import Deployed


class CannotGoBack(ReleaseFailed):
    """The release is not what the run left, or it is not known what it was before. Nothing was touched."""


@dataclass(frozen=True)
class Place:
    """What a release was before a run touched it, as it was read from the cluster.

    `newest` is its newest revision (0 when helm had nothing of that name, None when an older version of toto did not
    record it) and `status` helm's word for it. `revision` is the one to go back to; 0 when none was ever whole.
    """

    revision: int = 0
    newest: int | None = None
    status: str = ""


@dataclass(frozen=True)
class RevertedRelease:
    """What a release is after its revert: its revision (0 when it is not installed), and that in words."""

    revision: int
    words: str


async def revert(helm: Helm, release: Release, before: Place, run: str) -> RevertedRelease:
    """Take back what `run` did to a release: roll it back, or uninstall what the run itself has installed.

    `release` is that of the commit that was rolled out. Raises `CannotGoBack` when somebody else changed it meanwhile,
    or when nobody knows what it was; `ReleaseFailed`, `ClusterUnreachable`.
    """
    now = await helm.current(release)
    if now is None:
        return RevertedRelease(0, "deleted outside toto meanwhile" if before.revision else "not installed")
    if before.newest is None:
        if not before.revision:
            raise _unknown(release)
        return await _rolled_back(helm, release, now, before.revision)
    if now.number <= before.newest:
        return RevertedRelease(now.number, f"at revision {now.number}, as it was")
    await _check_own(helm, release, before, run)
    if before.newest == 0 or before.status == "uninstalled":
        stays = _stays(await helm.kept(release))
        await helm.uninstall(release, keep_history=before.newest > 0)
        return RevertedRelease(0, f"uninstalled from namespace {release.namespace}{stays}")
    return await _rolled_back(helm, release, now, before.revision or before.newest, whole=before.revision > 0)


async def _check_own(helm: Helm, release: Release, before: Place, run: str) -> None:
    """Raise `CannotGoBack` when a revision since `before` is somebody else's."""
    assert before.newest is not None
    for each in await helm.since(release, before.newest):
        if not each.made_by(run):
            raise CannotGoBack(
                f"cannot go back by itself: revision {each.number} ({each.chart}, {each.status}, "
                f"{each.at.astimezone(UTC):%Y-%m-%d %H:%M} UTC) is not of this run, which began at revision "
                f"{before.newest}",
                target=release.label,
                hint=_choices(release, before.revision),
            )


async def _rolled_back(helm: Helm, release: Release, now: Deployed, to: int, *, whole: bool = True) -> RevertedRelease:
    """Roll back to revision `to`, unless it is there. A revision that was never `whole` need not become ready now."""
    if now.number == to and now.status == "deployed":
        return RevertedRelease(to, f"at revision {to}, as it was")
    stays = _stays(await helm.kept(release, to))
    if now.status != "deployed" or now.description != f"Rollback to {to}":
        now = await helm.rollback(release, to, wait=whole)
    kind = "" if whole else ", which was never whole,"
    return RevertedRelease(now.number, f"rolled back to revision {to}{kind or ','} as revision {now.number}{stays}")


def _stays(kept: Sequence[str]) -> str:
    return f"; what the chart has helm keep stays: {', '.join(kept)}" if kept else ""


def _unknown(release: Release) -> CannotGoBack:
    return CannotGoBack(
        "cannot go back by itself: the version of toto that began this did not record whether the release was there "
        "before, and toto uninstalls nothing that it cannot prove to have made",
        target=release.label,
        hint=_choices(release, 0),
    )


def _choices(release: Release, revision: int) -> str:
    back = f"`{release.by_hand('rollback')} {revision}`" if revision else f"`{release.by_hand('uninstall')}`"
    accept = f"`ssh toto accept {release.label} --reason WHY`"
    return f"look at `{release.by_hand('history')}`; then {back}, or take it as it is: {accept}"
