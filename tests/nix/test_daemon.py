"""toto's nix daemon: what is built in its sandbox, on which network, and whose settings count."""

import asyncio
import grp
import os
import shutil
import signal
import socket as sockets
import sys
import tempfile
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.lab import nix_daemon
from tests.lab.fleet import command_of, processes
from toto.base import process
from toto.base.errors import InputError
from toto.cell.namespace import ALLOWED, own_addresses
from toto.nix import commands as nix
from toto.nix import daemon, quiet

pytestmark = pytest.mark.skipif(not nix_daemon.possible(), reason="toto's nix daemon needs root or sudo")


async def drv(attributes: str) -> str:
    """A derivation, new each time."""
    expression = f'derivation {{ name = "test"; once = "{uuid.uuid4()}"; {attributes} }}'
    done = await process.run(["nix-instantiate", "--expr", expression], env=nix.environment())
    return done.stdout.strip()


def script(text: str) -> str:
    """The attributes of a derivation that runs a shell script."""
    return f'system = "x86_64-linux"; builder = "/bin/sh"; args = [ "-c" \'\'{text}\'\' ];'


async def built(tmp_path: Path, attributes: str) -> str:
    """What a build leaves in $out."""
    return Path(await nix.build(await drv(attributes), tmp_path / "root", timeout=120, target="test")).read_text()


async def test_a_build_sees_nothing_of_the_machine_and_is_nobody_in_it(tmp_path: Path) -> None:
    seen = await built(tmp_path, script("{ id -u; ls -A /; ls -A /root; (echo x > /proc/sys/kernel/core_pattern); "
                                 "ls -A /tmp; } > $out 2>&1; true"))  # fmt: skip
    lines = seen.splitlines()
    assert lines[0] != "0" and {"home", "root", "run", "etc", "var"} & set(lines) <= {"etc"}
    assert "can't create /proc/sys/kernel/core_pattern: Permission denied" in seen


async def test_a_build_is_one_of_the_build_users(tmp_path: Path) -> None:
    word = f"word-{uuid.uuid4()}"
    work = asyncio.create_task(built(tmp_path, script(f'sh -c "sleep 600; true" {word}')))
    try:
        async with asyncio.timeout(60):
            while not (found := [each for each in processes() if command_of(each).startswith(b"sh\0-c\0sleep 600")]):
                await asyncio.sleep(0.05)
        users = {Path(f"/proc/{each}/status").stat().st_uid for each in found if word.encode() in command_of(each)}
        names = set((await process.run(["getent", "group", daemon.GROUP])).stdout.strip().split(":")[3].split(","))
        ids = {int((await process.run(["id", "-u", name])).stdout) for name in names}
        assert users and users <= ids
    finally:
        work.cancel()
        await asyncio.wait((work,))
    async with asyncio.timeout(60):  # it ends with its client
        while any(word.encode() in command_of(each) for each in processes()):
            await asyncio.sleep(0.05)


@asynccontextmanager
async def answering(address: str, text: str) -> AsyncIterator[tuple[int, list[str]]]:
    """A server on this machine that says `text`: its port, and who has called."""
    callers: list[str] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        callers.append(str(writer.get_extra_info("peername")))
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.0 200 OK\r\nContent-Length: {len(text)}\r\n\r\n{text}".encode())
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, address, 0) as server:
        yield server.sockets[0].getsockname()[1], callers


async def test_a_fixed_output_build_has_the_network_and_reaches_nothing_of_this_machine(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    (address, *_) = own_addresses()
    text = f"found {uuid.uuid4()}\n"  # a store path that exists already would not be fetched
    digest = (await process.run(["sha256sum"], stdin=text.encode())).stdout.split()[0]

    def fetched(host: str, port: int) -> str:
        return (
            f'system = "builtin"; builder = "builtin:fetchurl"; url = "http://{host}:{port}/"; '
            f'outputHashMode = "flat"; outputHashAlgo = "sha256"; outputHash = "{digest}"; '
            "executable = false; unpack = false;"
        )

    async with answering("0.0.0.0", text) as (port, callers):
        places = ("127.0.0.1", "localhost", "10.0.2.2", "198.18.0.2", address)
        for failed in await asyncio.gather(
            *(built(tmp_path / place, fetched(place, port)) for place in places), return_exceptions=True
        ):
            assert isinstance(failed, nix.BuildFailed) and "unable to download" in str(failed), failed
        assert callers == []
        if os.geteuid() != 0:  # the daemon of this process is root's
            return
        # The same reaches it when the server's settings name the address: so a network was there.
        monkeypatch.setenv(ALLOWED, f"{address}/32")
        async with daemon.running(tmp_path_factory.mktemp("open")) as path:
            monkeypatch.setenv(daemon.SOCKET, str(path))
            assert await built(tmp_path, fetched(address, port)) == text
        assert len(callers) == 1


@pytest.mark.parametrize("setting", ["sandbox = false", "build-users-group =", "sandbox-paths = /root"])
async def test_nobodys_settings_open_the_sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    (tmp_path / "nix").mkdir()
    (tmp_path / "nix/nix.conf").write_text(f"{setting}\n")
    monkeypatch.setenv("NIX_CONFIG", setting)
    monkeypatch.setenv("NIX_USER_CONF_FILES", str(tmp_path / "nix/nix.conf"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert "No such file" in await built(tmp_path, script("ls /root > $out 2>&1; true"))
    assert "uid=0" not in await built(tmp_path, script("id > $out"))


@pytest.mark.skipif(os.geteuid() != 0, reason="the daemon of this process is root's")
async def test_no_build_gets_the_machines_logins(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nix writes the netrc-file into the folder of a `builtin:fetchurl`, which may then fetch that file."""
    (tmp_path / "netrc").write_text(f"machine cache.example.org login a password {uuid.uuid4()}\n")
    (tmp_path / "nix.conf").write_text(f"netrc-file = {tmp_path}/netrc\nsubstituters =\n")
    monkeypatch.setenv("NIX_CONF_DIR", str(tmp_path))
    digest = (await process.run(["sha256sum", tmp_path / "netrc"])).stdout.split()[0]
    fetched = (
        'system = "builtin"; builder = "builtin:fetchurl"; url = "file:///build/netrc"; outputHashMode = "flat"; '
        f'outputHashAlgo = "sha256"; outputHash = "{digest}"; executable = false; unpack = false;'
    )
    async with daemon.running(tmp_path_factory.mktemp("logins")) as path:
        monkeypatch.setenv(daemon.SOCKET, str(path))
        with pytest.raises(nix.BuildFailed, match="file:///build/netrc"):
            await built(tmp_path, fetched)


@pytest.mark.skipif(os.geteuid() != 0, reason="the daemon of this process is root's")
async def test_it_is_started_again_when_it_dies_and_ends_with_toto(tmp_path_factory: pytest.TempPathFactory) -> None:
    home = tmp_path_factory.mktemp("own")

    def running() -> list[int]:
        needle = f"NIX_DAEMON_SOCKET_PATH={home}/".encode()
        found = []
        for each in processes():
            try:
                found += [each] if needle in Path(f"/proc/{each}/environ").read_bytes() else []
            except OSError:
                continue
        return found

    async with daemon.running(home) as path:
        for each in running():
            os.kill(each, signal.SIGKILL)
        async with asyncio.timeout(60):
            while not running() or not daemon._answers(path):
                await asyncio.sleep(0.1)
    assert running() == []


@pytest.mark.skipif(os.geteuid() != 0, reason="the daemon itself is root's")
async def test_it_tells_systemd_when_it_answers_and_leaves_the_folder_that_toto_has_mounted() -> None:
    with tempfile.TemporaryDirectory(dir="/run", prefix="toto-told-") as name:
        await it_tells_systemd(Path(name))
        (left,) = (Path(name) / "nix").iterdir()  # (below /run it is removed, with whatever it had)
        assert left.name == quiet.ASKED and left.stat().st_gid == grp.getgrnam("nogroup").gr_gid


async def it_tells_systemd(home: Path) -> None:
    with sockets.socket(sockets.AF_UNIX, sockets.SOCK_DGRAM) as systemd:
        systemd.bind(str(home / "notify"))
        systemd.settimeout(60)
        command = [sys.executable, "-m", "toto.cli", "nix-daemon", "--home", str(home / "nix"), "--group", "nogroup"]
        async with process.start(command, env={**os.environ, "NOTIFY_SOCKET": str(home / "notify")}) as running:
            assert await asyncio.to_thread(systemd.recv, 100) == b"READY=1"
            assert daemon._answers(home / "nix" / "client" / "socket")
            # Its unit is asked to start what is installed now: a client goes on to its end.
            with sockets.socket(sockets.AF_UNIX) as client:
                client.connect(str(home / "nix" / "client" / "socket"))
                async with asyncio.timeout(120):
                    while len(daemon._daemons(running.pid)) < 2:
                        await asyncio.sleep(0.05)
                os.kill(running.pid, signal.SIGHUP)
                await asyncio.sleep(2.5)
                assert running.status is None
            async with asyncio.timeout(120):
                assert await running.process.wait() == 0


def test_its_shell_is_busybox_wherever_nix_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    busybox = shutil.which("busybox")
    assert busybox is not None
    assert f"sandbox-paths = /bin/sh={Path(busybox).resolve()}\n" in daemon.configuration()
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(InputError, match="busybox is not on PATH"):
        daemon.configuration()
