"""What test scripts are given to reach the machine that they test, and what they cannot reach.

The machine is this one: an `ssh` on PATH that does what the real one does, joins the words and gives them to a shell.
(`tests/lab` has real machines.)
"""

import asyncio
import contextlib
import json
import os
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.conftest import free_port
from tests.machine.test_ssh import WORDS, needs_sshd, sshd
from toto.base import process
from toto.machine.ssh import SshTarget, plain
from toto.rehearsal.phase_run import Bench, Endpoint, PhasePassed, bench
from toto.rehearsal.results import PhaseResult
from toto.rehearsal.suite import Phase

SSH = """#!/bin/sh
while [ "$1" != -- ]; do shift; done
shift
exec sh -c "$*"
"""


@pytest.fixture
def endpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Endpoint:
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "ssh").write_text(SSH)
    (tools / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("SSH_AUTH_SOCK", str(tmp_path / "agent"))
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "toto:canary-in-the-environment")
    key = tmp_path / "machines-key"
    key.write_text("canary-in-the-key")
    target = SshTarget("web1", "127.0.0.1", identity=key, throwaway=True)
    return Endpoint(plain(target, tmp_path / "ssh-files"), {})


@contextlib.asynccontextmanager
async def at(endpoint: Endpoint, tmp_path: Path, phase: Phase = Phase.SMOKE) -> AsyncIterator[Bench]:
    tree, scratch = tmp_path / "tree", tmp_path / "scratch"
    for each in (tree, scratch):
        each.mkdir(exist_ok=True)
    async with bench(endpoint, "web1", phase, tree, scratch) as place:
        yield place
    assert list(scratch.iterdir()) == []


async def said(place: Bench, *words: str, timeout: float = 30) -> process.Completed:
    return await process.run(words, cell=place.cell, env=place.env, check=False, timeout=timeout)


async def test_scripts_are_given_the_machine_and_no_secret(endpoint: Endpoint, tmp_path: Path) -> None:
    async with at(endpoint, tmp_path) as place:
        lines = (await said(place, "env")).lines
        assert {"TOTO_HOST=web1", "TOTO_PHASE=smoke", "TOTO_ADDRESS=127.0.0.1"} <= set(lines)
        names = {line.partition("=")[0] for line in lines}
        assert names == {"PATH", "HOME", "TMPDIR", "LANG", "TERM", "PWD", "TOTO_HOST", "TOTO_PHASE", "TOTO_ADDRESS"}
        everywhere = [
            "grep",
            "-rIl",
            "--devices=skip",
            "canary",
            "/toto",
            "/infra",
            "/etc",
            "/run",
            "/root",
            "/tmp",
            "/home",
        ]
        assert (await said(place, *everywhere)).stdout == ""
        processes = await said(place, "sh", "-c", "cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline")
        assert "canary" not in processes.stdout and str(tmp_path) not in processes.stdout


@pytest.mark.parametrize(
    "words",
    [
        ["sh", "-c", 'echo "a b"'],
        ["true"],
        ["printf", "%s|", "it's", "$HOME", "*", "", "a\nb", "\n", "`id`", "''", "\\", 'say "x"', "é", "-n"],
        ["echo 'one line' | tr a-z A-Z"],
    ],
)
async def test_on_host_carries_words_as_they_are(endpoint: Endpoint, tmp_path: Path, words: list[str]) -> None:
    direct = ["sh", "-c", words[0]] if len(words) == 1 else words
    expected = subprocess.run(direct, capture_output=True, check=True)
    async with at(endpoint, tmp_path) as place:
        done = await said(place, "on-host", *words)
        assert (done.stdout.encode(), done.status) == (expected.stdout, 0)
        assert (await said(place, "on-host")).status == 64


async def test_on_host_has_the_scripts_streams_and_the_commands_status(endpoint: Endpoint, tmp_path: Path) -> None:
    async with at(endpoint, tmp_path) as place:
        done = await said(place, "sh", "-c", "echo in | on-host --stdin 'tr a-z A-Z; echo error >&2; exit 7'")
        assert (done.stdout, done.stderr, done.status) == ("IN\n", "error\n", 7)
        assert (await said(place, "sh", "-c", "on-host echo x >&-; on-host echo $? <&-")).stdout == "0\n"
        large = await said(place, "sh", "-c", "on-host 'head -c 3000000 /dev/zero' | wc -c")
        assert large.stdout.strip() == "3000000"


async def test_a_loop_over_a_list_runs_to_its_end(endpoint: Endpoint, tmp_path: Path) -> None:
    loop = 'printf "%s\n" a b c | while read -r each; do on-host "cat; echo $each"; done'
    async with at(endpoint, tmp_path) as place:
        assert (await said(place, "sh", "-c", loop)).lines == ["a", "b", "c"]
        eaten = await said(place, "sh", "-c", loop.replace("on-host", "on-host --stdin"))
        assert eaten.lines == ["b", "c", "a"]


async def test_what_is_not_a_command_is_told(endpoint: Endpoint, tmp_path: Path) -> None:
    async with at(endpoint, tmp_path) as place:
        for words in ([], ["--stdin"], ["--", "true"], ["--tty", "true"]):
            done = await said(place, "on-host", *words)
            assert (done.status, done.stderr) == (64, "usage: on-host [--stdin] COMMAND [ARGUMENT...]\n")
        done = await said(place, "on-host", "echo", "é" * 20_000)
        assert done.status == 64 and "too long; give it by a file, or by --stdin" in done.stderr
        assert len((await said(place, "on-host", "echo", "e" * 100_000)).stdout) == 100_001


@needs_sshd
@pytest.mark.parametrize("shell", ["sh", "bash", "dash", "zsh", "fish", "tcsh", "nu"])
async def test_words_arrive_as_they_are_under_every_login_shell(shell: str, tmp_path: Path) -> None:
    """sshd gives the shell what it would give to the login shell of a user: `-c` and the line."""
    if (found := shutil.which(shell)) is None:
        pytest.skip(f"there is no {shell} on this machine")
    forced = tmp_path / "forced"
    forced.write_text(f'#!/bin/sh\nexec {found} -c "$SSH_ORIGINAL_COMMAND"\n')
    forced.chmod(0o755)
    async with sshd(tmp_path, "127.0.0.1", f"ForceCommand {forced}") as server:
        there = Endpoint(plain(server.target, tmp_path / "ssh-files"), {})
        async with at(there, tmp_path) as place:
            words = [
                *WORDS,
                "!!",
                "!x",
                "\\0101",
                "\\",
                "'",
                "''",
                "~",
                "$PWD",
                "%self",
                "{a,b}",
                "[x]",
                "\n",
                "a\n",
                "(",
            ]
            done = await said(place, "on-host", "printf", "%s\\0", *words)
            assert done.stdout.split("\0")[:-1] == words, done.stderr
            bare = await said(place, "sh", "-c", r"""on-host printf %s "$(printf 'a\377b')" | od -An -tx1""")
            assert bare.stdout.split() == ["61", "ff", "62"]
            line = "for each in 'a b' c; do echo \"$each\"; done; test ! -e /nowhere && exit 3"
            done = await said(place, "on-host", line)
            assert (done.stdout, done.status) == ("a b\nc\n", 3)
            assert (await said(place, "on-host", "command", "-v", "sh")).status == 0
            piped = await said(place, "sh", "-c", "echo in | on-host --stdin cat; on-host cat < /etc/passwd")
            assert piped.stdout == "in\n"


async def test_a_command_ends_with_the_script_that_asked_for_it(endpoint: Endpoint, tmp_path: Path) -> None:
    async with at(endpoint, tmp_path) as place:
        with pytest.raises(process.CommandTimeout):
            await said(place, "on-host", f"echo $$ > {tmp_path}/pid; exec sleep 1000", timeout=3)
        pid = int((tmp_path / "pid").read_text())
        async with asyncio.timeout(120):
            while process.started(pid):
                await asyncio.sleep(0.05)


async def test_what_does_not_speak_as_on_host_gets_no_answer_and_harms_nothing(
    endpoint: Endpoint, tmp_path: Path
) -> None:
    hostile = """
import json, os, socket
def ask(head, body, streams):
    with socket.socket(socket.AF_UNIX) as toto:
        toto.settimeout(5)
        toto.connect("/toto/on-host.sock")
        socket.send_fds(toto, [head], streams)
        try:
            if body: toto.sendall(body)
            toto.shutdown(socket.SHUT_WR)
            print(toto.recv(10))
        except OSError:
            print(b"")
words = json.dumps(["touch", "/tmp/never"]).encode()
ask(b"x", b"", [0, 1, 2])
ask(b"\\xff\\xff\\xff\\xff", words, [0, 1, 2])
ask(len(words).to_bytes(4, "big"), words, [0])
ask((9).to_bytes(4, "big"), b"[1, 2, 3]", [0, 1, 2])
ask((9).to_bytes(4, "big"), b'["a\\u0000"', [0, 1, 2])
ask((4).to_bytes(4, "big"), b"nope", [0, 1, 2])
"""
    async with at(endpoint, tmp_path) as place:
        done = await said(place, "python3", "-c", hostile)
        assert done.lines == ["b''"] * 6, done.stderr
        assert (await said(place, "on-host", "echo", "still", "there")).stdout == "still there\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has cells of other users")
async def test_no_other_user_may_ask(endpoint: Endpoint, tmp_path: Path) -> None:
    async with at(endpoint, tmp_path):
        [given] = (tmp_path / "scratch").iterdir()
        assert (given / "on-host.sock").stat().st_mode & 0o077 == 0
        assert (given / "on-host.sock").stat().st_uid not in {0, os.geteuid()}


async def test_a_real_machines_ports_are_relayed_and_nothing_else_is_reached(
    endpoint: Endpoint, tmp_path: Path
) -> None:
    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"the machine's own port\n")
        writer.close()

    named, other = free_port(), free_port()
    async with (
        await asyncio.start_server(answer, "127.0.0.1", named),
        await asyncio.start_server(answer, "127.0.0.1", other),
        at(Endpoint(endpoint.connection, {80: named}), tmp_path, Phase.POST_SWITCH) as place,
    ):
        read = 'exec 3<>"/dev/tcp/$TOTO_ADDRESS/$TOTO_PORT_80"; cat <&3'
        assert (await said(place, "bash", "-c", read)).stdout == "the machine's own port\n"
        for address in (f"127.0.0.1/{other}", f"10.0.2.2/{named}", "1.1.1.1/443"):
            assert (await said(place, "bash", "-c", f"exec 3<>/dev/tcp/{address}; cat <&3")).status != 0


async def test_the_ports_of_a_machine_with_an_ipv6_address_are_on_the_loopback(
    endpoint: Endpoint, tmp_path: Path
) -> None:
    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"by IPv6\n")
        writer.close()

    port, target = free_port(), SshTarget("web1", "::1", throwaway=True)
    there = Endpoint(plain(target, tmp_path / "v6"), {80: port})
    async with await asyncio.start_server(answer, "::1", port), at(there, tmp_path) as place:
        read = 'exec 3<>"/dev/tcp/$TOTO_ADDRESS/$TOTO_PORT_80"; cat <&3'
        assert (await said(place, "bash", "-c", read)).stdout == "by IPv6\n"


async def test_abstract_sockets_of_the_machine_are_not_there(endpoint: Endpoint, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("\0toto-test-abstract")
        listener.listen()
        async with at(endpoint, tmp_path) as place:
            asks = 'import socket; socket.socket(socket.AF_UNIX).connect("\\0toto-test-abstract")'
            done = await said(place, "python3", "-c", asks)
            assert "Connection refused" in done.stderr, json.dumps(done.stderr)


def test_a_phase_without_scripts_passes_with_no_tests() -> None:
    assert PhasePassed.of(PhaseResult("web1", Phase.SMOKE)) == PhasePassed(tests=0, seconds=0)
