"""Private inputs of a flake: read by ssh with the repo's key, from hosts that are trusted, and nothing else."""

import json
import os
import shlex
import shutil
import tempfile
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.machine.test_ssh import Server, needs_sshd, sshd
from tests.repos import git
from toto.base import paths, process
from toto.base.errors import InputError
from toto.cell.namespace import ALLOWED, own_addresses
from toto.git_host import host as git_host
from toto.machine import keys
from toto.nix import commands as nix
from toto.nix import inputs
from toto.nix.hosts import Host
from toto.nix.inputs import InputsFailed
from toto.nix.messages import EvaluationFailed

pytestmark = [
    needs_sshd,
    pytest.mark.skipif(
        os.geteuid() != 0 or shutil.which("nix-daemon") is None, reason="toto runs its nix daemon here only as root"
    ),
]


@dataclass
class Fleet:
    """An infra repo whose flake has an input on a git server that only a key opens."""

    infra: Path
    tree: Path
    server: Server
    private: Path
    locked: str = ""
    word: str = field(default_factory=lambda: str(uuid.uuid4()))

    @property
    def url(self) -> str:
        return f"ssh://root@{self.server.target.address}:{self.server.target.port}{self.private}"

    async def lock(self) -> None:
        """Lock the flake as an operator does, with a key and a store of their own."""
        (self.tree / "flake.nix").write_text(
            f"""{{ inputs.secret.url = "git+{self.url}?ref=main"; outputs = inputs: {{ nixosConfigurations.a =
              {{ config.system.build.toplevel = derivation {{ name = "toplevel"; system = "x86_64-linux";
                 builder = "/bin/sh"; said = inputs.secret.word + builtins.readFile (inputs.secret + "/link"); }}; }};
              }}; }}"""
        )
        login = ["ssh", "-F", "none", "-i", str(self.tree.parent / "operators"), "-o", "StrictHostKeyChecking=no"]
        env = nix.environment() | {
            "GIT_SSH_COMMAND": shlex.join([*login, "-o", "UserKnownHostsFile=/dev/null"]),
            "NIX_REMOTE": f"local?root={self.tree.parent}/operator",
            "XDG_CACHE_HOME": f"{self.tree.parent}/cache",
        }
        await process.run(["nix", *nix._FLAKES, "flake", "lock", f"path:{self.tree}"], env=env, timeout=60)
        self.locked = (self.tree / "flake.lock").read_text()

    def change(self, **changes: object) -> None:
        """Push the lock with changes to what it says of the input."""
        lock: dict[str, Any] = json.loads(self.locked)
        lock["nodes"]["secret"]["locked"] |= changes
        (self.tree / "flake.lock").write_text(json.dumps(lock))

    async def fetch(self) -> None:
        if lacking := await inputs.lacking(self.tree):
            await inputs.fetch(lacking, *keys.of_inputs(self.infra), timeout=60)

    async def trusted(self) -> None:
        """What the administrator does: make the key, let it read, and trust the server's host key."""
        key = await keys.make(self.infra, keys.INPUTS, "ssh")
        with (self.server.directory / "authorized").open("a") as file:
            file.write(f'restrict,command="git shell -c \\"$SSH_ORIGINAL_COMMAND\\"" {await keys.public_half(key)}\n')
        target = self.server.target
        (paths.repo_state(self.infra) / "inputs_known_hosts").write_text(
            f"[{target.address}]:{target.port},[127.0.0.1]:{target.port},[localhost]:{target.port} "
            f"{self.server.host_key}\n"
        )


@pytest.fixture(params=["any revision", "only what has a name"])
async def fleet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> AsyncIterator[Fleet]:
    monkeypatch.setenv("TOTO_STATE", str(tmp_path / "state"))
    (address, *_) = own_addresses()
    # git's protocol 2, which gives any revision, comes by a variable.
    more = ["AcceptEnv GIT_PROTOCOL"] if request.param == "any revision" else []
    async with sshd(tmp_path, address, *more) as server:
        tree, private = tmp_path / "tree", tmp_path / "private"
        tree.mkdir()
        made = Fleet(await git_host.make(tmp_path / "repos", "infra"), tree, server, private)
        shutil.copy(server.directory / "user %h", tmp_path / "operators")
        git("init", "--quiet", "--initial-branch=main", private, cwd=tmp_path)
        (private / "flake.nix").write_text(f'{{ outputs = _: {{ word = "{made.word}"; }}; }}\n')
        (private / "file").write_text("a file")
        (private / "link").symlink_to("file")
        (private / "script").write_text("#!/bin/sh\n")
        (private / "script").chmod(0o755)
        git("add", "--all", cwd=private)
        git("commit", "--quiet", "-m", "it", cwd=private)
        await made.lock()
        git("commit", "--quiet", "--allow-empty", "-m", "newer", cwd=private)
        yield made


async def test_it_is_fetched_with_the_key_of_the_repo_and_evaluated_without(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="no key `inputs`") as no_key:
        await fleet.fetch()
    assert "next: on toto: toto key infra inputs --new ssh; let that key read there" in str(no_key.value)
    await keys.make(fleet.infra, keys.INPUTS, "ssh")

    before = fleet.server.journal.read_text()
    with pytest.raises(InputsFailed, match=f"unless {ALLOWED} names it"):
        await fleet.fetch()
    assert fleet.server.journal.read_text() == before, "nothing has reached this machine"
    monkeypatch.setenv(ALLOWED, f"{fleet.server.target.address}/32")
    with pytest.raises(InputsFailed, match="ssh-keyscan -p") as unknown:
        await fleet.fetch()
    assert "Host key verification failed" in str(unknown.value)
    [hint] = [line for line in str(unknown.value).splitlines() if "next: " in line]
    command = hint.partition("on toto: ")[2].partition(", and")[0]
    await process.run(["sh", "-c", command])  # as the administrator types it
    with pytest.raises(InputsFailed, match="let the repository's key `inputs` read there"):
        await fleet.fetch()

    await fleet.trusted()
    with pytest.raises(EvaluationFailed):  # nix itself has no key
        await nix.flake_hosts(fleet.tree, timeout=120)
    await fleet.fetch()
    assert await inputs.lacking(fleet.tree) == []
    assert await nix.flake_hosts(fleet.tree, timeout=60) == [Host("a")]
    drv = await nix.instantiate(fleet.tree, Host("a"), tmp_path / "root", timeout=60)
    assert f'("said","{fleet.word}a file")' in Path(drv).read_text()
    assert not [each for each in Path(tempfile.gettempdir()).glob("toto-*-inputs-*") if process.owner() in each.name]


async def test_what_has_a_different_hash_or_submodules_is_refused(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ALLOWED, f"{fleet.server.target.address}/32")
    await fleet.trusted()
    other = "sha256-" + "A" * 43 + "="
    fleet.change(narHash=other)
    with pytest.raises(InputsFailed, match="its narHash is a different one"):
        await fleet.fetch()
    fleet.change(narHash=other, rev="0" * 40)
    with pytest.raises(InputsFailed, match="is that revision still there"):
        await fleet.fetch()
    logins = fleet.server.logins()
    for changes in ({"submodules": True}, {"lfs": True}, {"exportIgnore": True}, {"narHash": "sha256-AAAA"}):
        fleet.change(**changes)
        with pytest.raises(InputError, match=r"it asks for|has no narHash"):
            await fleet.fetch()
    assert fleet.server.logins() == logins, "nobody was asked"


@pytest.mark.parametrize("fleet", ["any revision"], indirect=True)
async def test_addresses_that_lead_elsewhere_reach_nothing(fleet: Fleet, tmp_path: Path) -> None:
    await fleet.trusted()
    mark, port = tmp_path / "mark", fleet.server.target.port
    before = fleet.server.journal.read_text()
    hostile = [
        f"ssh://-oProxyCommand=touch%20{mark}/x",
        f"ssh://-oProxyCommand=touch${{IFS}}{mark}/x",
        f"ssh://root@-oProxyCommand=touch {mark}/x",
        "ssh://-lroot@host/x",
        "ssh://host:-1/x",
        f"ssh://host:{port}:1/x",
        f"ssh://host/$(touch {mark})",
        f"ssh://host/`touch {mark}`",
        "ssh://host/x\n--upload-pack=id",
        "ssh://host/'x",
        "ssh://[::1]/x",
        "ssh://root:word@host/x",
        "ssh://host",
        "SSH://host/x",
        "git+ssh://host/x",
        "ssh:host/x",
        "ssh://hoſt/x",
    ]
    for url in hostile:
        fleet.change(url=url)
        with pytest.raises(InputError, match=r"its address should be like ssh://"):
            await fleet.fetch()
    for host in ("127.0.0.1", "localhost", "10.0.2.2", "198.18.0.2", fleet.server.target.address):
        fleet.change(url=f"ssh://root@{host}:{port}{fleet.private}")
        with pytest.raises(InputsFailed):
            await fleet.fetch()
    # These are nix's to fetch, in a cell that has no key and no file of toto's.
    for url in (f"file://{fleet.private}", f"ext::sh -c 'touch {mark}'", f"file://{paths.state_home()}", "-u"):
        fleet.change(url=url)
        assert await inputs.lacking(fleet.tree) == []
        with pytest.raises(EvaluationFailed) as failed:
            await nix.flake_hosts(fleet.tree, timeout=60)
        assert fleet.word not in str(failed.value)
    assert not mark.exists() and fleet.server.journal.read_text() == before


@pytest.mark.parametrize(
    "lock", ["", "[]", "{", "null", '{"nodes": 1}', '{"nodes": {"a": 1, "b": {"locked": 2}}}', "[" * 100_000, "\xff"]
)
async def test_a_lock_that_is_none_is_left_to_nix(tmp_path: Path, lock: str) -> None:
    (tmp_path / "flake.nix").write_text("{ outputs = _: { }; }")
    (tmp_path / "flake.lock").write_text(lock, encoding="latin-1")
    assert await inputs.lacking(tmp_path) == []


async def test_a_lock_is_no_link_no_pipe_and_not_endless(tmp_path: Path) -> None:
    (tmp_path / "flake.nix").write_text("{ outputs = _: { }; }")
    lock = tmp_path / "flake.lock"
    secret = tmp_path / "secret"
    secret.write_text("{}")
    lock.symlink_to(secret)
    with pytest.raises(InputError, match="is no file of at most"):
        await inputs.lacking(tmp_path)
    lock.unlink()
    os.mkfifo(lock)
    with pytest.raises(InputError, match="is no file of at most"):
        await inputs.lacking(tmp_path)
    lock.unlink()
    lock.write_text(" " * 4_000_001)
    with pytest.raises(InputError, match="is no file of at most"):
        await inputs.lacking(tmp_path)
    many = {
        f"n{number}": {"locked": {"type": "git", "url": "ssh://h/x", "rev": "0" * 40, "narHash": ""}}
        for number in range(101)
    }
    lock.write_text(json.dumps({"nodes": many}))
    with pytest.raises(InputError, match="more than 100 inputs by ssh"):
        await inputs.lacking(tmp_path)
