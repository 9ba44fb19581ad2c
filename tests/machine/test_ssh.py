"""Connections against a real sshd on the loopback."""

import asyncio
import getpass
import os
import shutil
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from toto.base import process
from toto.base.errors import InputError, TotoError
from toto.base.process import CommandFailed, CommandTimeout
from toto.machine import ssh
from toto.machine.ssh import AuthenticationFailed, HostKeyChanged, SshTarget, Unreachable

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/run/current-system/sw/bin")
needs_sshd = pytest.mark.skipif(SSHD is None, reason="there is no sshd on this machine: install openssh-server")


def free_port(address: str = "127.0.0.1") -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        port: int = probe.getsockname()[1]
        return port


async def keygen(path: Path) -> str:
    await process.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", path])
    return path.with_name(path.name + ".pub").read_text().strip()


@dataclass
class Server:
    directory: Path
    target: SshTarget
    host_key: str
    journal: Path

    def logins(self) -> int:
        return self.journal.read_text().count("Accepted publickey")


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    async with sshd(tmp_path) as made:
        yield made


@asynccontextmanager
async def sshd(tmp_path: Path, address: str = "127.0.0.1", *more: str) -> AsyncIterator[Server]:
    """An sshd of this machine, at an address of its own; `more` are further lines of its settings."""
    directory = tmp_path / "a server's 100% own"
    directory.mkdir()
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    host_key = await keygen(directory / "host")
    port = free_port(address)
    await keygen(directory / "user %h")
    plain = tmp_path / "plain"  # sshd_config takes no blanks
    plain.symlink_to(directory)
    (directory / "authorized").write_text((directory / "user %h.pub").read_text())
    (directory / "config").write_text(
        f"Port {port}\nListenAddress {address}\nHostKey {plain}/host\nAuthorizedKeysFile {plain}/authorized\n"
        "StrictModes no\nPidFile none\nUsePAM no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
        "PermitRootLogin prohibit-password\nLogLevel VERBOSE\n" + "".join(f"{line}\n" for line in more)
    )
    journal = directory / "journal"
    assert SSHD is not None
    async with process.start([SSHD, "-D", "-E", journal, "-f", directory / "config"]):
        for _ in range(100):
            if journal.exists() and "listening" in journal.read_text():
                break
            await asyncio.sleep(0.05)
        yield Server(
            directory,
            SshTarget(
                "web1.lan",
                address,
                port,
                getpass.getuser(),
                directory / "user %h",
                known_hosts=tmp_path / "state" / "known hosts",
            ),
            host_key,
            journal,
        )


WORDS = ["plain", "two words", "it's", '"quoted"', "$HOME `id` \\", "*", "", "new\nline", "-dash", "ä→ü", "a;b&c|d"]


@needs_sshd
async def test_words_arrive_as_they_are(server: Server, tmp_path: Path) -> None:
    async with ssh.connection(server.target, tmp_path / "c") as there:
        done = await there.run(["printf", "%s\\0", *WORDS])
        assert done.stdout.split("\0")[:-1] == WORDS
        assert (await there.run(["cat"], stdin=b"\x00\x01in")).stdout == "\x00\x01in"


@needs_sshd
async def test_commands_share_one_login_and_a_fresh_one_makes_its_own(server: Server, tmp_path: Path) -> None:
    async with ssh.connection(server.target, tmp_path / "c") as there:
        for _ in range(3):
            await there.run(["true"])
        await process.run(["ssh", "-F", there.config, "web1.lan", "--", "true"])  # as a test script would
        assert server.logins() == 1
        await there.run(["true"], fresh=True)
        assert server.logins() == 2


@needs_sshd
async def test_a_dead_master_is_replaced_by_plain_connections(server: Server, tmp_path: Path) -> None:
    async with ssh.connection(server.target, tmp_path / "c") as there:
        assert there.master is not None
        os.kill(there.master.pid, 9)
        while there.master.status is None:
            await asyncio.sleep(0.02)
        done = await there.run(["echo", "back"])
        assert (done.stdout, done.stderr) == ("back\n", "")


@needs_sshd
async def test_a_connection_lost_under_a_command_is_no_failure_of_the_command(server: Server, tmp_path: Path) -> None:
    async with ssh.connection(server.target, tmp_path / "c") as there:
        assert there.master is not None
        asyncio.get_running_loop().call_later(0.5, os.kill, there.master.pid, 9)
        with pytest.raises(Unreachable, match="lost"):
            await there.run(["sleep", "20"], timeout=10)


@needs_sshd
async def test_nothing_outlives_the_connection(server: Server, tmp_path: Path) -> None:
    async with ssh.connection(server.target, tmp_path / "c") as there:
        assert there.master is not None and there.control is not None
        master, control = there.master, there.control
        assert control.exists()
    assert not Path(f"/proc/{master.pid}").exists()
    assert not control.exists()
    assert not list((tmp_path / "c").glob("log.[0-9]*"))


@needs_sshd
async def test_a_long_directory_works(server: Server, tmp_path: Path) -> None:
    async with ssh.connection(server.target, tmp_path / ("d" * 100) / ("e" * 100)) as there:
        assert there.control is not None
        await there.run(["true"])
        assert server.logins() == 1
        hidden = there.control.parent
    assert not hidden.exists()


@needs_sshd
async def test_exit_statuses_are_the_commands_own(server: Server, tmp_path: Path) -> None:
    async with ssh.connection(server.target, tmp_path / "c") as there:
        for fresh in (False, True):
            for status in (1, 255):
                done = await there.run(["sh", "-c", f"echo no >&2; exit {status}"], check=False, fresh=fresh)
                assert (done.status, done.stderr) == (status, "no\n")
        with pytest.raises(CommandFailed) as failed:
            await there.run(["sh", "-c", "echo the reason is *secret* >&2; exit 3"], secrets=["*secret*"])
        assert str(failed.value).startswith("web1.lan: `sh -c")
        assert "the reason is ******" in str(failed.value) and "secret" not in str(failed.value)
        with pytest.raises(CommandTimeout, match=r"web1\.lan: `sleep 20` did not end within 0\.5 s"):
            await there.run(["sleep", "20"], timeout=0.5)


@needs_sshd
async def test_the_first_host_key_is_kept_and_a_different_one_is_refused(server: Server, tmp_path: Path) -> None:
    known = server.target.known_hosts
    assert known is not None
    await ssh.plain(server.target, tmp_path / "c").run(["true"])
    assert server.host_key in known.read_text() and known.read_text().startswith("web1.lan ")
    other = await keygen(tmp_path / "other")
    known.write_text(f"web1.lan {other}\n")
    with pytest.raises(HostKeyChanged, match=r"ssh-keygen -f .* -R web1\.lan"):
        await ssh.plain(server.target, tmp_path / "c").run(["true"])
    with pytest.raises(HostKeyChanged):
        async with ssh.connection(server.target, tmp_path / "c"):
            pass


@needs_sshd
async def test_a_pinned_host_key_decides(server: Server, tmp_path: Path) -> None:
    right = replace(server.target, host_key=server.host_key, known_hosts=None)
    await ssh.plain(right, tmp_path / "right").run(["true"])
    wrong = replace(right, host_key=await keygen(tmp_path / "other"))
    with pytest.raises(HostKeyChanged):
        await ssh.plain(wrong, tmp_path / "wrong").run(["true"])


@needs_sshd
async def test_a_refused_key_and_a_closed_port_are_different_errors(server: Server, tmp_path: Path) -> None:
    await keygen(tmp_path / "stranger")
    with pytest.raises(AuthenticationFailed, match="Permission denied"):
        await ssh.plain(replace(server.target, identity=tmp_path / "stranger"), tmp_path / "c").run(["true"])
    closed = replace(server.target, port=free_port())
    for attempt in (ssh.plain(closed, tmp_path / "c").run(["true"]), _connect(closed, tmp_path / "c")):
        with pytest.raises(Unreachable, match="Connection refused") as refused:
            await attempt
        assert type(refused.value) is Unreachable


async def test_a_port_that_accepts_and_says_nothing_is_unreachable(tmp_path: Path) -> None:
    async with await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0) as silent:
        port = silent.sockets[0].getsockname()[1]
        target = SshTarget("mute", "127.0.0.1", port, throwaway=True, connect_timeout=1)
        with pytest.raises(Unreachable, match="timed out"):
            await asyncio.wait_for(ssh.plain(target, tmp_path).run(["true"]), 120)


async def _connect(target: SshTarget, directory: Path) -> None:
    async with ssh.connection(target, directory):
        pass


BAD: list[dict[str, object]] = [
    {"name": "two words"},
    {"name": "*"},
    {"name": "a\nProxyCommand evil"},
    {"name": "-oProxyCommand=evil"},
    {"address": "-oProxyCommand=evil"},
    {"address": "a b"},
    {"address": "h\n"},
    {"user": "root\nB x"},
    {"user": "-x"},
    {"port": 0},
    {"port": 70000},
    {"host_key": "ssh-ed25519"},
    {"host_key": "ssh-ed25519 AAAA\n* ssh-rsa BBBB"},
    {"throwaway": False},
]


@pytest.mark.parametrize("bad", BAD, ids=repr)
def test_values_that_could_change_the_config_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(InputError):
        SshTarget(**({"name": "web1", "address": "192.0.2.1", "throwaway": True} | bad))  # type: ignore[arg-type]


@pytest.mark.parametrize("path", ["a\nb", 'a"b', "${HOME}"])
def test_paths_that_could_change_the_config_are_refused(path: str, tmp_path: Path) -> None:
    target = SshTarget("web1", "fe80::1%eth0", throwaway=True, identity=tmp_path / path)
    with pytest.raises(InputError, match="plainer"):
        target.write_config(tmp_path)


async def test_ssh_understands_the_config(tmp_path: Path) -> None:
    identity = tmp_path / "a %d \\ 'b" / "key"
    target = SshTarget("web1.lan", "fe80::1%eth0", 2200, "toto", identity, known_hosts=tmp_path / "k h")
    config = target.write_config(tmp_path / "new" / "c")
    said = (await process.run(["ssh", "-G", "-F", config, "web1.lan"])).lines
    # ssh -G shows a path as it is written, percent signs still doubled.
    for line in (
        "hostname fe80::1%eth0",
        "port 2200",
        "user toto",
        "batchmode yes",
        "hostkeyalias web1.lan",
        "stricthostkeychecking accept-new",
        f"identityfile {str(identity).replace('%', '%%')}",
        f"userknownhostsfile {tmp_path / 'k h'}",
    ):
        assert line in said
    assert (config.stat().st_mode & 0o777, config.parent.stat().st_mode & 0o777) == (0o600, 0o700)


def test_errors_are_errors_of_toto() -> None:
    assert issubclass(Unreachable, TotoError)
    assert issubclass(AuthenticationFailed, Unreachable) and issubclass(HostKeyChanged, Unreachable)
