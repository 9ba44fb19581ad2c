"""Finds, in the variables that terraform gets, the addresses of the backend that keeps its state."""

import re
from collections.abc import Iterator, Mapping
from typing import Final
from urllib.parse import urlsplit

from toto.base.errors import InputError
from toto.cell.relay import Endpoint

_HTTP: Final = ("TF_HTTP_ADDRESS", "TF_HTTP_LOCK_ADDRESS", "TF_HTTP_UNLOCK_ADDRESS")
_PORTS: Final = {"http": 80, "https": 443}
_WORD: Final = re.compile(r"(\w+)\s*=\s*('(?:[^'\\]|\\.)*'|\S*)")


def of_backends(variables: Mapping[str, str]) -> list[Endpoint]:
    """The servers of the `pg` backend (`PG_CONN_STR`) and of the `http` backend (`TF_HTTP_ADDRESS` and the like).

    Raises `InputError` for a PostgreSQL that is named by its socket, and for an address that toto cannot read.
    """
    found: list[Endpoint] = []
    if text := variables.get("PG_CONN_STR", ""):
        found += _of_postgres(text)
    for name in _HTTP:
        if text := variables.get(name, ""):
            try:
                url = urlsplit(text)
                found.append(_endpoint(name, url.hostname or "", str(url.port or _PORTS.get(url.scheme, 0))))
            except ValueError:
                raise _unreadable(name) from None
    return list(dict.fromkeys(found))


def _of_postgres(text: str) -> Iterator[Endpoint]:
    try:
        if "://" in text:
            hosts = urlsplit(text).netloc.rpartition("@")[2].split(",")
            pairs = [(host, port or "5432") for host, _, port in (each.partition(":") for each in hosts)]
        else:
            words = {name: value.strip("'") for name, value in _WORD.findall(text)}
            named = words.get("hostaddr") or words.get("host") or "localhost"
            ports = (words.get("port") or "5432").split(",")
            hosts = named.split(",")
            pairs = list(zip(hosts, ports * len(hosts) if len(ports) == 1 else ports, strict=True))
    except ValueError:
        raise _unreadable("PG_CONN_STR") from None
    for host, port in pairs:
        if host.startswith(("/", "%2F", "%2f", "@")):
            raise InputError(
                "it names PostgreSQL by a socket, which terraform does not see in its cell",
                target="PG_CONN_STR",
                hint="name an address and a port in the block: host=127.0.0.1 port=5432",
            )
        yield _endpoint("PG_CONN_STR", host or "localhost", port)


def _endpoint(name: str, host: str, port: str) -> Endpoint:
    try:
        return Endpoint.parse(f"{host}:{port}")
    except InputError:
        raise _unreadable(name) from None


def _unreadable(name: str) -> InputError:  # (without the value: it is a secret)
    return InputError("it has no host and port that toto can read", target=name, hint="fix the variable in the block")
