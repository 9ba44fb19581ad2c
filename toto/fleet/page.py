"""The page of the fleet, as a web application for Prefect's server: behind the same password, and read-only.

    GET /                        every target, and the newest runs
    GET /log                     the newest of what happened, as JSON: repo, target, since, author, most
    GET /REPO/builds             what was built: commits by hosts
    GET /REPO/jobs               its jobs; /REPO/jobs/JOB.json and .svg are one's state and badge
    GET /REPO/KIND/NAME          one target: its history, closure, tests and console
    GET /events                  server-sent events: an empty one for each change

A page is plain HTML, and works without JavaScript; with it, it follows the fleet. `Accept: application/json`, or
`?format=json`, gives the same as JSON. What targets and runs say is text of strangers': templates escape it, and no
script but the page's own may run (Content-Security-Policy).
"""

import asyncio
import base64
import binascii
import json
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Final

from fastapi import FastAPI
from jinja2 import Environment, PackageLoader
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

from toto.base.errors import TotoError
from toto.fleet import artifacts, jobs
from toto.fleet.state import Fleet, Line
from toto.fleet.words import ago, clean, lasted, size
from toto.ledger import history
from toto.ledger.target import HOST, Target
from toto.nix import commands as nix

PLACE: Final = "/fleet"
_EVENTS: Final = 1000  # that one request may ask for
_LISTENERS: Final = 64  # pages that follow the fleet at once
_LOOK: Final = 2.0  # seconds between two looks for them
_QUIET: Final = 20.0  # seconds after which a word is sent that says nothing: proxies close what is silent
_PHASES: Final = ("no-internet", "with-internet", "smoke", "post-switch")
_FENCE: Final = re.compile(r"\A(`{3,})\w*\n(.*)\n\1\Z", re.DOTALL)
_POLICY: Final = "; ".join(
    [
        "default-src 'none'",
        *("style-src 'self'", "script-src 'self'", "connect-src 'self'", "img-src 'self'"),
        *("base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"),
    ]
)
_HEADERS: Final = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def create_page(fleet: Fleet, *, auth: str | None, grafana: str = "") -> Starlette:
    """The application. `auth` is "user:password"; `grafana` the address of a Grafana with toto's dashboards."""
    page = _Page(fleet, grafana)
    app = Starlette(
        routes=[
            Route("/", page.fleet),
            Route("/events", page.events),
            Route("/log", page.log),
            Mount("/-/static", StaticFiles(packages=[("toto.fleet", "static")])),
            Route("/{repo}/builds", page.builds),
            Route("/{repo}/jobs", page.jobs),
            Route("/{repo}/jobs/{job}.svg", page.badge),
            Route("/{repo}/jobs/{job}.json", page.job),
            Route("/{repo}/{kind}/{name}", page.target),
        ]
    )
    app.add_middleware(_Locked, auth=auth, public=page.is_public)
    return app


def install(app: FastAPI, page: Starlette) -> None:
    """Have `app` answer with the page below `PLACE`, before anything of its own."""
    app.router.routes[:0] = [Route(PLACE, _entrance), Mount(PLACE, page)]


async def _entrance(_: Request) -> Response:
    return RedirectResponse(f"{PLACE}/")


class _Locked:
    """Asks for the password, but for what is `public`. Every answer has the headers of a page that runs nothing."""

    def __init__(self, app: ASGIApp, auth: str | None, public: Callable[[str], Awaitable[bool]]) -> None:
        self.app, self.auth, self.public = app, auth, public

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                own = [(name.lower().encode(), value.encode()) for name, value in _HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", ()), *own]}
            await send(message)

        known = self.auth is None or secrets.compare_digest(_given(Request(scope)), self.auth.encode())
        if not known and not await self.public(scope["path"]):
            asked = {"WWW-Authenticate": 'Basic realm="toto", charset="UTF-8"'}
            text = "the password of toto's UI, please (`toto password` prints it)\n"
            await PlainTextResponse(text, 401, asked)(scope, receive, with_headers)
            return
        await self.app(scope, receive, with_headers)


def _given(request: Request) -> bytes:
    kind, _, word = request.headers.get("authorization", "").partition(" ")
    with suppress(binascii.Error, ValueError):
        if kind.lower() == "basic":
            return base64.b64decode(word.strip(), validate=True)
    return b""


class _Page:
    def __init__(self, fleet: Fleet, grafana: str) -> None:
        self.state, self.grafana, self.listeners = fleet, grafana, 0
        self.sizes: dict[str, int] = {}  # of closures: a store path never changes
        self.templates = Environment(loader=PackageLoader("toto.fleet"), autoescape=True, trim_blocks=True)
        self.templates.filters |= {"ago": ago, "size": size, "lasted": lasted, "clean": clean}

    async def fleet(self, request: Request) -> Response:
        """Every target, and the newest runs."""
        state = await self.state.now()
        if _wants_json(request):
            return JSONResponse(
                {
                    "targets": [each.json() for each in state.lines],
                    "runs": [each.json() for each in state.runs],
                    "errors": list(state.errors),
                }
            )
        return await self._html("fleet.html", request, state=state)

    async def target(self, request: Request) -> Response:
        """One target."""
        words = request.path_params
        target, repo = Target(words["kind"], words["name"]), self.state.repo(words["repo"])
        state = await self.state.now()
        line = None if repo is None else state.line(words["repo"], target)
        if repo is None or line is None:
            return PlainTextResponse("there is no such target\n", 404)
        events, shown, closure = await asyncio.gather(
            self.state.events(repo, target), self._shown(words["repo"], target), self._closure(line)
        )
        if _wants_json(request):
            happened = [each.json() for each in events]
            return JSONResponse(line.json() | {"history": happened, "closure_bytes": closure, **shown})
        return await self._html("target.html", request, line=line, events=events, closure=closure, **shown)

    async def log(self, request: Request) -> Response:
        """What happened to the targets of a repo, newest first."""
        asked = request.query_params
        names = self.state.names
        repos = [name for name in names if asked.get("repo", "") in ("", name)]
        if len(repos) != 1 or (repo := self.state.repo(repos[0])) is None:
            return JSONResponse({"detail": f"say which repository, such as repo={names[0] if names else 'infra'}"}, 400)
        most = asked.get("most", "")
        found = await asyncio.to_thread(
            history.chosen,
            repo,
            Target.of(asked["target"]) if asked.get("target") else None,
            since=asked.get("since", ""),
            author=asked.get("author", ""),
            most=min(int(most), _EVENTS) if most.isdecimal() else _EVENTS,
        )
        return JSONResponse(found)

    async def builds(self, request: Request) -> Response:
        """The newest commits that were built, and all their hosts."""
        repo = request.path_params["repo"]
        if self.state.repo(repo) is None:
            return PlainTextResponse("there is no such repository\n", 404)
        found = await self.state.builds(repo)
        if _wants_json(request):
            return JSONResponse([vars(each) for each in found])
        hosts = sorted({host for each in found for host in each.rows})
        return await self._html("builds.html", request, repo=repo, builds=found, hosts=hosts)

    async def jobs(self, request: Request) -> Response:
        """The jobs of a repo."""
        if (repo := self.state.repo(request.path_params["repo"])) is None:
            return PlainTextResponse("there is no such repository\n", 404)
        found = await asyncio.to_thread(jobs.listed, repo)
        if _wants_json(request):
            return JSONResponse([{**each, "run": each["run"] and each["run"].model_dump()} for each in found])
        return await self._html("jobs.html", request, repo=request.path_params["repo"], jobs=found)

    async def job(self, request: Request) -> Response:
        """The state of a job."""
        repo = self.state.repo(request.path_params["repo"])
        found = await asyncio.to_thread(jobs.state, repo, request.path_params["job"]) if repo else None
        return JSONResponse(found) if found else PlainTextResponse("there is no such job\n", 404)

    async def badge(self, request: Request) -> Response:
        """The badge of a job."""
        repo = self.state.repo(request.path_params["repo"])
        found = await asyncio.to_thread(jobs.badge, repo, request.path_params["job"]) if repo else None
        return (
            Response(found, media_type="image/svg+xml") if found else PlainTextResponse("there is no such job\n", 404)
        )

    async def is_public(self, path: str) -> bool:
        """Whether a path is shown without a password."""
        name, job = jobs.asked(path) or ("", "")
        repo = self.state.repo(name) if job else None
        return repo is not None and await asyncio.to_thread(jobs.is_public, repo, job)

    async def events(self, request: Request) -> Response:
        """An event for each change, to who follows."""
        if self.listeners >= _LISTENERS:
            return PlainTextResponse("too many follow the fleet just now\n", 503)
        unheld = {"X-Accel-Buffering": "no"}  # nginx would keep events until it has a kilobyte of them
        return StreamingResponse(self._changes(request), media_type="text/event-stream", headers=unheld)

    async def _changes(self, request: Request) -> AsyncIterator[str]:
        self.listeners += 1
        try:
            seen, quiet = (await self.state.now()).stamp, 0.0
            yield "retry: 5000\n\n"
            while not await request.is_disconnected():
                await asyncio.sleep(_LOOK)
                quiet += _LOOK
                if (now := (await self.state.now()).stamp) != seen:
                    seen, quiet = now, 0.0
                    yield "event: change\ndata:\n\n"
                elif quiet >= _QUIET:
                    quiet = 0.0
                    yield ":\n\n"
        finally:
            self.listeners -= 1

    async def _shown(self, repo: str, target: Target) -> dict[str, Any]:
        """What the last runs showed of a target: what changed in it, its tests by phase, its compliance, console."""
        keys = {
            each: artifacts.of_target(each, repo, target) for each in ("difference", "console", "compliance", *_PHASES)
        }
        try:
            found = await self.state.shown(list(keys.values()))
        except TotoError:
            found = {}
        tests = {phase: _rows(found.get(keys[phase])) for phase in _PHASES}
        return {
            "difference": _unfenced(found.get(keys["difference"])),
            "console": _unfenced(found.get(keys["console"])),
            "compliance": _rows(found.get(keys["compliance"])),
            "tests": {phase: rows for phase, rows in tests.items() if rows},
        }

    async def _closure(self, line: Line) -> int | None:
        """The bytes of a host's closure, when toto still has it."""
        if line.target.kind != HOST or not line.system:
            return None
        with suppress(TotoError):
            if line.system not in self.sizes:
                self.sizes[line.system] = await nix.closure_size(line.system)
        return self.sizes.get(line.system)

    async def _html(self, template: str, request: Request, **more: Any) -> Response:
        made = self.templates.get_template(template)
        more |= {"place": PLACE, "now": datetime.now(UTC), "grafana": self.grafana}
        text = await asyncio.to_thread(made.render, **more)
        return Response(text, media_type="text/html")


def _wants_json(request: Request) -> bool:
    accepted = request.headers.get("accept", "")
    return request.query_params.get("format") == "json" or accepted.partition(",")[0] == "application/json"


def _rows(data: Any) -> list[dict[str, str]]:
    """The rows of a table artifact, whose data is JSON in a text."""
    rows = json.loads(data) if isinstance(data, str) else ()
    return [{str(name): str(value) for name, value in each.items()} for each in rows]


def _unfenced(data: Any) -> str:
    text = data if isinstance(data, str) else ""
    found = _FENCE.match(text)
    return found[2] if found else text
