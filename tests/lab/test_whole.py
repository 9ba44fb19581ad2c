"""The whole of toto on real parts: pushes to a real repo, real runs, real VMs, real machines that lose their power.

One fleet serves all tests of this file, in their order; each leaves it whole, with every machine at its last good.
What a test script of web1 does is read from files outside the repo (`Control`), so that a test can change its
mind without changing the host: the rehearsals of the two variants, A and B, are then cached.
"""

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Final

import pytest
import pytest_asyncio

from tests.lab import setup
from tests.lab.fleet import PATIENCE, Fleet, Run, command_of, mounts_of, processes
from tests.repos import git
from toto.compliance.history import read as known
from toto.ledger.ledger import REF, Ledger
from toto.machine.activation import MachineState

pytestmark = [pytest.mark.lab, pytest.mark.asyncio(loop_scope="module"), pytest.mark.minutes(16)]

# The instants at which toto is killed: all of them with TOTO_CUTS=1, or these.
ALL: Final = bool(os.environ.get("TOTO_CUTS"))
PHASES: Final = ["with-internet", "smoke", "post-switch"] if ALL else ["smoke"]
INSTANTS: Final = ["build", "copy", "intent", "revert", "stop"] if ALL else ["revert"]

GOOD = "echo 1..1\necho ok 1 - as it should be\n"
BAD = "echo 1..1\necho not ok 1 - the customer is happy\n"
GATE = """compliance = "gate"
[compliance.checks.base]
tags = ["front"]
[sandbox]"""
COMPLIANCE = """
import pytest

@pytest.mark.impact(0.7)
def test_nothing_is_forbidden(host):
    assert not host.file("/run/forbidden").exists

def test_root(host):
    assert host.user("root").uid == 0 and host.file("/etc/variant").content_string in ("A", "B")

@pytest.mark.skip(reason="not on NixOS")
def test_a_package(host):
    pass
"""
SETTINGS = """
[roll_out]
confirm_timeout = 90
activation_timeout = 180
connect_timeout = 15
[sandbox]
test_timeout = 120
"""


class Control:
    """What web1's test script of each phase does: a script that passes, unless a test sets a different one.

    The scripts' cells may read the folder, by a setting of the server's, but not write to it.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir()
        self.all_good()

    def all_good(self) -> None:
        for phase in ("no-internet", "with-internet", "smoke", "post-switch"):
            self[phase] = GOOD

    def __setitem__(self, phase: str, script: str) -> None:
        (self.directory / phase).write_text(script)

    def waits(self, phase: str, *, before: str = ":", after: str = ":") -> None:
        """The script waits until it is let go (then it passes); `before` and `after` that it runs a command."""
        wait = f"sh -c 'while [ ! -e {self.directory}/go ]; do sleep 0.1; done' {self.waiting}"
        self[phase] = "\n".join([before, wait, after, GOOD])
        (self.directory / "go").unlink(missing_ok=True)

    @property
    def waiting(self) -> str:
        """A word on the command line of what waits."""
        return f"waiting-{self.directory}"

    @property
    def endless(self) -> str:
        """What a builder runs that waits for ever. (It sees no file of this machine.)"""
        return f"sh -c 'while :; do sleep 1; done' {self.waiting}"

    async def begun(self, timeout: float = PATIENCE) -> None:
        """Wait until a script waits. (A cell's processes are seen from outside.)"""
        async with asyncio.timeout(timeout):
            while not any(self.waiting.encode() in command_of(pid) for pid in processes()):
                await asyncio.sleep(0.1)

    def go(self) -> None:
        (self.directory / "go").touch()

    def script(self) -> str:
        return f"#!/bin/sh\n. {self.directory}/$TOTO_PHASE\n"


class Whole(Fleet):
    """A fleet whose web1 has two variants and a script that a test controls."""

    def __init__(self, directory: Path, net: int = 2) -> None:
        super().__init__(directory, net)
        self.control = Control(directory / "control")
        self.readable = [directory / "control"]

    def alone(self) -> None:
        """Of the example leave web1, without its tests."""
        for name in ("gate", "web2"):
            (self.work / "hosts" / f"{name}.nix").unlink()
        manifest = (self.work / "machines.yaml").read_text()
        web1 = manifest.split("- name: web1")[1].split("  # web2")[0]
        (self.work / "machines.yaml").write_text(f"machines:\n  - name: web1{web1}")
        shutil.rmtree(self.work / "tests")
        (self.work / "toto.toml").write_text(SETTINGS)

    def test(self, phase: str, script: str) -> None:
        """Give web1 this test in a phase."""
        file = self.work / "tests" / "web1" / phase / "50-control"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(script)
        file.chmod(0o755)

    def web1(self, variant: str, more: str = "") -> dict[str, str | None]:
        """The host web1 in variant A or B; `more` is further configuration."""
        return {
            "hosts/web1.nix": "{ imports = [ ../modules/common.nix ../modules/web.nix ];\n"
            '  networking.hostName = "web1";\n'
            f'  environment.etc."variant".text = "{variant}";\n  {more} }}\n'
        }

    async def other(self, message: str) -> Run:
        """Deploy web1 in the variant that it does not run now."""
        return await self.deploy(message, self.web1(self.next_variant()))

    def next_variant(self) -> str:
        return "B" if '"A"' in (self.work / "hosts/web1.nix").read_text() else "A"

    def with_lib(self, variant: str, more: str) -> dict[str, str | None]:
        """`web1` with configuration that uses `lib` and `pkgs`."""
        return {
            name: (text or "").replace("{ imports", "{ lib, pkgs, ... }: { imports", 1)
            for name, text in self.web1(variant, more).items()
        }

    def made_by(self, script: str) -> str:
        """Configuration with a file that a derivation of its own makes, by a shell script."""
        return (
            'environment.etc."made".source = builtins.derivation { name = "made"; system = "x86_64-linux"; '
            f"builder = \"/bin/sh\"; args = [ \"-c\" ''{script}'' ]; }};"
        )

    async def until_ledger(self, says: Callable[[], bool], timeout: float = PATIENCE) -> None:
        async with asyncio.timeout(timeout):
            while not says():
                await asyncio.sleep(0.02)

    async def task(self, run: str, name: str) -> None:
        """Wait until a run, or one of its subflows, is at the task of this name."""
        wanted = {"flow_runs": {"id": {"any_": []}}, "task_runs": {"name": {"any_": [name]}}}
        async with asyncio.timeout(PATIENCE):
            while True:
                wanted["flow_runs"]["id"]["any_"] = self.family(run)  # type: ignore[index]
                if any(each["state_type"] == "RUNNING" for each in self.api("POST", "/task_runs/filter", wanted)):
                    return
                await asyncio.sleep(0.1)

    def begin_other(self, message: str) -> str:
        """As `other`, without waiting for the end; the run."""
        self.commit(message, self.web1(self.next_variant()))
        return self.push()

    def sandboxes(self) -> list[int]:
        """The processes of sandboxes that are there: each QEMU whose disk is in toto's state."""
        return [pid for pid in processes() if b"qemu" in command_of(pid) and str(self.state) in mounts_of(pid)]

    def history(self) -> list[str]:
        return git("log", "--format=%s", REF, cwd=self.repo).splitlines()

    def note(self, commit: str) -> str:
        """What toto has noted of a commit."""
        noted = git("for-each-ref", "refs/notes/toto", cwd=self.repo)
        return git("log", "-1", "--notes=toto", "--format=%N", commit, cwd=self.repo) if noted else ""

    async def settled(self) -> None:
        """No target is left half done, no sandbox runs, and each machine runs its last good."""
        systems = await self.systems()
        for name in self.machines:
            entry = self.entry(name)
            assert entry.intent is None
            assert self.runs_its_good(name, systems[name])
            assert await self.machines[name].profile() == systems[name]
        assert not self.sandboxes()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def whole(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Whole]:
    """gate and web1 are on, web2 is in the manifest and off. Nothing is deployed yet."""
    await asyncio.to_thread(setup.setup)
    fleet = Whole(tmp_path_factory.mktemp("whole"))
    try:
        await fleet.prepare()
        for path in (fleet.work / "tests" / "web1").rglob("*"):
            if path.is_file():
                path.unlink()
        for phase in ("no-internet", "with-internet", "smoke", "post-switch"):
            fleet.test(phase, fleet.control.script())
        (fleet.work / "toto.toml").write_text(SETTINGS)
        await asyncio.gather(fleet.start_server(), fleet.start_machines(["gate", "web1"]))
        yield fleet
    finally:
        await asyncio.shield(fleet.stop())


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def _controlled(whole: Whole) -> None:
    whole.control.all_good()


async def test_a_first_push_deploys_what_answers_and_says_what_does_not(whole: Whole) -> None:
    installed = await whole.systems()
    run = await whole.deploy("the fleet", whole.web1("A"))
    assert run.state == "COMPLETED", whole.logs(run.id)
    assert "gate, web1 deployed" in run.message
    assert "web2 unreachable" in run.message
    assert whole.api("GET", f"/flow_runs/{run.id}")["state_name"] == "Partial"
    await whole.settled()
    systems = await whole.systems()
    assert all(systems[name] != installed[name] for name in systems)
    entry = whole.entry("web1")
    assert entry.before is not None and MachineState.of(entry.before).system == installed["web1"]
    assert whole.entry("web2").unreachable is not None
    assert whole.entry("web2").intent is None
    scheduled = whole.api(
        "POST",
        "/flow_runs/filter",
        {"flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}, "tags": {"all_": ["retry"]}}},
    )
    assert [each["parameters"]["only"] for each in scheduled] == [["web2"]], "it is tried again by itself"


async def test_a_machine_that_was_off_catches_up_by_itself_and_is_not_rehearsed_again(whole: Whole) -> None:
    before = await whole.systems()
    await whole.start_machines(["web2"])
    run = await whole.deploy("readme", {"README.md": "hello\n"})
    assert run.state == "COMPLETED", whole.logs(run.id)
    assert run.message.endswith("web2 deployed")
    assert whole.subflows(run.id) == ["rehearse host / web2", "roll out host / web2"]
    assert "console:" not in whole.logs(run.id), "its verdict was cached: no VM was booted"
    assert {name: path for name, path in (await whole.systems()).items() if name != "web2"} == before
    await whole.settled()


async def test_a_readme_only_commit_touches_no_host_and_asks_none(whole: Whole) -> None:
    before, history = await whole.systems(), whole.history()
    for machine in whole.machines.values():
        await machine.network(False)
    run = await whole.deploy("readme again", {"README.md": "hello again\n"})
    for machine in whole.machines.values():
        await machine.network(True)
        await machine.wait_ssh()
    assert run.state == "COMPLETED"
    assert "nothing to do" in run.message
    assert whole.subflows(run.id) == []
    assert await whole.systems() == before
    assert whole.history() == history


async def test_what_is_only_tried_goes_back_when_its_time_is_up_and_when_who_tries_it_leaves(whole: Whole) -> None:
    before, entry, now = await whole.systems(), whole.entry("web1"), (whole.work / "hosts/web1.nix").read_text()
    whole.commit("tried", whole.web1(whole.next_variant()))
    whole.git("push", "-o", "skip", "toto", "main")
    argv = [sys.executable, "-m", "toto.cli", "deploy", "web1", "--repo", str(whole.repo), "--try"]

    done = await asyncio.to_thread(
        subprocess.run, [*argv, "15s"], env=whole.environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done
    assert "web1: smoke tests" in done.stdout and "web1: try" in done.stdout
    assert "web1: post-switch tests" not in done.stdout and "web1 tried; web1 reverted\n" in done.stdout
    after = whole.entry("web1")
    assert await whole.systems() == before and after.good == entry.good
    assert (after.intent, after.reverted) == (None, None), "nothing has failed"
    assert whole.history()[0].startswith("web1: tried, and put back to ")

    trying = subprocess.Popen([*argv, "1h"], env=whole.environment, stdout=subprocess.PIPE, text=True)
    assert trying.stdout is not None
    with trying, trying.stdout:
        run = trying.stdout.readline().split()[-1]
        async with asyncio.timeout(PATIENCE):
            while (await whole.systems())["web1"] == before["web1"]:
                await asyncio.sleep(1)
        assert await whole.machines["web1"].profile() == before["web1"], "it boots what it booted"
        trying.send_signal(signal.SIGINT)
        await asyncio.to_thread(trying.wait, 60)
    assert (await whole.ended(run)).state == "CANCELLED"
    async with asyncio.timeout(PATIENCE):
        while whole.entry("web1").intent is not None:
            await asyncio.sleep(0.5)
    assert await whole.systems() == before

    words = ("test", "web1", "smoke", "--repo", str(whole.repo), "--json")
    done = await asyncio.to_thread(
        subprocess.run, [*argv[:3], *words], env=whole.environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and '"result": "passed"' in done.stdout, done
    whole.commit("not tried any more", {"hosts/web1.nix": now})
    whole.git("push", "-o", "skip", "toto", "main")


async def test_a_host_of_the_working_tree_is_tried_by_hand_in_its_sandbox(whole: Whole) -> None:
    (whole.work / "hosts/web1.nix").write_text(str(whole.web1("by hand")["hosts/web1.nix"]))
    before, history = await whole.systems(), whole.history()
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "toto.cli", "sandbox", "web1"],
        cwd=whole.work,
        env=whole.environment | {"PYTHONPATH": str(Path(__file__).parents[2])},
        input="cat /etc/variant; exit 3\n",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and done.stdout.strip() == "by hand", done
    assert "web1 of the working tree" in done.stderr and "web1 is up, without internet" in done.stderr
    assert not whole.sandboxes() and whole.history() == history and await whole.systems() == before
    whole.git("checkout", "--", "hosts/web1.nix")


@pytest.mark.exhaustive
async def test_the_scripts_of_one_phase_run_alone(whole: Whole) -> None:
    whole.control["no-internet"] = BAD
    for phase, status in (("no-internet", 1), ("with-internet", 0)):
        done = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-m", "toto.cli", "test", "web1", phase, "--repo", str(whole.repo), "--json"],
            env=whole.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == status and f'"result": "{"failed" if status else "passed"}"' in done.stdout, done


async def test_a_change_of_tests_alone_rehearses_and_verifies_but_activates_nothing(whole: Whole) -> None:
    before, history = await whole.systems(), whole.history()
    run = await whole.deploy(
        "more tests",
        {"tests/web1/post-switch/60-more": "#!/bin/sh\necho 1..1\necho ok\n".replace("echo ok", "echo ok 1")},
    )
    assert run.state == "COMPLETED", whole.logs(run.id)
    assert whole.subflows(run.id) == ["rehearse host / web1", "roll out host / web1"]
    assert await whole.systems() == before
    assert len(whole.history()) == len(history) + 1
    assert "verified" in whole.history()[0]


async def test_a_failed_rehearsal_touches_nothing_and_is_not_remembered(whole: Whole) -> None:
    before, history = await whole.systems(), whole.history()
    whole.control["no-internet"] = BAD
    run = await whole.deploy("a variant that fails", whole.web1("E"))
    assert run.state == "FAILED"
    assert "no-internet tests failed" in run.message and "nothing was touched" in run.message
    assert (await whole.systems(), whole.history()) == (before, history)
    whole.control.all_good()
    again = await whole.deploy("the same once more", {})
    assert again.state == "COMPLETED", whole.logs(again.id)
    await whole.settled()
    assert list(whole.state.glob("repos/*/junit/web1.no-internet.xml"))
    await whole.deploy("back to A", whole.web1("A"))


@pytest.mark.exhaustive
async def test_one_host_that_does_not_evaluate_stops_no_rehearsal_and_every_roll_out(whole: Whole) -> None:
    before = await whole.systems()
    gate = (whole.work / "hosts/gate.nix").read_text()
    broken: dict[str, str | None] = {"hosts/gate.nix": gate.replace("pkgs.busybox", "pkgs.nope")}
    run = await whole.deploy("a mistake", whole.web1("B") | broken)
    assert run.state == "FAILED"
    assert "gate: evaluation failed" in run.message and "hosts/gate.nix:" in run.message
    assert "nothing was touched" in run.message
    assert whole.subflows(run.id) == ["rehearse host / web1"]
    assert await whole.systems() == before
    partly = await whole.deploy(
        "the others all the same", {"toto.toml": SETTINGS.replace("[sandbox]", 'policy = "partial"\n[sandbox]')}
    )
    assert partly.state == "FAILED" and "the others were rolled out" in partly.message, partly.message
    after = await whole.systems()
    assert {name for name in before if before[name] != after[name]} == {"web1"}
    fixed: dict[str, str | None] = {"hosts/gate.nix": gate, "toto.toml": SETTINGS}
    assert (await whole.deploy("fixed", whole.web1("A") | fixed)).state == "COMPLETED"


@pytest.mark.exhaustive
async def test_what_the_manifest_says_of_activation_is_respected(whole: Whole) -> None:
    """gate is only ever `test`ed (its boot default stays), web2 only set for its next boot (what runs stays)."""
    names = ("gate", "web2")
    before = await whole.systems()
    profiles = {name: await whole.machines[name].profile() for name in names}
    manifest = (whole.work / "machines.yaml").read_text()
    changed = re.sub(r"- name: gate\n", "- name: gate\n    activation: test\n", manifest)
    changed = re.sub(r"- name: web2\n", "- name: web2\n    activation: boot\n", changed)
    hosts = {name: (whole.work / f"hosts/{name}.nix").read_text() for name in names}
    more = '\n  environment.etc."more".text = "more";\n}'
    files: dict[str, str | None] = {
        f"hosts/{name}.nix": text.rstrip().removesuffix("}") + more for name, text in hosts.items()
    }
    run = await whole.deploy("some activate otherwise", files | {"machines.yaml": changed})
    assert run.state == "COMPLETED", whole.logs(run.id)
    after = await whole.systems()
    assert after["gate"] != before["gate"] and await whole.machines["gate"].profile() == profiles["gate"]
    assert after["web2"] == before["web2"] and await whole.machines["web2"].profile() != profiles["web2"]
    back: dict[str, str | None] = {f"hosts/{name}.nix": text for name, text in hosts.items()}
    assert (await whole.deploy("as it was", back | {"machines.yaml": manifest})).state == "COMPLETED"
    await whole.settled()


@pytest.mark.exhaustive
async def test_a_machine_that_leaves_the_manifest_is_forgotten_and_left_alone(whole: Whole) -> None:
    before = await whole.systems()
    manifest = (whole.work / "machines.yaml").read_text()
    run = await whole.deploy("web2 retires", {"machines.yaml": manifest[: manifest.index("  # web2 serves")]})
    assert run.state == "COMPLETED", whole.logs(run.id)
    assert await whole.systems() == before
    assert whole.entry("web2").good is None
    back = await whole.deploy("web2 is back", {"machines.yaml": manifest})
    assert back.state == "COMPLETED", whole.logs(back.id)
    await whole.settled()


async def test_a_failed_post_switch_test_puts_the_host_back(whole: Whole) -> None:
    before = await whole.systems()
    web1 = whole.machines["web1"]
    whole.control.waits("post-switch", after=f"{BAD}exit")
    begun = whole.begin_other("unhappy")
    await whole.control.begun()
    # Another tool activates meanwhile, as nixos-rebuild does when toto has given up on it: that is let end first.
    await web1.check(
        "sudo systemd-run --unit=nixos-rebuild-switch-to-configuration "
        "sh -c 'until [ -e /run/let-go ]; do sleep 0.2; done'"
    )
    whole.control.go()
    async with asyncio.timeout(PATIENCE):
        while (await web1.ssh("ps | grep -q '[a]ctivate.sh quiet'")).status != 0:
            await asyncio.sleep(0.2)
    assert await whole.systems() != before
    await web1.check("sudo touch /run/let-go")
    run = await whole.ended(begun)
    assert run.state == "FAILED"
    assert "the customer is happy" in run.message and "web1 reverted" in run.message
    assert await whole.systems() == before
    await whole.settled()
    report = whole.artifacts(run.id)["report-infra"]
    assert "not ok 1 - the customer is happy" in report and before["web1"] in report
    whole.control.all_good()
    again = await whole.deploy("once more", {})
    assert again.state == "COMPLETED", whole.logs(again.id)
    assert (await whole.systems())["web1"] != before["web1"]


async def test_a_compliance_gate_that_fails_puts_the_host_back(whole: Whole) -> None:
    before, web1 = await whole.systems(), whole.machines["web1"]
    await web1.check("sudo touch /run/forbidden")
    manifest = (whole.work / "machines.yaml").read_text()
    gate: dict[str, str | None] = {
        "toto.toml": SETTINGS.replace("[sandbox]", GATE),
        "machines.yaml": manifest.replace("tags: [web]", "tags: [web, front]", 1),
        "compliance/base.py": COMPLIANCE,
    }
    run = await whole.deploy("a gate", whole.web1(whole.next_variant()) | gate)
    assert run.state == "FAILED", run.message
    assert "web1: roll-out failed: post-switch compliance" in run.message and "web1 reverted" in run.message
    assert "not ok compliance/base.py: test_nothing_is_forbidden, impact 0.7" in whole.logs(run.id)
    assert await whole.systems() == before
    await whole.settled()
    assert known(whole.repo).machines == {}, "what was found before it went back is not how the machine is"

    await web1.check("sudo rm /run/forbidden")
    again = await whole.deploy("once more", {})
    assert again.state == "COMPLETED", whole.logs(again.id)
    assert (await whole.systems())["web1"] != before["web1"]
    found = {each.id: each.outcome.value for each in known(whole.repo).machines["web1"].controls}
    assert found == {"test_nothing_is_forbidden": "passed", "test_a_package": "not checked", "test_root": "passed"}

    await web1.check("sudo touch /run/forbidden")
    done = subprocess.run(
        [sys.executable, "-m", "toto.cli", "check", "web1", "--repo", whole.repo],
        env=whole.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and "web1: compliance check failed: 1 failed, 1 not checked" in done.stdout, done
    assert len(known(whole.repo).machines["web1"].trend) == 2
    back: dict[str, str | None] = {"toto.toml": SETTINGS, "machines.yaml": manifest, "compliance/base.py": None}
    assert (await whole.deploy("no gate", back)).state == "COMPLETED"


async def test_a_machine_whose_sshd_breaks_heals_itself_and_the_run_is_red(whole: Whole) -> None:
    before = await whole.systems()
    # (What can be seen before, such as sshd's settings, is refused before: this sshd is another program.)
    broken = (
        'systemd.services.sshd.serviceConfig.ExecStart = lib.mkForce "${pkgs.base}/bin/sleep 100000";\n'
        "  virtualisation.vmVariant.systemd.services.sshd.serviceConfig.ExecStart ="
        ' lib.mkOverride 10 "${pkgs.base}/bin/sshd -D -e -f /etc/ssh/sshd_config";'
    )
    run = await whole.deploy("lock ourselves out", whole.with_lib("B", broken))
    assert run.state == "FAILED"
    assert re.search(r"; web1\b.* reverted", run.message), run.message
    await whole.machines["web1"].wait_ssh()
    assert await whole.systems() == before
    await whole.settled()
    await whole.deploy("let us in again", whole.web1("A"))


@pytest.mark.exhaustive
async def test_a_machine_that_refuses_totos_key_goes_back_at_once_and_says_what_ssh_said(whole: Whole) -> None:
    before = await whole.systems()
    # (Of this toto learns only by the activation.)
    refusing = (
        'system.activationScripts.zz.text = lib.mkForce "rm -f /etc/ssh/authorized_keys.d/toto";\n'
        '  virtualisation.vmVariant.system.activationScripts.zz.text = lib.mkOverride 10 "";'
    )
    settings = (whole.work / "toto.toml").read_text()
    patient = settings.replace("confirm_timeout = 90", "confirm_timeout = 300")  # the watchdog would take so long
    run = await whole.deploy("forget the key", {**whole.with_lib("B", refusing), "toto.toml": patient})
    assert run.state == "FAILED", run
    assert re.search(r"let in no new connection.*; web1\b.* reverted", run.message), run.message
    await whole.log_line(run.id, "Permission denied", 60)  # (Prefect keeps the last lines a moment after the state)
    assert await whole.systems() == before
    await whole.settled()
    await whole.deploy("know it again", {**whole.web1("A"), "toto.toml": settings})


@pytest.mark.exhaustive
async def test_a_configuration_without_totos_key_is_not_activated(whole: Whole) -> None:
    before = await whole.systems()
    ledger = Ledger(whole.repo).read()
    refusing = "users.users.toto.openssh.authorizedKeys.keyFiles = lib.mkForce [ ];"
    run = await whole.deploy("a configuration without the key", whole.with_lib("B", refusing))
    assert run.state == "FAILED", run
    assert "does not let toto in" in run.message and "reverted" not in run.message, run.message
    await whole.log_line(run.id, "Permission denied", 60)  # (Prefect keeps the last lines a moment after the state)
    assert await whole.systems() == before
    assert Ledger(whole.repo).read() == ledger  # nothing was touched
    await whole.deploy("with it again", whole.web1("A"))


async def test_a_power_cut_between_test_and_switch_boots_the_old_generation(whole: Whole) -> None:
    before = await whole.systems()
    whole.control.waits("smoke")
    run = whole.begin_other("the power goes")
    await whole.control.begun()
    assert (await whole.systems())["web1"] != before["web1"], "the new system is active, not permanent"
    await whole.machines["web1"].power_cut()
    await whole.machines["web1"].start()
    await whole.machines["web1"].wait_ssh()
    assert await whole.systems() == before
    whole.control["smoke"] = GOOD
    whole.control.go()
    ended = await whole.ended(run)
    assert ended.state == "FAILED"
    assert "rebooted" in ended.message or "ssh cannot connect" in ended.message, ended.message
    await whole.settled()
    assert await whole.systems() == before
    whole.commit("as it runs", whole.web1(whole.next_variant()))  # so that the next test's variant is another one


@pytest.mark.parametrize("phase", PHASES)
async def test_the_next_run_settles_what_a_killed_toto_left(whole: Whole, phase: str) -> None:
    before = await whole.systems()
    whole.control.waits(phase)
    if phase == "with-internet":  # A and B are cached by now
        whole.commit("a third variant", whole.web1("C"))
        whole.push()
    else:
        whole.begin_other(f"killed in {phase}")
    await whole.control.begun()
    whole.kill()
    whole.control.all_good()
    touched = (await whole.systems())["web1"] != before["web1"]
    assert touched == (phase != "with-internet")
    assert (whole.entry("web1").intent is not None) == touched
    await whole.start_server()
    assert not whole.sandboxes(), "the start has removed what was left"
    if phase == "post-switch":  # the start settles it; in the other cases the next run does
        async with asyncio.timeout(PATIENCE):
            while whole.entry("web1").intent is not None:
                await asyncio.sleep(0.5)
        assert await whole.systems() == before
    files = whole.web1("A" if phase == "with-internet" else whole.next_variant())
    run = await whole.deploy("after the crash", files)
    assert run.state == "COMPLETED", whole.logs(run.id)
    if touched:
        assert any(line.startswith("web1: reverted") for line in whole.history()[:6])
    await whole.settled()
    states = {each["state_type"] for each in whole.api("POST", "/flow_runs/filter", {})}
    assert not states & {"RUNNING", "PENDING", "CANCELLING"}, "no run stays running for ever"


@pytest.mark.parametrize("instant", INSTANTS)
async def test_a_toto_killed_at_any_instant_leaves_the_machine_at_its_last_good(whole: Whole, instant: str) -> None:
    """In a build, while the closure is copied, right after the intent was written, while the host is reverted.

    And stopped in an orderly way during the smoke tests: as by the activation of the machine that toto runs on.
    """
    before, variant = await whole.systems(), "B" if whole.next_variant() == "A" else "A"
    match instant:
        case "build":
            whole.commit("a build that waits", whole.web1(variant, whole.made_by(whole.control.endless)))
            whole.push()
            await whole.control.begun()
        case "copy":
            large = whole.made_by("head -c 60000000 /dev/urandom > $out")
            whole.commit("a large closure", whole.web1(variant, large))
            run = whole.push()
            await whole.task(run, "copy the closure")
        case "intent":
            whole.begin_other("killed right after the intent")
            await whole.until_ledger(lambda: whole.entry("web1").intent is not None)
        case "revert":
            whole.control["post-switch"] = BAD
            run = whole.begin_other("killed while it is reverted")
            await whole.task(run, "revert web1")
        case "stop":
            whole.control.waits("smoke")
            whole.begin_other("it restarts toto")
            await whole.control.begun()
    if instant == "stop":
        await whole.stop_server()
    else:
        whole.kill()
    whole.control.all_good()
    whole.control.go()
    assert (whole.entry("web1").intent is not None) == (instant in ("intent", "revert", "stop"))
    await whole.start_server()
    await whole.until_ledger(lambda: whole.entry("web1").intent is None)
    assert await whole.systems() == before
    await whole.settled()
    if instant != "stop":  # (whoever has stopped it knows)
        await whole.until_ledger(lambda: "died in the middle" in whole.note("main"))
    if instant in ("intent", "revert"):
        assert "web1 reverted" in whole.note("main")
    whole.commit("as it is deployed", whole.web1(variant))


async def test_a_toto_killed_in_the_middle_of_an_activation_waits_for_its_end_and_goes_back(whole: Whole) -> None:
    before = await whole.systems()
    slow = (
        'system.activationScripts.slow.text = "sleep 20";\n'
        '  virtualisation.vmVariant.system.activationScripts.slow.text = lib.mkForce "";'
    )
    whole.commit("a slow activation", whole.with_lib("S", slow))
    whole.push()
    async with asyncio.timeout(PATIENCE):
        while (await whole.machines["web1"].ssh("sudo", "sh", "-c", "ls -d /run/toto/*.test.*")).status != 0:
            await asyncio.sleep(0.3)
    whole.kill()
    assert await whole.systems() == before, "the activation is under way"
    await whole.start_server()
    async with asyncio.timeout(PATIENCE):
        while whole.entry("web1").intent is not None:
            await asyncio.sleep(0.5)
    assert await whole.systems() == before
    await asyncio.sleep(5)
    await whole.settled()
    assert (await whole.deploy("not so slow", whole.web1("A"))).state == "COMPLETED"


async def test_two_pushes_at_once_end_with_the_newer_and_no_host_is_touched_by_both(whole: Whole) -> None:
    whole.control.waits("smoke")
    older = whole.begin_other("first")
    await whole.control.begun()
    whole.control["smoke"] = GOOD
    newer = whole.begin_other("second")
    await asyncio.sleep(8)
    whole.control.go()
    first, second = await whole.ended(older), await whole.ended(newer)
    assert first.state == "COMPLETED", first.message
    assert second.state == "COMPLETED", whole.logs(newer)
    head = git("rev-parse", "main", cwd=whole.repo)
    good = whole.entry("web1").good
    assert good is not None and good.commit == head
    lines = [line for line in reversed(whole.history()) if line.startswith("web1:")][-8:]
    assert [line.split()[1] for line in lines] == ["intent", "activation", "activation", "good"] * 2
    await whole.settled()


@pytest.mark.exhaustive
async def test_a_push_that_waits_is_superseded_by_a_newer_one(whole: Whole) -> None:
    whole.control.waits("smoke")
    first = whole.begin_other("first")
    await whole.control.begun()
    second = whole.begin_other("second, which waits")
    await whole.log_line(second, "a different run is rolling out")
    third = whole.begin_other("third")
    whole.control["smoke"] = GOOD
    whole.control.go()
    ends = [await whole.ended(run) for run in (first, second, third)]
    assert [end.state for end in ends] == ["COMPLETED", "CANCELLED", "COMPLETED"], [end.message for end in ends]
    assert "superseded" in ends[1].message
    await whole.settled()


async def test_a_cancel_in_the_ui_stops_the_sandbox_and_the_next_run_goes_on(whole: Whole) -> None:
    before = await whole.systems()
    whole.control.waits("with-internet")
    whole.commit("a variant that is cancelled", whole.web1("D"))
    run = whole.push()
    await whole.control.begun()
    assert whole.sandboxes()
    whole.api("POST", f"/flow_runs/{run}/set_state", {"state": {"type": "CANCELLING"}})
    ended = await whole.ended(run)
    assert ended.state == "CANCELLED"
    async with asyncio.timeout(PATIENCE):
        while whole.sandboxes():
            await asyncio.sleep(0.2)
    assert await whole.systems() == before
    whole.control.all_good()
    assert "died" not in whole.note("main")
    again = await whole.deploy("once more", {})
    assert again.state == "COMPLETED", whole.logs(again.id)
    await whole.settled()


async def test_a_cancel_in_the_middle_of_a_roll_out_puts_the_host_back(whole: Whole) -> None:
    before = await whole.systems()
    whole.control.waits("smoke")
    run = whole.begin_other("cancelled while it is rolled out")
    await whole.control.begun()
    assert await whole.systems() != before
    whole.api("POST", f"/flow_runs/{run}/set_state", {"state": {"type": "CANCELLING"}})
    assert (await whole.ended(run)).state == "CANCELLED"
    async with asyncio.timeout(PATIENCE):
        while whole.entry("web1").intent is not None:
            await asyncio.sleep(0.5)
    assert await whole.systems() == before
    await whole.settled()
    assert "died" not in whole.note("main")


async def test_a_machine_that_stays_away_keeps_its_open_intent_and_stops_no_other(whole: Whole) -> None:
    before = await whole.systems()
    whole.control.waits("smoke")
    run = whole.begin_other("the machine dies while it is rolled out")
    await whole.control.begun()
    await whole.machines["web1"].power_cut()
    whole.control["smoke"] = BAD
    whole.control.go()
    assert "web1 COULD NOT BE REVERTED" in (await whole.ended(run)).message
    left = whole.entry("web1").intent
    assert left is not None and MachineState.of(left.before).system == before["web1"]
    gate = (whole.work / "hosts/gate.nix").read_text()
    others = await whole.deploy("gate goes on", {"hosts/gate.nix": gate.replace("open", "wide open")})
    assert others.state == "FAILED" and "web1: settling failed" in others.message, others.message
    assert whole.entry("gate").good is not None and whole.entry("gate").good.run == others.id  # type: ignore[union-attr]
    assert whole.entry("web1").intent is not None
    await whole.machines["web1"].start()
    await whole.machines["web1"].wait_ssh()
    whole.control.all_good()
    assert (await whole.deploy("it is back", {})).state == "COMPLETED"
    await whole.settled()


async def test_a_stop_leaves_nothing_behind(whole: Whole) -> None:
    await whole.stop_server()
    assert whole.processes() == []
    assert not list((whole.state / "repos").glob("*/runs/*"))
    assert subprocess.run(["git", "fsck", "--no-dangling"], cwd=whole.repo, check=False).returncode == 0
