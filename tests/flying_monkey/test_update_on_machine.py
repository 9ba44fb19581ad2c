"""An update on a machine where systemd, sshd and sudo are real: hooks, kills, power cuts, and tests in their sandbox.

Every program of an update's waits at `/usr/lib/lab/at NAME` when a test asked for that.
"""

import asyncio
import base64
import json
import os
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Final

import pytest
import pytest_asyncio

from flying_monkey.desired import Deadlines, Hooks, Phase, System
from tests.flying_monkey.access import PLACE, PROFILE, Locked
from tests.lab.debian import DebianMachine
from tests.lab.machine import Answer

pytestmark = [pytest.mark.minutes(8), pytest.mark.asyncio(loop_scope="module")]

HOOKS: Final = Hooks(prepare=("drain",), finish=("undrain",))
AT: Final = "/usr/lib/lab/at"
_AT: Final = """#!/bin/sh
echo "$1" >> /var/log/activations
sync
[ "$(cat /run/stop 2>/dev/null)" != "$1" ] || { touch /run/reached; sleep 600; }
"""
_UNIT: Final = """[Unit]
After=local-fs.target %s
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=%s
[Install]
WantedBy=multi-user.target
"""
# Not well for the reasons that have a file.
_CHECK: Final = """echo 1..1; [ ! -e "/var/lib/unwell-$TOTO_REASON" ] || printf 'not '; echo ok 1 - it answers"""
# What NixOS does at a boot.
_LINKS: Final = " && ".join(f"ln -sfn $(readlink -f {PROFILE}) /run/{each}-system" for each in ("current", "booted"))
_BOOTED: Final = f"/bin/sh -c '{_LINKS}'"


def hook(name: str, more: str = "") -> tuple[str, int]:
    return f'#!/bin/sh\n{AT} "{name} $TOTO_REASON" >/dev/null\n{more}\n', 0o755


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def booted(tmp_path_factory: pytest.TempPathFactory, new_key: Callable[[str], Path]) -> AsyncIterator[Locked]:
    login, signer = new_key("login"), new_key("signer")
    files = {
        **Locked.files(login.with_suffix(".pub").read_text().strip(), signer),
        AT: (_AT, 0o755),
        "/etc/flying-monkey/prepare.d/drain": hook("drain"),
        "/etc/flying-monkey/finish.d/undrain": hook("undrain"),
        "/etc/flying-monkey/checks.d/web": hook("web", _CHECK),
        "/etc/systemd/system/lab-booted.service": (_UNIT % ("", _BOOTED), 0o644),
        "/etc/systemd/system/flying-monkey-resume.service": (
            _UNIT % ("lab-booted.service", f"{PLACE}/update resume"),
            0o644,
        ),
    }
    folder = tmp_path_factory.mktemp("update")
    async with DebianMachine("web1", folder, login, address="127.0.8.3", files=files) as machine:
        locked = Locked(machine, signer)
        await locked.prepare()
        locked.good = await locked.system("good", f'{AT} "good $1 links"')
        locked.new = await locked.system("new", f'{AT} "new $1 links"')  # type: ignore[attr-defined]
        await machine.check(
            f"ln -sfn {locked.good.path} /run/current-system; nix-env -p {PROFILE} --set {locked.good.path};"
            "systemctl enable lab-booted flying-monkey-resume; sync"
        )
        await machine.snapshot("ready")
        yield locked


@pytest_asyncio.fixture(loop_scope="module")
async def locked(booted: Locked) -> Locked:
    return await booted.again()


def new(locked: Locked) -> System:
    found: System = locked.new  # type: ignore[attr-defined]
    return found


async def remembered(locked: Locked) -> dict[str, Any]:
    """What the machine's memory has, without asking its helper, who would go on with what was begun."""
    found: dict[str, Any] = json.loads(
        await locked.machine.check("cat /var/lib/flying-monkey/memory.json || echo '{}'", login=False)
    )
    return found


async def settled(locked: Locked, *words: str) -> dict[str, Any]:
    """The memory once its step and state are `words`."""
    async with asyncio.timeout(900):
        while ((found := await remembered(locked)).get("step"), found.get("state")) != words:
            await asyncio.sleep(1)
    return found


async def stopped_at(locked: Locked, event: str, document: Any) -> None:
    """Hand over a document, and wait until its update is at `event`."""
    await locked.machine.check(f"rm -f /run/reached; echo '{event}' > /run/stop")
    await locked.ask("confirm" if document.phase == "keep" else "arm", document)
    # (One command that waits there: on an emulated machine a look from here is as much work as many of its own.)
    await locked.machine.check("timeout 240 sh -c 'until [ -e /run/reached ]; do sleep 0.3; done'")


async def test_an_update_is_prepared_for_checked_kept_and_finished(locked: Locked) -> None:
    await locked.ask("arm", locked.document(new(locked), hooks=HOOKS))
    assert await locked.ended() == "done 0"
    status = await locked.ask("status 0")
    assert (status["step"], status["hooks"], status["checks"]) == ("tried", {"prepare.d/drain": ""}, {"web": ""})
    await locked.ask("confirm", locked.document(new(locked), "keep", hooks=HOOKS))
    assert await locked.ended() == "done 0"
    status = await locked.ask("status 0")
    assert (status["step"], status["system"], status["boots"]) == ("finished", new(locked).path, new(locked).path)
    assert (status["drift"], status["reboot_needed"]) == ("", False)
    assert await locked.activations() == [
        *("drain try", "new test", "new test links", "web try"),
        *("new switch", "new switch links", "undrain kept"),
    ]
    assert await locked.machine.check("ls -d /run/toto/monkey.* 2>/dev/null || true") == ""


async def test_an_update_that_is_killed_goes_on_by_itself(locked: Locked) -> None:
    kill = "systemctl kill --signal=KILL 'flying-monkey-update-*'; rm /run/stop"
    await stopped_at(locked, "drain try", locked.document(new(locked), hooks=HOOKS, deadlines=Deadlines(confirm=600)))
    await locked.machine.check(kill)
    await settled(locked, "tried", "done 0")
    await stopped_at(locked, "new switch links", locked.document(new(locked), "keep", hooks=HOOKS))
    await locked.machine.check(f"{kill}; pkill sleep")
    await settled(locked, "finished", "done 0")
    assert (await locked.activations())[-1] == "undrain kept"


# What a test may do, and what it tries: prints which of them worked.
TRIES: Final = """
import json, os, pathlib, signal, socket, subprocess, sys
worked = {}
def tries(name):
    def run(function):
        try:
            worked[name] = str(function())
        except Exception as error:
            worked[name] = "no: " + str(error)
    return run
def write(path):
    tries("write " + path)(lambda: pathlib.Path(path).write_text("x"))
def read(path):
    here = pathlib.Path(path)
    tries("read " + path)(lambda: here.read_bytes()[:10] if here.is_file() else os.listdir(path))
def runs(name, *argv):
    tries(name)(lambda: subprocess.run(argv, check=True, capture_output=True, stdin=subprocess.DEVNULL).stdout)
def connect(name, address, family=socket.AF_INET):
    def run():
        with socket.socket(family) as each:
            each.settimeout(5)
            each.connect(address)
            return "connected"
    tries("connect " + name)(run)
for each in ("/etc/x", "/usr/x", "/nix/x", "/var/log/x", "/var/lib/x", "/root/x", "/dev/shm/x", "/run/x", "/tmp/x"):
    write(each)
for each in ("/etc/shadow", "/root", "/home", "/var/lib/flying-monkey", "/run/toto", "/etc/sudoers.d/toto",
             "/nix/var/nix/daemon-socket", "/etc/ssh/ssh_host_ed25519_key", "/etc/hostname"):
    read(each)
connect("loopback", ("127.0.0.1", 22))
connect("outside", ("10.0.2.2", %(port)d))
connect("daemon", "/nix/var/nix/daemon-socket/socket", socket.AF_UNIX)
tries("kill 1")(lambda: os.kill(1, signal.SIGTERM))
tries("kill all")(lambda: os.kill(-1, signal.SIGCONT))
tries("setuid")(lambda: os.setuid(0))
runs("sudo", "sudo", "-n", "%(helper)s")
runs("su", "su", "-c", "id")
runs("mount", "mount", "-t", "tmpfs", "x", "/mnt")
runs("namespace", "unshare", "-Ur", "id")
runs("start a unit", "systemctl", "--no-ask-password", "stop", "ssh")
runs("build", "nix-store", "--add", "/etc/hostname")
tries("setuid file")(lambda: (os.system("cp /bin/sh /tmp/sh"), os.chmod("/tmp/sh", 0o4755)))
worked["uid"] = os.getuid()
worked["processes"] = len([each for each in os.listdir("/proc") if each.isdigit()])
json.dump(worked, sys.stdout)
"""


async def on_machine(locked: Locked, *words: str, stdin: bytes = b"") -> Answer:
    text = base64.urlsafe_b64encode(json.dumps(words).encode()).decode()
    return await locked.ssh(f"test {text}", stdin)


async def test_a_test_runs_as_nobody_with_its_input_outputs_and_exit_status(locked: Locked) -> None:
    answer = await on_machine(locked, "/bin/sh", "-c", "cat; echo wrong >&2; exit 3", stdin=b"told\n" * 3)
    assert answer == Answer(3, "told\n" * 2 + "told", "wrong")
    assert (await on_machine(locked, "no-such-program")).status == 127
    answer = await on_machine(locked, "head", "-c", "6000000", "/dev/zero")
    assert len(answer.out) <= 4 * 2**20, "what it prints is bounded"
    for line in ("test W10", "test e30", "test Iiki", "test AAAA"):
        answer = await locked.ssh(line)
        assert answer.status in (64, 125) and not answer.out and "a test is a list" in answer.err, (line, answer)


async def test_all_tests_together_are_bounded(locked: Locked) -> None:
    """Each may have 128 tasks, and all of them 256."""
    many = "i=0; while [ $i -lt 100 ]; do sleep 40 & i=$((i + 1)); done; sleep 20; echo all"
    answers = await asyncio.gather(*(on_machine(locked, "/bin/sh", "-c", many) for _ in range(3)))
    refused = [each for each in answers if each.out != "all"]
    assert refused and all("ork" in each.err for each in refused), answers
    assert "/flying-monkey-tests.slice/" in (await on_machine(locked, "cat", "/proc/self/cgroup")).out


async def test_a_test_reaches_nothing_of_the_machine(locked: Locked) -> None:
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    assert (
        await locked.machine.check(f"python3 -c 'import socket; socket.create_connection((\"10.0.2.2\", {port}))'")
        == ""
    )
    await locked.ask("status 0")
    tries = TRIES % {"port": port, "helper": f"{PLACE}/helper"}
    answer = await on_machine(locked, "python3", "-", stdin=tries.encode())
    server.close()
    assert answer.status == 0, answer
    found = json.loads(answer.out)
    worked = {name for name, value in found.items() if not str(value).startswith("no: ")}
    allowed = {"write /tmp/x", "read /etc/hostname", "connect loopback", "kill all", "uid", "processes"}
    assert worked <= allowed | {"write /dev/shm/x"}, {name: found[name] for name in worked - allowed}
    assert {"write /tmp/x", "read /etc/hostname", "connect loopback"} <= worked, found
    assert found["uid"] >= 61_184 and found["processes"] < 10
    assert await locked.machine.check("ls /tmp/x /dev/shm/x 2>/dev/null; systemctl is-active ssh") == "active"


async def test_a_machine_may_refuse_tests(locked: Locked) -> None:
    file = "/etc/flying-monkey/config.json"
    await locked.machine.check(f"sed -i 's/{{/{{\"tests\": false, /' {file}")
    answer = await on_machine(locked, "id")
    assert answer == Answer(64, "", "flying-monkey: this machine runs no tests")


async def test_a_full_disk_activates_nothing_and_is_told(locked: Locked) -> None:
    await locked.machine.check("fallocate -l $(($(df -k --output=avail / | tail -n 1) - 20000))K /filler")
    await locked.ask("arm", locked.document(new(locked), hooks=HOOKS))
    assert await locked.ended() == "back 0"
    assert "less than 64 MiB are free" in (await locked.ask("status 0"))["error"]
    assert await locked.activations() == []


REBOOTS: Final = pytest.mark.skipif(
    not os.environ.get("TOTO_CUTS"), reason="A REAL REBOOT IS NOT TRIED: it takes a boot; TOTO_CUTS=1"
)


async def rebooted(locked: Locked, activate: int) -> System:
    """A system with a different kernel, which was tried and is to be kept; the machine has rebooted for it."""
    system = await locked.system("fresh", f'{AT} "fresh $1 links"', kernel="/nix/store/fresh")
    await locked.machine.check("ln -sfn $(readlink -f /run/current-system) /run/booted-system; sync")
    boot = "cat /proc/sys/kernel/random/boot_id"
    before = await locked.machine.check(boot)
    deadlines = Deadlines(confirm=600, activate=activate)
    await locked.ask("arm", locked.document(system, hooks=HOOKS, deadlines=deadlines))
    assert await locked.ended() == "done 0"
    await locked.ask("confirm", locked.document(system, "keep", hooks=HOOKS, reboot="now", deadlines=deadlines))
    async with asyncio.timeout(900):
        while (again := (await locked.machine.ssh(boot, timeout=30)).out) in ("", before):
            await asyncio.sleep(1)
    assert again != before
    return system


@REBOOTS
async def test_a_different_kernel_is_rebooted_into_and_checked(locked: Locked) -> None:
    """By systemd, with the hooks around it and the checks after it."""
    system = await rebooted(locked, activate=900)
    await settled(locked, "finished", "done 0")
    status = await locked.ask("status 0")
    assert (status["system"], status["boots"]) == (system.path, system.path)
    assert status["reboot_needed"] is False and status["drift"] == ""
    assert "error" not in status
    events = await locked.activations()
    assert events[-2:] == ["web reboot", "undrain kept"], events


@REBOOTS
async def test_a_machine_that_is_not_well_with_its_new_kernel_tells_so_and_goes_back(locked: Locked) -> None:
    """It says by itself that it is not well, and goes back when toto says so; for the old kernel it waits to reboot."""
    await locked.machine.check("touch /var/lib/unwell-reboot; sync")
    system = await rebooted(locked, activate=300)
    await settled(locked, "finished", "done 69")
    status = await locked.ask("status 0")
    assert (status["system"], status["boots"]) == (system.path, system.path)
    assert status["error"] == "the check web failed: 1 of 1 failed: 1 - it answers", status
    assert (await locked.activations())[-2:] == ["web reboot", "undrain kept"]
    await locked.ask("arm", locked.document(locked.good, "back", hooks=HOOKS))
    await settled(locked, "finished", "done 0")
    status = await locked.ask("status 0")
    assert (status["system"], status["boots"]) == (locked.good.path, locked.good.path)
    assert status["reboot_needed"] is True and status["drift"] == ""
    events = await locked.activations()
    assert events[-4:] == ["drain back", "good switch", "good switch links", "undrain back"], events


CUTS: Final = [
    *(("try", each) for each in ("drain try", "new test links", "web try", "wait")),
    *(("keep", each) for each in ("new switch links", "undrain kept")),
    *(("late", each) for each in ("good test links", "undrain back")),
    *(("back", each) for each in ("good switch links", "undrain back")),
    # And at any instant: seconds after the document was handed over.
    *((phase, seconds) for phase in ("try", "keep") for seconds in ("0.1", "0.5", "1", "2", "4")),
]


@pytest.mark.parametrize(("phase", "cut"), CUTS if os.environ.get("TOTO_CUTS") else random.Random(14).sample(CUTS, 4))
async def test_a_power_cut_leaves_nothing_half_done(locked: Locked, phase: str, cut: str) -> None:
    tried = locked.document(new(locked), hooks=HOOKS, deadlines=Deadlines(confirm=2 if phase == "late" else 600))
    last = tried
    if phase in ("keep", "back"):
        await locked.ask("arm", tried)
        assert await locked.ended() == "done 0"
        system: tuple[System, Phase] = (new(locked), "keep") if phase == "keep" else (locked.good, "back")
        last = locked.document(*system, hooks=HOOKS)
    if cut[0].isdigit():
        await locked.ask("confirm" if phase == "keep" else "arm", last)
        await asyncio.sleep(float(cut))
    elif cut == "wait":
        await locked.ask("arm", last)
        assert await locked.ended() == "done 0"
    else:
        await stopped_at(locked, cut, last)
    await locked.machine.reset()
    await locked.machine.wait_ssh()
    found = await settled(locked, "finished", "done 0" if phase in ("keep", "back") else "back 0")
    facts = await locked.ask("facts")
    wanted = new(locked) if phase == "keep" else locked.good
    assert facts["system"] == facts["profile"] == wanted.path, found
    events = await locked.activations()
    drained, undrained = ([each for each in events if each.startswith(f"{word} ")] for word in ("drain", "undrain"))
    if drained:
        assert undrained[-1] == ("undrain kept" if phase == "keep" else "undrain back"), events
