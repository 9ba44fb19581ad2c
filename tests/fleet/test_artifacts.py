"""The keys of artifacts: no two things have the same."""

import itertools
import re

from toto.fleet import artifacts
from toto.ledger.target import HOST, Target


def test_what_repos_and_targets_show_is_never_taken_for_that_of_others() -> None:
    names = ("web-1", "web.1", "web_1", "Web-1", "web--1", "web", "1", "host", "a/b", "a-b", "", "-", "é", "web1\n")
    repos = ("infra", "in.fra", "in-fra", "infra--host", "infra--host--web", "host")
    whats = ("difference", "console", "plan", "back", "no-internet")
    of_targets = [
        artifacts.of_target(what, repo, Target(kind, name))
        for what, repo, kind, name in itertools.product(whats, repos, (HOST, "terraform", "helm"), names)
    ]
    of_repos = [artifacts.of_repo(what, repo) for what in ("plan", "report", "targets", "builds") for repo in repos]
    keys = of_targets + of_repos
    assert len(set(keys)) == len(keys)
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9-]*", each) for each in keys)


def test_the_key_of_an_ordinary_name_is_that_name() -> None:
    assert artifacts.of_repo("report", "my-infra") == "report-my-infra"
    assert artifacts.of_target("console", "infra", Target(HOST, "web-1")) == "console-infra--host--web-1"
    hashed = artifacts.of_target("plan", "infra", Target("terraform", "eu.dns"))
    assert re.fullmatch(r"plan-infra--terraform--eu-dns--[0-9a-f]{16}", hashed)
