"""What runs of flows are called; the git host's hook calls them the same."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tasks import names
from tests.repos import InfraRepo, git


@pytest.fixture
def repo(tmp_path: Path) -> InfraRepo:
    return InfraRepo(tmp_path / "repo")


def called(
    monkeypatch: pytest.MonkeyPatch,
    parameters: dict[str, Any],
    deployment: str | None = None,
    given: str = "lucky-otter",
    flow: str = "reconcile",
) -> str:
    """The name of a run with these parameters."""
    run = SimpleNamespace(parameters=parameters, name=given, flow_name=flow)
    monkeypatch.setattr(names, "runtime", SimpleNamespace(flow_run=run, deployment=SimpleNamespace(name=deployment)))
    return names.of_reconcile() if flow == "reconcile" else names.of_flow()


@pytest.mark.parametrize(
    ("deployment", "parameters", "expected"),
    [
        ("reconcile", {"origin": "push"}, "{repo} {tip} (push)"),
        ("reconcile", {}, "{repo} {tip} (ui)"),
        (None, {"origin": "notebook", "only": ["web1"]}, "{repo} {tip}: only web1 (notebook)"),
        ("toto", {"origin": "schedule"}, "{repo} {tip} (schedule)"),
        ("reconcile", {"only": ["web1", "web2"], "origin": "schedule"}, "{repo} {tip}: only web1 web2 (schedule)"),
        ("deploy-host", {"only": ["web1"]}, "{repo} {tip}: deploy-host web1 (ui)"),
        ("host", {"only": ["web1"]}, "{repo} {tip}: deploy-host web1 (ui)"),
        ("deploy-host", {"only": []}, "{repo} {tip}: deploy-host (ui)"),
        ("rehearse", {"rehearse_only": True, "only": ["web1"]}, "{repo} {tip}: rehearse web1 (ui)"),
        ("reconcile", {"plan_only": True, "origin": "push"}, "{repo} {tip}: plan (push)"),
        ("revert-to", {"commit": "v1"}, "{repo} {first}: revert-to (ui)"),
        ("reconcile", {"commit": "main"}, "{repo} {tip} (ui)"),
        ("reconcile", {"commit": "gone"}, "{repo} gone (ui)"),
        ("reconcile", {"commit": "a" * 40}, "{repo} aaaaaaaa (ui)"),
        ("reconcile", {"commit": "--help"}, "{repo} --help (ui)"),
        ("reconcile", {"commit": "a\x1b[31m\nb\u202ec"}, "{repo} a [31m b c (ui)"),
        ("reconcile", {"commit": "b" * 500}, "{repo} " + "b" * 57 + "... (ui)"),
        ("reconcile", {"only": ["web" * 50]}, "{repo} {tip}: only " + ("web" * 50)[:37] + "... (ui)"),
        ("nightly\x00check", {}, "{repo} {tip}: nightly check (ui)"),
    ],
)
def test_a_run_is_called_by_repo_commit_what_it_does_and_origin(
    repo: InfraRepo, monkeypatch: pytest.MonkeyPatch, deployment: str | None, parameters: dict[str, Any], expected: str
) -> None:
    first = repo.commit({"README.md": "one"})
    git("push", "--quiet", "origin", f"{first}:refs/tags/v1", cwd=repo.work)
    tip = repo.commit({"README.md": "two"})
    name = called(monkeypatch, {"repo": repo.bare, **parameters}, deployment)
    assert name == expected.format(repo=repo.bare.name.removesuffix(".git"), tip=tip[:8], first=first[:8])


def test_a_name_that_says_it_already_stays(repo: InfraRepo, monkeypatch: pytest.MonkeyPatch) -> None:
    tip = repo.commit({"README.md": "one"})[:8]
    name = repo.bare.name.removesuffix(".git")
    for given in (f"{name} {tip} (push)", f"{name} {tip}: only web1 (push)"):
        # The deployment's own parameters may say more than the hook knew.
        assert called(monkeypatch, {"repo": repo.bare, "only": ["web"]}, given=given) == given
    assert called(monkeypatch, {"repo": repo.bare}, given=f"{name} 00000000 (push)") == f"{name} {tip} (ui)"


def test_a_repo_without_a_commit_and_an_api_that_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Silent:
        @property
        def name(self) -> str:
            raise ConnectionError

    run = SimpleNamespace(parameters={"repo": tmp_path / "infra.git"}, name=None)
    monkeypatch.setattr(names, "runtime", SimpleNamespace(flow_run=run, deployment=Silent()))
    assert names.of_reconcile() == "infra newest commit (ui)"


def test_other_flows_are_called_by_their_own_name_and_the_repo(monkeypatch: pytest.MonkeyPatch) -> None:
    assert called(monkeypatch, {"repo": "/srv/infra.git"}, flow="settle") == "settle infra"
