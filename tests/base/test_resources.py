"""Room for things of different sizes side by side."""

import asyncio
from contextlib import AbstractAsyncContextManager

from toto.base.resources import Room


class Things:
    """Things in a room: each stays until it is told to go."""

    def __init__(self, room: Room) -> None:
        self.room, self.there = room, list[str]()
        self.go: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def come(self, name: str, place: AbstractAsyncContextManager[None]) -> None:
        self.go[name] = asyncio.Event()

        async def stay() -> None:
            async with place:
                self.there.append(name)
                await self.go[name].wait()
                self.there.remove(name)

        self.tasks[name] = asyncio.create_task(stay())
        await settled()

    async def leave(self, name: str) -> None:
        self.go[name].set()
        await settled()


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_as_many_are_there_as_fit_and_who_comes_first_goes_first() -> None:
    things = Things(room := Room(100, 3))
    for name, size in (("a", 60), ("b", 60), ("c", 1), ("large", 500)):
        await things.come(name, room.of(size))
    assert things.there == ["a"], "c would fit, and b came first"
    await things.leave("a")
    assert things.there == ["b", "c"]
    await things.leave("b")
    assert things.there == ["c"]
    await things.leave("c")
    assert things.there == ["large"], "one always fits"
    await things.leave("large")
    for name in "wxyz":
        await things.come(name, room.of(1))
    assert things.there == ["w", "x", "y"], "no more than there are cores"


async def test_one_that_is_alone_waits_for_the_others_and_they_for_it() -> None:
    things = Things(room := Room(100, 3))
    await things.come("a", room.of(10))
    await things.come("alone", room.alone())
    await things.come("b", room.of(10))
    assert things.there == ["a"]
    await things.leave("a")
    assert things.there == ["alone"]
    await things.leave("alone")
    assert things.there == ["b"]


async def test_one_that_is_cancelled_leaves_its_room_to_the_next() -> None:
    things = Things(room := Room(100, 3))
    for name in "abc":
        await things.come(name, room.of(90))
    things.tasks["b"].cancel()
    things.tasks["a"].cancel()
    await settled()
    assert things.tasks["a"].cancelled() and things.tasks["b"].cancelled() and things.there[-1] == "c"
