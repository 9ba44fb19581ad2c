"""A small client of Prefect's HTTP API, for toto outside flows: for the server's start, and for pushes that waited.

Flows and tasks use Prefect's own client.
"""

import asyncio
import base64
import contextlib
import json
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from toto.base import process
from toto.base.errors import TotoError


class ServerError(TotoError):
    """Prefect's server or worker did not start, died, or refused a request."""

    def __init__(
        self, message: str, *, status: int | None = None, target: str | None = None, hint: str | None = None
    ) -> None:
        super().__init__(message, target=target, hint=hint)
        self.status = status


PROFILE: Final = "toto"


def saved_auth(profiles: Path) -> str | None:
    """The "user:password" that is saved in a file of Prefect's profiles, for every client that uses it."""
    try:
        profile = tomllib.loads(profiles.read_text())["profiles"][PROFILE]
    except (OSError, KeyError, tomllib.TOMLDecodeError):
        return None
    auth = profile.get("PREFECT_API_AUTH_STRING")
    return str(auth) if auth else None


@dataclass(frozen=True)
class Api:
    """The API at `url`; `auth` is its "user:password", if it has one."""

    url: str
    auth: str | None = None

    @classmethod
    def of(cls, env: Mapping[str, str]) -> "Api":
        """The API of an environment; its password is in the profile, see `saved_auth`."""
        return cls(env["PREFECT_API_URL"], saved_auth(Path(env["PREFECT_PROFILES_PATH"])))

    async def call(self, method: str, path: str, body: object = None, *, timeout: float = 30) -> Any:
        """Send a request and return the decoded answer, None when it is empty.

        An answer of 503 is retried for up to `timeout` seconds: on SQLite it only means "locked just now".
        Raises `ServerError` with the HTTP status, if there is one.
        """
        deadline = time.monotonic() + timeout
        while True:
            try:
                return await asyncio.to_thread(self.ask, method, path, body, timeout)
            except ServerError as error:
                if error.status != 503 or time.monotonic() > deadline:
                    raise
            await asyncio.sleep(0.3)

    def ask(self, method: str, path: str, body: object = None, timeout: float = 30) -> Any:
        """As `call`, without a second try, and without a loop."""
        headers = {"Content-Type": "application/json"}
        if self.auth is not None:
            headers["Authorization"] = "Basic " + base64.b64encode(self.auth.encode()).decode()
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers, method=method)  # noqa: S310
        # No proxy: the API listens on loopback, or on the operator's own network.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=timeout) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")
            raise ServerError(
                f"{method} {path} was answered with {error.code}: {process.shorten(said, 500)}",
                status=error.code,
                target=self.url,
            ) from None
        except OSError as error:
            raise ServerError(f"no answer: {error}", target=self.url, hint="start `toto serve`") from None
        return json.loads(text) if text else None

    async def wait(self, seconds: float) -> bool:
        """Whether the API answers within `seconds`."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with contextlib.suppress(ServerError):
                await self.call("GET", "/health", timeout=2)
                return True
            await asyncio.sleep(0.1)
        return False
