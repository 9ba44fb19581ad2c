"""Signatures by `ssh-keygen -Y` (OpenSSH's PROTOCOL.sshsig), which is on every host already.

The file of allowed signers has, for each key, the repos whose documents it may sign as principals, its namespace and,
where wanted, until when it is valid: `infra namespaces="desired@toto",valid-before="20270101" ssh-ed25519 AAAA…`. A
list of revoked keys, or a KRL, may be given besides.
"""

import base64
import contextlib
import hashlib
import json
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

NAMESPACE: Final = "desired@toto"
MOST: Final = 200_000  # bytes of an envelope
_KEY: Final = re.compile(r"(?:ssh|ecdsa|sk)-[a-z0-9@.-]+ [A-Za-z0-9+/]{20,}=*")
_LONGEST: Final = 60.0  # seconds for ssh-keygen, on a slow machine


_LISTED: Final = 16  # keys that are told


class NotGenuine(Exception):
    """A text is not signed, or not by who may sign it."""


class CannotSign(Exception):
    """The signing key cannot be used."""


def fingerprint(key: str) -> str:
    """What ssh-keygen calls a public key, type and base64: `SHA256:…`. Raises ValueError."""
    words = key.split()
    if len(words) < 2:
        raise ValueError(f"not a public key: {key[:80]!a}")
    return f"SHA256:{base64.b64encode(hashlib.sha256(base64.b64decode(words[1])).digest()).decode().rstrip('=')}"


def listed(signers: Path) -> list[str]:
    """The fingerprints of the keys that a file of allowed signers has."""
    found: dict[str, None] = {}
    with contextlib.suppress(OSError, ValueError):
        for line in signers.read_text().splitlines():
            if key := _KEY.search(line):
                found[fingerprint(key[0])] = None
    return list(found)[:_LISTED]


def sign(text: bytes, key: Path, namespace: str) -> str:
    """The signature of `text` by the private key in the file `key`. Raises `CannotSign`."""
    done = _run(["-Y", "sign", "-q", "-n", namespace, "-f", str(key)], text)
    if done.returncode != 0 or not done.stdout:
        raise CannotSign(_last(done))
    return done.stdout.decode()


def seal(text: bytes, key: Path, namespace: str = NAMESPACE) -> bytes:
    """An envelope: `text` and its signature by the private key in the file `key`. Raises `CannotSign`."""
    return json.dumps({"text": text.decode(), "signature": sign(text, key, namespace)}).encode() + b"\n"


def unsealed(envelope: bytes) -> tuple[bytes, bytes]:
    """The text of an envelope and its signature, which nobody has checked. Raises `NotGenuine`."""
    if len(envelope) > MOST:
        raise NotGenuine(f"it has more than {MOST} bytes")
    try:
        found = json.loads(envelope)
        return found["text"].encode(), found["signature"].encode()
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise NotGenuine("it is not a signed document") from None


def opened(envelope: bytes, repo: str, signers: Path, now: datetime, revoked: Path | None = None) -> bytes:
    """The text of an envelope that somebody whom `signers` names signed for `repo`, with a key that is valid at `now`.

    Raises `NotGenuine`.
    """
    text, signed = unsealed(envelope)
    check(text, signed, repo, signers, NAMESPACE, now, revoked)
    return text


def check(
    text: bytes,
    signed: bytes,
    who: str,
    signers: Path,
    namespace: str,
    now: datetime | None = None,
    revoked: Path | None = None,
) -> None:
    """Check that `signed` is the signature of `text` by a key that `signers` has for `who` (valid at `now`, if given).

    Raises `NotGenuine`.
    """
    with _in_memory(signed) as file:
        words = ["-Y", "verify", "-q", "-n", namespace, "-f", str(signers), "-I", who, "-s", f"/proc/self/fd/{file}"]
        if now is not None:
            words.append(f"-Overify-time={now.astimezone(UTC):%Y%m%d%H%M%SZ}")
        if revoked is not None:
            words += ["-r", str(revoked)]
        done = _run(words, text, keep=file)
    if done.returncode != 0:
        raise NotGenuine(_last(done, f"no key that may sign for {who} has signed it"))


def _run(words: list[str], text: bytes, keep: int | None = None) -> "subprocess.CompletedProcess[bytes]":
    environment = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"}
    return subprocess.run(
        ["ssh-keygen", *words],
        input=text,
        capture_output=True,
        check=False,
        timeout=_LONGEST,
        env=environment,
        pass_fds=[] if keep is None else [keep],
    )


def _last(done: "subprocess.CompletedProcess[bytes]", otherwise: str = "") -> str:
    """The last line that ssh-keygen said; it says nothing of a key that it does not know."""
    lines = done.stderr.decode(errors="replace").split("\n")
    otherwise = otherwise or f"ssh-keygen: status {done.returncode}"
    return next((each.strip() for each in reversed(lines) if each.strip()), otherwise)


@contextmanager
def _in_memory(text: bytes) -> Iterator[int]:
    file = os.memfd_create("signature")
    try:
        os.write(file, text)
        yield file
    finally:
        os.close(file)
