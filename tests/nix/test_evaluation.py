"""Evaluation: what is pushed reads its own tree, nixpkgs and its locked inputs, and reaches nothing besides."""

import asyncio
import json
import os
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from tests.lab import nix_daemon, setup
from tests.lab.fleet import command_of, processes
from toto.base import paths, process, server_rules
from toto.base.errors import TotoError
from toto.nix import commands as nix
from toto.nix.hosts import Host
from toto.nix.memory import Allowance
from toto.nix.messages import EvaluationFailed

pytestmark = pytest.mark.skipif(not nix_daemon.possible(), reason="toto's nix daemon needs root or sudo")

CANARY: Final = "a-canary-that-nobody-may-see"
# Stands for nixpkgs: a host has one attribute, which its system's derivation shows.
NIXOS: Final = """{ configuration, system }: {
  config.system.build.toplevel = derivation {
    name = "toplevel"; inherit system; builder = "/bin/sh"; args = [ "-c" "echo made > $out" ];
    said = toString (import configuration).said;
  };
}
"""
HOST: Final = Host("a", "hosts/a.nix")


@dataclass
class Outside:
    """What lies on this machine beside a tree: a secret file, another repo's store path, a server on the loopback."""

    folder: Path
    secret: Path
    foreign: str
    port: int
    callers: int = 0

    async def said(self, tree: Path, host: Host = HOST) -> str:
        """All that comes out of an evaluation: its error, or its derivation."""
        try:
            drv = await nix.instantiate(tree, host, self.folder / "root", system="x86_64-linux", timeout=60)
        except TotoError as error:
            return f"failed: {error}"
        return Path(drv).read_text()


@pytest.fixture
async def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Outside]:
    (tmp_path / "nixpkgs/nixos").mkdir(parents=True)
    (tmp_path / "nixpkgs/nixos/default.nix").write_text(NIXOS)
    monkeypatch.setenv("NIX_PATH", f"nixpkgs={tmp_path / 'nixpkgs'}")
    monkeypatch.setenv("TOTO_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("CANARY", CANARY)
    secret = tmp_path / "secret" / "key"
    secret.parent.mkdir()
    secret.write_text(f'"{CANARY}"\n')
    (secret.parent / "flake.nix").write_text(f'{{ outputs = _: {{ canary = "{CANARY}"; }}; }}\n')
    added = await process.run(["nix-store", "--add", secret], env=nix.environment())
    made = Outside(tmp_path, secret, added.stdout.strip(), 0)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        made.callers += 1
        writer.write(f"HTTP/1.0 200 OK\r\n\r\n{CANARY}".encode())
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        made.port = server.sockets[0].getsockname()[1]
        yield made


@pytest.fixture
def tree(tmp_path: Path, outside: Outside) -> Path:
    folder = tmp_path / "tree"
    (folder / "hosts").mkdir(parents=True)
    (folder / "file").write_text("of the tree")
    (folder / "link").symlink_to(outside.secret)
    (folder / "up").symlink_to("../secret/key")
    return folder


def host(tree: Path, attempt: str) -> None:
    (tree / "hosts" / "a.nix").write_text(f"{{ said = {attempt}; }}\n")


async def test_a_derivation_says_what_it_builds(tree: Path, outside: Outside) -> None:
    host(tree, '"hello"')
    drv = await nix.instantiate(tree, HOST, outside.folder / "root", system="x86_64-linux", timeout=60)
    asked = await process.run(["nix-store", "--query", "--outputs", drv], env=nix.environment())
    assert nix.output(drv, target="a") == asked.stdout.strip()


def test_a_derivation_whose_path_is_not_known_yet_is_refused(tmp_path: Path) -> None:
    floating = tmp_path / "floating.drv"
    floating.write_text('Derive([("out","","r:sha256","")],[],[],"x86_64-linux","/bin/sh",[],[])')
    with pytest.raises(EvaluationFailed, match=r"a: .* has not one output `out`"):
        nix.output(str(floating), target="a")


BUILT: Final = (
    'import (derivation {{ name = "built"; system = "x86_64-linux"; builder = "/bin/sh"; '
    'args = [ "-c" "echo \\"$({0})\\" > $out" ]; }})'
)


@pytest.mark.parametrize("attempt", ["builtins.readFile ../file", BUILT.format('echo \\\\\\"of the tree\\\\\\"')])
async def test_it_reads_its_tree_and_what_it_has_built(tree: Path, outside: Outside, attempt: str) -> None:
    host(tree, attempt)
    assert '("said","of the tree")' in await outside.said(tree)


@pytest.mark.parametrize(
    "attempt",
    [
        'builtins.readFile "{secret}"',
        "builtins.readFile {secret}",
        "import {secret}",
        'builtins.unsafeDiscardStringContext (builtins.readFile "{secret}")',
        'builtins.hashFile "sha256" {secret}',
        'builtins.path {{ path = "{secret}"; name = "x"; }}',
        "builtins.filterSource (_: _: true) {folder}",
        '"${{{secret}}}"',
        "builtins.attrNames (builtins.readDir {folder})",
        "builtins.attrNames (builtins.readDir /nix/store)",
        "builtins.pathExists {secret}",
        'builtins.readFile "{foreign}"',
        'builtins.storePath "{foreign}"',
        'scopedImport {{ }} "{foreign}"',
        "builtins.readFile ../link",
        "builtins.readFile ../up",
        "import ../up",
        "builtins.readFile ../../secret/key",
        'builtins.readFile "/proc/self/environ"',
        "builtins.readFile /etc/passwd",
        "builtins.readFile /daemon/nix.conf",
        'builtins.getEnv "CANARY"',
        'builtins.getEnv "HOME"',
        'builtins.exec [ "cat" "{secret}" ]',
        'builtins.fetchurl "http://127.0.0.1:{port}/x"',
        'builtins.fetchTarball "http://127.0.0.1:{port}/x.tar"',
        'builtins.readFile (import <nix/fetchurl.nix> {{ url = "http://127.0.0.1:{port}/"; sha256 = "{hash}"; }})',
        'builtins.fetchurl "file://{secret}"',
        'builtins.fetchGit "file://{folder}"',
        'builtins.fetchTree {{ type = "path"; path = "{folder}"; }}',
        '(builtins.getFlake "path:{folder}").canary',
        'builtins.readFile (builtins.fetchTree {{ type = "path"; path = "{foreign}"; }})',
        'builtins.readFile (builtins.fetchTree "path:{foreign}")',
        'builtins.attrNames (builtins.readDir (builtins.fetchTree {{ type = "path"; path = "/daemon"; }}))',
        'builtins.attrNames (builtins.readDir (builtins.fetchTree {{ type = "path"; path = "/nix/store"; }}))',
    ],
)
async def test_it_reaches_nothing_else(tree: Path, outside: Outside, attempt: str) -> None:
    host(tree, attempt.format(secret=outside.secret, folder=outside.secret.parent, foreign=outside.foreign,
                              port=outside.port, hash="0" * 64))  # fmt: skip
    said = await outside.said(tree)
    assert CANARY not in said
    assert said.startswith("failed: ") or '("said","")' in said, said
    assert outside.callers == 0


@pytest.mark.parametrize("command", ["cat {secret}", "cat {foreign}", "cat /daemon/nix.conf", "ls /root"])
async def test_what_it_builds_while_it_evaluates_reaches_nothing_either(
    tree: Path, outside: Outside, command: str
) -> None:
    command = command.format(secret=outside.secret, foreign=outside.foreign, port=outside.port)
    host(tree, f"builtins.toJSON ({BUILT.format(command + ' || echo 1')})")
    assert '("said","1")' in await outside.said(tree)
    assert outside.callers == 0


def rule(builds: int) -> None:
    (paths.state_home() / server_rules.FILE).write_text(f"[evaluation]\nbuilds = {builds}\n")


async def test_the_server_may_forbid_to_build_while_it_evaluates(tree: Path, outside: Outside) -> None:
    host(tree, BUILT.format("echo 7"))
    assert '("said","7")' in await outside.said(tree)
    rule(0)
    host(tree, BUILT.format("echo 8"))
    assert "allow-import-from-derivation" in await outside.said(tree)


def chain(length: int, once: str) -> str:
    """Builds that each need the one before, the last of which an evaluation reads; each says a word to stderr."""
    return f"""import (builtins.foldl' (before: number: derivation {{
        name = "built-${{toString number}}"; system = "x86_64-linux"; builder = "/bin/sh"; inherit before;
        args = [ "-c" "echo 'building nothing' >&2; echo '\\"{once}\\"' > $out" ];
    }}) "{once}" (builtins.genList (number: number) {length}))"""


async def test_an_evaluation_that_builds_too_much_is_ended(tree: Path, outside: Outside) -> None:
    rule(3)
    once = str(uuid.uuid4())
    host(tree, chain(3, once))
    assert f'("said","{once}")' in await outside.said(tree)
    host(tree, f"[ ({chain(3, once)}) ({chain(2, str(uuid.uuid4()))}) ]")  # what is there already is not built again
    assert "failed" not in await outside.said(tree)
    word = str(uuid.uuid4())
    # What it prints itself hides no build.
    noise = f'builtins.trace (builtins.concatStringsSep "" (builtins.genList (_: "x") 200000)) ({chain(40, word)})'
    for attempt in (chain(4, str(uuid.uuid4())), noise):
        host(tree, attempt)
        said = await outside.said(tree)
        assert said.startswith("failed: a: its evaluation was ended: it began more than the 3 builds that"), said
        assert "or raise evaluation.builds in toto's server.toml" in said
    async with asyncio.timeout(60):  # and it builds no more
        while any(word.encode() in command_of(each) for each in processes()):
            await asyncio.sleep(0.05)
    built = [each.read_text() for each in Path("/nix/store").glob("*-built-*[0-9]") if each.is_file()]
    assert len([text for text in built if word in text and "Derive" not in text]) < 20


@pytest.mark.parametrize("most", [3, 2])
async def test_a_whole_system_whose_text_is_built_keeps_to_the_limit(
    tmp_path: Path, outside: Outside, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    setup.setup()
    monkeypatch.setenv("NIX_PATH", setup.environment()["NIX_PATH"])
    (tmp_path / "infra/hosts").mkdir(parents=True)
    (tmp_path / "infra/hosts/a.nix").write_text(
        f"""{{ networking.hostName = "a"; environment.etc."text".text = {chain(3, str(uuid.uuid4()))}; }}"""
    )
    rule(most)
    said = await outside.said(tmp_path / "infra")
    assert said.startswith("Derive(" if most == 3 else "failed: a: its evaluation was ended: it began more than"), said


async def test_memory_and_output_are_bounded(tree: Path, outside: Outside) -> None:
    host(tree, 'builtins.foldl\' (text: _: text + text) "x" (builtins.genList (x: x) 34)')
    with pytest.raises(EvaluationFailed, match=r"nix\.evaluate_memory"):
        await nix.instantiate(tree, HOST, outside.folder / "root", timeout=120, memory=Allowance(300_000_000))
    host(tree, 'builtins.deepSeq (map (x: builtins.trace (toString x) x) (builtins.genList (x: x) 300000)) (throw "x")')
    assert len(await outside.said(tree)) < 30_000


async def test_a_flake_is_evaluated_purely_and_its_inputs_are_none_of_this_machine(
    tmp_path: Path, outside: Outside
) -> None:
    tree = tmp_path / "flake"
    tree.mkdir()

    def flake(said: str, inputs: str = "") -> None:
        (tree / "flake.nix").write_text(
            f"""{{ {inputs} nixConfig.sandbox = false; outputs = inputs: {{ nixosConfigurations.a =
            {{ config.system.build.toplevel = derivation {{ name = "toplevel"; system = "x86_64-linux";
               builder = "/bin/sh"; said = toString ({said}); }}; }}; }}; }}"""
        )

    flake('"of the flake"')
    assert await nix.flake_hosts(tree, timeout=60) == [Host("a")]
    assert '("said","of the flake")' in await outside.said(tree, Host("a"))
    for attempt in (f"builtins.readFile {outside.secret}", f'builtins.readFile "{outside.foreign}"',
                    "builtins.readFile /etc/passwd", "builtins.currentTime", "<nixpkgs>", "builtins.storeDir + 1",
                    f'builtins.fetchurl "http://127.0.0.1:{outside.port}/"',
                    'builtins.fetchTree { type = "path"; path = "/daemon"; }',
                    f'builtins.readFile (builtins.fetchTree "path:{outside.foreign}")'):  # fmt: skip
        flake(attempt)
        said = await outside.said(tree, Host("a"))
        assert said.startswith("failed: ") and CANARY not in said, said
    # Who is told the hash of a folder reads it by that hash the next time.
    unknown = f"sha256-{'A' * 43}="
    for attempt in (f'builtins.fetchTree {{ type = "path"; path = "{outside.foreign}"; narHash = "{unknown}"; }}',
                    f'builtins.fetchurl {{ url = "file://{outside.foreign}"; sha256 = "{unknown}"; }}'):  # fmt: skip
        flake(attempt)
        said = await outside.said(tree, Host("a"))
        assert "hash mismatch" in said and "got …" in said, said
        assert "sha256-" not in said.replace(unknown, "") and "-source" not in said, said
    flake('builtins.getEnv "CANARY"')
    assert '("said","")' in await outside.said(tree, Host("a"))
    flake("inputs.other.canary", f'inputs.other.url = "path:{outside.secret.parent}";')
    await process.run(["nix", *nix._FLAKES, "flake", "lock", f"path:{tree}"], env=dict(os.environ))
    lock = json.loads((tree / "flake.lock").read_text())
    lock["nodes"]["other"]["locked"]["narHash"] = "sha256-" + "A" * 43 + "="  # (it is in this machine's store now)
    (tree / "flake.lock").write_text(json.dumps(lock))
    with pytest.raises(EvaluationFailed) as caught:
        await nix.flake_hosts(tree, timeout=60)
    assert CANARY not in str(caught.value) and outside.callers == 0
