"""One HTTP request to toto, on a connection of its own, made in a child process without rights.

Only as much of HTTP as toto's server speaks: an answer has a `Content-Length` and what it says, and is whole or none.
"""

import encodings.idna  # noqa: F401  (before the rights to read it are gone)
import json
import re
import socket
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from flying_monkey import apart
from flying_monkey.apart import Failed, User

MOST: Final = 262_144  # bytes of an answer
_HEAD: Final = 16_384  # bytes of an answer's head
_CONNECT: Final = 15.0  # seconds for one address, and for each step of TLS
_URL: Final = re.compile(r"(https?)://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::([0-9]{1,5}))?((?:/[A-Za-z0-9._~-]+)*)/?")
_STATUS: Final = re.compile(r"HTTP/1\.[01] ([1-5][0-9]{2})(?: [^\r\n]*)?")
_HEADER: Final = re.compile(r"([A-Za-z0-9-]{1,64}):[ \t]*([\x20-\x7e]{0,4096}?)[ \t]*")
_TOLD: Final = ("etag", "toto-ask")


class BadUrl(Exception):
    """An address cannot be used."""


@dataclass(frozen=True)
class Server:
    """Where toto is, the authorities that it is trusted by (PEM; None: the machine's own), and who talks to it."""

    host: str
    port: int
    tls: bool
    folder: str
    authorities: str | None
    who: User | None

    @classmethod
    def at(cls, url: str, ca: str | None, who: User | None) -> Self:
        """The server at `url`, trusted by the file `ca`. Without TLS it is on this machine, behind a tunnel.

        Raises `BadUrl`, OSError.
        """
        found = _URL.fullmatch(url)
        if found is None:
            raise BadUrl(f"{url[:200]!a} is no address such as https://toto.example:4201")
        host, tls = found[2].strip("[]"), found[1] == "https"
        if not tls and host not in ("127.0.0.1", "::1", "localhost"):
            raise BadUrl(f"{url[:200]!a}: http is for this machine alone; use https")
        authorities = Path(ca).read_text() if ca else None
        return cls(host, int(found[3] or (443 if tls else 80)), tls, found[4], authorities, who)

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}{self.folder}"


@dataclass(frozen=True)
class Answer:
    """What toto answered; of the headers only those in lower case that the agent knows."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def said(self) -> str:
        """Its text, as far as it may be shown."""
        return apart.plain(self.body.replace(b"\n", b" "))


def exchange(
    server: Server, method: str, path: str, headers: Mapping[str, str], body: bytes | None = None, *, longest: float
) -> Answer:
    """The answer to one request, within `longest` seconds. Raises `Failed`."""
    data = apart.run(
        lambda: _talk(server, method, path, headers, body, longest), server.who, longest=longest, most=MOST + 4_096
    )
    head, separator, rest = data.partition(b"\n")
    try:
        found = json.loads(head)
        status, told = found["status"], found["headers"]
        sound = type(status) is int and 100 <= status <= 599 and isinstance(told, dict)
        sound = sound and all(
            key in _TOLD and isinstance(value, str) and len(value) < 200 for key, value in told.items()
        )
    except (ValueError, LookupError, TypeError, RecursionError):
        sound = False
    if not sound or not separator:
        raise Failed("the answer cannot be read")
    return Answer(status, told, rest)


def _talk(
    server: Server, method: str, path: str, headers: Mapping[str, str], body: bytes | None, longest: float
) -> bytes:
    """Ask, and read the answer. Runs in the child."""
    deadline = time.monotonic() + longest
    lines = [f"{method} {server.folder}{path} HTTP/1.1", f"Host: {server.host}:{server.port}", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    lines += [] if body is None else [f"Content-Length: {len(body)}"]
    with _connected(server) as connection:
        connection.settimeout(max(deadline - time.monotonic(), 0.1))
        connection.sendall("\r\n".join([*lines, "", ""]).encode("ascii") + (body or b""))
        status, told, start = _head(connection, deadline)
        if status in (204, 304) or status < 200:
            length = 0
        elif not re.fullmatch(r"[0-9]{1,9}", told.get("content-length", "")) or "transfer-encoding" in told:
            raise Failed("an answer without its length")
        else:
            length = int(told["content-length"])
        if length > MOST:
            raise Failed(f"the answer has more than {MOST} bytes")
        data = bytearray(start)
        while len(data) < length:
            data += _received(connection, deadline)
    shown = {name: told[name] for name in _TOLD if name in told}
    return json.dumps({"status": status, "headers": shown}).encode() + b"\n" + bytes(data[:length])


def _connected(server: Server) -> socket.socket:
    connection = socket.create_connection((server.host, server.port), timeout=_CONNECT)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    if not server.tls:
        return connection
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if server.authorities is None:
        context.load_default_certs()
    else:
        context.load_verify_locations(cadata=server.authorities)
    return context.wrap_socket(connection, server_hostname=server.host)


def _head(connection: socket.socket, deadline: float) -> tuple[int, dict[str, str], bytes]:
    """The status and headers of an answer, and the beginning of what follows."""
    data = bytearray()
    while (end := data.find(b"\r\n\r\n")) < 0:
        if len(data) > _HEAD:
            raise Failed("the head of the answer is too long")
        data += _received(connection, deadline)
    first, *lines = data[:end].decode("latin-1").split("\r\n")
    found = _STATUS.fullmatch(first)
    headers: dict[str, str] = {}
    for line in lines:
        header = _HEADER.fullmatch(line)
        if header is None or header[1].lower() in headers.keys() & {"content-length", "etag"}:
            raise Failed("the answer is no HTTP")
        headers[header[1].lower()] = header[2]
    if found is None:
        raise Failed("the answer is no HTTP")
    return int(found[1]), headers, bytes(data[end + 4 :])


def _received(connection: socket.socket, deadline: float) -> bytes:
    connection.settimeout(max(deadline - time.monotonic(), 0.1))
    data = connection.recv(65_536)
    if not data:
        raise Failed("the answer was cut short")
    return data
