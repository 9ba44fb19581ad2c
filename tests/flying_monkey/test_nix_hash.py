"""Hashes as nix itself writes them."""

import subprocess

import pytest

from flying_monkey.nix_hash import sha256

DIGEST = bytes(range(200, 232))


@pytest.mark.parametrize("form", ["--to-base16", "--to-base32", "--to-sri"])
def test_what_nix_writes_is_read(form: str) -> None:
    words = ["nix-hash", "--type", "sha256", form, DIGEST.hex()]
    if form == "--to-sri":
        words = [
            "nix",
            "--extra-experimental-features",
            "nix-command",
            "hash",
            "to-sri",
            "--type",
            "sha256",
            DIGEST.hex(),
        ]
    text = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    assert sha256(text) == DIGEST
    assert text.startswith("sha256-") or sha256(f"sha256:{text}") == DIGEST


@pytest.mark.parametrize("text", ["", "sha256:", "sha256-", "sha256-AAAA", "sha256-****", "0" * 63, "e" * 52, "z" * 52])
def test_nothing_else_is(text: str) -> None:
    assert sha256(text) is None
