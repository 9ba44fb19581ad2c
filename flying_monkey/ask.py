"""What the agent asks toto: who am I to you, what should I be, and here is a report."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from flying_monkey import proof, signature
from flying_monkey.apart import Failed
from flying_monkey.exchange import Answer, Server, exchange
from flying_monkey.machine import Configuration

_SHORT: Final = 30.0  # seconds for a request that waits for nothing
_TOKEN: Final = re.compile(r"[A-Za-z0-9_-]{20,200}")
_TAG: Final = re.compile(r'"[0-9a-f]{0,64}"')
_ASKED: Final = re.compile(r"[0-9a-f]{16,64}")
_KINDS: Final = ("ed25519", "ecdsa", "rsa")  # of host keys, in this order


class TurnedAway(Failed):
    """Toto answers, and does not know this machine; the message is toto's advice."""


@dataclass(frozen=True)
class Said:
    """What toto says: a new signed document, if there is one, with its tag; and the word of a report that it wants."""

    envelope: bytes | None
    tag: str
    asked: str


@dataclass
class Toto:
    """Toto, as this machine asks it. It proves itself when that is needed. Each request is a new connection."""

    configuration: Configuration
    server: Server
    token: str = ""
    key: Path | None = None
    _refused: int = field(default=0)

    def document(self, has: str, asked: str, wait: float) -> Said:
        """The newest document, once it is not the one with the tag `has`, or toto asks anew, or after `wait` seconds.

        Raises `Failed`.
        """
        path = f"/document?wait={wait:.0f}" + (f"&asked={asked}" if asked else "")
        answer = self._request("GET", path, {"If-None-Match": has} if has else {}, longest=wait + _SHORT)
        tag, word = answer.headers.get("etag", ""), answer.headers.get("toto-ask", "")
        word = word if _ASKED.fullmatch(word) else ""
        if answer.status == 304:
            return Said(None, has, word)
        if answer.status != 200 or not _TAG.fullmatch(tag):
            raise Failed(f"toto answers {answer.status}: {answer.said}")
        return Said(answer.body, tag, word)

    def report(self, envelope: bytes) -> bool:
        """Hand over a signed report; whether toto takes it (False: it is none to toto). Raises `Failed`."""
        answer = self._request("POST", "/reports", {"Content-Type": "application/json"}, envelope)
        if answer.status not in (200, 201, 400, 413):
            raise Failed(f"toto answers {answer.status}: {answer.said}")
        return answer.status in (200, 201)

    def prove(self) -> None:
        """Have a token. Raises `TurnedAway`, `Failed`."""
        self.token = ""
        answer = self._exchange("POST", "/challenge", {}, b"")
        challenge = _field(answer, "challenge")
        if not proof.CHALLENGE.fullmatch(challenge):
            raise Failed("toto's challenge is none")
        keys = host_keys(self.configuration)
        if not keys:
            raise Failed(f"there is no ssh host key in {self.configuration.host_keys}")
        self.key = keys[self._refused % len(keys)]
        name, repo = self.configuration.name, self.configuration.repo
        try:
            signed = signature.sign(proof.text(repo, name, challenge), self.key, proof.ASK)
        except signature.CannotSign as error:
            raise Failed(f"{self.key} cannot sign: {error}") from None
        body = {"repo": repo, "machine": name, "challenge": challenge, "signature": signed}
        answer = self._exchange("POST", "/session", {"Content-Type": "application/json"}, json.dumps(body).encode())
        if answer.status == 403:
            self._refused += 1
            raise TurnedAway(answer.said)
        token = _field(answer, "token")
        if not _TOKEN.fullmatch(token):
            raise Failed("toto's token is none")
        self.token = token

    def forget(self) -> None:
        """Prove itself anew before the next request: nothing of an earlier session is used any more."""
        self.token = ""

    def _request(
        self, method: str, path: str, headers: dict[str, str], body: bytes | None = None, *, longest: float = _SHORT
    ) -> Answer:
        for again in (False, True):
            if not self.token:
                self.prove()
            answer = self._exchange(method, path, headers | {"Authorization": f"Bearer {self.token}"}, body, longest)
            if answer.status != 401 or again:
                break
            self.token = ""
        return answer

    def _exchange(
        self, method: str, path: str, headers: dict[str, str], body: bytes | None = None, longest: float = _SHORT
    ) -> Answer:
        return exchange(self.server, method, path, headers, body, longest=longest)


def host_keys(configuration: Configuration) -> list[Path]:
    """The files of this machine's private ssh host keys, that which most machines are known by first."""
    files = [Path(configuration.host_keys, f"ssh_host_{kind}_key") for kind in _KINDS]
    return [each for each in files if each.is_file()]


def _field(answer: Answer, name: str) -> str:
    if answer.status != 200:
        raise Failed(f"toto answers {answer.status}: {answer.said}")
    try:
        found: Any = json.loads(answer.body)[name]
    except (ValueError, LookupError, TypeError, RecursionError):
        found = None
    if not isinstance(found, str):
        raise Failed(f"toto's answer has no {name}")
    return found
