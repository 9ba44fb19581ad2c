"""Who may sign what, with real keys and the real ssh-keygen."""

import json
import subprocess
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from flying_monkey.desired import Desired
from flying_monkey.signature import MOST, NAMESPACE, CannotSign, NotGenuine, opened, seal
from tests.flying_monkey.conftest import ISSUED

NewKey = Callable[[str], Path]


@pytest.fixture(scope="module")
def key(new_key: NewKey) -> Path:
    return new_key("toto")


def allow(folder: Path, key: Path, repo: str = "infra", options: str = f'namespaces="{NAMESPACE}"') -> Path:
    file = folder / "signers"
    with file.open("a") as sink:
        sink.write(f"{repo} {options} {key.with_suffix('.pub').read_text()}")
    return file


def test_a_signed_document_is_opened_and_a_changed_one_is_not(document: Desired, key: Path, tmp_path: Path) -> None:
    signers = allow(tmp_path, key)
    envelope = seal(document.write(), key)
    assert Desired.read(opened(envelope, "infra", signers, ISSUED)) == document
    changed = json.loads(envelope)
    for text in (changed["text"].replace('"serial":7', '"serial":8'), changed["text"] + " ", ""):
        with pytest.raises(NotGenuine):
            opened(json.dumps(changed | {"text": text}).encode(), "infra", signers, ISSUED)


def test_both_listed_signers_count_and_no_other(document: Desired, key: Path, new_key: NewKey, tmp_path: Path) -> None:
    admin, stranger = new_key("admin"), new_key("stranger")
    allow(tmp_path, key)
    signers = allow(tmp_path, admin)
    for each in (key, admin):
        assert opened(seal(document.write(), each), "infra", signers, ISSUED)
    with pytest.raises(NotGenuine):
        opened(seal(document.write(), stranger), "infra", signers, ISSUED)


@pytest.mark.parametrize(
    ("repo", "options"),
    [
        ("other", f'namespaces="{NAMESPACE}"'),
        ("infra", 'namespaces="file"'),
        ("infra", f'namespaces="{NAMESPACE}",valid-before="20260301"'),
        ("infra", f'namespaces="{NAMESPACE}",valid-after="20260401"'),
        ("!infra,*", f'namespaces="{NAMESPACE}"'),
    ],
)
def test_a_key_counts_for_its_repo_its_namespace_and_its_time(
    document: Desired, key: Path, tmp_path: Path, repo: str, options: str
) -> None:
    signers = allow(tmp_path, key, repo, options)
    with pytest.raises(NotGenuine):
        opened(seal(document.write(), key), "infra", signers, ISSUED + timedelta(hours=13))


def test_the_time_that_counts_is_the_machines(document: Desired, key: Path, tmp_path: Path) -> None:
    signers = allow(tmp_path, key, options=f'namespaces="{NAMESPACE}",valid-before="20270101"')
    envelope = seal(document.write(), key)
    assert opened(envelope, "infra", signers, ISSUED)
    with pytest.raises(NotGenuine):
        opened(envelope, "infra", signers, datetime(2027, 1, 2, tzinfo=ISSUED.tzinfo))


def test_a_revoked_key_signs_nothing(document: Desired, key: Path, tmp_path: Path) -> None:
    signers, revoked, list_of_revoked = allow(tmp_path, key), tmp_path / "keys", tmp_path / "krl"
    revoked.write_bytes(key.with_suffix(".pub").read_bytes())
    subprocess.run(["ssh-keygen", "-q", "-k", "-f", list_of_revoked, key.with_suffix(".pub")], check=True)
    for each in (revoked, list_of_revoked):
        with pytest.raises(NotGenuine):
            opened(seal(document.write(), key), "infra", signers, ISSUED, each)


def test_a_signature_for_something_else_is_none(document: Desired, key: Path, tmp_path: Path) -> None:
    """A key that signs git commits too must not have signed a deployment by that."""
    signers = allow(tmp_path, key, options="")
    text = document.write()
    words = ["ssh-keygen", "-Y", "sign", "-q", "-n", "git", "-f", str(key)]
    signature = subprocess.run(words, input=text, capture_output=True, check=True).stdout
    envelope = json.dumps({"text": text.decode(), "signature": signature.decode()}).encode()
    with pytest.raises(NotGenuine):
        opened(envelope, "infra", signers, ISSUED)


@pytest.mark.parametrize(
    "envelope",
    [
        *(b"", b"[]", b"null", b"{}", b"[" * 100_000, b'{"text": 1, "signature": ""}', b'{"text": "x"}'),
        *(b'{"text": "\\ud800", "signature": ""}', b'{"text": "x", "signature": "\\u0000"}', b"x" * (MOST + 1)),
    ],
)
def test_what_is_no_envelope_is_refused(key: Path, tmp_path: Path, envelope: bytes) -> None:
    with pytest.raises(NotGenuine):
        opened(envelope, "infra", allow(tmp_path, key), ISSUED)


def test_signers_that_are_not_there_let_nobody_in(document: Desired, key: Path, tmp_path: Path) -> None:
    envelope = seal(document.write(), key)
    for missing in (tmp_path / "none", tmp_path):
        with pytest.raises(NotGenuine):
            opened(envelope, "infra", missing, ISSUED)
    with pytest.raises(NotGenuine):
        opened(envelope, "infra", allow(tmp_path, key), ISSUED, revoked=tmp_path / "none")


def test_a_key_that_cannot_sign_is_said(document: Desired, key: Path, tmp_path: Path) -> None:
    with pytest.raises(CannotSign, match="No such file"):
        seal(document.write(), tmp_path / "none")
    with pytest.raises(CannotSign):
        seal(document.write(), Path("/dev/null"))
