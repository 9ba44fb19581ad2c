"""Every way out of toto's user that we could think of, on a machine where systemd, sshd, sudo and nix are real."""

import asyncio
import json
import shlex
import struct
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Final

import pytest
import pytest_asyncio

from flying_monkey.desired import Deadlines, Machine, System
from flying_monkey.signature import seal
from tests.flying_monkey.access import PLACE, Locked
from tests.lab.debian import DebianMachine
from tests.lab.setup import environment, setup
from toto.base import process

pytestmark = [pytest.mark.minutes(5), pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def booted(tmp_path_factory: pytest.TempPathFactory, new_key: Callable[[str], Path]) -> AsyncIterator[Locked]:
    login, signer = new_key("login"), new_key("signer")
    files = Locked.files(login.with_suffix(".pub").read_text().strip(), signer)
    folder = tmp_path_factory.mktemp("debian")
    async with DebianMachine("web1", folder, login, address="127.0.8.2", files=files) as machine:
        locked = Locked(machine, signer)
        await locked.prepare()
        await machine.snapshot("ready")
        yield locked


@pytest_asyncio.fixture(loop_scope="module")
async def locked(booted: Locked) -> Locked:
    return await booted.again()


async def test_a_system_is_tried_kept_and_put_back(locked: Locked) -> None:
    new = await locked.system("new")
    facts = await locked.ask("facts")
    assert facts["system"] == facts["profile"] == locked.good.path and facts["serial"] == 0
    assert facts["host_keys"] == [" ".join(locked.machine.host_key.split()[:2])]
    assert await locked.ask("arm", locked.document(new)) == {"serial": 1, "step": "accepted"}
    assert await locked.ended() == "done 0"
    facts = await locked.ask("facts")
    assert (facts["system"], facts["profile"]) == (new.path, locked.good.path), "not yet what the next boot begins"
    assert await locked.ask("confirm", locked.document(new, "keep")) == {"serial": 2, "step": "kept"}
    assert await locked.ended() == "done 0"
    facts = await locked.ask("facts")
    assert (facts["system"], facts["profile"]) == (new.path, new.path)
    assert await locked.ask("arm", locked.document(locked.good, "back")) == {"serial": 3, "step": "accepted"}
    assert await locked.ended() == "done 0"
    facts = await locked.ask("facts")
    assert (facts["system"], facts["profile"]) == (locked.good.path, locked.good.path)
    assert await locked.activations() == ["new test", "new switch", "good switch"]


async def test_what_nobody_keeps_goes_back_by_itself(locked: Locked) -> None:
    new = await locked.system("new", "echo said by the system")
    await locked.ask("arm", locked.document(new, deadlines=Deadlines(confirm=5)))
    while (state := (await locked.ask("status 30"))["state"]) != "back 0":
        assert state in ("running", "done 0")
        await asyncio.sleep(1)
    assert (await locked.ask("facts"))["system"] == locked.good.path
    refused = await locked.ask("confirm", locked.document(new, "keep"))
    assert "not confirmed in time" in refused["error"]
    assert "said by the system" in (await locked.ask("log"))["log"]
    assert await locked.activations() == ["new test", "good test"]


async def test_nothing_is_obeyed_that_is_not_a_new_document_for_this_machine(
    locked: Locked, new_key: Callable[[str], Path]
) -> None:
    new, unsigned = await locked.system("new"), await locked.system("unsigned", signed=False)
    first = locked.document(new)
    other_machine = replace(first, machine=replace(first.machine, name="web2"))
    other_key = replace(first, machine=Machine("web1", first.machine.host_key.replace("AAAAC3", "AAAAC4")))
    old = replace(first, issued=first.issued - timedelta(days=9), expires=first.issued - timedelta(days=2))
    wrong_hash = replace(first, system=System(new.path, locked.good.nar_hash))
    missing = replace(first, system=System(new.path.replace("-new", "-gone"), new.nar_hash))
    for document, words in [
        (other_machine, "for the machine web2"),
        (other_key, "a different host key"),
        (replace(first, repo="other"), "of the repo other"),
        (old, "it expired"),
        (replace(first, phase="keep"), "its phase is keep"),
    ]:
        refused = await locked.ask("arm", document)
        assert words in refused.get("error", ""), (words, refused)
    assert "its phase is try" in (await locked.ask("confirm", first))["error"]
    for envelope in (b"", b"{}", b"\0" * 1_000, seal(first.write(), new_key("stranger")), first.write()):
        refused = await locked.ask("arm", envelope)
        assert refused["kind"] == "NotGenuine", refused
    changed = json.loads(seal(first.write(), locked.signer))
    changed["text"] = changed["text"].replace('"serial":1', '"serial":2')
    assert (await locked.ask("arm", json.dumps(changed).encode()))["kind"] == "NotGenuine"
    assert (await locked.ask("facts"))["serial"] == 0, "what was refused is not remembered"

    await locked.ask("arm", first)
    assert await locked.ended() == "done 0"
    await locked.ask("arm", locked.document(locked.good, "back"))
    assert await locked.ended() == "done 0"
    replayed = await locked.ask("arm", first)
    assert "its serial is 1, and this machine has had 2" in replayed["error"]
    assert await locked.activations() == ["new test", "good test", "good switch"]
    for document, words in [
        (wrong_hash, "has the hash"),
        (missing, "not valid"),
        (replace(first, system=unsigned), "untrusted"),
    ]:
        locked.serial += 1
        await locked.ask("arm", replace(document, serial=locked.serial))
        assert await locked.ended() == "back 0"
        assert words in (await locked.ask("status 0"))["error"]
    assert await locked.activations() == ["new test", "good test", "good switch"]


LINES = [
    *("sh", "bash -i", "id", "facts; id", "facts && id", "facts | id", "facts\nid", "$(id)", "`id`", " facts"),
    *("facts ", "FACTS", "facts --help", "status", "status -1", "status 100", "status 5; id", "status 5\n", "status ٣"),
    *("exec", "scp -t /tmp", "sftp", "internal-sftp", "/usr/lib/openssh/sftp-server", "rsync --server . /"),
    *(
        "nix-store --serve",
        "nix-store --serve --write --option builders x",
        "nix-daemon --stdio",
        "nix-store -q --roots",
    ),
    *("sudo -n id", "sudo -n /bin/sh", f"{PLACE}/helper", f"sudo -n {PLACE}/helper arm", "env facts", "../gate -c id"),
    *("test", "test ", "test x;id", "test W10 W10", "test W10\n", "testW10"),
    *("arm x", "confirm keep", "git-upload-pack x", "login", "begin a b c", "facts\r", "\x1b[A"),
]


async def test_no_other_command_is_done(locked: Locked) -> None:
    answer = await locked.ssh("")
    assert answer.status == 64 and "this user can do" in answer.err, "no command is no shell either"
    for begin in range(0, len(LINES), 6):  # a few at a time: sshd lets in ten that have not logged in yet
        lines = LINES[begin : begin + 6]
        for line, answer in zip(lines, await asyncio.gather(*(locked.ssh(each) for each in lines)), strict=True):
            assert answer.status == 64 and not answer.out, (line, answer)
            assert "this user can do: facts, status SECONDS, arm, confirm, log" in answer.err, (line, answer)


async def sftp(locked: Locked, user: str) -> bytes:
    """How the answer to an sftp client begins; b"" when there is none."""
    words = [*locked.machine.ssh_options, "-s", f"{user}@{locked.machine.address}", "sftp"]
    ssh = await asyncio.create_subprocess_exec(
        "ssh", *words, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    assert ssh.stdin and ssh.stdout
    ssh.stdin.write(struct.pack(">IBI", 5, 1, 3))  # SSH_FXP_INIT
    said = await asyncio.wait_for(ssh.stdout.read(2), 60)
    ssh.stdin.close()
    await ssh.wait()
    return said


async def test_no_subsystem_is_run_by_sshd_itself(locked: Locked) -> None:
    """By `internal-sftp` sshd serves files as the user, whatever its login shell is."""
    await locked.machine.check(
        "sed -i 's/^Subsystem.*/Subsystem sftp internal-sftp/' /etc/ssh/sshd_config; systemctl restart ssh"
    )
    assert (await sftp(locked, "root"), await sftp(locked, "toto")) == (bytes(2), b"")
    await locked.machine.check("sed -i /ForceCommand/d /etc/ssh/sshd_config.d/20-toto.conf; systemctl restart ssh")
    assert await sftp(locked, "toto") == bytes(2), "the ForceCommand it is that keeps it out"


async def test_no_word_of_the_environment_and_no_file_of_the_user_counts(locked: Locked) -> None:
    await locked.machine.check(
        "mkdir -p /var/empty/.ssh && echo 'echo LEAK' | tee /var/empty/.bashrc /var/empty/.profile /var/empty/.ssh/rc"
        " && echo 'BASH_ENV=/var/empty/.bashrc' > /var/empty/.ssh/environment && chown -R toto /var/empty"
    )
    for name in (
        "BASH_ENV",
        "ENV",
        "PYTHONPATH",
        "PYTHONSTARTUP",
        "LD_PRELOAD",
        "PATH",
        "LC_ALL",
        "LANG",
        "SSH_ORIGINAL_COMMAND",
    ):
        answer = await locked.ssh("facts", options=("-o", f"SetEnv={name}=/var/empty/.bashrc"))
        assert answer.status == 0 and "LEAK" not in answer.out + answer.err and "system" in json.loads(answer.out), name


async def test_nothing_is_forwarded_and_no_terminal_is_given(locked: Locked) -> None:
    answer = await locked.ssh("facts", options=("-tt",))
    assert "PTY allocation request failed" in answer.err
    for option in (("-W", "127.0.0.1:22"), ("-R", "127.0.0.1:4444:127.0.0.1:1", "-o", "ExitOnForwardFailure=yes")):
        answer = await locked.ssh("" if option[0] == "-W" else "facts", options=option)
        assert answer.status == 255 and not answer.out, (option, answer)


async def test_no_other_key_and_no_password_lets_in(locked: Locked, new_key: Callable[[str], Path]) -> None:
    stranger = new_key("stranger")
    await locked.machine.check(
        f"mkdir -p /var/empty/.ssh && echo '{stranger.with_suffix('.pub').read_text().strip()}' > "
        "/var/empty/.ssh/authorized_keys && chown -R toto /var/empty && passwd --status toto | grep -q ' L '"
    )
    answer = await locked.ssh("facts", options=("-i", str(stranger), "-o", "IdentityAgent=none"))
    assert answer.status == 0, "the key of root's file"
    words = [
        each if each != str(locked.machine.key.absolute()) else str(stranger) for each in locked.machine.ssh_options
    ]
    process = await asyncio.create_subprocess_exec(
        "ssh", *words, "-o", "IdentityAgent=none", f"toto@{locked.machine.address}", "facts",
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, err = await process.communicate()
    assert process.returncode == 255 and not out and b"Permission denied" in err


async def test_sudo_gives_root_nothing_but_the_helper(locked: Locked) -> None:
    """As the user would, were the gate left behind."""
    as_toto = "setpriv --reuid=toto --regid=toto --init-groups --reset-env"
    for words in (
        *("id", "/bin/sh", f"{PLACE}/helper arm", f"{PLACE}/helper ''", f"-u nobody {PLACE}/helper", "-e /etc/shadow"),
        *(
            f"FOO=1 {PLACE}/helper",
            f"BASH_ENV=/x {PLACE}/helper",
            f"-E {PLACE}/helper",
            f"PYTHONPATH=/x {PLACE}/helper",
        ),
        *(f"{PLACE}/gate", "-s", "-i"),
    ):
        answer = await locked.machine.ssh(f"{as_toto} sudo -n {words} </dev/null", login=False)
        assert answer.status != 0 and "uid=0" not in answer.out, (words, answer)
    answer = await locked.machine.ssh(f'echo \'{{"verb": "facts"}}\' | {as_toto} sudo -n {PLACE}/helper', login=False)
    assert answer.status == 0 and json.loads(answer.out)["name"] == "web1"
    for request in (
        "",
        "[]",
        "{}",
        '{"verb": "guard"}',
        '{"verb": "arm"}',
        '{"verb": "status", "wait": "1; id"}',
        "[" * 9_999,
    ):
        answer = await locked.machine.ssh(f"echo '{request}' | {as_toto} sudo -n {PLACE}/helper", login=False)
        assert json.loads(answer.out)["kind"] == "BadRequest", request


BUILT: Final = """derivation {
  name = "toto-access-NAME"; system = builtins.currentSystem; builder = "/bin/sh"; args = [ "-c" "echo NAME > $out" ];
}"""


async def build_over_ssh(locked: Locked, drv: str) -> str:
    """Ask for a build by nix's serve protocol, version 2.1; what the machine says to it."""
    magic, version, build, no_limit = 0x390C9DEB, 0x201, 6, 0
    path = struct.pack("<Q", len(drv)) + drv.encode().ljust(-len(drv) % 8 + len(drv), b"\0")
    words = [*locked.machine.ssh_options, f"toto@{locked.machine.address}", "nix-store --serve --write"]
    ssh = await asyncio.create_subprocess_exec(
        "ssh", *words, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    assert ssh.stdin and ssh.stdout
    ssh.stdin.write(struct.pack("<4Q", magic, version, build, 1) + path + struct.pack("<2Q", no_limit, no_limit))
    said, built = b"", bytes(8)
    async with asyncio.timeout(300):
        while b"max-jobs" not in said and said[16:24] != built and (more := await ssh.stdout.read(1_000)):
            said += more
    ssh.stdin.close()
    await ssh.wait()
    return "built" if said[16:24] == built else said.decode(errors="replace")


async def test_toto_writes_what_is_signed_to_the_store_and_builds_nothing(locked: Locked, tmp_path: Path) -> None:
    """(A path whose name follows from its contents needs no signature: it is what it says.)"""
    setup()
    to = f"ssh://toto@{locked.machine.address}"
    env = environment() | {"NIX_SSHOPTS": shlex.join(locked.machine.ssh_options)}

    async def nix(*words: str, check: bool = True) -> process.Completed:
        return await process.run(words, env=env, timeout=300, check=check)

    mine = (await nix("nix-build", "--no-out-link", "--expr", BUILT.replace("NAME", tmp_path.parent.name))).lines[-1]
    copy = ("nix", "copy", "--to", to)
    for words in ((*copy, mine), (*copy, "--no-check-sigs", mine)):
        refused = await nix(*words, check=False)
        assert refused.status != 0 and "signature" in refused.stderr, refused.stderr
    key = tmp_path / "secret"
    key.write_text(await locked.machine.check("cat /root/secret"))
    await nix("nix", "store", "sign", "--recursive", "--key-file", str(key), mine)
    await nix(*copy, mine)
    assert await locked.machine.check(f"cat {mine}") == tmp_path.parent.name

    other = (await nix("nix-instantiate", "--expr", BUILT.replace("NAME", f"other-{tmp_path.parent.name}"))).lines[-1]
    await nix(*copy, "--derivation", other)
    await locked.machine.check(f"test -e {other}")
    # (No command of nix's own asks for that over ssh. A program that speaks the protocol does.)
    said = await build_over_ssh(locked, other)
    assert "max-jobs" in said, said
    document = locked.document(System(mine, (await nix("nix-store", "--query", "--hash", mine)).stdout.strip()))
    await locked.ask("arm", document)
    assert await locked.ended() == "back 0"
    assert "is no NixOS system" in (await locked.ask("status 0"))["error"]


async def test_a_configuration_that_others_may_write_is_not_used(locked: Locked) -> None:
    await locked.machine.check("chmod 666 /etc/flying-monkey/config.json")
    answer = await locked.ssh("facts")
    assert answer.status == 64 and "others may write to it" in answer.err
    await locked.machine.check(
        "chmod 644 /etc/flying-monkey/config.json; echo x > /var/lib/flying-monkey/memory.json || "
        "{ mkdir -p /var/lib/flying-monkey; echo x > /var/lib/flying-monkey/memory.json; }"
    )
    new = await locked.system("new")
    assert (await locked.ask("arm", locked.document(new)))["kind"] == "Lost"
    assert await locked.activations() == []
