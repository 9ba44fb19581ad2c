"""A report is read as strictly as a document."""

import json
from typing import Any

import pytest

from flying_monkey.report import BadReport, Report
from tests.flying_monkey.test_outbox import report


def test_a_report_is_read_as_it_was_written() -> None:
    made = report(error="no", log="a\nb", details={"hooks": {"drain": ""}, "drift": ""})
    assert Report.read(made.write()) == made


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"serial": -1}, "serial"),
    ({"serial": True}, "serial"),
    ({"number": 2**60}, "number"),
    ({"number": 1.5}, "number"),
    ({"machine": "../web1"}, "machine"),
    ({"state": "done 0; rm"}, "state"),
    ({"phase": "force"}, "phase"),
    ({"system": "/etc"}, "system"),
    ({"system": "/nix/store/../../etc"}, "system"),
    ({"error": "x" * 5_000}, "error"),
    ({"log": ["x"]}, "log"),
    ({"details": []}, "details"),
    ({"details": {"x": "x" * 20_000}}, "details"),
    ({"more": 1}, "more"),
    ({"asked": "a b"}, "asked"),
]


@pytest.mark.parametrize(("change", "words"), WRONG)
def test_what_is_not_allowed_is_refused(change: dict[str, Any], words: str) -> None:
    text = json.dumps(json.loads(report().write()) | change).encode()
    with pytest.raises(BadReport, match=words):
        Report.read(text)


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b"nul", b"\xff", b"[" * 60_000, b'"' + b"x" * 70_000])
def test_what_is_no_report_is_refused(text: bytes) -> None:
    with pytest.raises(BadReport):
        Report.read(text)
