"""Cells: what runs in one sees and uses only what it is given, and ends with it."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lab.fleet import command_of, processes
from toto.base import process
from toto.base.errors import TotoError
from toto.base.process import CommandFailed, CommandNotFound, CommandTimeout, LimitExceeded, Pushed
from toto.cell import cell as cells
from toto.cell.cell import Cell
from toto.cell.limits import Limits

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="toto is not root here")


async def said(cell: Cell, *words: str, timeout: float = 60, **env: str) -> process.Completed:
    return await process.run(words, cell=cell, env=env, check=False, timeout=timeout)


def waiting(word: str) -> list[int]:
    """The processes of this machine with `word` on their command line."""
    return [pid for pid in processes() if word.encode() in command_of(pid) and process.started(pid)]


async def gone(word: str) -> None:
    async with asyncio.timeout(120):
        while waiting(word):
            await asyncio.sleep(0.05)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    folder = tmp_path / "tree"
    folder.mkdir()
    folder.chmod(0o755)
    (folder / "file").write_text("pushed\n")
    return folder


async def test_it_sees_the_machines_programs_and_what_it_is_given(tree: Path) -> None:
    cell = Cell(read={Path("/infra"): tree})
    top = (await said(cell, "ls", "-A", "/")).lines
    assert set(top) <= {"bin", "dev", "etc", "infra", "lib", "lib32", "lib64", "libx32", "proc", "sbin", "tmp", "usr"}
    assert (await said(cell, "cat", "/infra/file")).stdout == "pushed\n"
    etc = set((await said(cell, "ls", "-A", "/etc")).lines)
    assert etc <= {"alternatives", "group", "hosts", "ld.so.cache", "nsswitch.conf", "passwd", "ssl"}
    assert (await said(cell, "id", "-un")).stdout == "cell\n"


async def test_its_environment_is_made_from_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CANARY", "canary")
    done = await said(Cell(), "sh", "-c", "cat /proc/[0-9]*/environ | tr '\\0' '\\n'; hostname", GIVEN="x")
    assert {line.partition("=")[0] for line in done.lines} == {
        *("PATH", "HOME", "TMPDIR", "LANG", "TERM", "GIVEN", "PWD", "cell")
    }
    assert not {line for line in done.lines if line.startswith("PWD=") and line not in {"PWD=/", "PWD=/tmp"}}


# In a mount namespace of its own: links in /run to the programs, and links to links to the certificates in the store.
LIKE_NIXOS = """
set -e
mount -t tmpfs none /run
mount -t tmpfs none /nix/store
mount -t tmpfs none /etc/ssl
mkdir -p /run/current-system/bin /etc/ssl/certs /etc/ssl/static /nix/store/x-cacert
for each in bwrap setpriv nsenter; do ln -s "$(command -v $each)" /run/current-system/bin/$each; done
echo certificate > /nix/store/x-cacert/ca-bundle.crt
ln -s /nix/store/x-cacert/ca-bundle.crt /etc/ssl/static/ca-bundle.crt
ln -s /etc/ssl/static/ca-bundle.crt /etc/ssl/certs/ca-certificates.crt
PATH=/run/current-system/bin:$PATH exec "$@"
"""
READS_THEM = """
import asyncio
from toto.base import process
from toto.cell.cell import Cell
print(asyncio.run(process.run(["cat", "/etc/ssl/certs/ca-certificates.crt"], cell=Cell(), timeout=60)).stdout)
"""


@as_root
@pytest.mark.skipif(not Path("/nix/store").is_dir(), reason="there is no /nix/store here")
async def test_programs_and_certificates_may_be_links_as_on_nixos() -> None:
    done = await process.run(
        [
            "unshare",
            "--mount",
            "--propagation",
            "private",
            "sh",
            "-c",
            LIKE_NIXOS,
            "sh",
            sys.executable,
            "-c",
            READS_THEM,
        ],
        timeout=60,
        check=False,
    )
    assert done.stdout.strip() == "certificate", done


@as_root
async def test_it_is_another_user_of_the_machine_in_each_cell() -> None:
    seen = set()
    for _ in range(3):
        async with process.start(["sleep", "60"], cell=Cell()) as running:
            async with asyncio.timeout(120):
                while not (
                    inside := [p for p in process.descendants(running.pid) if command_of(p).startswith(b"sleep")]
                ):
                    await asyncio.sleep(0.02)
            status = Path(f"/proc/{inside[0]}/status").read_text()
            uids = {int(each) for each in status.split("Uid:")[1].split("\n")[0].split()}
            assert len(uids) == 1 and not uids & {0, os.geteuid()}
            assert "CapEff:\t0000000000000000" in status and "NoNewPrivs:\t1" in status and "Groups:\t \n" in status
            seen |= uids
    assert len(seen) == 3


@pytest.mark.parametrize(
    "attempt",
    [
        "touch /infra/x",
        "touch /x",
        "touch /usr/x",
        "touch /dev/x",
        "touch /etc/x",
        "echo x > /infra/file",
        ": > /proc/sys/kernel/core_pattern",
        ": > /proc/sysrq-trigger",
        "unshare --user true",
        "mount -t tmpfs none /tmp",
        "chroot / true",
        "mknod /tmp/disk b 8 0",
        "ls /root",
        "ls /home",
        "ls /run",
        "ls /var",
        "ls /nix",
        "ls /sys",
        "cat /etc/shadow",
        "cat /proc/kcore",
        "dmesg",
        "kill -9 -1 && test $(ls -d /proc/[0-9]* | wc -l) -gt 9",
        "su -c true",
        "ls /proc/1/root/root",
        "ls /dev/kvm /dev/net /dev/fuse",
        "nsenter --target 1 --mount true",
        "bash -c 'exec 3<>/dev/tcp/127.0.0.1/22'",
        "ip link add x type dummy",
    ],
)
async def test_it_cannot(tree: Path, attempt: str) -> None:
    done = await said(Cell(read={Path("/infra"): tree}), "sh", "-c", attempt)
    assert done.status != 0, done
    assert (tree / "file").read_text() == "pushed\n" and [each.name for each in tree.iterdir()] == ["file"]


async def test_links_in_what_it_is_given_lead_nowhere_outside(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("canary")
    (tree / "link").symlink_to(tmp_path / "secret")
    done = await said(Cell(read={Path("/infra"): tree}), "cat", "/infra/link")
    assert done.status != 0 and "canary" not in done.stdout


async def test_it_writes_to_its_folders_and_to_no_more_than_their_size(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir(mode=0o700)
    cell = Cell(write={Path("/out"): folder}, scratch=1_000_000, limits=Limits(file_size=3_000_000))
    cell.give()
    done = await said(cell, "sh", "-c", "echo made > /out/file; head -c 5000000 /dev/zero > /tmp/large")
    assert (folder / "file").read_text() == "made\n"
    assert "No space left" in done.stderr
    done = await said(cell, "sh", "-c", "head -c 5000000 /dev/zero > /out/large; stat -c %s /out/large")
    assert done.stdout == "3000000\n"
    assert "No space left" in (await said(cell, "sh", "-c", "head -c 5000000 /dev/zero > /dev/shm/large")).stderr


async def test_a_link_in_a_folder_that_it_wrote_is_as_it_left_it(tmp_path: Path) -> None:
    """Whoever reads it outside must not follow it."""
    folder = tmp_path / "out"
    folder.mkdir()
    cell = Cell(write={Path("/out"): folder})
    cell.give()
    await said(cell, "ln", "-s", "/etc/shadow", "/out/link")
    assert (folder / "link").is_symlink()


@pytest.mark.parametrize(
    ("words", "limits", "exceeded"),
    [
        (["python3", "-c", "x = bytearray(10**9); import time; time.sleep(30)"], Limits(memory=200_000_000), "memory"),
        (["sh", "-c", "head -c 90000000 /dev/zero > /out/x; sleep 30"], Limits(disk=50_000_000), "50 MB of disk"),
    ],
)
async def test_what_uses_more_than_it_may_is_ended(
    tmp_path: Path, words: list[str], limits: Limits, exceeded: str
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    cell = Cell(write={Path("/out"): folder}, limits=limits)
    cell.give()
    with pytest.raises(LimitExceeded, match=exceeded):
        await process.run(words, cell=cell, timeout=25)


async def test_memory_is_summed_where_there_are_no_control_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toto.cell.limits._parents", list)
    many = "import os, time; [os.fork() for _ in range(3)]; x = bytearray(60_000_000); time.sleep(30)"
    with pytest.raises(LimitExceeded, match="memory"):
        await process.run(["python3", "-c", many], cell=Cell(limits=Limits(memory=300_000_000)), timeout=25)


async def test_a_fork_bomb_ends_with_its_cell() -> None:
    bomb = "f() { f & f; }; f"
    with pytest.raises(CommandTimeout):
        await process.run(["bash", "-c", bomb, "bomb-canary"], cell=Cell(limits=Limits(processes=64)), timeout=3)
    await gone("bomb-canary")


async def test_nothing_outlives_it() -> None:
    done = await said(Cell(), "sh", "-c", "setsid sleep 987654 & env -i setsid -f sleep 987654; exit 3")
    assert done.status == 3
    await gone("987654")


@pytest.mark.parametrize("end", ["cancel", "killed"])
async def test_it_ends_with_toto(end: str) -> None:
    if end == "cancel":
        task = asyncio.create_task(process.run(["sleep", "876543"], cell=Cell()))
        async with asyncio.timeout(60):
            while not waiting("876543"):
                await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    else:
        program = (
            "import asyncio; from toto.base import process; from toto.cell.cell import Cell\n"
            "asyncio.run(process.run(['sleep', '876543'], cell=Cell()))"
        )
        toto = subprocess.Popen([sys.executable, "-c", program])
        async with asyncio.timeout(90):
            while len(waiting("sleep\000876543")) < 2:  # and the bwrap around it
                await asyncio.sleep(0.05)
        toto.kill()
        toto.wait()
    await gone("876543")


async def test_a_signal_reaches_the_program_and_not_its_cell() -> None:
    lines: list[str] = []
    traps = "trap 'echo saved; exit 0' INT; echo ready; while :; do sleep 0.05; done"
    task = asyncio.create_task(
        process.run(["bash", "-c", traps], cell=Cell(), on_line=lines.append, signals=[signal.SIGINT], grace=20)
    )
    async with asyncio.timeout(120):
        while lines != ["ready"]:
            await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert lines == ["ready", "saved"]


@pytest.mark.parametrize(("script", "status"), [("exit 7", 7), ("kill -TERM $$", -15), ("kill -SEGV $$", -11)])
async def test_the_programs_own_exit_status_is_told(script: str, status: int) -> None:
    assert (await said(Cell(), "sh", "-c", script)).status == status
    with pytest.raises(CommandFailed):
        await process.run(["sh", "-c", script], cell=Cell())


async def test_a_program_that_is_not_there_is_named() -> None:
    with pytest.raises(CommandNotFound, match="no-such-program"):
        await process.run(["no-such-program"], cell=Cell())


async def test_a_cell_that_cannot_be_made_says_why(tmp_path: Path) -> None:
    with pytest.raises(TotoError, match="nowhere"):
        await process.run(["true"], cell=Cell(read={Path("/infra"): tmp_path / "nowhere"}))


async def test_it_sees_a_closure_and_no_other_store_path(tmp_path: Path) -> None:
    store = Path("/nix/store")
    paths = sorted(str(each) for each in store.glob("*-*") if not each.name.startswith("."))[:40]
    if len(paths) < 2:
        pytest.skip("there is nothing in /nix/store")
    cell = Cell(store=paths[1:])
    assert (await said(cell, "ls", "-A", "/nix/store")).lines == sorted(Path(each).name for each in paths[1:])
    assert (await said(cell, "sh", "-c", "touch /nix/store/x || touch /nix/store/*/x")).status != 0
    everything = (await said(Cell(store=True), "ls", "-A", "/nix/store")).lines
    assert Path(paths[0]).name in everything


async def test_programs_may_be_in_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on NixOS: their store paths are named, and the folders of toto's PATH that are among them are searched."""
    if not (found := sorted(Path("/nix/store").glob("*-lab-tools/bin/busybox"))):
        pytest.skip("the lab's tools are not in the store")
    (tmp_path / "tools").write_text(f"{found[0].parents[1]}\n")
    monkeypatch.setenv("TOTO_TOOLS", str(tmp_path / "tools"))
    monkeypatch.setenv("PATH", f"{found[0].parent}:{os.environ['PATH']}")
    for each in (cells.system_closure, cells.search_path):
        each.cache_clear()
    try:
        done = await said(Cell(), "/bin/sh", "-c", "command -v busybox; ls /nix/store")
        assert done.lines == [str(found[0]), found[0].parents[1].name], done
    finally:
        for each in (cells.system_closure, cells.search_path):
            each.cache_clear()


async def test_what_is_pushed_runs_nowhere_else(tmp_path: Path) -> None:
    """The type checker refuses a command with something pushed that has no cell."""
    source = """
from toto.base import process
from toto.base.process import Pushed
async def right(cell: process.Cell) -> None:
    await process.run([Pushed("/infra/x")], cell=cell)
async def wrong() -> None:
    await process.run([Pushed("/infra/x")])
    async with process.start([Pushed("/infra/x")]):
        pass
"""
    (tmp_path / "example.py").write_text(source)
    checked = await process.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", tmp_path / "cache", tmp_path / "example.py"],
        cwd=Path(__file__).parents[2],
        check=False,
        timeout=300,
    )
    refused = [line for line in checked.lines if 'incompatible type "Pushed"' in line]
    assert [line.split("example.py")[1].split(":")[1] for line in refused] == ["7", "8"]
    assert "Found 2 errors" in checked.stdout
    assert str(Pushed(Path("/infra/x"))) == "/infra/x"
