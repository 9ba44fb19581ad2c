"""The web application that machines ask.

    POST /challenge                  a word to sign
    POST /session                    a token, for {"repo", "machine", "challenge", "signature"}
    GET  /document?wait=S&asked=W    the newest document, once it is not the one of If-None-Match; 304 after S seconds
    POST /reports                    takes a signed report
    GET  /cache/…                    a nix binary cache of what the machine may fetch

All but the first two need the token, as a bearer's or as a basic password (for nix's netrc). A `Toto-Ask` header with
a document has the word that toto's next report should repeat.
"""

import asyncio
import base64
import binascii
import contextlib
import hashlib
import json
import logging
import os
import re
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Final, TypeAlias

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from flying_monkey import report
from flying_monkey.report import BadReport
from flying_monkey.signature import NotGenuine
from toto.api.published import Published
from toto.api.sessions import NotProven, Session, Sessions
from toto.base.errors import TotoError
from toto.machine import documents
from toto.machine.fetched import Counting
from toto.store import grants

log = logging.getLogger(__name__)

LONGEST: Final = 300.0  # seconds that a machine may wait for a document
_BODY: Final = 2 * report.MOST  # bytes; JSON escapes what it holds
_ARRIVES: Final = 15.0  # seconds for a whole body
_STREAM: Final = 3_600.0  # seconds for one file of the cache
_STREAMS: Final = 32  # files at once for one machine; nix asks for 25
_CHUNK: Final = 262_144  # bytes
_FILE: Final = re.compile(r"nix-cache-info|[0-9a-df-np-sv-z]{32}\.narinfo|nar/[0-9a-df-np-sv-z]{52}\.nar(?:\.zst)?")
_ABOUT: Final = "nix-cache-info"
_KINDS: Final = {"narinfo": "text/x-nix-narinfo", _ABOUT: "text/x-nix-cache-info"}
_WORD: Final = re.compile(r"[A-Za-z0-9._-]{1,128}")

Handler: TypeAlias = Callable[[Request, Session], Awaitable[Response]]


class _Refused(Exception):
    """A request gets this status and text instead of an answer."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


def create_app(sessions: Sessions | None = None) -> Starlette:
    """The application; `sessions` are its own unless given."""
    server = _Server(sessions or Sessions())

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        beside = [asyncio.create_task(each) for each in (server.published.watch(), server.counting.keep())]
        try:
            yield
        finally:
            for each in beside:
                each.cancel()
            await asyncio.gather(*beside, return_exceptions=True)

    app = Starlette(
        routes=[
            Route("/challenge", _told(server.challenge), methods=["POST"]),
            Route("/session", _told(server.session), methods=["POST"]),
            Route("/document", _told(server.proven(server.document)), methods=["GET"]),
            Route("/reports", _told(server.proven(server.reports)), methods=["POST"]),
            Route("/cache/{file:path}", _told(server.proven(server.cache)), methods=["GET", "HEAD"]),
        ],
        lifespan=lifespan,
    )
    app.state.published = server.published
    return app


def _told(handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """The handler, with every refusal as a plain answer. What is not expected is logged without the request's words."""

    async def answer(request: Request) -> Response:
        try:
            return await handler(request)
        except _Refused as refused:
            headers = {"WWW-Authenticate": 'Basic realm="toto"'} if refused.status == 401 else {}
            return PlainTextResponse(str(refused), refused.status, headers | {"Connection": "close"})
        except ClientDisconnect:
            return Response(status_code=400)
        except (OSError, TotoError) as error:
            log.error("%s %s: %s", request.method, request.url.path[:80], error)
            return PlainTextResponse("toto cannot answer this just now\n", 503)

    return answer


class _Server:
    def __init__(self, sessions: Sessions) -> None:
        self.sessions, self.published, self.counting = sessions, Published(), Counting()

    async def challenge(self, request: Request) -> Response:
        """A word to sign."""
        return Response(json.dumps({"challenge": self.sessions.challenge()}), media_type="application/json")

    async def session(self, request: Request) -> Response:
        """A token for a machine that has signed a challenge."""
        address = request.client.host if request.client else ""
        if not self.sessions.may_try(address):
            raise _Refused(429, "too many proofs from this address: wait a minute\n")
        try:
            found = json.loads(await _body(request))
            asked = [found[each] for each in ("repo", "machine", "challenge", "signature")]
            if not all(isinstance(each, str) for each in asked) or not all(map(_WORD.fullmatch, asked[:3])):
                raise ValueError
        except (ValueError, LookupError, TypeError, RecursionError):
            self.sessions.note_failure(address)
            raise _Refused(400, "a proof is an object of repo, machine, challenge and signature\n") from None
        repo, machine, challenge, signed = asked
        try:
            token = await self.sessions.prove(repo, machine, challenge, signed.encode(), address)
        except NotProven as error:
            self.sessions.note_failure(address)
            log.warning("%s of %s, at %s, was refused: %s", machine, repo, address, str(error).partition("\n")[0])
            raise _Refused(403, str(error)) from None
        return Response(json.dumps({"token": token}), media_type="application/json")

    def proven(self, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
        """A handler for machines that have proven themselves."""

        async def answer(request: Request) -> Response:
            session = self.sessions.session(_token(request))
            if session is None:
                raise _Refused(401, "prove who you are: /challenge, /session\n")
            documents.note_contact(session.place)
            return await handler(request, session)

        return answer

    async def document(self, request: Request, session: Session) -> Response:
        """The newest document, once it is not the one that the machine has; 304 when that takes too long."""
        has, asked = request.headers.get("if-none-match", ""), request.query_params.get("asked", "")
        deadline = asyncio.get_running_loop().time() + _seconds(request.query_params.get("wait", "0"))
        seen: tuple[int, ...] | None = None
        gone = asyncio.create_task(_gone(request.receive))
        try:
            while True:
                now = _changes(session.place)
                if now != seen:
                    seen = now
                    envelope, word = documents.published(session.place), documents.asked(session.place)
                    tag = f'"{hashlib.sha256(envelope).hexdigest()}"' if envelope is not None else '""'
                    headers = {"ETag": tag, "Cache-Control": "no-store"} | ({"Toto-Ask": word} if word else {})
                    if envelope is not None and tag != has:
                        return Response(envelope, headers=headers, media_type="application/json")
                    if word and word != asked:
                        return Response(status_code=304, headers=headers)
                left = deadline - asyncio.get_running_loop().time()
                if left <= 0 or gone.done() or self.published.ended:
                    documents.note_contact(session.place)
                    return Response(status_code=304, headers=headers)
                change = asyncio.create_task(self.published.change(left))
                await asyncio.wait((change, gone), return_when=asyncio.FIRST_COMPLETED)
                change.cancel()
        finally:
            gone.cancel()

    async def reports(self, request: Request, session: Session) -> Response:
        """Keep a report."""
        try:
            fresh = documents.take(session.place, session.repo, session.machine, await _body(request))
        except (BadReport, NotGenuine) as error:
            raise _Refused(400, f"this is no report: {error}\n") from None
        return Response(status_code=201 if fresh else 200)

    async def cache(self, request: Request, session: Session) -> Response:
        """A file of what the machine may fetch, and of nothing else."""
        name = request.path_params["file"]
        if _FILE.fullmatch(name) is None or session.streams >= _STREAMS:
            raise _Refused(429 if session.streams >= _STREAMS else 404, "no such file\n")
        opened = _open(grants.of(session.place.folder, session.place.machine), name)
        if opened is None:
            self.counting.note(session.place, misses=int(name != _ABOUT))
            raise _Refused(404, "no such file\n")

        def got(sent: int, *, whole: bool) -> None:
            self.counting.note(session.place, hits=int(whole and name != _ABOUT), sent=sent)

        kind = _KINDS.get(name.rpartition(".")[2], "application/x-nix-nar")
        return _File(opened, session, kind, got)


class _File(Response):
    """An open file, as it is; it is closed when the machine has it, or does not want it any more.

    Then `got` is told how many bytes of it the machine has got, and whether that is all.
    """

    def __init__(self, opened: int, session: Session, kind: str, got: Callable[..., None]) -> None:
        self.opened, self.session, self.size = opened, session, os.fstat(opened).st_size
        self.got = got
        super().__init__(headers={"Content-Length": str(self.size)}, media_type=kind)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it: as many bytes as were announced."""
        gone = asyncio.create_task(_gone(receive))
        self.session.streams += 1
        left = length = 0 if scope["method"] == "HEAD" else self.size
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async with asyncio.timeout(_STREAM):
                while left > 0 and not gone.done():
                    documents.note_contact(self.session.place)
                    data = await asyncio.to_thread(os.read, self.opened, min(_CHUNK, left))
                    if not data:
                        break
                    await send({"type": "http.response.body", "body": data, "more_body": True})
                    left -= len(data)
            if not gone.done():
                await send({"type": "http.response.body", "body": b""})
        finally:
            gone.cancel()
            self.session.streams -= 1
            os.close(self.opened)
            self.got(length - left, whole=left == 0)


def _open(cache: Path, name: str) -> int | None:
    """A regular file below `cache`, opened without following any link; None when there is none."""
    folder, _, file = name.rpartition("/")
    place: int | None = None
    try:
        place = os.open(cache / folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        opened = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=place)
    except OSError:
        return None
    finally:
        if place is not None:
            os.close(place)
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        os.close(opened)
        return None
    return opened


def _changes(place: documents.Place) -> tuple[int, ...]:
    """What differs when the document, or what toto asks, has changed."""
    found: list[int] = []
    for name in ("document", "ask"):
        with contextlib.suppress(OSError):
            seen = (place.told / name).stat()
            found += [seen.st_ino, seen.st_mtime_ns]
        found.append(0)
    return tuple(found)


async def _gone(receive: Receive) -> None:
    """Wait until the machine has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _body(request: Request) -> bytes:
    body = b""
    try:
        async with asyncio.timeout(_ARRIVES):
            async for chunk in request.stream():
                body += chunk
                if len(body) > _BODY:
                    raise _Refused(413, f"at most {_BODY} bytes\n")
    except TimeoutError:
        raise _Refused(408, f"the request did not arrive within {_ARRIVES:.0f} s\n") from None
    return body


def _token(request: Request) -> str:
    kind, _, word = request.headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        return word.strip()
    if kind.lower() == "basic":
        with contextlib.suppress(binascii.Error, ValueError):
            return base64.b64decode(word.strip(), validate=True).decode().partition(":")[2]
    return ""


def _seconds(text: str) -> float:
    return min(float(text), LONGEST) if re.fullmatch(r"[0-9]{1,5}", text, re.ASCII) else 0.0
