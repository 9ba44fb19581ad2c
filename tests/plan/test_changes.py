"""The change set: what is desired against the ledger, case by case."""

import pytest

from toto.infra_repo.manifest import Machine, Manifest
from toto.ledger.ledger import Deployed, Entry, Intent, Note, Snapshot
from toto.ledger.target import Target
from toto.machine.activation import MachineState
from toto.plan.changes import Action, Change, ChangeSet, Desired, Failure, Why, of_machines
from toto.plan.compare import compare
from toto.plan.host import DeployedHost, DesiredHost


def host(name: str = "web1", version: int = 1, tests: str = "t1", path: int | None = None) -> Desired:
    return DesiredHost(
        target=Target("host", name),
        file=f"hosts/{name}.nix",
        identity=f"/nix/store/{name}-{version}.drv",
        path=f"/nix/store/{name}-{version if path is None else path}",
        tests=tests,
    )


def was(name: str = "web1", version: int = 1, tests: str = "t1") -> Deployed:
    return DeployedHost(
        identity=f"/nix/store/{name}-{version}.drv",
        path=f"/nix/store/{name}-{version}",
        commit="a" * 40,
        run="r0",
        at="2026-01-01T00:00:00Z",
        tests=tests,
    )


NOTE = Note(identity="i", commit="c", run="r0", at="2026-01-02T00:00:00Z", why="w")
INTENT = Intent(desired=was(), before=MachineState(system="/nix/store/old"), run="r0", owner="o", at="x", step="switch")


def manifest(*machines: Machine) -> Manifest:
    return Manifest(machines={machine.name: machine for machine in machines})


def ledger(kind: str = "host", **entries: Entry) -> Snapshot:
    return Snapshot("l" * 40, {Target(kind, name): entry for name, entry in entries.items()})


def only(change_set: ChangeSet) -> Change:
    (change,) = change_set.changes
    return change


MACHINE = Machine(name="web1", address="192.0.2.1")


@pytest.mark.parametrize(
    ("desired", "entry", "why", "action"),
    [
        (host(), Entry(), Why.NEW, Action.DEPLOY),
        (host(version=2), Entry(good=was()), Why.CHANGED, Action.DEPLOY),
        (host(tests="t2"), Entry(good=was()), Why.TESTS, Action.VERIFY),
        (host(version=2, path=1), Entry(good=was()), Why.CHANGED, Action.RECORD),
        (host(version=2, path=1, tests="t2"), Entry(good=was()), Why.CHANGED, Action.VERIFY),
        (host(), Entry(good=was(), intent=INTENT), Why.INTENT, Action.DEPLOY),
        (host(version=2), Entry(good=was(), unreachable=NOTE), Why.UNREACHABLE, Action.DEPLOY),
        (host(), Entry(unreachable=NOTE), Why.UNREACHABLE, Action.DEPLOY),
        (host(version=2), Entry(good=was(), reverted=NOTE), Why.REVERTED, Action.DEPLOY),
    ],
)
def test_why_a_host_is_in(desired: Desired, entry: Entry, why: Why, action: Action) -> None:
    change = only(compare("c", [desired], [], manifest(MACHINE), ledger(web1=entry)))
    assert (change.why, change.action) == (why, action)


@pytest.mark.parametrize(
    "entry", [Entry(good=was()), Entry(good=was(), reverted=NOTE), Entry(good=was(), unreachable=NOTE)]
)
def test_an_equal_identity_is_no_change(entry: Entry) -> None:
    found = compare("c", [host()], [], manifest(MACHINE), ledger(web1=entry))
    assert found.empty
    assert found.unchanged == (Target("host", "web1"),)


@pytest.mark.parametrize(
    "machines",
    [
        manifest(),
        manifest(Machine(name="web1", address="192.0.2.1", role="other")),
        manifest(Machine(name="web1", address="192.0.2.1", deploy="none")),
    ],
)
def test_a_host_that_toto_does_not_deploy_is_rehearsed_once(machines: Manifest) -> None:
    first = compare("c", [host()], [], machines, ledger())
    assert only(first).action is Action.REHEARSE
    second = compare("c", [host()], [], machines, ledger(web1=Entry(rehearsed=was())))
    assert second.empty
    third = compare("c", [host(tests="t2")], [], machines, ledger(web1=Entry(rehearsed=was())))
    assert only(third).why is Why.TESTS


def test_a_machine_without_host_file_waits() -> None:
    found = compare("c", [], [], manifest(MACHINE, Machine(name="nas", address="192.0.2.2", role="other")), ledger())
    assert found.waiting == ("web1",)
    assert found.empty


def test_a_machine_that_left_the_manifest_is_retired() -> None:
    found = compare("c", [], [], manifest(), ledger(web1=Entry(good=was())))
    assert found.retired == (Target("host", "web1"),)


def test_a_failed_evaluation_is_neither_waiting_nor_retired_nor_unchanged() -> None:
    found = compare(
        "c",
        [],
        [Failure(target=Target("host", "web1"), message="no")],
        manifest(MACHINE),
        ledger(web1=Entry(good=was())),
    )
    assert (found.waiting, found.retired, found.unchanged) == ((), (), ())
    assert not found.empty


def test_the_plan_prints_every_target_and_why() -> None:
    failure = Failure(target=Target("host", "bad"), message="hosts/bad.nix:3: oops")
    found = compare(
        "c",
        [host(version=2), host("new1")],
        [failure],
        manifest(MACHINE, Machine(name="new1", address="192.0.2.3"), Machine(name="later", address="192.0.2.4")),
        ledger(web1=Entry(good=was()), gone=Entry(good=was("gone"))),
    )
    text = str(found)
    for word in (
        "host/web1",
        "drv changed",
        "host/new1",
        "new",
        "host/bad",
        "hosts/bad.nix:3: oops",
        "host/later",
        "waiting",
        "host/gone",
        "retire",
    ):
        assert word in text


def test_what_is_asked_for_again_is_in_though_nothing_has_changed() -> None:
    found = compare("c", [host(), host("never")], [], manifest(MACHINE), ledger(web1=Entry(good=was())), force=True)
    assert {change.label: change.why for change in found.changes} == {"never": Why.NEW, "web1": Why.FORCED}


@pytest.mark.parametrize("kind", ["terraform", "helm"])
def test_a_root_and_a_release_change_with_their_files(kind: str) -> None:
    target = Target(kind, "dns")
    wanted = Desired(target=target, file="terraform/dns", identity="2")
    good = Deployed(identity="1", commit="a" * 40, run="r0", at="x", revision=3)
    for entry, why in (
        (Entry(), Why.NEW),
        (Entry(good=good), Why.FILES),
        (Entry(reverted=NOTE), Why.REVERTED),
        (Entry(good=good.model_copy(update={"identity": "2"}), intent=INTENT), Why.INTENT),
    ):
        change = only(compare("c", [wanted], [], manifest(), Snapshot("l", {target: entry})))
        assert (change.why, change.action, change.label) == (why, Action.DEPLOY, f"{kind}/dns")
    same = Snapshot("l", {target: Entry(good=good.model_copy(update={"identity": "2"}))})
    assert compare("c", [wanted], [], manifest(), same).unchanged == (target,)
    assert compare("c", [], [], manifest(), same).retired == (target,)


def test_the_order_is_that_of_a_roll_out() -> None:
    wanted = [Desired(target=Target(kind, "a"), file="f", identity="1") for kind in ("helm", "terraform")]
    found = compare("c", [*wanted, host("a")], [], manifest(), ledger())
    assert [change.target.kind for change in found.changes] == ["host", "terraform", "helm"]


def test_a_change_set_survives_being_written_down() -> None:
    failure = Failure(target=Target("host", "b"), message="m")
    found = compare("c", [host()], [failure], manifest(MACHINE), ledger())
    assert ChangeSet.model_validate_json(found.model_dump_json()).model_dump() == found.model_dump()


def test_a_changed_machine_reads_as_words() -> None:
    before = Machine.model_validate({"name": "a", "address": "192.0.2.1", "tags": ["web"], "ssh": {"user": "root"}})
    after = Machine.model_validate({"name": "a", "address": "192.0.2.1", "ssh": {"user": "toto", "port": 2222}})
    [change] = of_machines(manifest(before), manifest(after))
    assert change.what == "ssh.user 'root' → 'toto', ssh.port 22 → 2222, tags ('web') → ()"
