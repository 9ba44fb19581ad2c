"""Toto as its users meet it: two of them push over ssh to one fleet, with options, and many times in a row.

One machine, web1; a real sshd with the forced command in front of the repository that the real flows deploy.
"""

import asyncio
import os
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
import pytest_asyncio

from tests.conftest import free_port
from tests.git_host.test_over_ssh import Clone, Host, set_rules
from tests.lab import setup
from tests.lab.test_whole import BAD, Whole
from tests.machine.test_ssh import keygen
from tests.repos import git
from toto.base import process
from toto.git_host import access
from toto.git_host import host as git_host
from toto.ledger.ledger import REF

pytestmark = [pytest.mark.lab, pytest.mark.asyncio(loop_scope="module"), pytest.mark.minutes(3)]

PUSHES = 20 if os.environ.get("TOTO_CUTS") else 6


@dataclass
class Pushers:
    """The fleet, and two users with a clone each, over ssh."""

    whole: Whole
    alice: Clone
    bob: Clone

    def change(self, clone: Clone, variant: str) -> str:
        """A commit that makes web1 another variant; its hash."""
        for name, text in self.whole.web1(variant).items():
            (clone.folder / name).write_text(text or "")
        clone.git("add", "--all")
        return clone.commit()

    def ledger(self) -> str:
        """The commit of the ledger, "" where nothing was deployed yet."""
        return git("for-each-ref", "--format=%(objectname)", REF, cwd=self.whole.repo)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pushers(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Pushers]:
    await asyncio.to_thread(setup.setup)
    whole = Whole(tmp_path_factory.mktemp("pushers"), net=3)
    host = Host(whole.directory, free_port())
    try:
        await whole.prepare()
        whole.alone()
        settings = whole.work / "toto.toml"
        settings.write_text(settings.read_text().replace("test_timeout = 120", "test_timeout = 900"))  # see below
        for phase in ("no-internet", "smoke"):
            whole.test(phase, whole.control.script())
        whole.commit("the fleet", whole.web1("A"))
        for name in ("host", "alice", "bob"):
            await keygen(host.folder / name)
        await git_host.make_admin(host.repos, "alice", (host.folder / "alice.pub").read_text())
        bob = (host.folder / "bob.pub").read_text().strip()
        set_rules(
            host,
            host.clone("alice", access.ADMIN),
            lambda text: (
                text.replace("[users]", f'[users]\nbob = ["{bob}"]') + '[repos.infra]\nwrite = ["alice", "bob"]\n'
            ),
            push=False,
        )
        async with process.start([*await host.sshd(whole.state), "-E", host.folder / "journal"]):
            await asyncio.gather(whole.start_server(), whole.start_machines(["web1"]))
            clones = [host.clone(name) for name in ("alice", "bob")]
            for clone in clones:
                clone.git("fetch", "--quiet", str(whole.work), "main")
                clone.git("reset", "--quiet", "--hard", "FETCH_HEAD")
            yield Pushers(whole, *clones)
    finally:
        await asyncio.shield(whole.stop())


async def test_a_branch_is_rehearsed_and_planned_and_touches_nothing(pushers: Pushers) -> None:
    before = await pushers.whole.systems()
    output = await asyncio.to_thread(pushers.alice.push, "main:refs/heads/try", "rehearse", "wait")
    assert "nothing is rolled out" in output
    assert re.search(r"rehearse host / web1: done", output), output
    assert "\ntoto: done\n" in output, output
    output = await asyncio.to_thread(pushers.alice.push, "main:refs/heads/plan", "plan")
    assert re.search(r"(?m)^host/web1 +deploy", output), output
    assert "pull step" not in output and "submitt" not in output, "what Prefect says of itself"
    assert "rehearse host / web1" not in output
    assert pushers.ledger() == ""
    assert await pushers.whole.systems() == before


async def test_whoever_waits_sees_what_was_rehearsed_on_a_branch_reach_the_machine(pushers: Pushers) -> None:
    before = await pushers.whole.systems()
    assert "nothing is started (-o skip)" in pushers.alice.push("main", "skip")
    pushers.alice.commit()
    output = await asyncio.to_thread(pushers.alice.push, "main", "wait", "only=web1")
    assert "roll out host / web1: done" in output, output
    assert re.search(r"(?m): web1 deployed\ntoto: done$", output), output
    assert (await pushers.whole.systems()) != before
    assert not pushers.whole.sandboxes()
    await pushers.whole.settled()


async def test_whoever_waits_sees_why_the_machine_was_reverted(pushers: Pushers) -> None:
    before = await pushers.whole.systems()
    pushers.whole.control["smoke"] = BAD
    pushers.change(pushers.alice, "B")
    said = await asyncio.to_thread(pushers.alice.refused, "main", "wait")  # so git says, for its exit status
    text = re.sub(r"(?m)^ *remote: |\s+$", "", said)
    pushers.whole.control.all_good()
    assert re.search(r"(?m)^  not ok 1 - the customer is happy$", text), "the failing test's own line"
    assert re.search(r"(?m): web1: roll-out failed: smoke tests failed: .*; web1 reverted\ntoto: failed$", text), text
    assert await pushers.whole.systems() == before
    await pushers.whole.settled()


async def test_many_pushes_of_two_users_end_with_the_newest_and_one_roll_out_at_a_time(pushers: Pushers) -> None:
    """Without a pause; a smoke test looks whether it is alone, and the first's lasts until all are pushed."""
    whole, machine = pushers.whole, pushers.whole.machines["web1"]
    whole.control.waits(
        "smoke", before="on-host mkdir /tmp/alone || on-host touch /tmp/overlap", after="on-host rmdir /tmp/alone"
    )
    pushers.bob.git("fetch", "--quiet", "toto", "main")
    pushers.bob.git("reset", "--quiet", "--hard", "FETCH_HEAD")
    commits, before = [], len(whole.history())
    for number in range(PUSHES):
        clone, other = (pushers.alice, pushers.bob)[:: 1 if number % 2 else -1]
        commits.append(pushers.change(clone, {0: "first", PUSHES - 1: "C"}.get(number, "AB"[number // 2 % 2])))
        await asyncio.to_thread(clone.push)
        if number == 0:
            await whole.control.begun()
        other.git("fetch", "--quiet", "toto", "main")
        other.git("reset", "--quiet", "--hard", "FETCH_HEAD")
    whole.control.go()
    runs = [await asyncio.to_thread(whole.run_of, commit) for commit in commits]
    ends = [await whole.ended(run) for run in runs]
    assert {end.state for end in ends} <= {"COMPLETED", "CANCELLED"}, [end.message for end in ends]
    assert ends[-1].state == "COMPLETED", ends[-1].message
    assert all("superseded" in end.message for end in ends if end.state == "CANCELLED")
    good = whole.entry("web1").good
    assert good is not None and good.commit == git("rev-parse", "main", cwd=whole.repo)
    assert (await machine.ssh("cat", "/etc/variant")).out.strip() == "C"
    assert (await machine.ssh("ls", "/tmp/overlap")).status != 0, "two runs were on the machine at once"
    fresh = whole.history()[: len(whole.history()) - before]
    assert sum(line.startswith("web1: good") for line in fresh) > 1, "there was nothing that could overlap"
    await whole.settled()
    pushed = {run: whole.api("GET", f"/flow_runs/{run}")["tags"] for run in runs}
    assert {tag for tags in pushed.values() for tag in tags} >= {"user:alice", "user:bob"}
