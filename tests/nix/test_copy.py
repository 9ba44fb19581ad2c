"""What is copied to a machine is signed by the repo's key, whoever toto is to its nix daemon."""

import os
import shutil
import uuid
from pathlib import Path

import pytest

from tests.machine.test_ssh import Server, needs_sshd, server
from toto.base import process
from toto.base.process import CommandFailed
from toto.git_host import host as git_host
from toto.machine import keys, ssh
from toto.nix import cache as caches
from toto.nix import commands as nix
from toto.nix import daemon

__all__ = ["server"]  # the fixture
pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("nix-daemon") is None, reason="toto runs its nix daemon here only as root"
)


async def closure(tmp_path: Path) -> tuple[str, str]:
    """A new store path and one that it refers to."""
    source = tmp_path / "source"
    source.write_text(str(uuid.uuid4()))
    added = (await process.run(["nix-store", "--add", source], env=nix.environment())).stdout.strip()
    expression = (
        '{ source }: derivation { name = "test"; system = "x86_64-linux"; builder = "/bin/sh"; '
        'args = [ "-c" "echo ${builtins.storePath source} > $out" ]; }'
    )
    made = await process.run(
        ["nix-instantiate", "--expr", expression, "--argstr", "source", added], env=nix.environment()
    )
    return await nix.build(made.stdout.strip(), tmp_path / "root", timeout=60, target="test"), added


async def signatures(path: str, env: dict[str, str]) -> list[str]:
    """The signatures of a path in the store that `env` names, without what else nix says there."""
    words = ["nix", "--extra-experimental-features", "nix-command", "path-info", "--sigs", path]
    said = (await process.run(words, env=env)).stdout.split()[1:]
    return [each for each in said if each != "ultimate" and not each.startswith("ca:")]


@needs_sshd
async def test_a_closure_arrives_signed_and_the_daemon_need_not_trust_toto(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setenv("TOTO_STATE", str(tmp_path / "a state"))
    repo = await git_host.make(tmp_path / "repos", "infra")
    key = await keys.make(repo, "cache", "signing")
    public = await keys.public_half(key)
    text = daemon.configuration().replace("trusted-users = root", "trusted-users = nobody")
    monkeypatch.setattr(daemon, "configuration", lambda: text)
    there = tmp_path / "machine"
    machines = nix.environment() | {"NIX_REMOTE": f"local?root={there}"}
    login = f"""env NIX_REMOTE='local?root={there}' sh -c \\"$SSH_ORIGINAL_COMMAND\\" """
    accepted = server.directory / "authorized"
    accepted.write_text(f'command="{login}" {accepted.read_text()}')

    async with daemon.running(tmp_path_factory.mktemp("a nix")) as socket:
        monkeypatch.setenv(daemon.SOCKET, str(socket))
        path, other = await closure(tmp_path)
        words = ["nix", "--extra-experimental-features", "nix-command", "store", "sign", "-k", str(key), path]
        with pytest.raises(CommandFailed, match="not privileged to add signatures"):
            await process.run(words, env=nix.environment())
        signed = tmp_path / "signed"
        for _ in range(2):  # (a second attempt finds the folder as the first has left it)
            await nix.sign(path, key, signed)
        async with ssh.connection(server.target, tmp_path / "an ssh") as connection:
            await nix.copy(path, "web1.lan", connection.config, timeout=60, target="web1", signed=signed)
        for each in (path, other):
            [signature] = await signatures(each, machines)
            assert signature.startswith("infra-cache:"), "it is the name of the key"
            assert await signatures(each, nix.environment()) == [], "no other repo's copy has it"
    # Who trusts the public half accepts it, whoever brings it.
    choosy = ["nix", "--extra-experimental-features", "nix-command", "store", "verify", "-r", "--no-contents"]
    trusting = [*choosy, "--sigs-needed", "1", "--option", "trusted-public-keys"]
    await process.run([*trusting, public, path], env=machines)
    with pytest.raises(CommandFailed, match="untrusted"):
        await process.run([*trusting, public.replace("infra-cache", "lab-cache"), path], env=machines)


@needs_sshd
async def test_a_machine_fetches_what_it_can_and_what_it_has_then_is_compared(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOTO_STATE", str(tmp_path / "state"))
    repo = await git_host.make(tmp_path / "repos", "infra")
    key = await keys.make(repo, "cache", "signing")
    there, cache = tmp_path / "machine", tmp_path / "cache"
    machines = nix.environment() | {"NIX_REMOTE": f"local?root={there}"}
    settings = (
        f"substituters = file://{cache}\ntrusted-public-keys = {await keys.public_half(key)}\nbuild-users-group ="
    )
    login, accepted = tmp_path / "login", server.directory / "authorized"
    own = f"NIX_REMOTE='local?root={there}' NIX_CONFIG='{settings}'"
    login.write_text(f'#!/bin/sh\nexport {own}\nexec sh -c "$SSH_ORIGINAL_COMMAND"\n')
    login.chmod(0o755)
    accepted.write_text(f'command="{login}" {accepted.read_text()}')
    (same, shared), (other, _) = await closure(tmp_path), await closure(tmp_path)
    cache.mkdir()
    await caches.add(shared, cache, key, timeout=60, target="web1")

    async with ssh.connection(server.target, tmp_path / "ssh") as connection:
        words: tuple[str, Path] = ("web1.lan", connection.config)
        await nix.copy(same, *words, timeout=60, target="web1", substitute=True)
        await nix.compare(same, *words, timeout=60, target="web1")
        assert await signatures(same, machines) == [], "what the cache has not was sent"
        assert [each.partition(":")[0] for each in await signatures(shared, machines)] == ["infra-cache"], "fetched"
        # A cache whose key the machine trusts has a different build of the same path.
        await caches.add(other, cache, key, timeout=60, target="web1")
        await _built_differently(other, cache, key, tmp_path)
        await nix.copy(other, *words, timeout=60, target="web1", substitute=True)
        assert (there / other[1:]).read_text() == "built elsewhere"
        with pytest.raises(nix.CopyFailed, match=r"2 paths .* not what was rehearsed"):
            await nix.compare(other, *words, timeout=60, target="web1")


async def _built_differently(path: str, cache: Path, key: Path, folder: Path) -> None:
    """Have a cache offer something else by the name of a path, rightly signed."""
    env = nix.environment() | {"NIX_REMOTE": f"local?root={folder / 'elsewhere'}", "NIX_CONFIG": "build-users-group ="}
    text = folder / "elsewhere" / path[1:]
    text.parent.mkdir(parents=True)
    text.write_text("built elsewhere")
    digest = (await process.run(["nix-hash", "--type", "sha256", text])).stdout.strip()
    size = len((await process.run(["nix-store", "--dump", text])).stdout)
    registered = f"{path}\n{digest}\n{size}\n\n0\n"
    await process.run(["nix-store", "--load-db"], env=env, stdin=registered.encode())
    (cache / f"{Path(path).name[:32]}.narinfo").unlink()
    await process.run(
        ["nix", *nix.NEW, "copy", "--no-check-sigs", "--to", f"file://{cache}?secret-key={key}", path], env=env
    )
