"""A red team's infra repo, pushed over ssh to a whole toto: none of its ways out reaches anything.

Each way is a small file in `ways/repo/`. mallory may rehearse alice's repo `infra`, and deploy her own, `red`; of
`vault` and of the rules she may see nothing. What may go side by side is in one commit; `push/` has commits of their
own.

A way says what toto answers to it, when it has got as far as it can (`# says:`): one that fails earlier proves nothing.
"""

import asyncio
import os
import re
import subprocess
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import pytest_asyncio

from tests.attack.victim import CANARY, Victim, serving
from tests.conftest import free_port
from tests.git_host.test_over_ssh import Clone, Host, set_rules
from tests.lab import setup
from tests.lab.fleet import Fleet, command_of, processes
from tests.lab.nix import nix_string
from tests.machine.test_ssh import keygen
from tests.repos import git
from toto.base import process
from toto.base.prefect_api import saved_auth
from toto.cell.namespace import own_addresses
from toto.git_host import access
from toto.git_host import host as git_host
from toto.server.environment import PROFILES

pytestmark = [
    pytest.mark.lab,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.minutes(2),
    pytest.mark.xdist_group("127.0.6"),
    pytest.mark.skipif(os.geteuid() != 0, reason="sshd runs an AuthorizedKeysCommand for root only"),
]

WAYS: Final = Path(__file__).parent / "ways" / "repo"
ALL: Final = bool(os.environ.get("TOTO_ATTACK"))
SURVIVOR: Final = b"765432"
STORE: Final = Path("/nix/store")
REPOS: Final = ("infra", "red")
OWN: Final = ("profiles.toml", "auth", "auth.curl", "server.json")  # where toto has its password; only it reads them
# What stands for nixpkgs: a host says one thing. A host of the lab is a module, which is a function.
NIXOS: Final = """{ configuration, system }:
let
  file = if configuration ? imports then builtins.head configuration.imports else configuration;
  host = import file;
  toplevel = derivation { name = "way"; inherit system; builder = "/bin/sh"; said = toString host.said; };
in if host ? said then { config.system.build = { inherit toplevel; vm = toplevel; }; }
else import <nixpkgs/nixos> { inherit configuration system; }
"""
LAB: Final = """{
  services.openssh.enable = true;
  fileSystems."/" = { device = "/dev/vda"; fsType = "ext4"; };
  boot.loader.grub.device = "/dev/vda";
  system.stateVersion = "24.11";
}
"""
SETTINGS: Final = """[nix]
nixpkgs = "nixpkgs.nix"
unlisted = true
[roll_out]
policy = "partial"
[sandbox]
boot_timeout = 60
"""
BASE: Final = {
    "machines.yaml": "machines: []\n",
    "toto.toml": SETTINGS,
    "nixpkgs.nix": "./nixpkgs\n",
    "nixpkgs/nixos/default.nix": NIXOS,
    "lab.nix": LAB,
}
# A host that says what an expression gives: in the store, and in the error of its evaluation.
SAID: Final = """{ said = let got = builtins.toJSON (
%s
); in builtins.seq (builtins.toFile "way" (builtins.unsafeDiscardStringContext got)) (throw "${%s} got ${got}"); }
"""
EXCERPT: Final = re.compile(r"^\s*\d+\|.*$", re.MULTILINE)  # of the way's own text, in an error of nix's
# A bare repository that is committed as files, whose settings name commands.
BARE: Final = """[core]
repositoryformatversion = 1
bare = true
fsmonitor = touch /tmp/way
[extensions]
partialClone = o
[remote "o"]
url = ext::sh -c "ls /nix/store >&2"
promisor = true
[protocol]
allow = always
[uploadpack]
packObjectsHook = ls /nix/store
"""


@dataclass(frozen=True)
class Way:
    """One way out: its file or folder, what toto answers, and in which runs it gets so far."""

    path: Path
    says: str
    when: tuple[str, ...]
    rehearser_only: bool = False

    @property
    def kind(self) -> str:
        return self.path.parent.name

    @property
    def name(self) -> str:
        return self.path.name.partition(".")[0]

    @property
    def target(self) -> str:
        """The label of the target that it is in a run."""
        return f"{self.kind}/{self.name}" if self.kind in ("terraform", "helm") else self.name

    def told(self, messages: list[tuple[str, str]]) -> str:
        """What a run said of the target, without its own text: nix shows the lines where an error is."""
        subflow = self.name if self.kind in ("terraform", "helm", "host") else None
        mine = [text for run, text in messages if run == subflow or self.target in _named(text)]
        return EXCERPT.sub("", "\n".join(mine))


def _named(text: str) -> list[str]:
    """The targets that a message of a run is about: before its first colon; or in its last line, when they are many."""
    everyone = re.search(r"^all \d+: (.*)\Z", text, re.MULTILINE)
    return (everyone[1] if everyone else text.partition(": ")[0]).split(", ")


def _way(path: Path) -> Way:
    files = (
        [path] if path.is_file() else [path / name for name in ("main.tf", "release.yaml") if (path / name).exists()]
    )
    text = files[0].read_text()
    told = dict(re.findall(r"^# (says|when|by): (.*)$", text, re.MULTILINE))
    # Nothing of terraform, helm and a VM runs for a plan; a release is deployed where there is a cluster.
    usual = {"terraform": "rehearse deploy", "host": "rehearse deploy", "helm": "rehearse"}
    when = tuple(told.get("when", usual.get(path.parent.name, "plan rehearse deploy")).split())
    return Way(path, told["says"], when, "by" in told)


def ways(*kinds: str) -> list[Way]:
    """All ways of some kinds for `make attack`, else some."""
    found = [_way(path) for kind in kinds for path in sorted((WAYS / kind).iterdir())]
    return found if ALL else found[::6]


TOGETHER: Final = ways("evaluation", "builder", "terraform", "helm", "host")


class Red(Fleet):
    """A whole toto with secrets, and two users of its git host."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, net=6)
        self.host = Host(directory, free_port())
        kept = (
            "state/keys",
            "state/canary",
            "repos/vault.git",
            "repos/toto-admin.git",
            "repos/infra.git/refs/heads/main",
        )
        self.victim = Victim(directory, within=kept)
        self.words: dict[str, str] = {}
        self.secrets: list[str] = [CANARY]
        self.said: list[str] = []
        self.paths: set[str] = set()

    @property
    def environment(self) -> dict[str, str]:
        return super().environment | {"CANARY": CANARY, "HOME": str(self.directory / "home")}

    async def make_users(self) -> None:
        """Secrets in toto's state and its user's home, and a git host with users; no repository yet."""
        for name in ("state", "state/keys", "home"):
            (self.directory / name).mkdir(mode=0o700)
        (self.state / "canary").write_text(f"{CANARY}: of toto's state\n")
        (self.state / "keys" / "canary").write_text(f"{CANARY}: a key\n")
        for name in ("machines", "sandbox"):
            await keygen(self.state / "keys" / name)
            self.secrets.append((self.state / "keys" / name).read_text().splitlines()[2])
        (self.directory / "home" / ".gitconfig").write_text(
            f'[filter "evil"]\nsmudge = touch {self.state}/keys/new; cat\nrequired = true\n'
        )
        for name in ("host", "alice", "mallory"):
            await keygen(self.host.folder / name)
        await git_host.make_admin(self.host.repos, "alice", (self.host.folder / "alice.pub").read_text())
        mallory = (self.host.folder / "mallory.pub").read_text().strip()
        set_rules(
            self.host,
            self.host.clone("alice", access.ADMIN),
            lambda text: (
                text.replace("[users]", f'[users]\nmallory = ["{mallory}"]')
                + '[repos.infra]\nadmin = ["alice"]\nrehearse = ["mallory"]\n'
                + '[repos.red]\nadmin = ["alice"]\ndeploy = ["mallory"]\n'
            ),
            push=False,
        )

    async def make_repositories(self) -> None:
        """alice makes them; hers have something in them. From now on all that is reached is noticed."""
        vault = ""
        for name, text in (("infra", "the fleet"), ("vault", CANARY), ("red", "")):
            done = self.host.ask("alice", "repo", "create", name)
            assert done.returncode == 0, done.stderr
            if text:
                clone = self.host.clone("alice", name)
                write(clone.folder, BASE | {"README.md": f"{text}\n"})
                clone.git("add", "--all")
                vault = clone.commit()
                clone.push("main", "skip")
        foreign = self.directory / "foreign"
        foreign.write_text(f"{CANARY}: a store path of the vault\n")
        added = await process.run(["nix-store", "--add", foreign])
        addresses = own_addresses() or ["192.0.2.2"]
        self.words = {
            "VICTIM": str(self.directory),
            "FOREIGN": added.stdout.strip(),
            "TCP": str(self.victim.tcp),
            "UDP": str(self.victim.udp),
            "API": str(self.port),
            "PID": str(os.getpid()),
            "ADDRESS": addresses[0],
            "ADDRESSES": " ".join(addresses),
            "HASH": "0" * 64,
            "VAULT": vault,
        }
        auth = saved_auth(self.home / PROFILES)
        assert auth is not None
        self.secrets.append(auth.partition(":")[2])
        self.victim.remember()
        self.paths = {each.name for each in STORE.iterdir()}

    def filled(self, text: str) -> str:
        """A way's text, with the words of this victim; what is built is built each time."""
        for name, value in {**self.words, "ONCE": uuid.uuid4().hex}.items():
            text = text.replace(f"@{name}@", value)
        return text

    def clone_of(self, repo: str, what: str) -> Clone:
        """A new clone of mallory's, with a tree that has no way out yet."""
        folder = self.directory / "clones" / f"{what}-{uuid.uuid4().hex[:8]}"
        folder.mkdir(parents=True)
        clone = Clone(folder / repo, Path(repo))
        clone.git("config", "core.sshCommand", self.host.ssh("mallory"))
        clone.git("remote", "add", "toto", self.host.url(repo))
        clone.git("fetch", "--quiet", "toto")
        if clone.git("for-each-ref", "refs/remotes/toto/main"):
            clone.git("reset", "--quiet", "--soft", "toto/main")
        return clone

    async def messages(self, run: str) -> list[tuple[str, str]]:
        """What a run and its subflows have logged: the name of the run or subflow, and the message."""
        found: list[tuple[str, str]] = []
        family = await asyncio.to_thread(self.family, run)
        asked: dict[str, Any] = {"flow_runs": {"id": {"any_": family}}, "limit": 200}
        runs = await asyncio.to_thread(self.api, "POST", "/flow_runs/filter", asked)
        names = {each["id"]: each["name"] for each in runs}
        for offset in range(0, 100_000, 200):
            asked = {"logs": {"flow_run_id": {"any_": family}}, "sort": "TIMESTAMP_ASC", "limit": 200, "offset": offset}
            page: list[dict[str, Any]] = await asyncio.to_thread(self.api, "POST", "/logs/filter", asked)
            found += [(names.get(each["flow_run_id"], ""), each["message"]) for each in page]
            if len(page) < 200:
                break
        return found

    async def harm(self) -> list[str]:
        """What has been reached, in words."""
        found = self.victim.harm()
        found += [f"a secret is in {text[:300]!r}" for text in self.said if any(each in text for each in self.secrets)]
        new = [STORE / each.name for each in STORE.iterdir() if each.name not in self.paths and not each.is_symlink()]
        logs = [self.directory / name for name in ("journal", "toto.log")]
        for path in await asyncio.to_thread(
            having, self.secrets, [self.state, self.home, self.host.repos, *logs, *new]
        ):
            # (A repository's own keys: `infra` has inherited the one of a toto that had but one.)
            keys = path.parent.name == "keys" and path.is_relative_to(self.state / "repos")
            own = (path.name in OWN or keys) and path.stat().st_mode & 0o077 == 0
            kept = (self.state / "keys", self.state / "canary", self.host.repos / "vault.git")
            found += [] if own or any(path.is_relative_to(each) for each in kept) else [f"a secret is in {path}"]
        for repo in REPOS:
            everything = subprocess.run(
                ["git", "cat-file", "--batch", "--batch-all-objects", "--buffer"],
                cwd=self.host.repos / f"{repo}.git",
                capture_output=True,
                check=True,
            ).stdout
            found += [f"a secret is in {repo}" for secret in self.secrets if secret.encode() in everything]
        return found


def write(folder: Path, files: Mapping[str, str]) -> None:
    """Write files below a folder; what begins with `#!` can be run."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755 if text.startswith("#!") else 0o644)


def having(secrets: list[str], places: list[Path]) -> list[Path]:
    """The files in and below some places that have one of the secrets in them. No link is followed."""
    patterns = "\n".join(secrets)
    argv = ["grep", "--recursive", "--files-with-matches", "--fixed-strings", "--text", "--no-messages", "--file=-"]
    found: list[Path] = []
    for start in range(0, len(places), 500):
        some = [str(each) for each in places[start : start + 500] if each.exists()]
        done = subprocess.run([*argv, "--", *some], input=patterns, capture_output=True, text=True, check=False)
        found += map(Path, done.stdout.splitlines())
    return found


def tree(red: Red, folder: Path, chosen: list[Way]) -> None:
    """An infra repo with some ways in it."""
    hosts = [way.name for way in chosen if way.kind in ("evaluation", "builder", "host")]
    listed = "".join(
        f"  - {{name: {name}, address: 192.0.2.{number}, role: other}}\n" for number, name in enumerate(hosts)
    )
    write(folder, BASE | {"machines.yaml": f"machines:\n{listed}" if hosts else "machines: []\n"})
    for way in chosen:
        match way.kind:
            case "evaluation":
                write(
                    folder, {f"hosts/{way.name}.nix": SAID % (red.filled(way.path.read_text()), nix_string(way.name))}
                )
            case "builder":
                script = red.filled(way.path.read_text())
                network = "# network" in script
                made = f"{{ {script} }} >&2; exit 1" if network else f"{{ {script} }} 2>&1 | tr -d '\\000' > $out"
                fixed = f'outputHashMode = "flat"; outputHashAlgo = "sha256"; outputHash = "{"0" * 64}";'
                text = (
                    f'builtins.readFile (derivation {{ name = "way"; once = "{uuid.uuid4()}"; builder = "/bin/sh"; '
                    f'system = "x86_64-linux"; args = [ "-c" {nix_string(made)} ]; {fixed if network else ""} }})'
                )
                write(folder, {f"hosts/{way.name}.nix": SAID % (text, nix_string(way.name))})
            case "host":
                write(folder, {f"hosts/{way.name}.nix": red.filled(way.path.read_text())})
            case kind:
                for file in way.path.rglob("*"):
                    if file.is_file():
                        name = f"{kind}/{way.name}/{file.relative_to(way.path)}"
                        write(folder, {name: red.filled(file.read_text())})
                        (folder / name).chmod(file.stat().st_mode)


def bare(folder: Path) -> None:
    """A bare repository as files, with settings that name commands."""
    git("init", "--quiet", "--bare", "--initial-branch=main", folder, cwd=folder.parent)
    empty = git("hash-object", "-w", "-t", "tree", "/dev/null", cwd=folder)
    commit = git("commit-tree", "-m", "x", empty, cwd=folder)
    git("update-ref", "refs/heads/main", commit, cwd=folder)
    for hook in (folder / "hooks").iterdir():
        hook.unlink()
    (folder / "config").write_text(BARE)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def red(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Red]:
    await asyncio.to_thread(setup.setup)
    red = Red(tmp_path_factory.mktemp("red"))
    try:
        await red.make_users()
        sshd = await red.host.sshd(red.state)
        async with process.start([*sshd, "-E", red.host.folder / "journal"]), serving(red.victim):
            await red.start_server()
            await red.make_repositories()
            yield red
    finally:
        await asyncio.shield(red.stop())
        if foreign := red.words.get("FOREIGN"):
            await process.run(["nix-store", "--delete", foreign], check=False)


PUSHES: Final = [("infra", "plan"), ("infra", "rehearse"), ("red", "plan"), ("red", "rehearse"), ("red", "deploy")]


@pytest.mark.parametrize(("repo", "how"), PUSHES if ALL else [PUSHES[1], PUSHES[4]])
async def test_the_ways_that_go_together_reach_nothing(red: Red, repo: str, how: str) -> None:
    clone = red.clone_of(repo, how)
    tree(red, clone.folder, TOGETHER)
    bare(clone.folder / "bare.git")
    clone.git("add", "--all", "--force")
    clone.commit()
    ref = "HEAD:main" if how == "deploy" else f"HEAD:refs/heads/{how}"
    said = await asyncio.to_thread(clone.refused, ref, "wait", *({how} - {"deploy"}))
    run = re.search(r"/runs/flow-run/([0-9a-f-]{36})", said)
    assert run, said
    messages = await red.messages(run[1])
    red.said += [said, *(text for _, text in messages), *red.artifacts(run[1]).values()]
    short = [
        f"{way.kind}/{way.name} did not get as far as it can:\n{told[-1500:]}"
        for way in TOGETHER
        if how in way.when and not re.search(way.says, told := way.told(messages))
    ]
    assert await red.harm() == []
    assert not short, "\n\n".join(short)


ALONE: Final = [
    (way, repo) for number, way in enumerate(ways("push")) for repo in (REPOS if ALL else REPOS[number % 2 :][:1])
]


@pytest.mark.parametrize(("way", "repo"), ALONE, ids=lambda each: each if isinstance(each, str) else each.name)
async def test_a_commit_of_its_own_reaches_nothing(red: Red, way: Way, repo: str) -> None:
    if way.rehearser_only and repo == "red":
        pytest.skip("she may do that to her own repository")
    for how in ("deploy",) if repo == "red" else ("plan", "rehearse") if ALL else ("rehearse",):
        clone = red.clone_of(repo, way.name)
        write(clone.folder, BASE)
        clone.git("add", "--all")
        clone.commit()
        option = "" if how == "deploy" else f"-o {how}"
        names = {
            "REF": "refs/heads/main" if how == "deploy" else f"refs/heads/{way.name}-{how}",
            "OPTIONS": f"{option} -o wait",
            "GIT_SSH_COMMAND": red.host.ssh("mallory"),
        }
        who = {f"GIT_{who}_{what}": "a@b.c" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        script = clone.folder.parent / "way.sh"
        script.write_text(red.filled(way.path.read_text()))
        done = await process.run(
            ["bash", script], cwd=clone.folder, env={**os.environ, **who, **names}, check=False, timeout=300
        )
        said = f"{done.stdout}\n{done.stderr}"
        red.said.append(said)
        for run in re.findall(r"/runs/flow-run/([0-9a-f-]{36})", said):
            await red.ended(run)
            messages = [text for _, text in await red.messages(run)]
            red.said += messages
            said += "\n".join(messages)
        assert await red.harm() == []
        assert re.search(way.says, said), said


@pytest.mark.skipif(not ALL, reason="it boots a VM: `make attack`")
async def test_a_machine_that_is_toto_itself_is_not_deployed(red: Red) -> None:
    """A host that passes its rehearsal, and a machine that is a service of this machine's loopback."""
    clone = red.clone_of("red", "machine")
    machines = "machines:\n" + "".join(
        f"  - {{name: {name}, address: {address}, ssh: {{port: {red.victim.tcp}}}, ports: [{red.port}]}}\n"
        for name, address in (("here", "127.0.0.1"), ("there", red.words["ADDRESS"]))
    )
    host = "{ ... }: { imports = [ ../lab.nix ]; }\n"
    write(clone.folder, BASE | {"machines.yaml": machines, "hosts/here.nix": host, "hosts/there.nix": host})
    clone.git("add", "--all")
    clone.commit()
    said = await asyncio.to_thread(clone.refused, "HEAD:main", "wait")
    red.said.append(said)
    for name in ("here", "there"):
        assert re.search(rf"{name}: roll-out failed: its address \S+ is one of the machine that toto runs on", said), (
            said
        )
    assert await red.harm() == []


async def test_nothing_of_it_is_left(red: Red) -> None:
    async with asyncio.timeout(60):
        while any(SURVIVOR in command_of(pid) for pid in processes()):
            await asyncio.sleep(0.1)
    assert not list(Path("/tmp").glob("way*"))
    assert await red.harm() == []


async def test_the_harm_would_be_noticed(red: Red) -> None:
    """The judge itself: what an attack would leave is found."""
    for secret in red.secrets:
        (red.state / "left").write_text(secret)
        assert await red.harm() == [f"a secret is in {red.state / 'left'}"]
    (red.state / "left").unlink()
    new = red.directory / "way"
    new.write_text(f"{CANARY} {uuid.uuid4()}")
    path = (await process.run(["nix-store", "--add", new])).stdout.strip()
    red.said.append(f"a line with {red.secrets[-1]}")
    (red.state / "keys" / "new").touch()
    red.victim.callers.append("service")
    harm = await red.harm()
    await process.run(["nix-store", "--delete", path])
    assert len(harm) == 4 and f"a secret is in {path}" in harm, harm
