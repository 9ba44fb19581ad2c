"""The server's cell: what somebody who has taken it over can do, and what toto makes of what is left there."""

import asyncio
import json
import os
import signal
import socket
import time
from pathlib import Path
from typing import Final

import httpx
import pytest

from tests.api.conftest import ADDRESS, World
from tests.conftest import free_port
from toto.api import certificate, run
from toto.base import paths, process
from toto.base.prefect_api import ServerError
from toto.cell.cell import python
from toto.machine import documents, keys
from toto.server import serve

pytestmark = pytest.mark.asyncio(loop_scope="module")

# It runs where the server does. Each line of what it prints is a thing that it could do.
_TRIES: Final = r"""
import os, socket, subprocess, sys
from pathlib import Path
secret, port, told, repo = sys.argv[1:]

def can(what, do):
    try:
        do()
    except Exception:
        return
    print(what)

def connect():
    socket.create_connection(("127.0.0.1", int(port)), 2)

def abstract():
    socket.socket(socket.AF_UNIX).connect("\0" + secret)

can("read a key", lambda: Path(secret).read_bytes())
can("list toto's state", lambda: os.listdir(Path(secret).parents[1]))
can("see keys", lambda: os.listdir("/state/keys"))
can("see the authority's key", lambda: os.listdir("/state/api").index("ca.key"))
can("connect to toto", connect)
can("connect to a socket without a file", abstract)
can("write a document", lambda: (Path("/state/api/told") / repo / "web1/document").write_text("mine"))
can("write beside it", lambda: (Path("/state/api/told") / repo / "web1/mine").write_text("mine"))
can("know a machine", lambda: Path("/state/api/told/known.json").write_text("{}"))
can("change its own code", lambda: Path(__import__("toto.api.app").__file__).with_name("more.py").write_text(""))
can("see other processes", lambda: [1 for each in os.listdir("/proc") if each.isdigit() and int(each) > 20][0])
can("be root of a user namespace", lambda: subprocess.run(["unshare", "--user", "true"], check=True))
can("read what is told", lambda: (Path("/state/api/told") / repo / "web1/document").read_bytes())
can("read its own TLS", lambda: Path("/state/api/tls/tls.key").read_bytes())
can("write what is said", lambda: Path("/state/api/said/mine").write_text("mine"))
"""


async def test_who_takes_it_over_reaches_what_it_serves_and_nothing_else(world: World) -> None:
    secret = await keys.of_machines(world.repo)
    documents.publish(world.repo, "web1", b"{}")
    cell, env = await run._cell([ADDRESS])
    words, _ = python()
    with socket.create_server((ADDRESS, 0)) as listener, socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind(f"\0{secret}")
        abstract.listen()
        told = [str(secret), str(listener.getsockname()[1]), str(documents.told()), world.place().folder]
        done = await process.run(["env", *words, "-c", _TRIES, *told], cell=cell, env=env, timeout=60)
    expected = ["read what is told", "read its own TLS", "write what is said"]
    assert done.lines == expected, done.stderr


async def test_the_server_runs_in_that_cell(world: World) -> None:
    async with world.client() as client:
        await world.challenge(client)
    inside = [
        each
        for each in process.descendants(os.getpid())
        if b"toto.api" in Path(f"/proc/{each}/cmdline").read_bytes().split(b"\0") and _is_python(each)
    ]
    assert inside
    for pid in inside:
        for kind in ("net", "user", "pid", "mnt"):
            assert Path(f"/proc/{pid}/ns/{kind}").readlink() != Path(f"/proc/self/ns/{kind}").readlink()
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        assert (status["CapEff"].strip(), status["NoNewPrivs"].strip()) == ("0" * 16, "1")
        env = dict(each.split(b"=", 1) for each in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") if each)
        assert env[b"TOTO_STATE"] == b"/state" and not any(name.startswith(b"PREFECT") for name in env)


def _is_python(pid: int) -> bool:
    try:
        return "python" in Path(f"/proc/{pid}/exe").readlink().name
    except OSError:  # it has just ended
        return False


async def test_what_a_server_that_was_taken_over_leaves_is_read_as_a_strangers(world: World, tmp_path: Path) -> None:
    web1, place = world.machines["web1"], world.place()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "0000000000000001.json").write_bytes(web1.sealed(web1.report(number=1)))
    place.said.parent.mkdir(parents=True, exist_ok=True)

    def reports() -> list[int]:
        found = documents.Reports(world.repo, "web1", [web1.host_key])
        return [each.number for each in found.read()]

    place.said.symlink_to(elsewhere)
    (elsewhere / "contact").write_text("")
    assert documents.contact(place) == 0 and documents.numbers(place) == []
    place.said.unlink()
    place.said.mkdir()
    (place.said / "reports").symlink_to(elsewhere)
    (place.said / "contact").symlink_to(elsewhere / "contact")
    assert documents.contact(place) == 0 and documents.numbers(place) == []
    (place.said / "reports").unlink()
    (place.said / "reports").mkdir()
    good = paths.private_folder(place.said / "reports") / "0000000000000002.json"
    good.write_bytes(web1.sealed(web1.report(number=2)))
    (place.said / "reports/0000000000000003.json").symlink_to(good)
    os.mkfifo(place.said / "reports/0000000000000004.json")
    with (place.said / "reports/0000000000000005.json").open("wb") as huge:
        huge.truncate(1 << 40)
    (place.said / "reports/0000000000000006.json").write_bytes(b"[" * 60_000)
    (place.said / "reports/0000000000000007.json").mkdir()
    began = time.monotonic()
    assert await asyncio.to_thread(reports) == [2]
    assert time.monotonic() - began < 20
    for number in range(2_000):
        (place.said / f"reports/9{number:015d}.json").write_text(json.dumps({"text": "{}", "signature": "x"}))
    found = documents.Reports(world.repo, "web1", [web1.host_key])
    for _ in range(20):
        assert found.read() == []
    assert len(found._forged) <= documents._FORGED + documents.KEPT
    # They are gone then, and a later run hears the machine again.
    for _ in range(40):
        documents.Reports(world.repo, "web1", [web1.host_key]).read()
    good.write_bytes(web1.sealed(web1.report(number=2)))
    assert await asyncio.to_thread(reports) == [2]


async def test_a_machine_that_is_forgotten_takes_nothing_else_along(world: World, tmp_path: Path) -> None:
    place = world.place()
    documents.publish(world.repo, "web1", b"{}")
    other = tmp_path / "other/web1"
    other.mkdir(parents=True)
    (other / "mine").write_text("mine")
    place.said.mkdir(parents=True, exist_ok=True)
    (place.said / "reports").symlink_to(other)
    documents.forget(world.repo, "web1")
    assert not place.told.exists() and not place.said.exists() and (other / "mine").exists()
    place.said.symlink_to(other)
    documents.forget(world.repo, "web1")
    assert not place.said.is_symlink() and (other / "mine").exists()
    aside = place.said.parent.with_name("aside")
    place.said.parent.rename(aside)
    place.said.parent.symlink_to(other.parent)
    documents.forget(world.repo, "web1")
    assert (other / "mine").exists(), "no link is followed on the way either"
    place.said.parent.unlink()
    aside.rename(place.said.parent)


async def test_two_who_ask_a_machine_at_once_are_both_answered(world: World) -> None:
    place = world.place()
    first = documents.ask(world.repo, "web1")
    assert documents.answers(place, first) == {first}
    second = documents.ask(world.repo, "web1")
    assert documents.asked(place) == second, "the machine is told the newest"
    assert documents.answers(place, first) == {first, second} and documents.answers(place, second) == {second}
    for _ in range(documents._WORDS):
        last = documents.ask(world.repo, "web1")
    assert last in documents.answers(place, first) and second not in documents.answers(place, first)
    assert documents.answers(place, last) == {last}


async def test_a_port_that_is_taken_is_told(world: World, tmp_path: Path) -> None:
    with pytest.raises(run.ApiFailed, match=rf"{ADDRESS}, port {world.port}, cannot be listened to: Address already"):
        async with run.running_api(tmp_path / "log", host=ADDRESS, port=world.port):
            pass


async def test_a_server_that_ends_is_started_again(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "AGAIN", 0.1)
    port, log = free_port(), tmp_path / "log"

    def inside() -> list[int]:
        own = [each for each in process.descendants(os.getpid()) if f"{log}" in _output(each)]
        return [each for each in own if _is_python(each)]

    async with serve._asked(serve.Machines(ADDRESS, port), log):
        (first,) = inside()
        os.kill(first, signal.SIGKILL)
        async with asyncio.timeout(60):
            while not (now := inside()) or now == [first]:
                await asyncio.sleep(0.1)
        async with world.client() as client:
            client.base_url = httpx.URL(f"https://{ADDRESS}:{port}")
            async with asyncio.timeout(60):
                while True:
                    try:
                        await world.challenge(client)
                        break
                    except httpx.TransportError:
                        await asyncio.sleep(0.1)
    assert inside() == []
    with pytest.raises(run.ApiFailed):
        async with serve._asked(serve.Machines(ADDRESS, world.port), log):
            pass


def _output(pid: int) -> str:
    try:
        return str(Path(f"/proc/{pid}/fd/2").readlink())
    except OSError:
        return ""


async def test_what_a_server_that_was_taken_over_has_left_does_not_keep_the_next_one_down(world: World) -> None:
    web1, place = world.machines["web1"], world.place()
    documents.publish(world.repo, "web1", b"{}")
    for folder in (place.told, place.told.parent):
        folder.chmod(0o700)  # as a restore makes them
    (place.told / "document").chmod(0o600)
    reports = place.said / "reports"
    reports.mkdir(parents=True)
    for number in range(documents.KEPT + 5):
        (reports / f"{number:016d}.json").write_bytes(web1.sealed(web1.report(number=number)) if number > 60 else b"")
    (reports / "mine").write_text("mine")
    for each in ("contact", documents.FETCHED):
        (place.said / each).write_text("")
    for stray in (place.said / "mine", place.said.parent / "web9/reports", documents.said() / "other/web1"):
        stray.mkdir(parents=True)
    await run._cell([ADDRESS])
    assert sorted(each.name for each in place.said.iterdir()) == ["contact", documents.FETCHED, "reports"]
    assert len(list(reports.iterdir())) == documents.KEPT and not (reports / "mine").exists()
    assert [each.name for each in place.said.parent.iterdir()] == ["web1"]
    assert [each.name for each in documents.said().iterdir()] == [place.folder]
    assert {each.stat().st_mode & 0o777 for each in (place.told, place.told.parent)} == {0o755}
    assert (place.told / "document").stat().st_mode & 0o777 == 0o644


async def test_a_time_that_a_stranger_has_set_is_no_time_to_come(world: World) -> None:
    place = world.place()
    documents.note_contact(place)
    os.utime(place.said / "contact", (2**33, 2**33))
    assert documents.contact(place) <= time.time()
    os.utime(place.said / "contact", (-5, -5))
    assert documents.contact(place) == 0


async def test_names_that_no_certificate_can_have_are_refused_and_any_error_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ServerError, match="neither a host name nor an address"):
        serve.Machines.of("127.0.0.1", ["bücher.example"])

    def broken(*_: object) -> None:
        raise ValueError("a broken file")

    monkeypatch.setattr(certificate, "own", broken)
    with pytest.raises(ValueError, match="a broken file"):
        async with asyncio.timeout(120), serve._asked(serve.Machines(ADDRESS, free_port()), tmp_path / "log"):
            pass
