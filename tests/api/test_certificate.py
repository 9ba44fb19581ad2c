"""toto's own certificates, as `ssl` and openssl see them."""

import subprocess
from pathlib import Path

import pytest

from toto.api import certificate


def test_a_new_name_needs_no_new_authority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOTO_STATE", str(tmp_path))
    first = certificate.own(["toto.lan", "10.0.0.1"])
    ca, leaf = first.ca.read_bytes(), first.certificate.read_bytes()
    assert certificate.own(["10.0.0.1", "toto.lan"]) == first
    assert (first.ca.read_bytes(), first.certificate.read_bytes()) == (ca, leaf)
    certificate.own(["toto.lan", "10.0.0.2"])
    assert first.ca.read_bytes() == ca and first.certificate.read_bytes() != leaf
    assert (first.key.stat().st_mode | (tmp_path / "api" / "ca.key").stat().st_mode) & 0o077 == 0
    first.ca.unlink()
    assert certificate.own(["toto.lan", "10.0.0.2"]).ca.read_bytes() != ca


@pytest.mark.parametrize("year", ["1971", "2026", "2200"])
def test_it_is_good_whatever_the_clock_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, year: str) -> None:
    monkeypatch.setenv("TOTO_STATE", str(tmp_path))
    made = certificate.own(["toto.lan"])
    seconds = (int(year) - 1970) * 31_556_952
    words = ["openssl", "verify", "-x509_strict", "-purpose", "sslserver", "-verify_hostname", "toto.lan"]
    subprocess.run([*words, "-attime", str(seconds), "-CAfile", made.ca, made.certificate], check=True)
