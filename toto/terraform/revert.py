"""Decides how a terraform root is reverted. `toto.terraform.session` does it."""

from dataclasses import dataclass

from toto.base.errors import TotoError
from toto.terraform.plan import Planned, State


class CannotGoBack(TotoError):
    """A terraform root cannot be reverted."""


@dataclass(frozen=True)
class WayBack:
    """How to revert a root: plan it again as it is at its last good `commit`; when that is "", destroy all of it.

    `before` are the addresses of the resources that existed before the roll-out. `since` are those that the roll-out
    created: a revert may destroy them, whatever the settings prevent.
    """

    commit: str
    before: frozenset[str]
    since: frozenset[str]

    @property
    def destroy(self) -> bool:
        return not self.commit

    def words(self, planned: Planned) -> str:
        """What the root is once that plan is applied, in words. It names what was destroyed and is now a new one."""
        where = f"as at {self.commit[:8]} ({planned.summary})" if self.commit else "empty again"
        anew = sorted(self.before.intersection(planned.created))
        return where + (f"; created anew, without their old data: {', '.join(anew)}" if anew else "")


def way_back(good: str | None, before: State, now: State, *, target: str) -> WayBack | None:
    """How to revert a root whose state was `before` and is `now`; None when nothing was done to it.

    `good` is the commit of its last good. Raises `CannotGoBack` for a root that existed before toto first deployed it.
    """
    if good is None and (now.serial, now.resources) == (before.serial, before.resources):
        return None
    if good is None and before.resources:
        raise CannotGoBack(
            "toto had not deployed it before, so toto does not know what it was",
            target=target,
            hint=f"its state was serial {before.serial}, with {len(before.resources)} resources; "
            "revert it by hand, then start the run again",
        )
    return WayBack(good or "", frozenset(before.resources), frozenset(now.resources) - frozenset(before.resources))
