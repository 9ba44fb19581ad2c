"""The document as text: what is written is read again, and nothing else is read."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flying_monkey.desired import MOST, BadDocument, Desired, Hooks


def test_what_is_written_is_read_again_and_is_one_line(document: Desired) -> None:
    assert b"reboot" not in document.write(), "older agents do not know it"
    for each in (
        document,
        replace(document, reboot="now"),
        replace(document, reboot="now", reboot_until=document.issued),
        replace(document, good=None, phase="keep", hooks=Hooks(("10-drain",), ("90-undrain",))),
    ):
        text = each.write()
        assert Desired.read(text) == each
        assert text.count(b"\n") == 1 and text == Desired.read(text).write()


MISSING: Any = object()


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("version", 2, "version: this agent reads version 1"),
        ("repo", "../infra", "repo: '../infra' is not allowed"),
        ("repo", "", "repo: '' is not allowed"),
        ("repo", MISSING, "repo is missing"),
        ("shell", "true", "'shell' is not known"),
        ("machine", "web1", "machine: not an object"),
        ("machine.name", "web1\n", "name: 'web1\\n' is not allowed"),
        ("machine.name", ".hidden", "name"),
        ("machine.host_key", "ssh-ed25519", "host_key"),
        ("serial", 0, "serial: not a whole number from 1"),
        ("serial", True, "serial"),
        ("serial", 1.0, "serial"),
        ("serial", 2**53, "serial"),
        ("issued", "2026-03-01 12:00:00", "issued: not a time such as"),
        ("issued", "2026-3-1T12:00:00Z", "issued"),
        ("issued", 1772366400, "issued"),
        ("expires", "2026-03-01T12:00:00Z", "expires: not later than issued"),
        ("phase", "force", "phase: not one of try, keep, back"),
        ("phase", ["try"], "phase"),
        ("activation", "dry-activate", "activation"),
        ("reboot", "later", "reboot: not one of never, window, now"),
        ("reboot_until", None, "reboot_until: not a time such as"),
        ("system.path", "/nix/store/../etc", "path"),
        ("system.path", f"/nix/store/{'a' * 32}-x/bin/sh", "path"),
        ("system.path", f"/nix/store/{'e' * 32}-x", "path"),
        ("system.nar_hash", "", "nar_hash"),
        ("system.nar_hash", "md5:" + "0" * 32, "nar_hash"),
        ("good", [], "good: not an object"),
        ("deadlines.confirm", 0, "confirm: not a whole number from 1 to 604800"),
        ("deadlines.confirm", 604_801, "confirm"),
        ("deadlines.other", 1, "'other' is not known"),
        ("hooks.prepare", ["../drain"], "prepare: '../drain' is not allowed"),
        ("hooks.prepare", ["drain", "drain"], "prepare: not a list of at most 64 different names"),
        ("hooks.prepare", "drain", "prepare: not a list"),
        ("hooks.finish", [f"h{each}" for each in range(65)], "finish"),
        ("hooks.finish", [{}], "finish"),
    ],
)
def test_a_wrong_field_is_named(document: Desired, field: str, value: Any, words: str) -> None:
    found = json.loads(document.write())
    *way, last = field.split(".")
    place = found[way[0]] if way else found
    if value is MISSING:
        del place[last]
    else:
        place[last] = value
    with pytest.raises(BadDocument) as caught:
        Desired.read(json.dumps(found).encode())
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "not JSON"),
        (b"[" * 60_000, "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[]", "the document: not an object"),
        (b'{"serial": NaN}', "NaN is no number"),
        (b'{"serial": 1, "serial": 2}', "a field is there twice"),
        (b" " * (MOST + 1), "more than 65536 bytes"),
        (b'{"serial": ' + b"9" * 5_000 + b"}", "not JSON"),
    ],
)
def test_what_is_no_document_is_said(text: bytes, words: str) -> None:
    with pytest.raises(BadDocument) as caught:
        Desired.read(text)
    assert words in str(caught.value)


def test_the_agent_needs_the_standard_library_alone() -> None:
    """A machine has no more: an interpreter without site-packages, which sees only this folder."""
    folder = Path(__file__).parents[2]
    names = sorted(f"flying_monkey.{each.stem}" for each in (folder / "flying_monkey").glob("*.py"))
    program = f"import sys; sys.path.append({str(folder)!r})\n" + "".join(f"import {name}\n" for name in names)
    program += "print(*[name for name in sys.modules if name.split('.')[0] in ('toto', 'pydantic', 'prefect')])"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
