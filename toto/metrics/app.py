"""The addresses that a Prometheus asks, in toto's web application.

    GET /metrics            the figures, in the text form of OpenMetrics or of Prometheus
    GET /metrics/machines   the fleet's machines, for `http_sd`

Both need toto's token for it, as the password of `prometheus`: whoever has it reads these, and nothing else.
"""

import asyncio
import base64
import hmac
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Final

from fastapi import FastAPI
from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from toto.base.errors import TotoError
from toto.git_host import host as git_host
from toto.metrics import token
from toto.metrics.fleet import Fleet
from toto.metrics.machines import targets
from toto.metrics.runs import Runs

log = logging.getLogger(__name__)

USER: Final = "prometheus"
_FRESH: Final = 3.0  # seconds for which figures are told again as they were
_PATIENCE: Final = 8.0  # seconds for a part of the figures; Prometheus waits for 10


class _Part:
    """A part of the figures: read by one at a time, and not more often than is of use."""

    def __init__(self, name: str, read: Callable[[], Awaitable[list[Metric]]]) -> None:
        self.name, self._read = name, read
        self._task: asyncio.Future[list[Metric]] | None = None
        self._until = 0.0

    async def now(self) -> list[Metric] | None:
        """Its figures; None when there are none in time. The log says why."""
        if self._task is None or (self._task.done() and time.monotonic() > self._until):
            self._task = asyncio.ensure_future(self._read())
            self._task.add_done_callback(lambda _: setattr(self, "_until", time.monotonic() + _FRESH))
        await asyncio.wait((self._task,), timeout=_PATIENCE)
        if not self._task.done():
            log.error("metrics: the %s were not read within %g s", self.name, _PATIENCE)
            return None
        if error := self._task.exception():
            log.error("metrics: the %s cannot be read: %s", self.name, error)
            return None
        return self._task.result()


class _Figures:
    """What an encoder of prometheus_client takes for a registry."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        yield from self._families


def install(app: FastAPI, repos: Path, ui_url: str, pool: str) -> None:
    """Have `app` answer at these addresses before anything of its own.

    They are of the repositories in the folder `repos`, and of a server with this UI and this work pool.
    """
    fleet, runs = Fleet(repos, ui_url), Runs(repos, pool)
    parts = [_Part("fleet", lambda: asyncio.to_thread(fleet.read)), _Part("runs", runs.read)]

    async def metrics(request: Request) -> Response:
        read = await asyncio.gather(*(part.now() for part in parts))
        complete = GaugeMetricFamily("toto_metrics_complete", "1 when this part could be read", labels=("part",))
        for part, found in zip(parts, read, strict=True):
            complete.add_metric((part.name,), float(found is not None))
        encode, kind = choose_encoder(request.headers.get("accept", ""))
        families: Any = _Figures([complete, *(each for found in read for each in found or ())])
        return Response(encode(families), media_type=kind)

    async def machines(request: Request) -> Response:
        try:
            return JSONResponse(await asyncio.to_thread(targets, git_host.infra_repos(repos)))
        except TotoError as error:  # then Prometheus goes on with those that it knows
            return PlainTextResponse(f"{error}\n", 503)

    def known(handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            right = base64.b64encode(f"{USER}:{token.file().read_text()}".encode())
            if not hmac.compare_digest(request.headers.get("authorization", "").encode(), b"Basic " + right):
                asked = {"WWW-Authenticate": 'Basic realm="toto metrics"'}
                text = f"the password of {USER}, please (`toto metrics token` on toto prints it)\n"
                return PlainTextResponse(text, 401, asked)
            return await handler(request)

        return answer

    app.router.routes[:0] = [Route("/metrics", known(metrics)), Route("/metrics/machines", known(machines))]
