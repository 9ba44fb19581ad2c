"""The ledger on real git: history, compare-and-swap, the fence."""

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from tests.repos import InfraRepo, git
from toto.ledger import history, ledger, steps
from toto.ledger.history import What
from toto.ledger.ledger import (
    Before,
    Deployed,
    Entry,
    Frozen,
    Intent,
    Ledger,
    LedgerError,
    LostTarget,
    Note,
    TargetBusy,
)
from toto.ledger.target import Target

WEB1 = Target("host", "web1")


def deployed(path: str, run: str = "run-1") -> Deployed:
    return Deployed(identity=f"{path}.drv", path=path, commit="c" * 40, run=run, at="2026-01-01T00:00:00Z", tests="t")


def intent(run: str, path: str = "/nix/store/new") -> Intent:
    return Intent(
        desired=deployed(path, run),
        before=Before(system="/nix/store/old", profile="/nix/store/old"),
        run=run,
        owner=ledger.owner(),
        at="2026-01-01T00:00:00Z",
    )


def note(run: str = "run-1") -> Note:
    return Note(identity="i", commit="c", run=run, at="2026-01-01T00:00:00Z", why="a test failed")


@pytest.fixture
def book(tmp_path: Path) -> Ledger:
    return Ledger(InfraRepo(tmp_path).bare)


async def test_an_empty_repo_has_an_empty_ledger(book: Ledger) -> None:
    assert book.read().entries == {}


def test_nothing_is_reverted_without_an_intent_of_ones_own() -> None:
    with pytest.raises(LostTarget, match="this run's intent is gone"):
        steps.require_intent(Entry(good=deployed("/nix/store/new")), "run-1")
    with pytest.raises(LostTarget):
        steps.require_intent(Entry(intent=intent("run-1")), "run-2")
    assert steps.require_intent(Entry(intent=intent("run-1")), "run-1").run == "run-1"


async def test_a_roll_out_reads_as_history(book: Ledger) -> None:
    await book.write(WEB1, steps.intend(intent("run-1")), "web1: intent to deploy")
    await book.write(WEB1, steps.good(deployed("/nix/store/new"), "run-1"), "web1: good")
    history = git("log", "--format=%s", ledger.REF, cwd=book.repo).splitlines()
    assert history == ["web1: good", "web1: intent to deploy"]
    entry = book.read().get(WEB1)
    assert entry.intent is None
    assert entry.good == deployed("/nix/store/new")
    assert entry.before == Before(system="/nix/store/old", profile="/nix/store/old")


async def test_the_ledger_is_no_branch_that_a_clone_sees(book: Ledger) -> None:
    await book.write(WEB1, steps.intend(intent("run-1")), "web1: intent")
    assert "ledger" not in git("branch", "--all", cwd=book.repo)


async def test_a_host_name_with_dots_is_its_own_entry(book: Ledger) -> None:
    target = Target("host", "toto.canon")
    await book.write(target, steps.rehearsed_only(deployed("/nix/store/x")), "toto.canon: rehearsed")
    assert list(book.read().entries) == [target]


async def test_a_different_run_cannot_touch_a_target_with_an_open_intent(book: Ledger) -> None:
    await book.write(WEB1, steps.intend(intent("run-1")), "one")
    before = book.read()
    with pytest.raises(TargetBusy, match="run-1"):
        await book.write(WEB1, steps.intend(intent("run-2")), "two")
    assert book.read() == before


async def test_a_run_whose_intent_was_taken_over_can_record_nothing(book: Ledger) -> None:
    opened = intent("run-1")
    await book.write(WEB1, steps.intend(opened), "one")
    await book.write(WEB1, steps.take_over(opened, "run-2"), "two takes over")
    for change in (steps.good(deployed("/nix/store/new"), "run-1"), steps.revert(None, note(), "run-1")):
        with pytest.raises(LostTarget):
            await book.write(WEB1, change, "too late")
    with pytest.raises(LostTarget):
        await book.write(WEB1, steps.take_over(opened, "run-3"), "three is second")


async def test_what_was_reverted_keeps_its_last_good_and_says_why(book: Ledger) -> None:
    await book.write(WEB1, steps.intend(intent("run-1")), "i")
    await book.write(WEB1, steps.revert(deployed("/nix/store/old"), note(), "run-1"), "back")
    assert book.read().get(WEB1) == Entry(good=deployed("/nix/store/old"), reverted=note())


async def test_an_intent_stays_open_until_its_host_is_settled(book: Ledger) -> None:
    opened = intent("run-1")
    await book.write(WEB1, steps.intend(opened), "one")
    await book.write(WEB1, steps.not_reached(note("run-2")), "two could not reach it")
    with pytest.raises(TargetBusy):
        await book.write(WEB1, steps.intend(intent("run-1", "/nix/store/newer")), "what was before must not be lost")
    assert book.read().get(WEB1).intent == opened


async def test_a_write_that_changes_nothing_makes_no_commit(book: Ledger) -> None:
    await book.write(WEB1, steps.rehearsed_only(deployed("/nix/store/x")), "one")
    before = book.read().commit
    await book.write(WEB1, steps.rehearsed_only(deployed("/nix/store/x")), "again")
    assert book.read().commit == before


async def test_what_the_ledger_names_outlives_a_forced_push_and_a_garbage_collection(tmp_path: Path) -> None:
    repo = InfraRepo(tmp_path / "infra")
    first = repo.commit({"a": "1"})
    ledger = Ledger(repo.bare)
    good = deployed("/nix/store/a").model_copy(update={"commit": first})
    told = note().model_copy(update={"commit": repo.commit({"a": "2"})})
    seen = good.model_copy(update={"commit": repo.commit({"a": "3"})})
    entry = Entry(good=good, unreachable=told, rehearsed=seen)
    await ledger.write(Target("host", "web1"), lambda _: entry, "web1: good")
    git("reset", "--quiet", "--soft", "HEAD~2", cwd=repo.work)
    git("commit", "--amend", "--quiet", "-m", "amended", cwd=repo.work)
    git("push", "--quiet", "--force", str(repo.bare), "HEAD:main", cwd=repo.work)
    git("-c", "gc.reflogExpireUnreachable=now", "gc", "--quiet", "--prune=now", cwd=repo.bare)
    for number, commit in enumerate((first, told.commit, seen.commit), 1):
        assert git("show", f"{commit}:a", cwd=repo.bare) == str(number)


async def test_a_retired_target_leaves_the_ledger_but_not_its_history(book: Ledger) -> None:
    await book.write(WEB1, steps.rehearsed_only(deployed("/nix/store/x")), "one")
    await book.write(WEB1, lambda _: None, "web1: retired")
    assert book.read().entries == {}
    assert git("log", "--format=%s", ledger.REF, cwd=book.repo).splitlines() == ["web1: retired", "one"]


async def test_one_entry_is_read_alone(book: Ledger) -> None:
    assert book.get(WEB1) == Entry()
    await book.write(WEB1, steps.intend(intent("run-1")), "web1: intent to deploy")
    await book.write(Target("host", "web"), steps.not_reached(note()), "web: unreachable")
    assert book.get(WEB1) == book.read().get(WEB1)
    assert book.get(Target("host", "we")) == book.get(Target("terraform", "web1")) == Entry()


async def test_what_was_read_before_is_not_read_again(book: Ledger) -> None:
    web2 = Target("host", "web2")
    for target in (WEB1, web2):
        await book.write(target, steps.not_reached(note()), "unreachable")
    before = book.read()
    assert book.read() is before
    await book.write(WEB1, steps.not_reached(note("run-2")), "web1: unreachable")
    after = book.read()
    assert after.entries[web2] is before.entries[web2]
    assert after.get(WEB1) == Entry(unreachable=note("run-2"))
    await book.write(web2, lambda _: None, "web2: retired")
    assert book.read().entries.keys() == {WEB1}


@pytest.mark.slow
async def test_many_writers_lose_no_entry(book: Ledger) -> None:
    names = [f"h{number}" for number in range(12)]
    await asyncio.gather(
        *(
            book.write(Target("host", name), steps.rehearsed_only(deployed(f"/nix/store/{name}")), name)
            for name in names
        )
    )
    assert sorted(target.name for target in book.read().entries) == sorted(names)
    assert len(git("log", "--format=%s", ledger.REF, cwd=book.repo).splitlines()) == len(names)


@pytest.mark.slow
def test_a_writer_that_is_killed_leaves_a_whole_ledger(book: Ledger) -> None:
    """SIGKILL at instants all over a stream of writes: what is there parses, and the next write goes through."""
    program = (
        "import asyncio, sys\n"
        "from pathlib import Path\n"
        "from tests.ledger.test_ledger import deployed\n"
        "from toto.ledger import steps\n"
        "from toto.ledger.ledger import Ledger\n"
        "from toto.ledger.target import Target\n"
        "async def main():\n"
        "    print('up', flush=True)\n"
        "    for n in range(1000):\n"
        "        await Ledger(Path(sys.argv[1])).write(Target('host', 'web1'),"
        " steps.rehearsed_only(deployed(f'/nix/store/{n}')), str(n))\n"
        "asyncio.run(main())\n"
    )
    for delay in (0.05, 0.11, 0.17, 0.23):
        writer = subprocess.Popen([sys.executable, "-c", program, str(book.repo)], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        writer.stdout.readline()
        try:
            writer.wait(timeout=delay)
        except subprocess.TimeoutExpired:
            writer.kill()
        writer.wait()
        writer.stdout.close()
        book.read()
    asyncio.run(book.write(Target("host", "web2"), steps.rehearsed_only(deployed("/nix/store/x")), "after"))
    assert Target("host", "web2") in book.read().entries


async def test_a_ledger_that_does_not_parse_is_reported_with_its_file_name(book: Ledger) -> None:
    await book.write(WEB1, steps.rehearsed_only(deployed("/nix/store/x")), "one")
    blob = (
        subprocess.run(
            ["git", "hash-object", "-w", "--stdin"], cwd=book.repo, input=b"{", capture_output=True, check=True
        )
        .stdout.decode()
        .strip()
    )
    inner = (
        subprocess.run(
            ["git", "mktree"],
            cwd=book.repo,
            input=f"100644 blob {blob}\tweb1.json\n".encode(),
            capture_output=True,
            check=True,
        )
        .stdout.decode()
        .strip()
    )
    outer = (
        subprocess.run(
            ["git", "mktree"],
            cwd=book.repo,
            input=f"040000 tree {inner}\thost\n".encode(),
            capture_output=True,
            check=True,
        )
        .stdout.decode()
        .strip()
    )
    git("update-ref", ledger.REF, git("commit-tree", outer, "-m", "broken", cwd=book.repo), cwd=book.repo)
    with pytest.raises(LedgerError, match=r"host/web1\.json"):
        book.read()


def test_the_owner_of_an_intent_is_known_to_live_or_not() -> None:
    me = ledger.owner()
    assert ledger.owner_lives(me) is True
    dead = subprocess.run(
        [sys.executable, "-c", "from toto.ledger import ledger; print(ledger.owner())"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    assert ledger.owner_lives(dead) is False
    host, boot, process = me.split("/")
    assert ledger.owner_lives(f"{host}/{'0' * 36}/{process}") is False
    assert ledger.owner_lives(f"elsewhere/{boot}/{process}") is None


async def test_its_history_reads_back_as_what_happened(book: Ledger) -> None:
    nas = Target("helm", "nas")
    await book.write(WEB1, steps.intend(intent("run-1")), "begun")
    await book.write(WEB1, lambda entry: steps.set_step(entry, "run-1", "switch"), "a step")
    await book.write(WEB1, steps.good(deployed("/nix/store/new"), "run-1"), "good")
    await book.write(WEB1, steps.verified(deployed("/nix/store/new", "run-2")), "verified")
    await book.write(WEB1, steps.not_reached(note("run-3")), "unreachable")
    await book.write(nas, steps.intend(intent("run-4")), "begun")
    await book.write(nas, steps.revert(None, note("run-4"), "run-4"), "reverted")
    await book.write(WEB1, lambda _: None, "retired")
    found = history.events(book.repo)
    assert [(str(each.target), each.what, each.run) for each in found] == [
        ("host/web1", What.BEGUN, "run-1"),
        ("host/web1", What.GOOD, "run-1"),
        ("host/web1", What.VERIFIED, "run-2"),
        ("host/web1", What.UNREACHABLE, "run-3"),
        ("helm/nas", What.BEGUN, "run-4"),
        ("helm/nas", What.REVERTED, "run-4"),
        ("host/web1", What.RETIRED, ""),
    ]
    assert found[1].seconds is not None and found[1].seconds >= 0
    assert list(history.newest(book.repo)) == found[::-1]
    assert list(history.newest(book.repo, nas)) == [found[5], found[4]]
    assert found[5].why == "a test failed"


async def test_a_freeze_outlives_what_is_done_and_leaves_nothing_when_it_is_taken_back(book: Ledger) -> None:
    frozen, dns = Frozen(by="alice", why="an audit"), Target("terraform", "dns")
    await book.write(dns, steps.freeze(frozen), "terraform/dns: frozen")
    await book.write(dns, steps.freeze(None), "terraform/dns: unfrozen")
    assert dns not in book.read().entries
    await book.write(WEB1, steps.freeze(frozen), "web1: frozen")
    await book.write(WEB1, steps.intend(intent("run-1")), "begun")
    await book.write(WEB1, steps.good(deployed("/nix/store/new"), "run-1"), "good")
    assert book.read().get(WEB1).frozen == frozen
    await book.write(WEB1, steps.intend(intent("run-2")), "begun")
    await book.write(WEB1, steps.revert(deployed("/nix/store/new"), note("run-2"), "run-2"), "reverted")
    assert book.read().get(WEB1).frozen == frozen
    await book.write(WEB1, steps.freeze(None), "web1: unfrozen")
    told = [(each.target, each.what, each.author) for each in history.events(book.repo) if each.what.endswith("frozen")]
    assert told == [
        (dns, What.FROZEN, "alice"),
        (dns, What.UNFROZEN, ""),
        (WEB1, What.FROZEN, "alice"),
        (WEB1, What.UNFROZEN, ""),
    ]


async def test_what_was_only_tried_is_no_failure(book: Ledger) -> None:
    good = deployed("/nix/store/new")
    await book.write(WEB1, steps.intend(intent("run-1")), "begun")
    await book.write(WEB1, steps.good(good, "run-1"), "good")
    await book.write(WEB1, steps.intend(intent("run-2", "/nix/store/tried")), "begun")
    await book.write(WEB1, steps.revert(good, None, "run-2"), "tried")
    entry = book.read().get(WEB1)
    assert (entry.good, entry.intent, entry.reverted) == (good, None, None)
    (newest, *_) = history.newest(book.repo)
    assert (newest.what, newest.run) == (What.TRIED, "run-2")
