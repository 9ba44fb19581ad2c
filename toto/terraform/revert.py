"""Decides how a terraform root is reverted, and whether a plan does that and nothing else.

A run's deeds are in its intent: what its plan creates, changes, moves, imports, forgets, by address and id. The way
back is a plan of its own. It destroys only what the run created and what can still be told to be that; it moves back,
forgets what was imported, and imports what was forgotten. `toto.terraform.session` makes and applies it.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from toto.base.errors import TotoError
from toto.terraform.plan import HASHED, Action, Change, Deed, Planned, State
from toto.terraform.session import Session

_KEY: Final = re.compile(r'\[(?:\d+|"(?:[^"\\]|\\.)*")\]')
_ASIDE: Final = "toto_way_back_"
_CREATES: Final = (Action.CREATE, Action.REPLACE)
_DESTROYS: Final = (Action.DESTROY, Action.REPLACE)


class CannotGoBack(TotoError):
    """A terraform root cannot be reverted."""


@dataclass(frozen=True)
class WayBack:
    """How to revert a root whose state is `now`, after a run that has done `deeds`.

    With a last good `commit` it is planned again as it is there, with `blocks` besides. Without one ("") the resources
    `destroy` are destroyed, and then the resources `forget` leave the state.
    """

    commit: str
    deeds: tuple[Deed, ...]
    now: State

    @property
    def destroy(self) -> tuple[str, ...]:
        """The addresses of what the run created."""
        return tuple(each.address for each in self.deeds if self._created(each.address, self.now))

    @property
    def forget(self) -> tuple[str, ...]:
        """The addresses of what the run imported."""
        return tuple(each.address for each in self.deeds if _taken_over(each) and each.address in self.now.ids)

    @property
    def blocks(self) -> str:
        """What the configuration gets besides, as the text of a `.tf.json` file: moves, imports, what is forgotten."""
        there = self.now.ids
        moved = [
            {"from": each.address, "to": each.was}
            for each in self.deeds
            if each.was and each.address in there and each.was not in there
        ]
        # `removed` names whole resources. One of several instances gets a name of its own first.
        single = [each for each in self.forget if _KEY.search(each)]
        aside = {each: f"{_KEY.sub('', each).split('.')[-2]}.{_ASIDE}{number}" for number, each in enumerate(single)}
        moved += [{"from": each, "to": to} for each, to in aside.items()]
        removed = dict.fromkeys(aside.get(each, each) for each in self.forget)
        imported = [
            {"to": each.address, "id": each.id.replace("${", "$${").replace("%{", "%%{")}
            for each in self.deeds
            if each.action is Action.FORGET and each.address not in there and not each.id.startswith(HASHED)
        ]
        blocks: dict[str, Sequence[Any]] = {
            "moved": moved,
            "removed": [{"from": each, "lifecycle": {"destroy": False}} for each in removed],
            "import": imported,
        }
        return json.dumps({name: each for name, each in blocks.items() if each})

    def with_forgotten(self, planned: Planned | None) -> Planned:
        """The whole way back without a last good: the plan that destroys, if there is one, and what is forgotten."""
        if planned is None:
            planned = Planned(root="", file=Path(), before=self.now, empty=True, terraform="")
        changes = tuple(Change(address=each, action=Action.FORGET) for each in self.forget)
        deeds = tuple(Deed(address=each, action=Action.FORGET) for each in self.forget)
        return planned.model_copy(
            update={
                "empty": planned.empty and not changes,
                "changes": (*planned.changes, *changes),
                "deeds": (*planned.deeds, *deeds),
            }
        )

    def wrong(self, planned: Planned) -> list[str]:
        """What a plan of the way back would do besides undoing the deeds, in words; if nothing, it may be applied."""
        now, destroyed = planned.before, {each.place for each in planned.deeds if each.action is Action.DESTROY}
        left = () if self.commit else (each for each in self.destroy if each not in destroyed)
        return [
            *(
                wrong
                for each in planned.deeds
                for wrong in (*self._wrongly_there(each), *self._wrongly_done(each, now))
            ),
            *(f"leave {each}, which this run created" for each in left),
        ]

    def _wrongly_there(self, deed: Deed) -> Iterator[str]:
        """What is wrong with where an object comes from."""
        done = self._at(deed.place)
        aside = deed.action is Action.FORGET and done is not None and _taken_over(done)
        if deed.was and not aside and not (done is not None and done.was == deed.address):
            yield f"move {deed.was} to {deed.address}"
        forgotten = done is not None and (done.action, done.id) == (Action.FORGET, deed.id)
        if deed.imported and not (forgotten and deed.action is Action.IMPORT):
            yield f"import {deed.address} and change it"

    def _wrongly_done(self, deed: Deed, now: State) -> Iterator[str]:
        """What is wrong with what happens to an object."""
        done, id = self._at(deed.place), now.ids.get(deed.place, "")
        own = self._created(deed.place, now) and not deed.deposed
        match deed.action:
            case Action.DESTROY | Action.REPLACE if not own:
                yield f"destroy {deed.place}, which this run did not create"
            case Action.CREATE if not self._destroyed(deed.address):
                yield f"create {deed.address}, which this run did not destroy"
            case Action.UPDATE if not (own or (done and done.action is Action.UPDATE and _may_be(done, id))):
                yield f"change {deed.address}, which this run did not change"
            case Action.FORGET if not (done and _taken_over(done) and done.left in ("", id)):
                yield f"forget {deed.address}, which this run did not import"

    def _at(self, address: str) -> Deed | None:
        return next((each for each in self.deeds if each.address == address and not each.deposed), None)

    def _created(self, address: str, now: State) -> bool:
        """Whether the object at an address is one that the run created."""
        done, id = self._at(address), now.ids.get(address, "")
        return (
            done is not None
            and done.action in _CREATES
            and id not in ("", done.id)
            and (not done.left or id == done.left)
        )

    def _destroyed(self, place: str) -> bool:
        """Whether there was an object at an address before the run, or was to be, and none was there after it."""
        return any(
            each.place == place and each.action in (*_DESTROYS, Action.CREATE) and not each.left for each in self.deeds
        )

    def words(self, planned: Planned) -> str:
        """What the root is once the way back is done, in words. They name what is not as it was."""
        where = f"as at {self.commit[:8]} ({planned.summary})" if self.commit else "empty again"
        if not self.commit and (left := len(set(planned.before.resources) - set(self.destroy) - set(self.forget))):
            where = f"what was there before toto, {left} resource{'s' if left > 1 else ''}"
        return "; ".join([where, *self._remains(planned)])

    def _remains(self, planned: Planned) -> Iterator[str]:
        anew = {each.address for each in planned.deeds if each.action in _CREATES}
        before = {each.place for each in self.deeds if each.action in _DESTROYS}
        there = planned.before.ids
        # (The last good may be content with the new one, as when only a trigger had it replaced.)
        other = {
            each.place
            for each in self.deeds
            if each.action in _DESTROYS and _gone(each) and there.get(each.address, each.id) not in ("", each.id)
        }
        found: Mapping[str, Iterable[str]] = {
            "created anew, without their old data": (anew & before) | other,
            "destroyed, and not in the last good": {
                each.place
                for each in self.deeds
                if each.action in _DESTROYS and _gone(each) and each.place not in {*anew, *other, *there}
            },
            "no longer where this run created them, so not destroyed": {
                each.address
                for each in self.deeds
                if each.action in _CREATES and each.left not in ("", each.id) and each.address not in there
            },
            "forgotten, and not in the last good": {
                each.address
                for each in self.deeds
                if each.action is Action.FORGET
                and each.address not in there
                and not any(other.imported and other.address == each.address for other in planned.deeds)
            },
            "forgotten again, but as this run changed them": {
                each.address for each in self.deeds if _taken_over(each) and each.action is Action.UPDATE
            },
        }
        for what, addresses in found.items():
            if addresses:
                yield f"{what}: {', '.join(sorted(addresses))}"


async def plan_back(session: Session, way: WayBack) -> Planned:
    """The plan of a way back. Raises `TerraformFailed` (also as `StateLocked`), `CommandTimeout`."""
    if way.commit:
        return await session.plan(back=way.blocks)
    whole = set(way.destroy) == set(way.now.resources)
    destroys = await session.plan(destroy=True, only=() if whole else way.destroy) if way.destroy else None
    return way.with_forgotten(destroys)


async def apply_back(session: Session, way: WayBack, planned: Planned) -> State:
    """Apply the plan of a way back; the state that it leaves. Raises `ApplyFailed`, `StateLocked`, `PlanStale`."""
    if not planned.empty and (way.commit or way.destroy):
        await session.apply(planned)
    if not way.commit and way.forget:
        await session.forget(way.forget)
    return await session.state()


def seen(deeds: Sequence[Deed], now: State) -> tuple[Deed, ...]:
    """The deeds of a run with what is at each address after its apply, of which the state is `now`."""
    return tuple(
        each if each.deposed else each.model_copy(update={"left": now.ids.get(each.address, "")}) for each in deeds
    )


def way_back(
    good: str | None, before: State, deeds: Sequence[Deed] | None, now: State, *, target: str
) -> WayBack | None:
    """How to revert a root whose state was `before` and is `now`; None when nothing was done to it.

    `good` is the commit of its last good, `deeds` what the run was to do; None for one that has not recorded that.
    Raises `CannotGoBack` for a root that existed before toto first deployed it, of which the run has changed something.
    """
    if good is None and (now.serial, now.resources) == (before.serial, before.resources):
        return None
    if good is None and (deeds is None or (changed := [each for each in deeds if _needs_last_good(each, now)])):
        what = (
            "an older version of toto has not recorded what it did"
            if deeds is None
            else "toto had not deployed it before, so toto does not know what this was:\n"
            + "\n".join(map(str, changed))
        )
        raise CannotGoBack(what, target=target)
    return WayBack(good or "", tuple(deeds or ()), now)


def _needs_last_good(deed: Deed, now: State) -> bool:
    """Whether a deed, if it was done, can only be undone with the configuration of a last good."""
    match deed.action:
        case Action.CREATE | Action.IMPORT:
            return False
        case Action.UPDATE:
            return not deed.imported
        case Action.MOVE:
            return deed.was not in now.ids
    return _gone(deed) or deed.place not in now.ids


def _gone(deed: Deed) -> bool:
    """Whether the object that a deed destroys or forgets may be gone: it was not seen there after the apply."""
    return not deed.left or deed.left != deed.id


def _taken_over(deed: Deed) -> bool:
    """Whether a deed has imported an object that is still there."""
    return deed.imported and deed.action is not Action.REPLACE


def _may_be(deed: Deed, id: str) -> bool:
    """Whether an id may be that of the object which a deed has changed."""
    return id == deed.left if deed.left else id == deed.id or deed.id.startswith(HASHED)
