"""What has to be done to revert a terraform root. `toto.terraform.session` does it."""

from dataclasses import dataclass

from toto.base.errors import TotoError
from toto.terraform.plan import Planned, State


class CannotGoBack(TotoError):
    """A terraform root cannot be made what it was."""


@dataclass(frozen=True)
class WayBack:
    """Plan the root of the last good `commit` again; "" where there is none: then plan that all of it is destroyed.

    `before` are the resources that there were before the roll-out. `since` are those that came by it, which may be
    destroyed whatever the settings prevent.
    """

    commit: str
    before: frozenset[str]
    since: frozenset[str]

    @property
    def destroy(self) -> bool:
        return not self.commit

    def told(self, planned: Planned) -> str:
        """What the root is once that plan is applied, in words: also what was destroyed and is only created anew."""
        where = f"as at {self.commit[:8]} ({planned.summary})" if self.commit else "empty again"
        anew = sorted(self.before.intersection(planned.created))
        return where + (f"; new, and not what they were: {', '.join(anew)}" if anew else "")


def way_back(good: str | None, before: State, now: State, *, target: str) -> WayBack | None:
    """The way back of a root whose state was `before` and is `now`; None where nothing was done to it.

    `good` is the commit of its last good. Raises `CannotGoBack` for a root that was there before toto knew it.
    """
    if good is None and (now.serial, now.resources) == (before.serial, before.resources):
        return None
    if good is None and before.resources:
        raise CannotGoBack("toto had not deployed it before, so what it was is not known", target=target,
                           hint=f"its state was serial {before.serial}, with {len(before.resources)} resources; "
                                "go back by hand, then start the run again")
    return WayBack(good or "", frozenset(before.resources), frozenset(now.resources) - frozenset(before.resources))
