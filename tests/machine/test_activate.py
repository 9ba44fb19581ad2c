"""The machine's side of an activation, `activate.sh`, under every shell that may run it. No VM: its paths are replaced.

A fake system is a directory whose switch-to-configuration logs its verb and changes the link to the running system.
"""

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import flying_monkey

SHELLS = [each for each in (["dash"], ["bash"], ["busybox", "sh"]) if shutil.which(each[0])]
SCRIPT = Path(flying_monkey.__file__).with_name("activate.sh")


class Machine:
    """The paths of a machine below a folder, and the script with these paths."""

    def __init__(self, root: Path, shell: list[str]) -> None:
        self.root, self.shell = root, shell
        self.state, self.profile = root / "state", root / "profile"
        self.current = root / "current-system"
        text = SCRIPT.read_text()
        for path, here in (
            ("/run/toto", self.state),
            ("/nix/var/nix/profiles/system", self.profile),
            ("/nix/var/nix/gcroots", root / "roots"),
            ("/run/systemd/system", root / "no-systemd"),
            ("/run/nixos/switch-to-configuration.lock", root / "switching"),
        ):
            assert path in text
            text = text.replace(path, str(here))
        text = text.replace("readlink -f /run/current-system", f"readlink -f {self.current}")
        text = text.replace("/bin/sh", " ".join(shell)).replace("PATH=/run/wrappers", f"PATH={root}/bin:/run/wrappers")
        self.state.mkdir()
        (root / "bin").mkdir()
        self.script = self.state / "activate.sh"
        self.script.write_text(text)
        self._program("bin/nix-env", 'ln -sfn "$4" "$2"')
        self._program("bin/sync", ":")  # the real one waits for every disk of this machine
        self._program(
            "bin/systemctl",
            f'[ "$1" != list-units ] || {{ cat {root}/broken 2>/dev/null; exit 0; }}\n'
            f'[ -e {root}/unit ] && [ "$3" = nixos-rebuild-switch-to-configuration.service ]',
        )
        self.old = self.system("old")
        self.current.symlink_to(self.old)
        self.profile.symlink_to(self.old)

    def system(self, name: str, more: str = "") -> Path:
        path = self.root / name
        (path / "bin").mkdir(parents=True, exist_ok=True)
        self._program(
            f"{name}/bin/switch-to-configuration",
            f'echo "{name} $1 $(umask)" >> {self.root}/log\n{more}\n[ "$1" = boot ] || ln -sfn {path} {self.current}',
        )
        return path

    def _program(self, name: str, body: str) -> None:
        path = self.root / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)

    def start(self, *words: str | Path) -> subprocess.Popen[str]:
        """Start a verb in its own process group, as sshd does, and in the folder by which `processes` finds it."""
        return subprocess.Popen(
            [*self.shell, self.script, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            cwd=self.root,
        )

    def processes(self) -> list[int]:
        """The processes of this machine that still run: their working directory is its folder."""
        found = []
        for each in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if (each / "cwd").readlink() == self.root:
                    found.append(int(each.name))
        return found

    def end(self) -> None:
        """Kill the watchdogs that still wait: most tests need not see their end."""
        deadline = time.monotonic() + 60
        while (left := self.processes()) and time.monotonic() < deadline:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        assert not left

    def run(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        with self.start(*words) as running:
            try:
                out, err = running.communicate(timeout=60)
            finally:
                running.kill()
        return subprocess.CompletedProcess(running.args, running.returncode, out, err)

    def verb(self, *words: str | Path) -> str:
        done = self.run(*words)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def begin(self, name: str, verb: str, path: Path, *, finish: int = 10, confirm: int = 2) -> None:
        self.verb("begin", name, verb, path, self.old, self.old, str(finish), str(confirm))

    def result(self, name: str) -> str:
        return self.verb("result", name, "10").splitlines()[0]

    def reverted(self, name: str) -> bool:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if (said := self.result(name)).startswith("back"):
                return said == "back 0"
            time.sleep(0.1)
        return False

    @property
    def log(self) -> list[str]:
        path = self.root / "log"
        return path.read_text().splitlines() if path.exists() else []

    def runs(self) -> Path:
        return self.current.resolve()


@pytest.fixture(params=SHELLS, ids=" ".join)
def machine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path.resolve(), request.param)
    try:
        yield made
    finally:
        made.end()


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_facts_are_what_the_links_say(machine: Machine) -> None:
    facts = dict(line.split("=") for line in machine.verb("facts").splitlines())
    assert facts == {"system": str(machine.old), "profile": str(machine.old)}


def test_what_is_confirmed_stays(machine: Machine) -> None:
    new = machine.system("new")
    machine.begin("run.switch.1", "switch", new)
    assert machine.result("run.switch.1") == "done 0"
    assert machine.verb("confirm", "run.switch.1") == "confirmed"
    until(lambda: not machine.processes())  # its watchdog is gone, and can do nothing more
    assert machine.verb("confirm", "run.switch.1") == "confirmed", "said twice, as after a lost connection"
    assert machine.result("run.switch.1") == "done 0"
    assert (machine.runs(), machine.profile.resolve()) == (new, new)
    assert machine.log == ["new switch 0022"], "with the umask that a configuration expects"


def test_what_nobody_confirms_is_reverted_with_its_profile(machine: Machine) -> None:
    new = machine.system("new")
    machine.begin("run.switch.1", "switch", new, confirm=1)
    assert machine.reverted("run.switch.1")
    assert (machine.runs(), machine.profile.resolve()) == (machine.old, machine.old)
    assert [line.rsplit(" ", 1)[0] for line in machine.log] == ["new switch", "old test", "old boot"]
    assert machine.verb("confirm", "run.switch.1") == "back", "a late confirmation is not believed"


def test_an_activation_that_only_tests_leaves_the_profile_alone(machine: Machine) -> None:
    machine.begin("run.test.1", "test", machine.system("new"), confirm=1)
    assert machine.reverted("run.test.1")
    assert [line.rsplit(" ", 1)[0] for line in machine.log] == ["new test", "old test"]


def test_a_boot_default_that_nobody_confirms_is_reverted_and_nothing_else_is_touched(machine: Machine) -> None:
    machine.begin("run.boot.1", "boot", machine.system("new"), confirm=1)
    assert machine.reverted("run.boot.1")
    assert (machine.runs(), machine.profile.resolve()) == (machine.old, machine.old)
    assert [line.rsplit(" ", 1)[0] for line in machine.log] == ["new boot", "old boot"]


def test_a_revert_that_fails_in_part_is_no_success(machine: Machine) -> None:
    machine.system("old", '[ "$1" != boot ] || exit 3')
    machine.begin("run.switch.1", "switch", machine.system("new"), confirm=1)
    until(lambda: machine.result("run.switch.1") == "back 3")
    assert machine.runs() == machine.old


def test_a_failed_activation_that_nobody_confirms_is_reverted(machine: Machine) -> None:
    machine.begin("run.switch.1", "switch", machine.system("bad", "exit 4"), confirm=1)
    assert machine.reverted("run.switch.1")
    assert machine.profile.resolve() == machine.old


def test_two_activations_of_a_run_do_not_take_each_others_confirmation(machine: Machine) -> None:
    new = machine.system("new")
    machine.begin("run.test.1", "test", new, confirm=5)
    assert machine.result("run.test.1") == "done 0"
    assert machine.verb("confirm", "run.test.1") == "confirmed"
    machine.begin("run.switch.2", "switch", new, confirm=1)
    assert machine.verb("names", "run").split() == ["run.switch.2", "run.test.1"]
    assert machine.reverted("run.switch.2")
    assert (machine.runs(), machine.profile.resolve()) == (machine.old, machine.old)
    assert machine.result("run.test.1") == "done 0"


def test_a_failed_activation_says_so_and_waits_for_toto(machine: Machine) -> None:
    machine.begin("run.test.1", "test", machine.system("bad", "exit 4"))
    assert machine.result("run.test.1") == "done 4"


def test_units_that_were_broken_before_are_no_failure(machine: Machine) -> None:
    (machine.root / "broken").write_text("nfs.mount loaded failed failed a dead server\n")
    new = machine.system("new", f"echo 'web.service loaded activating auto-restart' >> {machine.root}/broken")
    machine.begin("run.test.1", "test", machine.system("old news", "exit 4"))
    assert machine.result("run.test.1") == "done 0"
    (new / "bin/switch-to-configuration").open("a").write("exit 4\n")
    machine.begin("run.test.2", "test", new)
    said = machine.verb("result", "run.test.2", "10")
    assert said.startswith("done 4") and "broken since this activation: web.service" in said
    assert "nfs.mount" not in said


def test_a_disk_that_is_dead_does_not_stand_in_the_way_back(machine: Machine) -> None:
    machine._program("bin/sync", "exec sleep 600")
    machine.begin("run.switch.1", "switch", machine.system("new"), confirm=1)
    assert machine.reverted("run.switch.1")
    assert (machine.runs(), machine.profile.resolve()) == (machine.old, machine.old)


def test_the_watchdog_counts_seconds_and_not_its_own_naps(machine: Machine) -> None:
    machine._program("bin/sleep", 'exec /bin/sleep "$(( ${1%%.*} + 1 ))"')  # a machine so busy that a nap takes seconds
    machine.begin("run.test.1", "test", machine.system("new"), confirm=4)
    assert machine.result("run.test.1") == "done 0"
    ended = time.monotonic()
    assert machine.reverted("run.test.1")
    assert time.monotonic() - ended < 15, "twenty naps would be longer"


def test_whoever_still_has_a_way_in_has_it_revert_at_once(machine: Machine) -> None:
    machine.begin("run.switch.1", "switch", machine.system("new"), confirm=600)
    assert machine.result("run.switch.1") == "done 0"
    assert machine.verb("back", "run.switch.1") == ""
    assert machine.reverted("run.switch.1")
    assert (machine.runs(), machine.profile.resolve()) == (machine.old, machine.old)
    assert machine.verb("confirm", "run.switch.1") == "back"


def test_a_boot_loader_that_fails_does_not_leave_the_rejected_system_running(machine: Machine) -> None:
    machine.system("old", '[ "$1" != boot ] || { echo "no room on /boot"; exit 1; }')
    machine.begin("run.switch.1", "switch", machine.system("new"), confirm=1)
    until(lambda: machine.result("run.switch.1") == "back 1")
    assert (machine.runs(), machine.profile.resolve()) == (machine.old, machine.old)


def test_an_activation_waits_for_another_tools_and_does_not_count_its_time(machine: Machine) -> None:
    new = machine.system("new")
    with (machine.root / "switching").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert machine.verb("begin", "run.test.1", "test", new, machine.old, machine.old, "10", "2") == "busy"
        assert machine.verb("result", "run.test.1", "0") == "unknown" and machine.log == []
    machine.begin("run.test.1", "test", new)
    assert machine.result("run.test.1") == "done 0"


def test_an_activation_that_hangs_is_ended(machine: Machine) -> None:
    machine.begin("run.test.1", "test", machine.system("slow", "exec sleep 60"), finish=1)
    assert machine.result("run.test.1") in ("done 124", "done 143")  # coreutils, busybox
    assert machine.runs() == machine.old


def test_without_a_watchdog_nothing_is_reverted(machine: Machine) -> None:
    new = machine.system("new")
    machine.begin("run.back.1", "test", new, confirm=0)
    assert machine.result("run.back.1") == "done 0"
    until(lambda: not machine.processes())
    assert machine.runs() == new


def test_cleaning_up_waits_for_what_is_under_way(machine: Machine) -> None:
    new = machine.system("new", "sleep 0.6")
    machine.begin("run.test.1", "test", new, confirm=0)
    until(lambda: bool(machine.log))
    assert len(list((machine.root / "roots").iterdir())) == 2, "what was and what comes stay in the store meanwhile"
    machine.verb("clean-up", "run")
    assert machine.runs() == new, "it had come to its end"
    assert {each.name for each in machine.state.iterdir()} == {"activate.sh", "lock"}
    assert list((machine.root / "roots").iterdir()) == []
    assert machine.verb("names", "run") == ""
    assert machine.verb("result", "run.test.1", "1") == "unknown"


def test_it_is_quiet_when_no_tool_activates(machine: Machine) -> None:
    assert machine.verb("quiet", "0") == "quiet", "nobody has activated since the boot: there is no lock"
    (machine.root / "unit").touch()
    assert machine.verb("quiet", "0") == "busy", "nixos-rebuild's unit runs, and holds no lock yet"
    with machine.start("quiet", "20") as waiting:
        (machine.root / "unit").unlink()
        assert waiting.communicate(timeout=60) == ("quiet\n", "")
    with (machine.root / "switching").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert machine.verb("quiet", "0") == "busy"
    assert machine.verb("quiet", "0") == "quiet", "a lock that nobody holds"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")
def test_the_lock_of_a_user_who_may_not_activate_holds_nothing_up(machine: Machine) -> None:
    lock = machine.root / "switching"
    lock.touch(0o644)
    with lock.open() as file:  # (in a folder that only root may enter, in this test)
        holds = f"flock {file.fileno()} && echo held && exec sleep 600"
        argv = ["setpriv", "--reuid=65534", "--clear-groups", "sh", "-c", holds]
        holder = subprocess.Popen(argv, stdout=subprocess.PIPE, pass_fds=[file.fileno()], cwd="/")
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        assert machine.verb("quiet", "0") == "quiet"
        assert lock.stat().st_mode & 0o777 == 0o600
    finally:
        holder.kill()
        holder.communicate()


def test_an_activation_outlives_the_connection_that_asked_for_it(machine: Machine) -> None:
    new = machine.system("new", "sleep 0.6")
    with machine.start("begin", "run.test.1", "test", new, machine.old, machine.old, "10", "0") as asking:
        until((machine.state / "run.test.1/begun").exists)
        os.killpg(asking.pid, signal.SIGKILL)  # it is not reaped yet, so the group is still its own
    assert machine.result("run.test.1") == "done 0"
    assert machine.runs() == new


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", ".hidden", "a b", "$(touch x)"])
def test_a_name_that_is_a_path_or_worse_is_refused(machine: Machine, name: str) -> None:
    for words in (
        ("begin", name, "test", machine.system("new"), machine.old, machine.old, "1", "0"),
        ("result", name, "0"),
        ("confirm", name),
        ("names", name),
        ("clean-up", name),
    ):
        assert machine.run(*words).returncode == 64, words
    assert machine.log == []
    assert [each.name for each in machine.state.iterdir()] == ["activate.sh"]


def test_a_name_is_used_once(machine: Machine) -> None:
    new = machine.system("new")
    machine.begin("run.test.1", "test", new, confirm=0)
    again = machine.run("begin", "run.test.1", "test", new, machine.old, machine.old, "10", "0")
    assert again.returncode == 64
    assert machine.result("run.test.1") == "done 0"
    until(lambda: not machine.processes())
    assert len(machine.log) == 1
