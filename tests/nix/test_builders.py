"""Remote builders: real sshds with nix stores of their own on this machine, for a nix daemon of toto's."""

import asyncio
import os
import shutil
import signal
import stat
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.lab.fleet import command_of, processes
from tests.machine.test_ssh import Server, keygen, needs_sshd, sshd
from tests.repos import InfraRepo
from toto.base import files, paths, process, server_rules
from toto.base.errors import InputError
from toto.git_host import host as git_host
from toto.infra_repo.deployed import manifest_of
from toto.ledger.ledger import Ledger
from toto.ledger.target import Target
from toto.machine import fleet_builders
from toto.nix import builders, daemon, quiet
from toto.nix import commands as nix
from toto.nix.commands import BuildFailed
from toto.plan.host import DeployedHost

as_root = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("nix-daemon") is None, reason="toto runs its nix daemon here only as root"
)
# What a derivation does that leaves the name of who built it: the sandboxes of builders have it in a file.
WHO = "who=here; [ ! -e /who ] || read who < /who; echo $who > $out;"


@dataclass
class Builder:
    """An sshd whose logins get the nix store below `root`."""

    name: str
    server: Server
    root: Path

    def settings(self, *more: str, systems: Sequence[str] = ("x86_64-linux",), host_key: str | None = None) -> str:
        target = self.server.target
        lines = [
            f"[builders.{self.name}]",
            f'address = "{target.address}"\nport = {target.port}\nuser = "{target.user}"',
            f'host_key = "{host_key or self.server.host_key}"\nsystems = {list(systems)}\njobs = 2',
            *more,
        ]
        return "".join(f"{line}\n" for line in lines)

    def has(self, path: str) -> bool:
        return (self.root / path.removeprefix("/")).exists()

    def die(self) -> None:
        """As a machine that is switched off: its sshd ends, and every login with all that it runs."""
        [itself] = [each for each in processes() if f"{self.server.directory}/config".encode() in command_of(each)]
        for each in process.descendants(itself):
            os.kill(each, signal.SIGKILL)


@asynccontextmanager
async def builder(folder: Path, name: str, key: str = "") -> AsyncIterator[Builder]:
    """One that lets toto's key in for `nix-store --serve --write`, as examples/builder.nix does.

    `key` is its public half, when this process has a different state.
    """
    own = folder / name
    own.mkdir()
    (own / "who").write_text(f"{name}\n")
    files.write(own / "nix.conf", daemon.configuration().replace("/bin/sh=", f"/who={own}/who /bin/sh="), 0o644)
    async with sshd(own) as server:
        command = f"env NIX_REMOTE='local?root={own}/root' NIX_CONF_DIR={own} nix-store --serve --write"
        (server.directory / "authorized").write_text(
            f'restrict,command="{command}" {key or await builders.public_half()}'
        )
        yield Builder(name, server, own / "root")


def settings(*each: str) -> None:
    files.write(paths.state_home() / "server.toml", "".join(each))


@asynccontextmanager
async def building(monkeypatch: pytest.MonkeyPatch, home: Path, *each: str) -> AsyncIterator[None]:
    """A nix daemon of toto's with these builders."""
    settings(*each)
    async with daemon.running(home) as socket:
        monkeypatch.setenv(daemon.SOCKET, str(socket))
        yield


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TOTO_STATE", str(tmp_path / "a state"))
    return tmp_path


@pytest.fixture
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("a nix")


async def built(
    place: Path,
    script: str,
    system: str = "x86_64-linux",
    on_line: Callable[[str], None] | None = None,
    heard: builders.Heard | None = None,
) -> str:
    """What a new derivation, a shell script, leaves in its output: the path, which has it."""
    expression = (
        f'derivation {{ name = "thing"; once = "{uuid.uuid4()}"; system = "{system}"; builder = "/bin/sh"; '
        f"args = [ \"-c\" ''{script}'' ]; }}"
    )
    made = await process.run(["nix-instantiate", "--expr", expression], env=nix.environment())
    heard = heard or builders.Heard(on_line)
    return await nix.build(made.stdout.strip(), place / "root", timeout=60, target="web1", heard=heard)


def text(path: str) -> str:
    return Path(path).read_text().strip()


@needs_sshd
@as_root
async def test_a_builder_builds_and_its_key_is_roots_alone(
    place: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[str] = []
    async with builder(place, "one") as one, building(monkeypatch, home, one.settings()):
        path = await built(place, f"echo a line; {WHO}", on_line=heard.append)
        assert text(path) == "one" and one.has(path)
        assert "building thing on one" in heard and "a line" in heard
        with pytest.raises(BuildFailed, match="on 'ssh://one' failed") as failed:  # as a build that fails here
            await built(place, "echo why; exit 3", on_line=heard.append)
        assert "why" in failed.value.message and not failed.value.transient
        assert not any("was lost" in line for line in heard)

        said = await process.run([sys.executable, "-m", "toto.cli", "key", "builders"], env=dict(os.environ))
        assert said.stdout == await builders.public_half()
        key = await builders.key()
        assert stat.S_IMODE(key.stat().st_mode) == 0o600 and key.stat().st_uid == 0
        assert stat.S_IMODE((home / "builders").stat().st_mode) == 0o700
        # An evaluation sees the folder of the socket.
        assert sorted(each.name for each in daemon.socket().parent.iterdir()) == ["builders.pub", "nix.conf", "socket"]
        secret = key.read_text().splitlines()[1]
        assert secret not in "".join(each.read_text() for each in daemon.socket().parent.iterdir() if each.is_file())


@needs_sshd
@as_root
async def test_a_different_host_key_is_refused_and_a_change_of_the_settings_counts_at_once(
    place: Path, home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[str] = []
    other = await keygen(place / "other")
    async with builder(place, "one") as one, building(monkeypatch, home, one.settings(host_key=other)):
        assert text(await built(place, WHO, on_line=heard.append)) == "here"
        assert one.server.logins() == 0
        [told] = [line for line in heard if line.startswith("the builder one")]
        assert told == "the builder one is passed over: its host key is not the one of the settings"

        settings(one.settings().replace("x86_64-linux", "x86_64"))
        async with asyncio.timeout(120):
            while "the builders stay as they are: server.toml: builders.one.systems" not in caplog.text:
                await asyncio.sleep(0.1)
        settings(one.settings())
        async with asyncio.timeout(120):
            while text(await built(place, WHO)) != "one":
                await asyncio.sleep(0.2)


@needs_sshd
@as_root
async def test_what_a_builder_was_lost_with_is_built_by_the_other_one_then_here(
    place: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with builder(place, "one") as one, builder(place, "two") as two:
        heard: list[str] = []

        def dies_with(mortal: Builder) -> Callable[[str], None]:
            def hear(line: str) -> None:
                heard.append(line)
                if line == f"at work: {mortal.name}":
                    mortal.die()

            return hear

        async with building(monkeypatch, home, one.settings("speed = 9"), two.settings()):
            slow = f"{WHO} echo at work: $who; [ $who != one ] || sleep 600"
            both = builders.Heard(dies_with(one))
            assert text(await built(place, slow, heard=both)) == "two"
            assert both.who == "built by two 1; one was lost while it built thing"
            told = [line for line in heard if line.startswith(("building thing on", "the builder"))]
            assert told[:2] == ["building thing on one", "the builder one was lost while it built thing"]
            assert "Connection refused" in told[2] and told[3:] == ["building thing on two"]

            slow = f"{WHO} echo at work: $who; [ $who = here ] || sleep 600"
            assert text(await built(place, slow, on_line=dies_with(two))) == "here"
            assert "the builder two was lost while it built thing" in heard


@needs_sshd
@as_root
async def test_a_system_that_nobody_builds_is_named_and_one_that_a_builder_offers_goes_there(
    place: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        builder(place, "one") as one,
        builder(place, "arm") as arm,
        building(monkeypatch, home, one.settings(), arm.settings(systems=["aarch64-linux"])),
    ):
        with pytest.raises(BuildFailed) as failed:
            await built(place, WHO, "riscv64-linux")
        assert str(failed.value) == (
            "web1: nobody builds for riscv64-linux: this machine is x86_64-linux, and no builder offers it\n"
            "next: add a builder for it to server.toml (docs/builders.md)"
        )
        assert not failed.value.transient
        # THE DISPATCH ONLY: what is built for aarch64 cannot run on this machine, and `arm` says so.
        with pytest.raises(BuildFailed, match=r"on 'ssh://arm' failed: .*a 'aarch64-linux' .* is required"):
            await built(place, WHO, "aarch64-linux")
        arm.die()
        with pytest.raises(BuildFailed, match=r"x86_64-linux, and arm does not answer .*refused") as failed:
            await built(place, WHO, "aarch64-linux")
        assert failed.value.transient


@needs_sshd
@as_root
async def test_nothing_is_built_on_a_builder_that_is_to_be_quiet_and_what_it_builds_ends_first(
    place: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (more := place / "more").mkdir()
    async with builder(place, "calm") as calm, building(monkeypatch, home, calm.settings()):
        own = place / "calm/nix.conf"
        files.write(own, own.read_text().replace("/who=", f"/more={more} /who="), 0o644)
        began, entered, leave = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def be_quiet() -> None:
            async with quiet.quiet(home, ["calm"], patience=600):
                entered.set()
                await leave.wait()

        slow = f"{WHO} echo at work; while [ ! -e /more/go ]; do sleep 0.2; done"
        async with asyncio.timeout(120):
            first = asyncio.create_task(
                built(place, slow, on_line=lambda line: began.set() if line == "at work" else None)
            )
            await began.wait()
            waiting = asyncio.create_task(be_quiet())
            while text(await built(place, WHO)) != "here":
                await asyncio.sleep(0.2)
            async with quiet.quiet(home, ["calm"], patience=0):  # as a revert does, which waits for nothing
                assert not entered.is_set(), "one is at work there"
            (more / "go").touch()
            assert text(await first) == "calm"
            await entered.wait()
            assert text(await built(place, WHO)) == "here", "no build begins there"
            leave.set()
            await waiting
            while text(await built(place, WHO)) != "calm":
                await asyncio.sleep(0.2)


@needs_sshd
@as_root
async def test_a_machine_of_the_fleet_builds_when_the_settings_approve_its_host_key_and_as_its_manifest_says(
    place: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with builder(place, "one") as one:
        target = one.server.target
        repos = git_host.default_repos()
        repo = InfraRepo(place / "infra")
        lines = f"role: builder, ssh: {{port: {target.port}, host_key: {one.server.host_key}}}"
        commit = repo.commit(
            {"machines.yaml": f"machines:\n- {{name: pi, address: {target.address}, {lines}, builds: {{jobs: 3}}}}\n"}
        )
        repos.mkdir(parents=True)
        bare = repo.bare.rename(repos / "infra.git")
        assert fleet_builders.described([bare]) == {}, "it was not rolled out"
        good = DeployedHost(identity="drv", path="/nix/store/x", commit=commit, run="r", at="2026-01-01T00:00:00Z")
        await Ledger(bare).write(Target("host", "pi"), lambda entry: entry.model_copy(update={"good": good}), "good")
        (pi,) = fleet_builders.described([bare]).values()
        assert (pi.address, pi.port, pi.systems, pi.jobs) == (target.address, target.port, ("x86_64-linux",), 3)

        fleet = manifest_of(bare)
        approved = f'[fleet_builders."infra/pi"]\nhost_key = "{one.server.host_key}"\nuser = "{target.user}"\n'
        other = approved.replace(one.server.host_key, await keygen(place / "other"))
        async with building(monkeypatch, home, other):
            builders.tell(home, {"infra/pi": pi})
            assert builders.wanted(home) == {}, "whoever pushes a manifest cannot make it one"
            assert builders.unused_of(home, fleet) == ["pi"]
            settings(approved)
            async with asyncio.timeout(120):
                while text(await built(place, WHO)) != "one":
                    await asyncio.sleep(0.2)
            assert builders.listed(home)["infra.pi"].jobs == 3 and builders.unused_of(home, fleet) == []
            assert builders.same_as(home, fleet.machines["pi"]) == ["infra.pi"]
            async with asyncio.timeout(120), fleet_builders.not_building(fleet.machines["pi"], patience=60):
                assert text(await built(place, WHO)) == "here"
            for wrong in (b"{", b'{"infra/pi": {}}', b"x" * 2_000_000):
                (home / quiet.ASKED / "fleet.json").write_bytes(wrong)
                assert builders.wanted(home) == {}


DRV = "/nix/store/0kijw2kh0hhll9x5ilfwvzy9zbzask1f-thing.drv"
BEGIN = f"building '{DRV}' on 'ssh://one'..."


@pytest.mark.parametrize(
    ("said", "lost"),
    [
        (f"{BEGIN}\nerror: builder for '{DRV}' failed with exit code 1;", True),
        (f"{BEGIN}\nerror: Cannot build '{DRV}'.\n       Reason: builder failed with exit code 1.", True),  # nix 2.31
        (f"{BEGIN}\nerror: build of '{DRV}' on 'ssh://one' failed: x\nerror: builder for '{DRV}' failed", False),
        (f"building '{DRV}'...\nerror: builder for '{DRV}' failed with exit code 1;", False),
        (f"{BEGIN}\nerror: builder for '{DRV.replace('thing', 'other')}' failed with exit code 1;", False),
    ],
)
def test_a_lost_builder_and_a_failed_build_are_told_apart(said: str, lost: bool) -> None:
    lines: list[str] = []
    heard = builders.Heard(lines.append)
    for line in said.splitlines():
        heard(line)
    assert heard.lost == lost
    assert ("the builder one was lost while it built thing" in lines) == lost
    assert ("building thing on one" in lines) == said.startswith(BEGIN)
    assert heard.who.startswith("built by one 1" if said.startswith(BEGIN) else "built by toto 1")
    assert ("one was lost while it built thing" in heard.who) == lost


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"host_key": ""}, "server.toml: builders.one.host_key: is missing"),
        ({"host_key": 'host_key = "AAAA"'}, "builders.one.host_key: string should match pattern"),
        ({"systems": "systems = []"}, "builders.one.systems: tuple should have at least 1 item"),
        ({"systems": 'systems = ["x - -"]'}, "builders.one.systems.0: string should match pattern"),
        ({"address": 'address = "-oProxyCommand=x"'}, "builders.one.address: string should match pattern"),
        ({"address": 'address = "a\\n  ProxyCommand x"'}, "builders.one.address: string should match pattern"),
        ({"more": "port = 0"}, "builders.one.port: should be at least 1"),
        ({"more": 'prot = "ssh"'}, "builders.one.prot: is not a known field; did you mean 'port'?"),
        ({"name": '[builders."a b"]'}, "string should match pattern"),
    ],
)
def test_a_builder_that_cannot_be_is_refused(place: Path, change: dict[str, str], wrong: str) -> None:
    lines = {
        "name": "[builders.one]",
        "address": 'address = "builder.example.org"',
        "host_key": 'host_key = "ssh-ed25519 AAAAC3Nz builder"',
        "systems": 'systems = ["x86_64-linux"]',
    }
    settings("\n".join(lines.values()))
    assert server_rules.load().builders["one"].user == "builder"
    settings("\n".join((lines | change).values()))
    with pytest.raises(InputError) as refused:
        server_rules.load()
    assert wrong in str(refused.value)


def test_builders_of_a_toto_that_is_not_root_are_told_to_be_unused(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert builders.unused() == []
    settings('[builders.one]\naddress = "a"\nhost_key = "ssh-ed25519 AAAA"\nsystems = ["x86_64-linux"]\n')
    assert (builders.unused() == []) == (os.geteuid() == 0)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "a state/server.toml names builders, which are not used" in builders.unused()[0]


@pytest.mark.parametrize(
    ("said", "lost"), [("at work", True), ("cannot build on 'ssh://a': error: gone\n", True), ("error: x", False)]
)
def test_a_builder_that_goes_without_an_error_of_nixs_is_lost(said: str, lost: bool) -> None:
    lines: list[str] = []
    heard = builders.Heard(lines.append)
    heard(f"building '/nix/store/{'0' * 32}-thing.drv' on 'ssh://one'...")
    heard.ended(said)
    assert heard.lost is lost and (lines[-1] == "the builder one was lost while it built thing") is lost
