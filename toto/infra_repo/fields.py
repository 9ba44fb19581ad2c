"""The types of values that manifest and settings share (names, addresses, keys, words), and their checks."""

import ipaddress
import re
from collections.abc import Hashable
from typing import Annotated, Final

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainSerializer,
    StrictBool,
    StrictInt,
    StrictStr,
    WithJsonSchema,
)

from toto.base.errors import InputError
from toto.base.model import shown
from toto.infra_repo.window import Window

_NAME: Final = r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}"
_ADDRESS: Final = r"[\w:][\w.:%-]{0,252}"
_USER: Final = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,31}"
_HOST_KEY: Final = r"(ssh|ecdsa|sk)-[a-z0-9@.-]+ [A-Za-z0-9+/]+=*( [^\x00-\x1f\x7f]*)?"
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def check_name(name: str) -> str:
    """Return `name` if it can name a host or a machine; else raise ValueError."""
    if not re.fullmatch(_NAME, name) or ".." in name or name.endswith("."):
        raise ValueError(
            f"should be 1 to 63 letters, digits, '-', '_' and single dots, begin with a letter or digit "
            f"and not end in a dot, not {shown(name)}"
        )
    return name


def require_name(name: str, what: str, where: str, *, hint: str) -> str:
    """Return `name` if it can be `what` ("a host's name"). Such a name goes into paths, command lines and refs.

    Else raise `InputError` about the file or folder `where`.
    """
    try:
        return check_name(name)
    except ValueError as error:
        raise InputError(f"{what} {error}", target=where, hint=hint) from None


def check_address(address: str) -> str:
    """Return `address` if it can be a host name or an IP address; else raise ValueError."""
    if "@" in address:
        raise ValueError(f"should be a host name or an IP address; the user goes into ssh.user, not {shown(address)}")
    if not re.fullmatch(_ADDRESS, address):
        raise ValueError(f"should be a host name or an IP address, not {shown(address)}")
    return address


def plain_address(address: str) -> str:
    """An address in the one spelling by which two are compared: lower case, no final dot, an IP address in short."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address.lower().rstrip(".")
    return str((found.ipv4_mapped if found.version == 6 else None) or found)


def check_user(user: str) -> str:
    """Return `user` if it can name a user; else raise ValueError."""
    if not re.fullmatch(_USER, user):
        raise ValueError(f"should be a user name of letters, digits, '.', '-' and '_', not {shown(user)}")
    return user


def _check_word(text: str) -> str:
    if not text.strip() or text.startswith("-") or _CONTROL.search(text) or '"' in text:
        raise ValueError(f"should be one line of text that does not begin with '-', not {shown(text)}")
    return text


def check_key_name(name: str) -> str:
    """Return `name` if it can name one of a repo's keys; else raise ValueError."""
    if "/" in name or name.startswith("~"):
        raise ValueError(
            f"names a key that this repository has on toto, not a file: run "
            f"`toto key REPO NAME --import {shown(name, 200)}` there, and write NAME here"
        )
    return check_name(name)


def check_host_key(text: str) -> str:
    """Return `text` if it is an ssh public key on one line; else raise ValueError."""
    if not re.fullmatch(_HOST_KEY, text):
        raise ValueError(f"should be a public key like 'ssh-ed25519 AAAA…', not {shown(text)}")
    return text


def check_system(text: str) -> str:
    """Return `text` if it looks like a nix system ("x86_64-linux"); else raise ValueError."""
    if not re.fullmatch(r"[a-z0-9_]+-[a-z0-9]+", text):
        raise ValueError(f"should be a system like 'x86_64-linux', not {shown(text)}")
    return text


def check_feature(text: str) -> str:
    """Return `text` if it can be a system feature of nix's ("big-parallel"); else raise ValueError."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", text):
        raise ValueError(f"should be a feature like 'big-parallel', not {shown(text)}")
    return text


def _check_freeze(value: object) -> object:
    if not isinstance(value, bool) and (
        not isinstance(value, str)
        or not value.strip()
        or _CONTROL.search(value)
        or value.lower() in ("true", "false", "yes", "no", "on", "off")
    ):
        raise ValueError(f"should be true, false or the reason in one line of text, not {shown(value)}")
    return value


def _check_window(value: object) -> object:
    if isinstance(value, Window):
        return value
    if not isinstance(value, str):
        raise ValueError(f"should be text like 'Sat-Sun 22:00-06:00', not {shown(value)}")
    return Window.parse(value)


def _check_distinct(values: tuple[Hashable, ...]) -> tuple[Hashable, ...]:
    seen: set[Hashable] = set()
    for value in values:
        if value in seen:
            raise ValueError(f"should name each once, not {shown(value)} twice")
        seen.add(value)
    return values


Name = Annotated[StrictStr, AfterValidator(check_name), Field(json_schema_extra={"pattern": f"^{_NAME}$"})]
KeyName = Annotated[StrictStr, AfterValidator(check_key_name)]
Word = Annotated[StrictStr, AfterValidator(_check_word)]
Port = Annotated[StrictInt, Field(ge=1, le=65535)]
Distinct = AfterValidator(_check_distinct)
Freeze = Annotated[StrictBool | StrictStr, BeforeValidator(_check_freeze)]


OpenIn = Annotated[
    Window,
    BeforeValidator(_check_window),
    PlainSerializer(str),
    WithJsonSchema({"type": "string", "examples": ["Sat-Sun 22:00-06:00", "22:00-06:00"]}),
]
