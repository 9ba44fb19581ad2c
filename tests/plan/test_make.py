"""From a commit to a plan, on real nix and the lab's nixpkgs; no machine is touched and no VM booted."""

import json
import os
import re
import socket
import time
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from tests.lab import setup
from tests.ledger.test_ledger import note
from tests.repos import InfraRepo, git
from toto.base import paths, process, server_rules
from toto.base.errors import InputError
from toto.infra_repo import git as git_of
from toto.ledger.ledger import Entry, Ledger
from toto.ledger.target import Target
from toto.machine import condition, keys, owners
from toto.nix import builders, closure, daemon
from toto.nix import commands as nix
from toto.nix.hosts import Host, in_files
from toto.nix.messages import EvaluationFailed
from toto.plan import make as plan
from toto.plan import order
from toto.plan.changes import Action, Why
from toto.plan.host import HostOrder, build_toplevel
from toto.plan.kinds import kind_of
from toto.plan.order import Plan
from toto.plan.release import ReleaseOrder
from toto.report.report import Report

Make = Callable[..., Awaitable[Plan]]


@pytest.fixture(scope="module")
def lab() -> Path:
    return setup.setup()


@pytest.fixture
def repo(tmp_path: Path) -> InfraRepo:
    return InfraRepo(tmp_path / "repo")


@pytest.fixture
def make(lab: Path, repo: InfraRepo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    for name, value in setup.environment().items():
        if name in ("NIX_PATH", "NIX_CONFIG"):
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("TOTO_STATE", str(tmp_path / "state"))
    numbers = iter(range(100))

    async def run(commit: str, *only: str) -> Plan:
        return await plan.make(repo.bare, commit, f"run-{next(numbers)}", only)

    return run


def machines(*names: str) -> str:
    if not names:
        return "machines: []\n"
    return "machines:\n" + "".join(
        f"  - {{ name: {name}, address: 192.0.2.{number + 1} }}\n" for number, name in enumerate(names)
    )


def host(name: str, text: str = "x") -> str:
    return f'{{ networking.hostName = "{name}"; environment.etc."text".text = "{text}"; }}\n'


def vm(made: Plan) -> str:
    """The drv of the only host's VM."""
    (order,) = made.orders
    assert isinstance(order, HostOrder)
    return order.vm


async def good(repo: InfraRepo, made: Plan) -> None:
    """Make everything that a plan wants the last good, as a roll-out would."""
    for change in made.changes.changes:
        wanted = change.desired
        deployed = kind_of(change.target).deployed(wanted, commit=made.commit, run=made.run, at="now")
        entry = Entry(good=deployed)
        await Ledger(repo.bare).write(change.target, lambda _, new=entry: new, "good")  # type: ignore[misc]


async def test_a_readme_only_commit_changes_no_host(repo: InfraRepo, make: Make) -> None:
    first = await make(
        repo.commit({"machines.yaml": machines("a", "b"), "hosts/a.nix": host("a"), "hosts/b/default.nix": host("b")})
    )
    assert [(change.label, change.why) for change in first.changes.changes] == [("a", Why.NEW), ("b", Why.NEW)]
    await good(repo, first)
    assert (await make(repo.commit({"README.md": "hello"}))).changes.empty


async def test_a_signing_key_that_is_not_there_is_told_before_anything_is_evaluated(
    repo: InfraRepo, make: Make
) -> None:
    files = {"machines.yaml": machines(), "toto.toml": "[nix]\nsigning_key = 'cache'\n", "hosts/a.nix": host("a")}
    pushed = repo.commit({**files})
    with pytest.raises(InputError, match=r"this repository has no key cache, which nix\.signing_key names"):
        await make(pushed)
    assert (await plan.one(repo.bare, pushed, "sandbox", Target("host", "a"))).label == "a", "nothing of it is copied"
    await keys.make(repo.bare, "cache", "signing")
    assert (await make(pushed)).changes.empty


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("virtualisation.memorySize = 2000;", "virtualisation.memorySize: 2000 is more than the 1000 that this server"),
        ("virtualisation.vmVariant.virtualisation.memorySize = 2000;", "most.vm.memory in its server.toml"),
        ("virtualisation.diskSize = 5000;", "virtualisation.diskSize: 5000 is more than the 4000 that this server"),
    ],
)
async def test_a_vm_that_asks_for_more_than_the_server_allows_is_refused_by_name(
    repo: InfraRepo, make: Make, asked: str, said: str
) -> None:
    (paths.state_home() / server_rules.FILE).write_text('[most]\n"vm.memory" = 1000\n"vm.disk" = 4000\n')
    big = f'{{ networking.hostName = "big"; {asked} }}'
    files: dict[str, str | None] = {"hosts/a.nix": host("a"), "hosts/big.nix": big}
    made = await make(repo.commit(files | {"machines.yaml": machines("a", "big")}))
    [failed] = made.changes.failed
    assert failed.target.name == "big" and said in failed.message
    assert "next: set a lower one in virtualisation.vmVariant of the host" in failed.message
    [order] = made.orders
    assert isinstance(order, HostOrder) and (order.vm_memory, order.vm_disk) == (384, 1024), "what the lab's hosts say"
    if "memorySize" in asked:  # the memory that a person chose counts in its place
        made = await make(repo.commit({"toto.toml": "[sandbox]\nmemory = 700\n"}))
        assert [each.vm_memory for each in made.orders if isinstance(each, HostOrder)] == [700, 700]


async def test_a_machine_that_obeys_documents_and_is_a_builder_is_warned_of(
    repo: InfraRepo, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of(address: str, key: str) -> server_rules.Builder:
        return server_rules.Builder(address=address, host_key=f"ssh-ed25519 {key} a comment", systems=("x86_64-linux",))

    await builders.write(tmp_path / "builders", {"one": of("10.0.0.1", "AAAA"), "two": of("10.0.0.2", "BBBB")})
    (tmp_path / "client").mkdir()
    with socket.socket(socket.AF_UNIX) as there:
        there.bind(str(tmp_path / "client/socket"))
        monkeypatch.setenv(daemon.SOCKET, str(tmp_path / "client/socket"))
        machine = "  - {{name: {0}, address: {1}, access: {2}, ssh: {{host_key: ssh-ed25519 {3}}}}}\n"
        machines = (
            ("a", "10.0.0.1", "locked", "XXXX"),
            ("b", "10.0.0.9", "locked", "BBBB"),
            ("c", "10.0.0.2", "sudo", "C"),
        )
        made = await make(
            repo.commit({"machines.yaml": "machines:\n" + "".join(machine.format(*each) for each in machines)})
        )
    text = made.changes.text()
    assert "it is also the builder one, whose user is root there (docs/builders.md) (a)" in text
    assert "it is also the builder two, whose user is root there (docs/builders.md) (b)" in text
    assert text.count("it is also the builder") == 2


async def test_the_user_that_the_docs_have_for_toto_may_run_sudo_also_where_only_wheel_may(
    repo: InfraRepo, make: Make
) -> None:
    text = (Path(__file__).parents[2] / "docs/machines.md").read_text()
    module = text.partition("```nix\n")[2].partition("```")[0]
    files: dict[str, str | None] = {"machines.yaml": machines("a"), "hosts/a.nix": f"{{ {module} }}"}
    made = await make(repo.commit(files))
    assert not made.changes.failed, made.changes.failed
    (etc,) = [each for each in await nix.closure(made.orders[0].desired.identity) if each.endswith("-etc.drv")]
    said = Path(etc).read_text()
    assert re.search(r"toto [^\\]* wheel\\n", said) and r"\ntoto ALL=(ALL:ALL) NOPASSWD: ALL\n" in said


async def test_only_the_hosts_that_use_a_shared_file_change(repo: InfraRepo, make: Make) -> None:
    files: dict[str, str | None] = {
        "machines.yaml": machines("a", "b"),
        "text": "one",
        "hosts/b.nix": host("b"),
        "hosts/a.nix": '{ environment.etc."text".text = builtins.readFile ../text; }\n',
    }
    await good(repo, await make(repo.commit(files)))
    changed = await make(repo.commit({"text": "two"}))
    assert [(change.label, change.why, change.action) for change in changed.changes.changes] == [
        ("a", Why.CHANGED, Action.DEPLOY)
    ]
    assert changed.changes.unchanged == (Target("host", "b"),)


async def test_a_commit_that_goes_back_to_what_is_deployed_changes_nothing(repo: InfraRepo, make: Make) -> None:
    files: dict[str, str | None] = {"machines.yaml": machines("a"), "hosts/a.nix": host("a", "one")}
    await good(repo, await make(repo.commit(files)))
    repo.commit({"hosts/a.nix": host("a", "two")})
    assert (await make(repo.commit({"hosts/a.nix": host("a", "one")}))).changes.empty


async def test_where_the_tree_lies_does_not_reach_the_drv_from_commit_to_commit(repo: InfraRepo, make: Make) -> None:
    leaky = '{ environment.etc."where".text = toString ../.; }\n'
    await good(repo, await make(repo.commit({"machines.yaml": machines("a"), "hosts/a.nix": leaky})))
    assert (await make(repo.commit({"README.md": "hello"}))).changes.empty


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{ networking.hostName = ; }\n", r"hosts/bad\.nix:1"),
        ("\n\n{ nope }\n", r"hosts/bad\.nix:[34]"),  # newer nix names the end of the file
        ("{ }: { }\n", "bad"),
        ("{ pkgs, ... }: { environment.systemPackages = [ pkgs.nopenope ]; }\n", "nopenope"),
        ('{ networking.nope.nope = throw "on purpose"; environment.etc.x.text = throw "on purpose"; }\n', "on purpose"),
        ("", "bad"),
    ],
)
async def test_one_host_that_does_not_evaluate_stops_no_other(
    repo: InfraRepo, make: Make, text: str, says: str
) -> None:
    made = await make(
        repo.commit({"machines.yaml": machines("bad", "fine"), "hosts/bad.nix": text, "hosts/fine.nix": host("fine")})
    )
    assert [change.label for change in made.changes.changes] == ["fine"]
    (failure,) = made.changes.failed
    assert failure.target == Target("host", "bad")
    assert re.search(says, failure.message), failure.message
    assert "/state/" not in failure.message, "positions are shown as the operator knows them"


async def test_an_endless_evaluation_is_ended_and_reported(repo: InfraRepo, make: Make) -> None:
    endless = (
        "{ networking.hostName = toString (builtins.foldl' (sum: x: sum + builtins.length "
        "(builtins.genList (y: y) 100000)) 0 (builtins.genList (x: x) 1000000)); }\n"
    )
    made = await make(
        repo.commit(
            {"machines.yaml": machines("a"), "hosts/a.nix": endless, "toto.toml": "[nix]\nevaluate_timeout = 2\n"}
        )
    )
    assert "did not end within 2 s" in made.changes.failed[0].message


async def test_what_an_evaluation_uses_is_measured_and_decides_the_next_ones_limit(
    repo: InfraRepo, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    large = (
        "{ environment.etc.sum.text = let all = builtins.genList (x: x) 4000000; in "
        "toString (builtins.foldl' (sum: x: sum + x) 0 all + builtins.length all); }\n"
    )
    files: dict[str, str | None] = {"machines.yaml": machines("a"), "hosts/a.nix": large}
    made = await make(repo.commit(files | {"toto.toml": "[nix]\nevaluate_memory = 64\n"}))
    assert not made.changes.failed and vm(made)
    said = [record.getMessage() for record in caplog.records if "tries it again" in record.getMessage()]
    assert said and all(each.startswith("a: its evaluation used more than 128 MB of memory") for each in said)
    file = paths.repo_state(repo.bare) / "evaluations.json"
    used = json.loads(file.read_text())
    assert used.keys() == {"a", "a#vm"} and min(used.values()) > 128
    caplog.clear()
    assert not (await make(made.commit)).changes.failed
    assert not [each for each in caplog.records if "tries it again" in each.getMessage()], "its limit is higher now"
    file.write_text("{ broken")
    await make(repo.commit({"machines.yaml": machines("b"), "hosts/a.nix": None, "hosts/b.nix": host("b")}))
    assert not {"a", "a#vm"} & json.loads(file.read_text()).keys()


async def test_dotted_names_work_and_names_that_are_paths_do_not(repo: InfraRepo, make: Make) -> None:
    made = await make(repo.commit({"machines.yaml": machines("toto.canon"), "hosts/toto.canon.nix": host("toto")}))
    assert [change.label for change in made.changes.changes] == ["toto.canon"]
    assert not (await make(repo.commit({"hosts/a..b.nix": host("x")}))).changes.told, "no machine can have that name"
    with pytest.raises(InputError, match=r"a\.\.b"):
        await make(repo.commit({"toto.toml": "[nix]\nunlisted = true\n"}))


UNLISTED = "[nix]\nunlisted = true\n"


async def test_a_host_that_no_machine_names_is_evaluated_only_when_asked_for_and_stops_nothing(
    repo: InfraRepo, make: Make
) -> None:
    files: dict[str, str | None] = {
        "machines.yaml": machines("a"),
        "hosts/a.nix": host("a"),
        "hosts/common/default.nix": "{ nope = 1; }\n",
        "hosts/common.nix": "{ nope = 2; }\n",
        "hosts/laptop.nix": host("laptop"),
    }
    made = await make(repo.commit(files))
    assert [order.label for order in made.orders] == ["a"] and not made.changes.failed and not made.changes.excused
    (told,) = made.changes.told
    assert told.place == "machines.yaml" and told.what.startswith("does not list common, laptop: not evaluated. ")
    one = await make(made.commit, "laptop")
    assert [(each.label, each.change.action, each.stops) for each in one.orders] == [("laptop", Action.REHEARSE, True)]
    assert not (await make(made.commit, "host")).changes.failed, "a kind names nobody"
    with pytest.raises(InputError, match=r"no target, tag or kind laptob\nnext: did you mean laptop\?"):
        await make(made.commit, "laptob")
    (failed,) = (await make(made.commit, "common")).changes.failed
    assert failed.target.name == "common", "one that is named by a person is no warning"
    with pytest.raises(InputError, match=r"common: is defined twice: hosts/common/default\.nix and hosts/common\.nix"):
        await make(repo.commit({"toto.toml": UNLISTED}))
    made = await make(repo.commit({"hosts/common.nix": None}))
    assert [(each.label, each.stops) for each in made.orders] == [("a", True), ("laptop", False)]
    assert not made.changes.failed and [each.target.name for each in made.changes.excused] == ["common"]
    assert "does not evaluate, a warning: not in machines.yaml" in str(made.changes)
    report = Report("infra", made.commit, made.changes)
    assert not report.failed and report.complete
    assert report.headline().endswith("; common failed, a warning since machines.yaml does not list it")


async def test_a_host_that_was_rehearsed_on_request_is_not_retired_by_a_run_that_leaves_it_out(
    repo: InfraRepo, make: Make
) -> None:
    made = await make(repo.commit({"machines.yaml": machines(), "hosts/laptop.nix": host("laptop")}), "laptop")
    seen = kind_of(made.orders[0].target).deployed(made.orders[0].desired, commit=made.commit, run="r", at="now")
    await Ledger(repo.bare).write(made.orders[0].target, lambda _: Entry(rehearsed=seen), "rehearsed")
    assert (await make(made.commit)).changes.empty and (await make(made.commit, "laptop")).changes.empty
    assert (await make(repo.commit({"hosts/laptop.nix": None}))).changes.retired == (Target("host", "laptop"),)


PLACES = [
    f"{folder}/{file}" for folder in ("hosts", "machines") for file in ("a.nix", "a/default.nix", "a/configuration.nix")
]


async def test_the_files_that_are_hosts_and_two_of_one_name(repo: InfraRepo, tmp_path: Path) -> None:
    for number, place in enumerate(PLACES):
        tree = tmp_path / str(number)
        (tree / place).parent.mkdir(parents=True)
        (tree / place).write_text("{ }")
        (tree / "hosts/.git").mkdir(parents=True)
        assert in_files(tree, ["a"]) == [Host("a", place)]
        (tree / "hosts/a/hardware.nix").parent.mkdir(exist_ok=True)
        (tree / "hosts/a/hardware.nix").write_text("{ }")
        assert in_files(tree, ["a"]) == [Host("a", place)]
        other = PLACES[(number + 3) % 6]
        (tree / other).parent.mkdir(parents=True, exist_ok=True)
        (tree / other).write_text("{ }")
        with pytest.raises(InputError) as caught:
            in_files(tree, ["a"])
        assert place in str(caught.value) and other in str(caught.value)
        assert len(in_files(tree, ["b"])) == 1, "that nobody lists it stops nothing"
    (tmp_path / "1/hosts/a/configuration.nix").write_text("{ }")
    (tmp_path / "1" / PLACES[4]).unlink()
    assert in_files(tmp_path / "1", ["a"]) == [Host("a", "hosts/a/default.nix")], "it imports the other, most likely"


async def test_a_flakes_hosts_are_the_hosts(repo: InfraRepo, make: Make, lab: Path) -> None:
    flake = f"""{{
      inputs.nixpkgs.url = "path:{lab}";
      outputs = {{ self, nixpkgs }}: {{
        nixosConfigurations."toto.canon" = nixpkgs.lib.nixosSystem {{
          system = "x86_64-linux"; modules = [ ./hosts/canon.nix ]; }};
      }};
    }}"""
    files: dict[str, str | None] = {
        "machines.yaml": machines("toto.canon"),
        "flake.nix": flake,
        "hosts/canon.nix": host("canon"),
    }
    with pytest.raises(EvaluationFailed, match="nix flake lock"):
        await make(repo.commit(files))
    await process.run(["nix", "flake", "lock", f"path:{repo.work}"], env=dict(os.environ))
    made = await make(repo.commit({}))
    assert not made.changes.failed, made.changes.failed
    (change,) = made.changes.changes
    assert change.label == "toto.canon"
    assert vm(made).endswith(".drv")
    await good(repo, made)
    assert (await make(repo.commit({"README.md": "hello"}))).changes.empty


async def test_a_run_can_be_limited_by_name_and_by_tag(repo: InfraRepo, make: Make) -> None:
    commit = repo.commit(
        {
            "machines.yaml": "machines:\n  - { name: a, address: 192.0.2.1, tags: [web] }\n"
            "  - { name: b, address: 192.0.2.2 }\n",
            "hosts/a.nix": host("a"),
            "hosts/b.nix": host("b"),
        }
    )
    assert [change.label for change in (await make(commit, "web")).changes.changes] == ["a"]
    assert [change.label for change in (await make(commit, "b")).changes.changes] == ["b"]
    with pytest.raises(InputError, match="nope"):
        await make(commit, "nope")


async def test_toto_s_module_changes_the_vm_and_never_the_toplevel(
    repo: InfraRepo, make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = await make(repo.commit({"machines.yaml": machines("a"), "hosts/a.nix": host("a")}))
    monkeypatch.setenv("TOTO_STATE", str(tmp_path / "another"))
    other = await make(made.commit)
    assert other.changes.changes[0].desired.identity == made.changes.changes[0].desired.identity
    assert vm(other) != vm(made), "a different sandbox key"
    assert vm(await make(made.commit)) == vm(other), "the same from run to run"


@pytest.mark.parametrize(
    "forced",
    [
        "services.openssh.enable = lib.mkForce false;",
        "users.users.root.openssh.authorizedKeys.keys = lib.mkForce [ ];",
        "virtualisation.forwardPorts = lib.mkForce [ 22 ]; virtualisation.graphics = lib.mkForce true;",
        "boot.isContainer = true; boot.initrd.network.ssh = { enable = true; hostKeys = [ /etc/no-key ]; };",
        'networking.nftables = { enable = true; ruleset = "table inet x { }"; }; networking.firewall.enable = false;',
    ],
)
async def test_toto_s_module_wins_over_what_a_host_forces_and_reaches_the_vm_alone(
    repo: InfraRepo, make: Make, forced: str
) -> None:
    text = f'{{ lib, ... }}: {{ networking.hostName = "a"; {forced} }}\n'
    made = await make(repo.commit({"machines.yaml": machines("a"), "hosts/a.nix": text}))
    assert not made.changes.failed, made.changes.failed
    key = await keys.public("sandbox")
    for drv, there in ((vm(made), True), (made.orders[0].desired.identity, False)):
        etc = [Path(each).read_text() for each in await nix.closure(drv) if each.endswith("-etc.drv")]
        assert any(key.split()[1] in each for each in etc) is there
        assert not there or any("ssh/sshd_config" in each and key.split()[1] in each for each in etc)


async def test_the_difference_of_two_closures_names_packages_and_units(
    repo: InfraRepo, make: Make, tmp_path: Path
) -> None:
    service = '{ systemd.services.SAY = { script = "sleep 1000"; wantedBy = [ "multi-user.target" ]; }; }\n'
    paths = []
    for number, text in enumerate([service.replace("SAY", "old"), service.replace("SAY", "new")]):
        made = await make(repo.commit({"machines.yaml": machines("a"), "hosts/a.nix": text}))
        paths.append(
            await nix.build(
                made.changes.changes[0].desired.identity, tmp_path / f"root{number}", timeout=60, target="a"
            )
        )
    found = await closure.difference(paths[0], paths[1])
    assert found.units_added == ("new.service",)
    assert found.units_removed == ("old.service",)
    assert found.packages_added == ("new-start",)
    assert found.packages_removed == ("old-start",)
    assert any(line.startswith("~ etc") for line in found.lines())
    assert (await closure.difference(paths[0], paths[0])).lines() == ["closure +0 bytes"]


@pytest.mark.parametrize(
    ("path", "name", "version"),
    [
        ("/nix/store/00000000000000000000000000000000-openssh-9.2p1", "openssh", "9.2p1"),
        ("/nix/store/00000000000000000000000000000000-etc", "etc", ""),
        ("/nix/store/00000000000000000000000000000000-nixos-system-web-1-24.11", "nixos-system-web", "1-24.11"),
        ("/nix/store/00000000000000000000000000000000-unit-sshd.service", "unit-sshd.service", ""),
    ],
)
def test_names_and_versions_are_separated_as_nix_does(path: str, name: str, version: str) -> None:
    assert closure.name_and_version(path) == (name, version)


async def test_a_system_that_cannot_switch_is_refused_after_its_build(repo: InfraRepo, make: Make) -> None:
    files: dict[str, str | None] = {
        "machines.yaml": machines("a"),
        "hosts/a.nix": "{ system.switch.enable = false; }\n",
        "hosts/b.nix": "{ system.switch.enable = false; }\n",
    }
    for name in ("a", "b"):  # b has no machine, and is only rehearsed
        (order,) = (await make(repo.commit(files), name)).orders
        assert isinstance(order, HostOrder)
        if name == "b":
            await build_toplevel(order)
            continue
        with pytest.raises(InputError) as caught:
            await build_toplevel(order)
        assert str(caught.value) == (
            "a: its system has no bin/switch-to-configuration, so nothing can activate it\n"
            "next: set system.switch.enable = true"
        )


async def test_a_build_that_fails_shows_the_builders_last_words(
    lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NIX_CONFIG", setup.NIX_CONFIG)
    expression = (
        'derivation { name = "bad"; system = builtins.currentSystem; builder = "/bin/sh"; '
        'args = [ "-c" "echo the disk of the builder burns; exit 3" ]; }'
    )
    drv = (await process.run(["nix-instantiate", "--expr", expression], env=dict(os.environ))).stdout.strip()
    with pytest.raises(nix.BuildFailed, match="the disk of the builder burns") as caught:
        await nix.build(drv, tmp_path / "root", timeout=60, target="a")
    assert not caught.value.transient


async def test_nixpkgs_can_be_pinned_in_the_repo_and_be_a_different_name_of_the_search_path(
    repo: InfraRepo, make: Make, lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files: dict[str, str | None] = {"machines.yaml": machines("a"), "hosts/a.nix": host("a")}
    plainly = (await make(repo.commit(files))).changes.changes[0].desired.identity
    monkeypatch.setenv("NIX_PATH", "")
    monkeypatch.setenv("TOTO_CELL_READ", str(lab))
    pin: dict[str, str | None] = {"pin.nix": f'/. + "{lab}"\n', "toto.toml": '[nix]\nnixpkgs = "pin.nix"\n'}
    assert (await make(repo.commit(pin))).changes.changes[0].desired.identity == plainly
    monkeypatch.delenv("TOTO_CELL_READ")
    monkeypatch.setenv("NIX_PATH", f"another={lab}")
    other = await make(repo.commit({"toto.toml": '[nix]\nnixpkgs = "<another>"\n'}))
    assert other.changes.changes[0].desired.identity == plainly
    (failure,) = (await make(repo.commit({"toto.toml": None}))).changes.failed
    assert "nix.nixpkgs in toto.toml" in failure.message


async def test_nixpkgs_can_be_a_pin_of_niv_or_npins(
    repo: InfraRepo, make: Make, lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files: dict[str, str | None] = {"machines.yaml": machines("a"), "hosts/a.nix": host("a")}
    copy = '{ from }: "${builtins.path { path = /. + from; name = "source"; }}"'
    words = ["nix-instantiate", "--eval", "--read-write-mode", "--expr", copy, "--argstr", "from", str(lab)]
    await process.run(words, env=nix.environment())  # (what is in the store already is not fetched)
    done = await process.run(["nix-hash", "--type", "sha256", lab], env=nix.environment())
    pin = {"type": "tarball", "url": "https://192.0.2.1/x.tar.gz", "sha256": done.stdout.strip()}
    files["nix/sources.json"] = json.dumps({"nixpkgs": pin})
    files["npins/sources.json"] = json.dumps({"version": 7, "pins": {"nixos": pin | {"type": "Channel"}}})
    monkeypatch.setenv("NIX_PATH", "")
    found = []
    for setting in ("niv", "npins#nixos"):
        made = await make(repo.commit(files | {"toto.toml": f'[nix]\nnixpkgs = "{setting}"\n'}))
        assert not made.changes.failed and vm(made).endswith(".drv")
        found.append(made.changes.changes[0].desired.identity)
    assert found[0] == found[1]
    with pytest.raises(InputError, match=r"npins/sources\.json: has no pin 'nixpkgs'; it has 'nixos'"):
        await make(repo.commit({"toto.toml": '[nix]\nnixpkgs = "npins"\n'}))


async def test_what_differs_in_the_manifest_shows_in_the_plan_and_deploys_nothing(repo: InfraRepo, make: Make) -> None:
    first = await make(repo.commit({"machines.yaml": machines("a", "nas"), "hosts/a.nix": host("a")}))
    assert {each.name for each in first.changes.machines} == {"a", "nas"}
    await good(repo, first)
    await git_of.mark(repo.bare, plan.LAST_GOOD, first.commit)
    moved = machines("a", "new").replace("192.0.2.1", "192.0.2.9")
    made = await make(repo.commit({"machines.yaml": moved}))
    assert made.changes.empty
    changed = {each.name: each.what for each in made.changes.machines}
    assert changed["a"] == "address '192.0.2.1' → '192.0.2.9'"
    assert changed["new"].startswith("added") and changed["nas"].startswith("removed")
    assert "machine/a" in str(made.changes)


async def test_a_freeze_and_a_closed_window_show_in_the_plan_unless_overridden(
    repo: InfraRepo, make: Make, tmp_path: Path
) -> None:
    files: dict[str, str | None] = {
        "machines.yaml": machines("a", "b"),
        "hosts/a.nix": host("a"),
        "hosts/b.nix": host("b"),
    }
    files["machines.yaml"] = f"{files['machines.yaml']}".replace("name: a,", "name: a, freeze: until the move,")
    held = (await make(repo.commit(files))).changes
    assert [(each.label, each.held) for each in held.changes] == [("a", "until the move"), ("b", "")]
    assert "held back" in str(held) and "until the move" in str(held)
    commit = repo.commit({"toto.toml": '[roll_out]\nfreeze = "holidays"\n'})
    assert {each.held for each in (await make(commit)).changes.changes} == {"holidays"}
    now = time.strftime("%H")
    later = f"{(int(now) + 3) % 24:02}:00-{(int(now) + 4) % 24:02}:00"
    closed = await make(repo.commit({"toto.toml": f'[roll_out]\nwindow = "{later}"\n'}))
    assert {each.held for each in closed.changes.changes if each.label == "b"} == {
        f"outside the window of the fleet, {later}"
    }
    urgent = await plan.make(repo.bare, commit, "urgent", override="CVE-2026-1")
    assert {each.held for each in urgent.changes.changes} == {""}
    assert urgent.orders[0].override == "CVE-2026-1"


async def test_an_error_in_a_flake_names_the_file_of_the_repo(repo: InfraRepo, make: Make, lab: Path) -> None:
    flake = f"""{{
      inputs.nixpkgs.url = "path:{lab}";
      outputs = {{ self, nixpkgs }}: {{
        nixosConfigurations.a = nixpkgs.lib.nixosSystem {{ system = "x86_64-linux"; modules = [ ./hosts/a.nix ]; }};
        nixosConfigurations.b = nixpkgs.lib.nixosSystem {{ system = "x86_64-linux"; modules = [
          {{ environment.etc.when.text = toString self.lastModified; }} ]; }};
      }};
    }}"""
    (repo.work / "flake.nix").write_text(flake)
    await process.run(["nix", "flake", "lock", f"path:{repo.work}"], env=dict(os.environ))
    made = await make(repo.commit({"machines.yaml": machines("a", "b"), "hosts/a.nix": "{\n  nope = ;\n}\n"}))
    (failure,) = made.changes.failed
    assert "hosts/a.nix:2" in failure.message and "/nix/store" not in failure.message.splitlines()[0]
    await good(repo, made)
    again = await make(repo.commit({"README.md": "later"}))
    assert again.changes.changes == (), "self.lastModified is the same in every export"


def test_what_comes_after_a_target_directly_or_not_is_behind_it() -> None:
    after = {"hv": (), "guest": ("hv",), "inner": ("guest",), "other": ()}
    assert order.behind(["hv"], after) == {"guest": "hv", "inner": "hv"}
    assert order.behind(["guest", "hv"], after) == {"inner": "guest", "guest": "hv"}
    assert order.behind(["other"], after) == {}
    chain = {f"m{n}": (f"m{n - 1}",) for n in range(1500)}
    assert order.behind(["m0", *chain], chain) == {f"m{n}": "m0" for n in range(1, 1500)}


LOCK = '{ "nodes": { "root": { } }, "root": "root", "version": 7 }'


def flake(*, outputs: bool = True) -> str:
    return f"{{ outputs = {{ self }}: {{ {'nixosConfigurations = { };' if outputs else ''} }}; }}"


@pytest.mark.parametrize(
    ("files", "place", "says"),
    [
        ({"flake.nix": flake(outputs=False)}, "flake.nix", "has no nixosConfigurations, and there is no hosts/"),
        ({"flake.nix": flake(), "hosts/b.nix": host("b")}, "hosts/b.nix", "add nixosConfigurations.b there"),
        ({"hosts/laptop.nix": host("laptop"), "machines.yaml": machines("lap-top")}, "host/lap-top", "mean laptop?"),
        ({"hosts/a.nix": host("a"), "tests/aa/smoke/x": "", "tests/lib/x": ""}, "tests/aa", "no host has this name: d"),
    ],
)
async def test_what_looks_like_a_host_and_is_none_is_told_with_what_to_do(
    repo: InfraRepo, make: Make, files: dict[str, str | None], place: str, says: str
) -> None:
    made = await make(repo.commit({"machines.yaml": machines(), "flake.lock": LOCK, **files}))
    (told,) = [each for each in made.changes.told if each.place != "machines.yaml"]
    assert told.place == place and says in told.what
    lines = str(made.changes).splitlines()
    assert any(line.split()[0] == place and says in line for line in lines), lines
    assert lines[0].startswith("NOTHING TO DEPLOY: "), "none of these has a host with a machine"


async def test_a_flake_without_hosts_beside_files_that_are_some_is_refused_unless_the_settings_say_which(
    repo: InfraRepo, make: Make
) -> None:
    files: dict[str, str | None] = {"flake.nix": flake(outputs=False), "flake.lock": LOCK, "hosts/a.nix": host("a")}
    with pytest.raises(InputError) as caught:
        await make(repo.commit({"machines.yaml": machines("a"), **files}))
    assert str(caught.value) == (
        "flake.nix: has no nixosConfigurations, and there is hosts/a.nix: toto does not guess which nixpkgs that is "
        "for\nnext: name the hosts in nixosConfigurations, or set nix.flake = false in toto.toml: then hosts are "
        "files, on nix.nixpkgs"
    )
    for said in ("flake = false", "nixpkgs = '<nixpkgs>'"):
        made = await make(repo.commit({"toto.toml": f"[nix]\n{said}\n"}))
        assert [order.label for order in made.orders] == ["a"] and not made.changes.told
    made = await make(repo.commit({"flake.nix": "it is not even read", "toto.toml": "[nix]\nflake = false\n"}))
    assert [order.label for order in made.orders] == ["a"]


async def test_a_flake_in_a_folder_has_its_own_lock_and_inputs_of_the_repo(
    repo: InfraRepo, make: Make, lab: Path
) -> None:
    text = f"""{{
      inputs.nixpkgs.url = "path:{lab}"; inputs.common.url = "path:../common";
      outputs = {{ self, nixpkgs, common }}: {{
        nixosConfigurations.a = nixpkgs.lib.nixosSystem {{ system = "x86_64-linux"; modules = [
          ./hosts/a.nix ../../shared.nix {{ environment.etc.word.text = common.word; }} ]; }};
      }};
    }}"""
    files: dict[str, str | None] = {
        "machines.yaml": machines("a"),
        "toto.toml": '[nix]\nflake = "deploy/nixos"\n',
        "hosts/b.nix": host("b"),
        "shared.nix": "{ }\n",
        "deploy/nixos/hosts/a.nix": host("a"),
        "deploy/common/flake.nix": '{ outputs = _: { word = "one"; }; }\n',
    }
    with pytest.raises(InputError, match=r"toto\.toml: nix\.flake: there is no deploy/nixos/flake\.nix"):
        await make(repo.commit(files))
    repo.commit({"deploy/nixos/flake.nix": text})
    # (Locked in a git repository, as people do: an old nix lets an input lead out of a folder only there.)
    await process.run(["nix", "flake", "lock", str(repo.work / "deploy/nixos")], env=dict(os.environ))
    made = await make(repo.commit({}))
    assert not made.changes.failed, made.changes.failed
    assert [order.label for order in made.orders] == ["a"] and vm(made).endswith(".drv")
    assert [each.place for each in made.changes.told] == ["hosts/b.nix"]
    await good(repo, made)
    assert (await make(repo.commit({"README.md": "hello"}))).changes.empty
    (failed,) = (await make(repo.commit({"deploy/nixos/hosts/a.nix": "{\n  nope = ;\n}\n"}))).changes.failed
    assert "deploy/nixos/hosts/a.nix:2" in failed.message and "/nix/store" not in failed.message.splitlines()[0]
    out = {"deploy/nixos/hosts/a.nix": host("a"), "deploy/nixos/flake.nix": text.replace("../common", "../../../x")}
    with pytest.raises(InputError, match=r"deploy/nixos/flake\.nix: does not evaluate"):
        await make(repo.commit(dict(out)))


async def test_a_deployed_machine_whose_host_is_gone_is_told(repo: InfraRepo, make: Make) -> None:
    files = {"machines.yaml": machines("a", "b"), "hosts/a.nix": host("a"), "hosts/b.nix": host("b")}
    first = await make(repo.commit(dict(files)))
    assert not first.changes.told and not first.changes.nothing
    await good(repo, first)
    made = await make(repo.commit({"hosts/b.nix": None}))
    (told,) = made.changes.told
    assert told.place == "host/b" and "its host is gone from the commit: it runs on as it was deployed" in told.what
    assert str(made.changes).count("host/b") == 1 and made.changes.retired == ()
    assert not (await make(repo.commit({"README.md": "x"}), "a")).changes.told, (
        "a run that is limited to a says nothing"
    )


async def test_what_is_known_of_a_machine_is_in_the_plan_without_asking_it(repo: InfraRepo, make: Make) -> None:
    locked = "machines:\n  - { name: a, address: 192.0.2.1, access: locked }\n"
    commit = repo.commit({"machines.yaml": locked, "hosts/a.nix": host("a")})
    condition.note(repo.bare, "a", condition.Condition(at=1, drift=("it runs /nix/store/x",), reboot_needed=True))
    rows = [row for row in (await make(commit)).changes.rows()[1:] if row["target"] == "machine/a"]
    assert [(row["why"], row["what changes"]) for row in rows] == [
        ("drifted", "it runs /nix/store/x"),
        ("reboot needed", "its next boot begins with a different kernel, initrd or modules"),
    ]


async def test_a_machine_that_needs_a_reboot_is_due_in_its_window_and_each_by_itself(
    repo: InfraRepo, make: Make
) -> None:
    closed = f"{datetime.now() + timedelta(days=3):%a} 10:00-11:00"
    opens = {"a": "00:00-24:00", "b": "00:00-24:00", "c": closed, "d": "00:00-24:00"}
    listed = "".join(
        f"  - {{ name: {name}, address: 192.0.2.{number}, access: locked, reboot: window, window: {window} }}\n"
        for number, (name, window) in enumerate(opens.items(), 1)
    )
    files: dict[str, str | None] = {
        "machines.yaml": f"machines:\n{listed}",
        **{f"hosts/{name}.nix": host(name) for name in opens},
    }
    first = await make(repo.commit(files))
    await good(repo, first)
    commit = git("rev-parse", "HEAD", cwd=repo.bare).strip()
    assert (await make(commit)).changes.empty
    for name in ("a", "b", "c"):
        condition.note(repo.bare, name, condition.Condition(at=1, reboot_needed=True))
    condition.note(repo.bare, "d", condition.Condition(at=1))
    made = await make(commit)
    assert [(each.label, each.why, each.action) for each in made.changes.changes] == [
        ("a", Why.REBOOT, Action.DEPLOY),
        ("b", Why.REBOOT, Action.DEPLOY),
    ]
    target = made.orders[0].target
    groups = kind_of(target).groups(made.manifest, made.orders)
    assert [[each.label for each in group] for group in groups] == [["a"], ["b"]]
    await Ledger(repo.bare).write(
        target, lambda entry: entry.model_copy(update={"reverted": note("run-1")}), "it did not come back"
    )
    assert [each.label for each in (await make(commit)).changes.changes] == ["b"], "a person looks at it first"


async def test_what_was_changed_by_hand_is_undone_where_the_machine_s_policy_says_so(
    repo: InfraRepo, make: Make
) -> None:
    rules = {"a": "drift: mend", "b": "drift: tell", "c": "drift: mend", "d": "drift: mend, freeze: not now"}
    listed = "".join(
        f"  - {{ name: {name}, address: 192.0.2.{number}, access: locked, {rule} }}\n"
        for number, (name, rule) in enumerate(rules.items(), 1)
    )
    files: dict[str, str | None] = {
        "machines.yaml": f"machines:\n{listed}",
        **{f"hosts/{name}.nix": host(name) for name in rules},
    }
    await good(repo, await make(repo.commit(files)))
    commit = git("rev-parse", "HEAD", cwd=repo.bare).strip()
    for name in ("a", "b", "d"):
        condition.note(repo.bare, name, condition.Condition(at=1, drift=("it runs /nix/store/x",)))
    condition.note(repo.bare, "c", condition.Condition(at=1))
    made = await make(commit)
    assert [(each.label, each.why, each.action, bool(each.held)) for each in made.changes.changes] == [
        ("a", Why.DRIFT, Action.DEPLOY, False),
        ("d", Why.DRIFT, Action.DEPLOY, True),
    ]
    condition.note(repo.bare, "a", condition.Condition(at=2))  # as the roll-out does at its end
    assert [each.label for each in (await make(commit)).changes.changes] == ["d"]


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"machines.yaml": machines()}, "this commit has no hosts and no terraform roots and no releases"),
        (
            {"machines.yaml": machines("b"), "hosts/a.nix": host("a")},
            "no host of this commit has a machine of its name",
        ),
    ],
)
async def test_a_fleet_with_nothing_to_deploy_says_so_first(
    repo: InfraRepo, make: Make, files: dict[str, str | None], says: str
) -> None:
    made = await make(repo.commit(files))
    assert str(made.changes).splitlines()[0].startswith("NOTHING TO DEPLOY: ") and says in made.changes.nothing
    assert "NOTHING TO DEPLOY" in Report("infra", made.commit, made.changes).headline()


async def test_a_deployed_machine_with_a_new_address_is_refused_without_its_old_one(
    repo: InfraRepo, make: Make
) -> None:
    first = await make(repo.commit({"machines.yaml": machines("a", "b"), "hosts/a.nix": host("a")}))
    await good(repo, first)
    await owners.claim(repo.bare, first.manifest.machines["a"], [])
    text = machines("a", "b").replace("192.0.2.1", "192.0.2.9")
    made = await make(repo.commit({"machines.yaml": text}))
    (failed,) = made.changes.failed
    assert "is deployed at 192.0.2.1, and machines.yaml says 192.0.2.9" in failed.message
    made = await make(repo.commit({"machines.yaml": text.replace("192.0.2.9", "192.0.2.9, was: 192.0.2.1")}))
    (change,) = made.changes.changes
    assert (change.why, change.action) == (Why.MOVED, Action.DEPLOY) and "what runs there stays" in change.note


async def test_a_commit_that_is_unfinished_is_refused_in_its_plan_by_name(make: Make, repo: InfraRepo) -> None:
    """On branches that are not deployed no hook looks at it."""
    fine = repo.commit({"machines.yaml": "machines: []\n", "hosts/a.nix": "{ }\n"})
    (repo.work / "terraform/zones").mkdir(parents=True)
    git("update-index", "--add", "--cacheinfo", f"160000,{fine},terraform/zones", cwd=repo.work)
    half = repo.commit({"hosts/A.nix": "{ }\n", "hosts/b.nix": "version https://git-lfs.github.com/spec/v1\noid x\n"})
    with pytest.raises(InputError) as caught:
        await make(half, "b")
    for words in (
        "terraform/zones: is a submodule",
        "hosts/a.nix: differs from hosts/A.nix only by case",
        "hosts/b.nix: is not the file but what git-lfs has committed",
    ):
        assert words in str(caught.value)
    (repo.work / "hosts/c.nix").symlink_to("/nix/store/00000000000000000000000000000000-c")
    with pytest.raises(InputError, match=r"hosts/c\.nix: is a link that leads out of the repo"):
        await make(repo.commit({"toto.toml": '[tree]\nunfinished = ["terraform", "hosts"]\n'}))
    (repo.work / "hosts/c.nix").unlink()
    (repo.work / "result").symlink_to("/nix/store/00000000000000000000000000000000-c")
    assert (await make(repo.commit({}), "helm")).changes.empty


def page(name: str = "page", **release: str) -> dict[str, str | None]:
    return {
        f"helm/{name}/release.yaml": "".join(f"{key}: {value}\n" for key, value in release.items()),
        f"helm/{name}/Chart.yaml": "apiVersion: v2\nname: page\nversion: 0.1.0\n",
        f"helm/{name}/templates/page.yaml": "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: page}\n",
    }


async def deployed(made: Plan, repo: InfraRepo, **more: str) -> None:
    """Record the plan's releases as deployed, at revision 3."""
    for each in made.orders:
        good = kind_of(each.target).deployed(each.desired, commit=made.commit, run="r", at="now", revision=3)
        entry = Entry(good=good.model_copy(update=more))

        def change(_: Entry, entry: Entry = entry) -> Entry:
            return entry

        await Ledger(repo.bare).write(each.target, change, "good")


@pytest.mark.parametrize("recorded", [{}, {"namespace": ""}], ids=["by this version", "by an older one"])
async def test_a_release_whose_namespace_changes_is_refused_by_name(
    make: Make, repo: InfraRepo, recorded: dict[str, str]
) -> None:
    await deployed(
        await make(repo.commit({"machines.yaml": "machines: []\n", **page(namespace="old")})), repo, **recorded
    )
    [failure] = (await make(repo.commit(page(namespace="new")))).changes.failed
    assert failure.message == (
        "helm/page: its place changed from old/page to new/page, while old/page still holds revision 3, which toto "
        "deployed: there would be two\nnext: change it back, or write `was: old/page` into helm/page/release.yaml: "
        "then it is installed anew, and the old one stays until somebody runs `helm --namespace old uninstall page`"
    )
    assert (await make(repo.commit(page(namespace="new", was="else/page")))).changes.failed
    [order] = (await make(repo.commit(page(namespace="new", was="old/page")))).orders
    assert isinstance(order, ReleaseOrder) and order.last is None
    assert order.change.note == "it was old/page, which stays in the cluster as it is"
    await deployed(await make(repo.commit(page(namespace="new", was="old/page"))), repo)
    assert (await make(repo.commit({}))).changes.empty
    [failure] = (await make(repo.commit(page(namespace="third", was="old/page")))).changes.failed
    assert "from new/page to third/page" in failure.message


async def test_a_release_whose_folder_is_renamed_is_refused_by_name(make: Make, repo: InfraRepo) -> None:
    await deployed(await make(repo.commit({"machines.yaml": "machines: []\n", **page(), **page("other")})), repo)
    git("mv", "helm/page", "helm/shop", cwd=repo.work)
    renamed = await make(repo.commit({"helm/shop/release.yaml": "namespace: web\n"}), "helm/shop")
    [failure] = renamed.changes.failed
    assert (
        "helm/shop: its place changed from default/page to web/shop, while default/page still holds" in failure.message
    )
    whole = await make(renamed.commit)
    assert whole.changes.failed and whole.changes.retired == ()  # else the next push would know nothing of it
    left = await make(repo.commit({"helm/page/README.md": "it is in helm/shop now\n"}), "helm/shop")
    assert left.changes.failed, "a folder that has nothing of a release any more is none"
    moved = await make(repo.commit({"helm/shop/release.yaml": "was: default/page\n"}))
    assert [each.label for each in moved.orders] == ["helm/shop"] and moved.changes.retired == (Target("helm", "page"),)
    assert "it was default/page, which stays" in str(moved.changes)
    copied = await make(repo.commit(page("copy") | page("page")), "helm/copy")
    assert [each.label for each in copied.orders] == ["helm/copy"]
    await deployed(moved, repo)
    git("rm", "-rq", "helm/other", "helm/copy", cwd=repo.work)
    swapped = await make(
        repo.commit({"helm/new/release.yaml": "chart: x\nrepo: https://x.org\nversion: 1.0.0\n"}), "helm"
    )
    assert not swapped.changes.failed and Target("helm", "other") not in swapped.changes.unchanged


async def test_what_looks_like_a_release_and_is_none_is_told_with_what_to_do(repo: InfraRepo, make: Make) -> None:
    files: dict[str, str | None] = {
        "helm/web/release.yml": "chart: /charts/web\n",
        "helm/shop/prod/release.yaml": "",
        "helm/lone/Chart.yaml": "name: lone\n",
        "helm/used/Chart.yaml": "apiVersion: v2\nname: used\nversion: 0.1.0\n",
        "helm/used/templates/release.yaml": "",
        "helm/user/release.yaml": "chart: ../used\n",
    }
    made = await make(repo.commit({"machines.yaml": "machines: []\n", **files}))
    told = {each.place: each.what for each in made.changes.told}
    assert told.keys() == {"helm/web/release.yml", "helm/shop/prod/release.yaml", "helm/lone"}
    assert "only helm/NAME/release.yaml is one" in told["helm/web/release.yml"]
    assert "a release.yaml in it, which may be empty, makes it one" in told["helm/lone"]


async def test_a_chart_that_lacks_what_it_depends_on_is_refused_in_the_plan(make: Make, repo: InfraRepo) -> None:
    chart = "apiVersion: v2\nname: page\nversion: 0.1.0\ndependencies: [{name: db, version: 2.0.0, repository: ''}]\n"
    db = "apiVersion: v2\nname: db\nversion: 1.0.0\n"
    files = {
        "machines.yaml": "machines: []\n",
        **page(),
        "helm/page/Chart.yaml": chart,
        "helm/page/charts/db/Chart.yaml": db,
    }
    made = await make(repo.commit(files), "helm")
    [failure] = made.changes.failed
    assert "helm/page/charts/ does not have what Chart.yaml wants: db 2.0.0 (wrong version)" in failure.message
    [order] = (await make(repo.commit({"helm/page/charts/db/Chart.yaml": db.replace("1.0", "2.0")}), "helm")).orders
    assert order.label == "helm/page"
