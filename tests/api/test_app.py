"""What a machine is answered, over real TLS, by a server of its own; and what a stranger is."""

import asyncio
import base64
import json
import os
import ssl
import time
from pathlib import Path

import httpx
import pytest

from tests.api.conftest import ADDRESS, Asking, World
from tests.conftest import free_port
from toto.api.run import running_api
from toto.machine import documents, owners
from toto.store import grants

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_a_machine_proves_itself_by_its_host_key_once_for_each_challenge(world: World) -> None:
    async with world.client() as client:
        web1, web2 = world.machines["web1"], world.machines["web2"]
        answer = web1.proof(await world.challenge(client))
        first = await client.post("/session", json=answer)
        assert first.status_code == 200 and len(first.json()["token"]) >= 40
        again = await client.post("/session", json=answer)
        assert (again.status_code, again.text) == (403, "this challenge has been answered\n")

        challenge = await world.challenge(client)
        other = web2.proof(challenge, machine="web1")
        refused = await client.post("/session", json=other)
        assert refused.status_code == 403 and "not signed by the host key of web1" in refused.text
        moved = web1.proof(challenge) | {"machine": "web2"}
        assert (await client.post("/session", json=moved)).status_code == 403
        forged = challenge[:-1] + ("0" if challenge[-1] != "0" else "1")
        refused = await client.post("/session", json=web1.proof(forged))
        assert "not one of this server's" in refused.text
        assert (await client.post("/session", json=web1.proof(challenge))).status_code == 200, "it is still good"


async def test_an_unknown_machine_is_told_what_to_do_and_is_never_learnt(world: World, tmp_path: Path) -> None:
    stranger = Asking("web9", tmp_path / "keys")
    before = owners.file().read_bytes()
    async with world.client() as client:
        for says in ({}, {"machine": "web1", "repo": "other"}):
            refused = await client.post("/session", json=stranger.proof(await world.challenge(client), **says))
            assert refused.status_code == 403 and "ssh.host_key" in refused.text and "machines.yaml" in refused.text
    assert owners.file().read_bytes() == before
    assert not world.place("web9").told.exists() and not world.place("web9").said.exists()


@pytest.mark.parametrize("token", ["", "x", "Bearer", f"Bearer {'A' * 43}", "Basic !!!", "Basic eDp5"])
async def test_nothing_is_given_without_a_token(world: World, token: str) -> None:
    documents.publish(world.repo, "web1", b"{}")
    async with world.client() as client:
        for path in ("/document", "/cache/nix-cache-info"):
            refused = await client.get(path, headers={"Authorization": token})
            assert refused.status_code == 401 and refused.headers["www-authenticate"].startswith("Basic")
        assert (await client.post("/reports", content=b"{}", headers={"Authorization": token})).status_code == 401


async def test_a_machine_gets_its_own_document_and_waits_for_the_next(world: World) -> None:
    async with world.client() as client:
        mine, theirs = await world.token(client), await world.token(client, "web2")
        assert (await client.get("/document", headers=mine)).status_code == 304, "nothing is published"
        documents.publish(world.repo, "web1", b'{"text": "1"}')
        got = await client.get("/document", headers=mine)
        assert (got.status_code, got.content) == (200, b'{"text": "1"}')
        assert (await client.get("/document", headers=theirs)).status_code == 304
        has = mine | {"If-None-Match": got.headers["etag"]}
        began = time.monotonic()
        assert (await client.get("/document?wait=1", headers=has)).status_code == 304
        assert 0.9 < time.monotonic() - began < 15
        waiting = asyncio.create_task(client.get("/document?wait=60", headers=has))
        await asyncio.sleep(0.5)
        documents.publish(world.repo, "web2", b'{"text": "theirs"}')
        await asyncio.sleep(0.5)
        assert not waiting.done(), "what is published for a different machine is nothing to it"
        began = time.monotonic()
        documents.publish(world.repo, "web1", b'{"text": "2"}')
        assert (await waiting).content == b'{"text": "2"}'
        assert time.monotonic() - began < 30
        assert time.time() - documents.contact(world.place()) < 30


async def test_toto_asks_for_a_report_by_a_word(world: World) -> None:
    async with world.client() as client:
        headers = await world.token(client)
        waiting = asyncio.create_task(client.get("/document?wait=60", headers=headers))
        await asyncio.sleep(0.3)
        word = documents.ask(world.repo, "web1")
        got = await waiting
        assert (got.status_code, got.headers["toto-ask"]) == (304, word)
        began = time.monotonic()
        assert (await client.get(f"/document?wait=1&asked={word}", headers=headers)).status_code == 304
        assert time.monotonic() - began > 0.9, "it has been told"


async def test_reports_are_kept_once_and_within_bounds(world: World) -> None:
    web1 = world.machines["web1"]
    async with world.client() as client:
        headers = await world.token(client)
        report = web1.sealed(web1.report())
        for status in (201, 200):
            assert (await client.post("/reports", content=report, headers=headers)).status_code == status
        for wrong in (
            b"",
            b"\0" * 5_000,
            web1.sealed(web1.report(machine="web2")),
            json.dumps({"text": "{}", "signature": ""}).encode(),
            json.dumps({"text": "[" * 5_000, "signature": ""}).encode(),
        ):
            assert (await client.post("/reports", content=wrong, headers=headers)).status_code == 400
        huge = await client.post("/reports", content=b"x" * 1_000_000, headers=headers)
        assert huge.status_code == 413
        numbers = [web1.report().number for _ in range(documents.KEPT + 5)]
        template = json.loads(report)
        for number in numbers:
            text = web1.report(number=number).write().decode()
            envelope = json.dumps(template | {"text": text}).encode()
            assert (await client.post("/reports", content=envelope, headers=headers)).status_code == 201
    assert documents.numbers(world.place()) == numbers[-documents.KEPT :]
    found = documents.Reports(world.repo, "web1", [web1.host_key])
    assert found.read() == [], "the server keeps what it cannot verify, and who reads it does not believe it"


async def test_the_cache_is_the_machines_own_and_nothing_else(world: World, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    for name in ("web1", "web2"):
        cache = grants.of(world.place(name).folder, name)
        (cache / "nar").mkdir(parents=True)
        (cache / "nix-cache-info").write_text("StoreDir: /nix/store\n")
        (cache / f"{name[-1] * 32}.narinfo").write_text(name)
        (cache / "nar" / f"{name[-1] * 52}.nar.zst").write_bytes(os.urandom(1_000_000))
    cache = grants.of(world.place().folder, "web1")
    (cache / f"{'a' * 32}.narinfo").symlink_to(secret)
    (cache / f"{'b' * 32}.narinfo").mkdir()
    os.mkfifo(cache / f"{'c' * 32}.narinfo")
    async with world.client() as client:
        token = (await world.token(client))["Authorization"].removeprefix("Bearer ")
        basic = {"Authorization": "Basic " + base64.b64encode(f"toto:{token}".encode()).decode()}
        assert (await client.get("/cache/nix-cache-info", headers=basic)).text.startswith("StoreDir")
        assert (await client.get(f"/cache/{'1' * 32}.narinfo", headers=basic)).text == "web1"
        nar = f"/cache/nar/{'1' * 52}.nar.zst"
        assert (await client.get(nar, headers=basic)).content == (cache / "nar" / f"{'1' * 52}.nar.zst").read_bytes()
        head = await client.head(nar, headers=basic)
        assert (head.headers["content-length"], head.content) == ("1000000", b"")
        assert (await client.post(nar, headers=basic)).status_code == 405
        for name in (
            *(f"{each * 32}.narinfo" for each in "2abc"),
            *(
                "../document",
                "..%2fdocument",
                "%2e%2e/document",
                "nar/../../document",
                "nar/",
                "nar",
                "",
                "/etc/passwd",
            ),
            *("..%5cdocument", "nix-cache-info%00", "nix-cache-info/", "./nix-cache-info", "NIX-CACHE-INFO"),
            *(f"nar/{'1' * 52}.nar.zst/..", f"nar/{'1' * 52}.nar.zst\n", f"%2e/{'1' * 32}.narinfo"),
        ):
            answer = await _raw(world, f"/cache/{name}", basic)
            assert answer.startswith((b"HTTP/1.1 404", b"HTTP/1.1 400")), (name, answer[:80])
            assert b"secret" not in answer and b"web2" not in answer


async def _raw(world: World, target: str, headers: dict[str, str]) -> bytes:
    """The answer to a request whose target no client has tidied up."""
    context = ssl.create_default_context(cafile=str(world.ca))
    reader, writer = await asyncio.open_connection(ADDRESS, world.port, ssl=context)
    lines = [f"GET {target} HTTP/1.1", f"Host: {ADDRESS}", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    writer.write("\r\n".join([*lines, "", ""]).encode())
    async with asyncio.timeout(120):
        answer = await reader.read()
    writer.close()
    return answer


async def test_a_token_ends_when_the_machine_moves_or_its_key_changes(world: World) -> None:
    async with world.client() as client:
        headers = await world.token(client, "web2")
        assert (await client.get("/document", headers=headers)).status_code == 304
        known = owners.read()
        changed = known.machines["web2"].model_copy(update={"host_keys": (world.machines["web1"].host_key,)})
        before = owners.file().read_text()
        owners._write(known, {**known.machines, "web2": changed})
        try:
            assert (await client.get("/document", headers=headers)).status_code == 401
        finally:
            owners.file().write_text(before)
            owners.make_known(known)


@pytest.mark.parametrize(
    ("here", "said"),
    [
        ("127.0.0.1", "198.51.100.{}, 192.0.2.7"),  # a proxy of this machine's adds the address to what the client said
        ("127.0.0.9", "198.51.100.{}"),  # nobody but the proxy is believed
    ],
)
async def test_who_fails_too_often_waits_and_nobody_else_does(
    world: World, tmp_path: Path, here: str, said: str
) -> None:
    stranger = Asking("web1", tmp_path / "keys")
    async with world.client() as client, world.client(here) as strangers:
        proof = stranger.proof(await world.challenge(client))
        seen = []
        for each in range(22):
            headers = {"X-Forwarded-For": said.format(each)}
            seen.append((await strangers.post("/session", json=proof, headers=headers)).status_code)
        assert seen == [403] * 20 + [429] * 2
        await world.token(client)


async def test_nothing_secret_is_logged(world: World) -> None:
    async with world.client() as client:
        headers = await world.token(client)
        await client.get("/document", headers=headers)
    said = (world.folder / "api.log").read_text()
    assert headers["Authorization"].removeprefix("Bearer ") not in said and "SSH SIGNATURE" not in said
    assert "GET" not in said, "there is no access log"


async def test_a_server_that_is_told_to_stop_lets_those_go_who_wait(world: World) -> None:
    port, log = free_port(), world.folder / "stopped.log"
    async with running_api(log, host=ADDRESS, port=port) as server, world.client() as client:
        client.base_url = httpx.URL(f"https://{ADDRESS}:{port}")
        client.headers["Connection"] = "close"  # as agents do
        headers = await world.token(client)
        waiting = asyncio.create_task(client.get("/document?wait=60", headers=headers))
        await asyncio.sleep(0.3)
        began = time.monotonic()
        await server.end(grace=10)
        assert (await waiting).status_code == 304
        assert time.monotonic() - began < 30
    assert log.read_text() == ""


@pytest.mark.slow  # (it waits)
async def test_a_client_that_never_asks_is_sent_away(world: World) -> None:
    context = ssl.create_default_context(cafile=str(world.ca))
    reader, writer = await asyncio.open_connection(ADDRESS, world.port, ssl=context)
    writer.write(b"GET /document HTTP/1.1\r\nHost: x\r\nX-Slow: ")
    async with asyncio.timeout(120):
        assert await reader.read() == b""
    writer.close()


async def test_a_machine_that_does_not_trust_the_authority_does_not_talk(world: World) -> None:
    async with httpx.AsyncClient(base_url=world.url) as client:
        with pytest.raises(httpx.ConnectError, match="certificate"):
            await client.post("/challenge")
