"""The helper's answers, also to what it cannot do."""

from typing import Any

import pytest

from flying_monkey import helper


@pytest.mark.parametrize(
    ("request_", "kind"),
    [({"verb": "facts"}, "Misconfigured"), ({}, "Misconfigured"), ({"verb": "arm", "envelope": 3}, "Misconfigured")],
)
def test_it_says_what_is_wrong_and_never_raises(request_: dict[str, Any], kind: str) -> None:
    assert helper.answer(request_)["kind"] == kind, "this machine has no agent's configuration"


def test_what_nobody_thought_of_is_an_answer_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(helper, "_answer", lambda request: request["missing"])
    assert helper.answer({}) == {"error": "KeyError: 'missing'", "kind": "Broken"}
