"""Signatures by `ssh-keygen -Y` (OpenSSH's PROTOCOL.sshsig), which is on every host already.

The file of allowed signers has, for each key, the repos whose documents it may sign as principals, its namespace and,
where wanted, until when it is valid: `infra namespaces="desired@toto",valid-before="20270101" ssh-ed25519 AAAA…`. A
list of revoked keys, or a KRL, may be given besides.
"""

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

NAMESPACE: Final = "desired@toto"
MOST: Final = 200_000  # bytes of an envelope
_LONGEST: Final = 60.0  # seconds for ssh-keygen, on a slow machine


class NotGenuine(Exception):
    """A text is not signed, or not by who may sign it."""


class CannotSign(Exception):
    """The signing key cannot be used."""


def seal(text: bytes, key: Path) -> bytes:
    """An envelope: `text` and its signature by the private key in the file `key`. Raises `CannotSign`."""
    done = _run(["-Y", "sign", "-q", "-n", NAMESPACE, "-f", str(key)], text)
    if done.returncode != 0 or not done.stdout:
        raise CannotSign(_last(done))
    return json.dumps({"text": text.decode(), "signature": done.stdout.decode()}).encode() + b"\n"


def opened(envelope: bytes, repo: str, signers: Path, now: datetime, revoked: Path | None = None) -> bytes:
    """The text of an envelope that somebody whom `signers` names signed for `repo`, with a key that is valid at `now`.

    Raises `NotGenuine`.
    """
    if len(envelope) > MOST:
        raise NotGenuine(f"it has more than {MOST} bytes")
    try:
        found = json.loads(envelope)
        text: bytes = found["text"].encode()
        signature: bytes = found["signature"].encode()
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise NotGenuine("it is not a signed document") from None
    with _in_memory(signature) as file:
        words = ["-Y", "verify", "-q", "-n", NAMESPACE, "-f", str(signers), "-I", repo, "-s", f"/proc/self/fd/{file}"]
        words.append(f"-Overify-time={now.astimezone(UTC):%Y%m%d%H%M%SZ}")
        if revoked is not None:
            words += ["-r", str(revoked)]
        done = _run(words, text, keep=file)
    if done.returncode != 0:
        raise NotGenuine(_last(done))
    return text


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


def _last(done: "subprocess.CompletedProcess[bytes]") -> str:
    lines = done.stderr.decode(errors="replace").split("\n")
    return next((each.strip() for each in reversed(lines) if each.strip()), f"ssh-keygen: status {done.returncode}")


@contextmanager
def _in_memory(text: bytes) -> Iterator[int]:
    file = os.memfd_create("signature")
    try:
        os.write(file, text)
        yield file
    finally:
        os.close(file)
