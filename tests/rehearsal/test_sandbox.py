"""Sandboxes: with QEMU and guests that never boot (quick), and with a host of the lab (marked `lab`)."""

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import time
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from toto.base import process
from toto.base.errors import InputError
from toto.cell.namespace import ALLOWED
from toto.rehearsal import acceleration, sandbox
from toto.rehearsal.console import LONGEST_CONSOLE, Console
from toto.rehearsal.errors import BootTimeout, SandboxError, SandboxFailed
from toto.rehearsal.sandbox import Sandbox

pytestmark = pytest.mark.minutes(2)

needs_qemu = pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="there is no QEMU on this machine")

NOTHING_BOOTS = """\
echo "a first word from the \x1b[1;31mconsole\x1b[0m"
cd "$TMPDIR"
exec qemu-system-x86_64 -machine accel=kvm:tcg -m 32 -nographic -boot n \\
  -net nic,netdev=user.0,model=virtio -netdev user,id=user.0,"$QEMU_NET_OPTS" EXTRA $QEMU_OPTS "$@"
"""


def make_vm(directory: Path, script: str, name: str = "web1") -> Path:
    path = directory / "vm" / "bin" / f"run-{name}-vm"
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\nset -e\n{script.replace('EXTRA', '')}")
    path.chmod(0o755)
    return directory / "vm"


@pytest.fixture
def tcg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOTO_ACCELERATION", "tcg")


@pytest.fixture
def state(tmp_path: Path) -> Path:
    # As long as a state directory may become, and longer than a socket's path may be.
    return tmp_path / ("a long state directory; " * 5)


def left(state: Path) -> list[str]:
    return [path.name for path in state.iterdir() if path.name != "acceleration"] if state.exists() else []


def machines(tmp_path: Path) -> set[int]:
    """Every QEMU of this machine whose disk is in a sandbox's directory of this test."""
    found = set()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if (
                entry.name.isdigit()
                and b"qmp.sock" in (entry / "cmdline").read_bytes()
                and str(tmp_path) in (entry / "mountinfo").read_text()
            ):
                found.add(int(entry.name))
    return found


async def boots(vm: Path, state: Path, **settings: object) -> None:
    given: dict[str, object] = {"host": "web1", "state": state, "key": Path("/nonexistent"), "boot_timeout": 4.0}
    async with sandbox.sandbox(vm, **(given | settings)):  # type: ignore[arg-type]
        pytest.fail("this VM cannot boot")


# --- guests that never boot ------------------------------------------------------------------------------------------


@needs_qemu
async def test_a_vm_that_never_boots_is_a_timeout_with_its_console(tmp_path: Path, state: Path, tcg: None) -> None:
    lines: list[str] = []
    with pytest.raises(BootTimeout, match="not ready within 4 s: it never spoke SSH") as failed:
        await boots(make_vm(tmp_path, NOTHING_BOOTS), state, on_console=lines.append)
    assert "a first word from the console" in failed.value.console
    assert lines[0] == "a first word from the console"
    assert any("SeaBIOS" in line for line in lines)
    assert left(state) == []


@needs_qemu
@pytest.mark.parametrize(
    ("asked", "what"),
    [
        ("-m 1G -object memory-backend-ram,id=m,size=1G,prealloc=on -machine memory-backend=m", "300 MB of memory"),
        ("", "31 MB of disk"),
    ],
)
async def test_a_vm_that_uses_more_than_it_asked_for_is_ended(
    tmp_path: Path, state: Path, tcg: None, monkeypatch: pytest.MonkeyPatch, asked: str, what: str
) -> None:
    monkeypatch.setattr(sandbox, "_OVERHEAD", 100_000_000)  # (of QEMU itself)
    monkeypatch.setattr(sandbox, "_SPARE", 10_000_000)
    script = NOTHING_BOOTS.replace("EXTRA", asked)
    if "disk" in what:
        script = script.replace("exec qemu", "head -c 60000000 /dev/zero > more; sleep 1\nexec qemu")
    with pytest.raises(SandboxFailed, match=f"the VM was ended: it used more than {what}"):
        await boots(make_vm(tmp_path, script), state, most_memory=191, most_disk=20, boot_timeout=60.0)
    assert left(state) == [] and machines(tmp_path) == set()


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo no space left >&2; exit 3", r"QEMU ended with status 3; the last lines of its console:\nno space left"),
        ("exec qemu-system-x86_64 --no-such-option", "QEMU ended with status 1"),
        ("exec /nowhere/qemu-system-x86_64", "QEMU ended with status 127"),
        ("sleep 0.2", "the VM switched itself off"),
        ("echo '[1.0] Kernel panic - not syncing: no init'; sleep 60", "the VM crashed: .*no init"),
    ],
)
async def test_a_vm_that_ends_is_reported_and_not_waited_for(
    tmp_path: Path, state: Path, tcg: None, script: str, message: str
) -> None:
    with pytest.raises(SandboxFailed, match=message):
        await boots(make_vm(tmp_path, script), state, boot_timeout=60.0)  # its end would be another message
    assert left(state) == []


@needs_qemu
@pytest.mark.parametrize(
    "extra",
    [
        "-nic user",  # a way out that no link switches
        "-netdev user,id=mine -device virtio-net-pci,netdev=mine",
        "-device virtio-net-pci",  # a card without a wire, and still not ours
    ],
)
async def test_a_card_that_toto_does_not_know_is_refused(tmp_path: Path, state: Path, tcg: None, extra: str) -> None:
    with pytest.raises(SandboxFailed, match="not the one that toto controls"):
        await boots(make_vm(tmp_path, NOTHING_BOOTS.replace("EXTRA", extra)), state, boot_timeout=30.0)


@needs_qemu
async def test_a_management_card_that_is_not_restricted_is_refused(tmp_path: Path, state: Path, tcg: None) -> None:
    script = NOTHING_BOOTS.replace('"$QEMU_NET_OPTS"', '"$QEMU_NET_OPTS",restrict=off')
    with pytest.raises(SandboxFailed, match="not the one that toto controls"):
        await boots(make_vm(tmp_path, script), state, boot_timeout=30.0)


@pytest.mark.parametrize("scripts", [[], ["a", "b"]])
async def test_a_path_without_a_vm_is_refused(tmp_path: Path, state: Path, tcg: None, scripts: list[str]) -> None:
    (tmp_path / "vm" / "bin").mkdir(parents=True)
    for name in scripts:
        (tmp_path / "vm" / "bin" / f"run-{name}-vm").touch()
    with pytest.raises(InputError, match=f"has {len(scripts)} scripts"):
        await boots(tmp_path / "vm", state)


async def test_a_state_directory_that_cannot_be_made_is_reported(tmp_path: Path, tcg: None) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SandboxFailed, match="the folder for the sandbox cannot be made"):
        await boots(make_vm(tmp_path, "exit 1"), tmp_path / "file" / "state")


async def test_a_state_directory_that_qemu_cannot_use_is_refused(tmp_path: Path, tcg: None) -> None:
    with pytest.raises(InputError, match="without a comma"):
        await boots(make_vm(tmp_path, "exit 1"), tmp_path / "a,b")


@needs_qemu
async def test_a_cancel_leaves_no_machine_and_no_directory(tmp_path: Path, state: Path, tcg: None) -> None:
    booting = asyncio.create_task(boots(make_vm(tmp_path, NOTHING_BOOTS), state, boot_timeout=60.0))
    await until(lambda: bool(machines(tmp_path)))
    assert len(left(state)) == 1
    booting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await booting
    assert (machines(tmp_path), left(state)) == (set(), [])


OWNER = """
import asyncio, sys
from pathlib import Path
from toto.rehearsal import sandbox
async def main():
    async with sandbox.sandbox(Path(sys.argv[1]), host="web1", state=Path(sys.argv[2]), key=Path("/none")):
        pass
asyncio.run(main())
"""


@needs_qemu
async def test_what_a_killed_owner_left_is_cleaned_up(tmp_path: Path, state: Path, tcg: None) -> None:
    vm = make_vm(tmp_path, "sleep 300 & " + NOTHING_BOOTS)  # the sleep stands for a swtpm
    owner = await asyncio.create_subprocess_exec(sys.executable, "-c", OWNER, vm, state)
    await until(lambda: bool(machines(tmp_path)))
    assert sandbox.clean_up(state) == [], "the owner is alive"
    assert len(machines(tmp_path)) == 1
    owner.send_signal(signal.SIGKILL)
    await owner.wait()
    assert len(sandbox.clean_up(state)) == 1
    await until(lambda: not machines(tmp_path))
    assert left(state) == []


async def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


# --- parts -----------------------------------------------------------------------------------------------------------


def test_totos_environment_does_not_reach_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QEMU_KERNEL_PARAMS", "init=/bin/sh")
    monkeypatch.setenv("SECRET", "x")
    made = sandbox._environment([80, 22, 443], "kvm", None, None)
    assert "SECRET" not in made
    assert made["QEMU_KERNEL_PARAMS"] == ""
    assert made["QEMU_NET_OPTS"].split(",") == [
        "restrict=on",
        "ipv6=off",
        "net=192.0.2.0/24",
        "hostfwd=tcp:127.0.0.1:0-:22",
        "hostfwd=tcp:127.0.0.1:0-:80",
        "hostfwd=tcp:127.0.0.1:0-:443",
    ]
    assert made["QEMU_OPTS"].startswith("-S ")
    for word in ("-machine", "-m ", "-smp"):
        assert word not in made["QEMU_OPTS"]
    assert sandbox._environment([], "tcg", 512, 2)["QEMU_KERNEL_PARAMS"] == "no_timer_check mitigations=off"
    asked = sandbox._environment([], "tcg", 512, 2)["QEMU_OPTS"]
    assert asked.endswith("-machine accel=tcg -m 512 -smp 2")


def test_forwards_are_read_from_qemu() -> None:
    said = """Hub -1 (user.0):
  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ
  TCP[ESTABLISHED]   12       127.0.0.1 43297      192.0.2.15    22     0     0
  TCP[HOST_FORWARD]   9       127.0.0.1 43297      192.0.2.15    22     0     0\r
  TCP[HOST_FORWARD]   8       127.0.0.1 36027      192.0.2.15    80     0     0\r
Hub -1 (inet):
  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ
"""
    assert sandbox._forwards(said) == {22: 43297, 80: 36027}


def test_a_console_keeps_its_beginning_and_its_end(tmp_path: Path) -> None:
    console = Console(tmp_path / "log", None)
    for number in range(12_000):
        console.take([f"{number} {'x' * 1000}".encode()])
    console.close()
    text = (tmp_path / "log").read_text()
    assert len(text) <= LONGEST_CONSOLE + 100
    assert text.startswith("0 xxx") and text.splitlines()[-1].startswith("11999 ") and "bytes left out" in text


def test_a_console_is_plain_text(tmp_path: Path) -> None:
    lines: list[str] = []
    console = Console(tmp_path / "log", lines.append)
    console.take(
        [
            b"\x1bc\x1b[?7l\x1b[2J\x1b[0mSeaBIOS\r",
            b"[\x1b[0;32m  OK  \x1b[0m] Started \xe2\x80\xa6\t1\x07\x08",
            b"\x1b]0;title\x07root@web1:~# \xff",
        ]
    )
    assert lines == ["SeaBIOS", "[  OK  ] Started …\t1", "root@web1:~# \ufffd"]
    assert (tmp_path / "log").read_text().splitlines() == lines


def test_a_sink_that_fails_does_not_stop_the_console(tmp_path: Path) -> None:
    def sink(_: str) -> None:
        raise RuntimeError

    console = Console(tmp_path / "log", sink)
    console.take([b"one", b"two"])
    assert (tmp_path / "log").read_text() == "one\ntwo\n"


@pytest.mark.parametrize(
    ("line", "fatal"),
    [
        (b"[    2.5] Kernel panic - not syncing: VFS: Unable to mount root fs", True),
        (b"An error occurred in stage 1 of the boot process, which must mount the", True),
        (b'You are in emergency mode. After logging in, type "journalctl -xb"', True),
        (b"[    0.0] Command line: panic=1 boot.panic_on_fail", False),
    ],
)
def test_a_crash_is_read_from_the_console(tmp_path: Path, line: bytes, fatal: bool) -> None:
    console = Console(tmp_path / "log", None)
    console.take([line])
    assert (console.fatal is not None) == fatal


# --- acceleration ----------------------------------------------------------------------------------------------------


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """The answers of the probe, in order; the test fails when none is left."""
    answers: list[bool] = []

    async def works() -> bool:
        return answers.pop(0)

    monkeypatch.delenv("TOTO_ACCELERATION", raising=False)
    monkeypatch.setattr(acceleration, "_kvm_works", works)
    yield answers
    assert answers == []


@pytest.mark.parametrize("chosen", ["kvm", "tcg"])
async def test_the_environment_overrides_the_probe(
    state: Path, probes: list[bool], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOTO_ACCELERATION", chosen)
    assert await acceleration.acceleration(state) == chosen


async def test_an_unknown_acceleration_is_refused(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOTO_ACCELERATION", "xen")
    with pytest.raises(InputError, match="'xen'"):
        await acceleration.acceleration(state)


@pytest.mark.parametrize(("works", "found"), [(True, "kvm"), (False, "tcg")])
async def test_the_probe_runs_once_per_boot(state: Path, probes: list[bool], works: bool, found: str) -> None:
    probes.append(works)
    assert [await acceleration.acceleration(state) for _ in range(3)] == [found] * 3
    probes.append(not works)
    remembered = state / "acceleration"
    remembered.write_text(f"another-boot {found}\n")
    assert await acceleration.acceleration(state) != found
    probes.append(works)
    remembered.write_text("not what toto wrote")
    assert await acceleration.acceleration(state) == found


@needs_qemu
async def test_the_little_guest_counts_down_where_a_processor_computes() -> None:
    assert await acceleration._counts_down("tcg", 20)
    assert not await acceleration._counts_down("tcg", 0.01)


async def test_no_kvm_device_is_no_kvm(tmp_path: Path) -> None:
    assert not await acceleration._kvm_works(device=tmp_path / "none")


# --- a host of the lab -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lab:
    vm: Path
    key: Path


# What a host forces does not keep toto out of its VM.
HOST = """{ lib, ... }: {
  networking.hostName = "web1";
  users.users.root.openssh.authorizedKeys.keys = lib.mkForce [ ];
  services.openssh.enable = lib.mkForce false;
  services.openssh.settings = { PermitRootLogin = "no"; AllowUsers = "alice"; };
  networking.interfaces.toto-mgmt.useDHCP = lib.mkForce false;
}"""

EXPRESSION = """
{ host, rehearsal, sandboxKey }: (import <nixpkgs/nixos> {
  configuration = { imports = [ (/. + host) (import (/. + rehearsal) { inherit sandboxKey; ports = [ 80 ]; }) ]; };
}).vm
"""


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    from tests.lab.setup import NIX_CONFIG, setup  # noqa: PLC0415

    directory = tmp_path_factory.mktemp("lab")
    (directory / "host.nix").write_text(HOST)

    async def build() -> Lab:
        key = directory / "key"
        await process.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "toto", "-f", key])
        rehearsal = Path(__file__).parents[2] / "nix" / "rehearsal.nix"
        built = await process.run(
            [
                "nix-build",
                "--no-out-link",
                "-E",
                EXPRESSION,
                "--argstr",
                "host",
                directory / "host.nix",
                "--argstr",
                "rehearsal",
                rehearsal,
                "--argstr",
                "sandboxKey",
                key.with_suffix(".pub").read_text().strip(),
            ],
            env=os.environ | {"NIX_PATH": f"nixpkgs={setup()}", "NIX_CONFIG": NIX_CONFIG},
        )
        return Lab(Path(built.lines[-1]), key)

    return asyncio.run(build())


ELSEWHERE = "198.51.100.77"  # an address of this machine during the test: TEST-NET-2, which no guest uses


@dataclass
class Outside:
    """Servers on this machine: on its loopback, and on `address`, which stands for the internet when it is allowed."""

    address: str
    tcp: int = 0
    udp: int = 0
    callers: int = 0
    packets: list[bytes] = field(default_factory=list)


@pytest.fixture
async def outside() -> AsyncIterator[Outside]:
    added = ["ip", "address", "add", f"{ELSEWHERE}/32", "dev", "lo"]
    if (await process.run(added, check=False)).status != 0:
        warnings.warn("NOT TESTED: a sandbox with internet: only root can give this machine an address", stacklevel=1)
        pytest.skip("only root can give this machine an address")
    here = Outside(ELSEWHERE)

    class Listener(asyncio.DatagramProtocol):
        def datagram_received(self, data: bytes, addr: object) -> None:
            here.packets.append(data)

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        here.callers += 1
        writer.write(b"hello from outside\n")
        writer.close()

    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(Listener, ("0.0.0.0", 0))
    async with await asyncio.start_server(answer, "0.0.0.0", 0) as server:
        here.tcp, here.udp = server.sockets[0].getsockname()[1], transport.get_extra_info("sockname")[1]
        try:
            yield here
        finally:
            await process.run(["ip", "address", "delete", f"{ELSEWHERE}/32", "dev", "lo"], check=False)
    transport.close()


# 10.0.2.2 is the sandbox's own loopback as the inet card's gateway shows it, 192.0.2.2 would be the management card's;
# .3 is the name server of each, fec0::2 and fec0::3 the same by IPv6. 198.18.0.2 is the uplink's way to this machine's
# loopback, which is closed; 169.254.169.254 is where clouds keep their secrets.
INTERNET = {
    "tcp": "read -r line < /dev/tcp/{address}/{tcp} && echo $line",
    "udp": "echo inet > /dev/udp/{address}/{udp}",
    "icmp": "ping -c 1 -W 3 10.0.2.2",
}
NEVER = {
    "this machine's loopback": "read -r line < /dev/tcp/10.0.2.2/{tcp} && echo $line",
    "this machine's loopback by the uplink": "read -r line < /dev/tcp/198.18.0.2/{tcp} && echo $line",
    "tcp by the management card": "read -r line < /dev/tcp/192.0.2.2/{tcp} && echo $line",
    "udp to the loopback": "echo loop > /dev/udp/10.0.2.2/{udp}",
    "udp by the management card": "echo mgmt > /dev/udp/192.0.2.2/{udp}",
    "dns by the management card": "nslookup example.org 192.0.2.3",
    "link-local": "read -r line < /dev/tcp/169.254.169.254/80",
    "ipv6": "read -r line < /dev/tcp/fec0::2/{tcp} && echo $line",
}
ATTEMPTS = INTERNET | NEVER | {"dns": "nslookup example.org 10.0.2.3"}
UDP = {name for name in ATTEMPTS if name.startswith("udp")}
# What a hostile guest would do first.
FORCE = """
for card in /sys/class/net/*; do
  [ "$(cat "$card/address")" = 52:54:00:12:34:57 ] || continue
  name=${card##*/}
  ip link set "$name" up
  ip addr add 10.0.2.15/24 dev "$name"
  ip -6 addr add fec0::15/64 dev "$name"
  ip route add default via 10.0.2.2 dev "$name"
  ip neigh add 10.0.2.2 lladdr 52:55:0a:00:02:02 dev "$name"
done
true
"""


async def attempt(box: Sandbox, script: str, here: Outside) -> bool:
    words = script.format(address=here.address, tcp=here.tcp, udp=here.udp)
    done = await box.connection.run(["timeout", "6", "bash", "-c", words], check=False)
    return done.status == 0


async def boot_id(box: Sandbox) -> str:
    return (await box.connection.run(["cat", "/proc/sys/kernel/random/boot_id"])).stdout.strip()


@pytest.mark.lab
async def test_there_is_no_internet_until_it_is_switched_on(
    lab: Lab, state: Path, outside: Outside, tcg: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    async with sandbox.sandbox(
        lab.vm, host="web1", state=state, key=lab.key, ports=[80], on_console=lines.append
    ) as box:
        assert await box.alive()
        before = await boot_id(box)

        async def nothing_gets_out() -> None:
            await box.connection.run(["sh", "-c", FORCE])
            answers = await asyncio.gather(*(attempt(box, script, outside) for script in ATTEMPTS.values()))
            # To send a UDP packet always succeeds: what counts is that none arrives.
            reached = {name for name, answer in zip(ATTEMPTS, answers, strict=True) if answer} - UDP
            await asyncio.sleep(1)
            assert (reached, outside.callers, outside.packets) == (set(), 0, [])

        await nothing_gets_out()
        await box.connection.run(["sh", "-c", "ip addr flush dev eth1; ip link set eth1 down; ip link set eth1 up"])

        assert await box.set_internet(True)
        await box.connection.run(["sh", "-c", FORCE])  # the lab's DHCP client takes IPv6 off a card
        for name, words in NEVER.items():
            assert not await attempt(box, words, outside) or name in UDP, name
        assert not await attempt(box, INTERNET["tcp"], outside)  # this machine's own addresses are closed, too
        await attempt(box, INTERNET["udp"], outside)
        assert (outside.callers, outside.packets) == (0, [])
        assert not await box.set_internet(False)

        monkeypatch.setenv(ALLOWED, f"{outside.address}/32")
        assert await box.set_internet(True)
        assert await attempt(box, INTERNET["tcp"], outside) and outside.callers == 1
        assert await attempt(box, INTERNET["icmp"], outside)
        await attempt(box, INTERNET["udp"], outside)
        await until(lambda: outside.packets == [b"inet\n"])
        assert not await attempt(box, NEVER["tcp by the management card"], outside)

        outside.callers, outside.packets[:] = 0, []
        assert not await box.set_internet(False)
        await nothing_gets_out()

        assert await boot_id(box) == before
        assert box.port(80) != box.port(22) == box.ssh.port
        with pytest.raises(SandboxError, match="443 is not forwarded"):
            box.port(443)
        fresh = await box.connection.run(["hostname"], fresh=True)
        assert fresh.stdout.strip() == "web1"
        script = await process.run(["ssh", "-F", box.connection.config, "web1", "--", "hostname"])
        assert script.stdout.strip() == "web1"
        assert box.console_log.read_text().splitlines() == lines
    assert left(state) == []


@pytest.mark.lab
async def test_two_sandboxes_of_one_host_do_not_meet(lab: Lab, state: Path, tcg: None) -> None:
    def one() -> "contextlib.AbstractAsyncContextManager[Sandbox]":
        return sandbox.sandbox(lab.vm, host="web1", state=state, key=lab.key, ports=[80], memory=300, cores=2)

    async with contextlib.AsyncExitStack() as stack:
        boxes = await asyncio.gather(stack.enter_async_context(one()), stack.enter_async_context(one()))
        assert len({await boot_id(box) for box in boxes}) == 2
        for box in boxes:
            assert box.port(22) != box.port(80)
        assert [(await box.connection.run(["nproc"])).stdout for box in boxes] == ["2\n", "2\n"]
        assert await boxes[0].set_internet(True)
        assert (await boxes[1].connection.run(["cat", "/sys/class/net/eth1/carrier"])).stdout == "0\n"
    assert left(state) == []


@pytest.mark.lab
async def test_a_guest_that_dies_under_the_tests_is_not_alive(lab: Lab, state: Path, tcg: None) -> None:
    async with sandbox.sandbox(lab.vm, host="web1", state=state, key=lab.key) as box:
        running = box._vm.running
        os.kill(running.pid, signal.SIGKILL)
        await until(lambda: running.status is not None)
        assert not await box.alive()
        with pytest.raises(SandboxError, match="QEMU ended before"):
            await box.set_internet(True)
    assert left(state) == []


@pytest.mark.lab
async def test_a_key_that_the_guest_does_not_know_is_named(lab: Lab, state: Path, tmp_path: Path, tcg: None) -> None:
    await process.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "stranger"])
    with pytest.raises(SandboxFailed, match=r"does not let toto's key in: .*Permission denied"):
        await boots(lab.vm, state, key=tmp_path / "stranger", boot_timeout=300.0)
