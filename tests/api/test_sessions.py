"""Tokens and challenges end in time, by a clock that the tests move."""

from pathlib import Path

import pytest

from tests.api.conftest import World
from tests.repos import git
from toto.api.sessions import ANSWER, IDLE, LONGEST, NotProven, Sessions


@pytest.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setenv("TOTO_STATE", str(tmp_path / "state"))
    git("init", "--quiet", "--bare", "infra.git", cwd=tmp_path)
    made = World(tmp_path, tmp_path / "infra.git", 0)
    await made.claim("web1", 1)
    return made


class Clock:
    now = 5_000.0

    def __call__(self) -> float:
        return self.now


async def token(sessions: Sessions, world: World, later: float = 0) -> str:
    challenge = sessions.challenge()
    assert isinstance(sessions.clock, Clock)
    sessions.clock.now += later
    signed = world.machines["web1"].proof(challenge)["signature"].encode()
    return await sessions.prove("infra", "web1", challenge, signed)


async def test_a_challenge_is_good_for_two_minutes_and_for_this_process(world: World) -> None:
    sessions = Sessions(clock=Clock())
    await token(sessions, world, ANSWER)
    with pytest.raises(NotProven, match="too old"):
        await token(sessions, world, ANSWER + 2)
    challenge = Sessions().challenge()
    signed = world.machines["web1"].proof(challenge)["signature"].encode()
    with pytest.raises(NotProven, match="not one of this server's"):
        await sessions.prove("infra", "web1", challenge, signed)


async def test_a_token_ends_when_it_is_not_used_and_in_the_end(world: World) -> None:
    clock = Clock()
    sessions = Sessions(clock=clock)
    word = await token(sessions, world)
    clock.now += IDLE - 1
    assert sessions.session(word)
    clock.now += IDLE + 1
    assert sessions.session(word) is None
    word, began = await token(sessions, world), clock.now
    while clock.now <= began + LONGEST:
        assert sessions.session(word)
        clock.now += IDLE - 1
    assert sessions.session(word) is None
