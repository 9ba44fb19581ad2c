"""A toto on a different machine.

`TOTO_URL` is the address of its UI: what is read comes from there. What is done goes over its git host's ssh, in the
name of the key's user; `TOTO_SSH` is the host for ssh (`toto`, when it is left out).
"""

import netrc
import os
import shlex
from dataclasses import dataclass
from typing import Any, Final, NoReturn, Self
from urllib.parse import unquote, urlsplit

from toto.base.errors import InputError
from toto.base.prefect_api import Api, ServerError

URL: Final = "TOTO_URL"
SSH: Final = "TOTO_SSH"
_HINT: Final = "is TOTO_URL right? It is like https://USER:PASSWORD@toto.example.org, as `toto password` prints them"


@dataclass(frozen=True)
class Remote:
    """A toto that answers at `url`; `auth` is its "user:password"."""

    url: str
    auth: str | None

    @classmethod
    def named(cls) -> Self | None:
        """The toto that the environment names; None when it names none. Raises `InputError`.

        The password is in the address, or in ~/.netrc.
        """
        if not (text := os.environ.get(URL)):
            return None
        try:
            parts = urlsplit(text)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise InputError(f"is no address: {error}", target=URL, hint=_HINT) from None
        if parts.scheme not in ("http", "https") or not host:
            raise InputError("is no http address", target=URL, hint=_HINT)
        place = f"[{host}]" if ":" in host else host
        url = f"{parts.scheme}://{place}{f':{port}' if port else ''}{parts.path.rstrip('/')}"
        if parts.username is not None:
            return cls(url, f"{unquote(parts.username)}:{unquote(parts.password or '')}")
        return cls(url, _of_netrc(host))

    @property
    def api(self) -> Api:
        """Prefect's API, which has the runs."""
        return Api(f"{self.url}/api", self.auth)

    async def page(self, path: str = "/", asked: str = "") -> Any:
        """What a page of the fleet says, as JSON. Raises `ServerError`."""
        try:
            return await Api(self.url, self.auth).call("GET", f"/fleet{path}?format=json&{asked}")
        except ServerError as error:
            error.hint = _HINT if error.status in (None, 401, 403) else None
            raise


def _of_netrc(host: str) -> str | None:
    try:
        found = netrc.netrc().authenticators(host)
    except (OSError, netrc.NetrcParseError):
        return None
    return f"{found[0]}:{found[2]}" if found else None


def over_ssh(words: list[str]) -> NoReturn:
    """Become the ssh that has the git host of the remote toto do what the words say."""
    host = os.environ.get(SSH) or "toto"
    os.execvp("ssh", ["ssh", "--", host, shlex.join(words)])  # noqa: S606
