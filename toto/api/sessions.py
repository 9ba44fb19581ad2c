"""Who asks: a machine proves itself by its ssh host key, and gets a token that is good for a while.

A challenge is nothing that the server remembers: it is a time and a random word with a code of them by a secret that
lives as long as this process. What a machine signed is taken once.
"""

import asyncio
import hashlib
import hmac
import ipaddress
import secrets
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from flying_monkey import proof
from flying_monkey.signature import NotGenuine
from toto.machine import documents
from toto.machine import proof as machine_proof

ANSWER: Final = 120.0  # seconds to answer a challenge
IDLE: Final = 900.0  # seconds after its last use that a token is good
LONGEST: Final = 4 * 3_600.0  # seconds that it is good in all
MOST: Final = 4_096  # tokens; the oldest makes room
FAILURES: Final = 20  # proofs of one address (of IPv6, one /64) that may fail within a minute
WAITING: Final = 8  # proofs of one address that may wait to be looked at
_MINUTE: Final = 60.0
_PROOFS: Final = 2  # at once
_TIME: Final = 12  # characters of a challenge that are its time

UNKNOWN: Final = (
    "toto does not know the machine {machine} of {repo} by a host key, and does not learn it from who asks.\n"
    "next: write the machine's key (/etc/ssh/ssh_host_ed25519_key.pub) as `ssh.host_key` of {machine} into "
    "machines.yaml, and push\n"
)


def network(address: str) -> str:
    """Who asks from an address: of IPv6, where one machine has as many as it likes, its network of 64 bits."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped is None:
        return str(ipaddress.ip_network((found, 64), strict=False))
    return str(getattr(found, "ipv4_mapped", None) or found)


class NotProven(Exception):
    """A machine has not proven itself; the message says what to do, and no more than a stranger may know."""


class Known:
    """The machines that toto knows, read again when their file has changed."""

    def __init__(self) -> None:
        self._seen: tuple[int, ...] = ()
        self._machines: dict[str, documents.Known] = {}

    def machine(self, repo: str, name: str) -> documents.Known | None:
        """A machine, when it is one of the repo of that name."""
        try:
            seen = documents.known_file().stat()
            now: tuple[int, ...] = (seen.st_mtime_ns, seen.st_ino, seen.st_size)
        except FileNotFoundError:
            now = ()
        if now != self._seen:
            self._machines = documents.read_known() if now else {}
            self._seen = now
        found = self._machines.get(name)
        return found if found and found.repo == repo else None


@dataclass
class Session:
    """A machine that has proven itself, as it was `known` then. `streams` are the files that it fetches."""

    repo: str
    machine: str
    known: documents.Known
    place: documents.Place
    began: float
    used: float
    streams: int = 0


@dataclass
class Sessions:
    """All sessions of this process. Times are those of `clock`, in seconds."""

    known: Known = field(default_factory=Known)
    clock: Callable[[], float] = time.monotonic
    _secret: bytes = field(default_factory=lambda: secrets.token_bytes(32))
    _key: bytes = field(default_factory=lambda: secrets.token_bytes(32))
    _open: OrderedDict[bytes, Session] = field(default_factory=OrderedDict)
    _answered: dict[str, float] = field(default_factory=dict)
    _failed: dict[str, list[float]] = field(default_factory=dict)
    _waiting: Counter[str] = field(default_factory=Counter)
    _proofs: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_PROOFS))

    def challenge(self) -> str:
        """A challenge for whoever asks."""
        word = f"{int(self.clock()):0{_TIME}d}{secrets.token_urlsafe(16)}"
        return word + self._code(word)

    async def prove(self, repo: str, machine: str, challenge: str, signed: bytes, address: str = "") -> str:
        """A token for a machine that has signed a challenge, and asks from an address. Raises `NotProven`."""
        known = self.known.machine(repo, machine)
        if known is None:
            raise NotProven(UNKNOWN.format(machine=machine[:128], repo=repo[:128]))
        self._check(challenge)
        text = proof.text(repo, machine, challenge)
        self._waiting[network(address)] += 1
        try:
            async with self._proofs:
                await asyncio.to_thread(machine_proof.check, text, signed, machine, known.host_keys, proof.ASK)
        except NotGenuine:
            raise NotProven(
                f"this is not signed by the host key of {machine} that machines.yaml has\n"
                "next: if the machine was installed anew, write its new host key there, and push\n"
            ) from None
        finally:
            self._waiting -= Counter((network(address),))  # (so those at 0 are left out)
        now = self.clock()
        self._answered = {word: at for word, at in self._answered.items() if at > now - ANSWER}
        if challenge in self._answered:
            raise NotProven("this challenge has been answered\n")
        self._answered[challenge] = now
        token = secrets.token_urlsafe(32)
        place = documents.Place(known.folder, machine)
        self._open[self._hash(token)] = Session(repo, machine, known, place, now, now)
        while len(self._open) > MOST:
            self._open.popitem(last=False)
        return token

    def session(self, token: str) -> Session | None:
        """The session of a token; None when it is over, or when the machine is not the repo's any more."""
        name, now = self._hash(token), self.clock()
        found = self._open.get(name)
        if found is None:
            return None
        over = now > min(found.used + IDLE, found.began + LONGEST)
        if over or self.known.machine(found.repo, found.machine) != found.known:
            del self._open[name]
            return None
        found.used = now
        return found

    def may_try(self, address: str) -> bool:
        """Whether proofs from an address are looked at: not after too many that failed, nor beside too many others."""
        now, place = self.clock(), network(address)
        recent = [at for at in self._failed.pop(place, ()) if at > now - _MINUTE]
        if recent:
            self._failed[place] = recent
        return len(recent) < FAILURES and self._waiting[place] < WAITING

    def note_failure(self, address: str) -> None:
        """Note that a proof from an address has failed."""
        if len(self._failed) >= MOST:
            self._failed = {each: times for each, times in self._failed.items() if times[-1] > self.clock() - _MINUTE}
        if len(self._failed) < MOST:
            self._failed.setdefault(network(address), []).append(self.clock())

    def _check(self, challenge: str) -> None:
        word, code = challenge[:-32], challenge[-32:]
        if not hmac.compare_digest(self._code(word).encode(), code.encode(errors="replace")):
            raise NotProven("this challenge is not one of this server's\n")
        if int(word[:_TIME]) < self.clock() - ANSWER:
            raise NotProven("this challenge is too old\n")

    def _code(self, word: str) -> str:
        return hmac.new(self._secret, word.encode(errors="replace"), hashlib.sha256).hexdigest()[:32]

    def _hash(self, token: str) -> bytes:
        """A token by a keyed hash: how long a look-up takes says nothing about the tokens that there are."""
        return hmac.new(self._key, token.encode(errors="replace"), hashlib.sha256).digest()
