"""Sources that npins or niv have pinned: fetched with their hash, and passed on as nixpkgs."""

import http.server
import json
import os
import shutil
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from toto.base.errors import InputError
from toto.cell.namespace import ALLOWED, own_addresses
from toto.nix import commands as nix
from toto.nix import pins
from toto.nix.hosts import Host

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("nix-daemon") is None, reason="toto runs its nix daemon here only as root"
)
NIXOS = """{ configuration, system }: {
  config.system.build.toplevel = derivation {
    name = "toplevel"; inherit system; builder = "/bin/sh"; said = toString (import configuration);
  };
}
"""
GITHUB = {"type": "GitHub", "owner": "nixos", "repo": "nixpkgs"}


@dataclass
class Web:
    """An archive of a nixpkgs on a web server, and the hash of what is in it, in nix's spellings."""

    url: str
    base32: str
    sri: str
    asked: list[str]


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    folder = tmp_path_factory.mktemp("web")
    source = folder / "source"
    (source / "nixos").mkdir(parents=True)
    (source / "nixos/default.nix").write_text(NIXOS)
    (source / "word").write_text(os.urandom(8).hex())  # so that no earlier run has left it in the store
    with tarfile.open(folder / "nixpkgs.tar.gz", "w:gz") as archive:
        archive.add(source, "nixpkgs-1a2b3c")
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(folder))

        def do_GET(self) -> None:
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *words: Any) -> None:
            pass

    (address, *_) = own_addresses()
    with http.server.ThreadingHTTPServer((address, 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        digests = [_hash(source, *options) for options in (["--base32"], [])]
        yield Web(f"http://{address}:{server.server_port}/nixpkgs.tar.gz", digests[0], nix._sri(digests[1]), asked)
        server.shutdown()


def _hash(folder: Path, *options: str) -> str:
    words = ["nix-hash", "--type", "sha256", *options, str(folder)]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, web: Web) -> Path:
    monkeypatch.setenv("TOTO_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("NIX_PATH", "")
    monkeypatch.setenv(ALLOWED, web.url.split("/")[2].partition(":")[0] + "/32")
    (tmp_path / "tree/hosts").mkdir(parents=True)
    (tmp_path / "tree/hosts/a.nix").write_text("<nixpkgs/word>\n")
    return tmp_path / "tree"


def pinned(tree: Path, tool: str, content: object) -> None:
    file = tree / pins.FILES[tool]
    file.parent.mkdir(exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content))


async def test_what_is_pinned_is_fetched_once_by_its_hash_and_is_the_hosts_nixpkgs(tree: Path, web: Web) -> None:
    pin = {"type": "Git", "repository": GITHUB, "branch": "x", "revision": "1a2b3c", "url": web.url, "hash": web.base32}
    gone = pin | {"url": web.url.replace("nixpkgs.tar", "gone.tar"), "hash": web.sri.replace(web.sri[10:14], "AAAA")}
    pinned(tree, "npins", {"version": 3, "pins": {"nixpkgs": pin, "gone": gone}})
    path = await pins.fetch(tree, "npins", "nixpkgs", timeout=60)
    assert web.asked == ["/nixpkgs.tar.gz", "/gone.tar.gz"], "one that is not nixpkgs may be missing"
    drv = await nix.instantiate(tree, Host("a", "hosts/a.nix", nixpkgs=path), tree / "root", system="x86_64-linux")
    assert f"{path}/word" in Path(drv).read_text(), "what a host calls <nixpkgs> is the same"
    # What npins' own default.nix does with a pin.
    own = f'builtins.fetchTarball {{ url = "{web.url}"; sha256 = "{web.sri}"; }}'
    (tree / "hosts/b.nix").write_text(f'builtins.readFile (({own}) + "/word")\n')
    drv = await nix.instantiate(tree, Host("b", "hosts/b.nix", nixpkgs=path), tree / "root", system="x86_64-linux")
    assert (Path(path) / "word").read_text() in Path(drv).read_text()
    for version, kind in enumerate(("Git", "GitRelease", "Channel", "Tarball", "Url"), 4):
        spelled = pin | {"type": kind, "hash": web.sri, "submodules": False, "locked_url": None, "unpack": True}
        pinned(tree, "npins", {"version": version, "pins": {"unstable": spelled}})
        assert await pins.fetch(tree, "npins", "unstable", timeout=60) == path
    for more in ({"type": "tarball"}, {}, {"type": "builtin-tarball", "url_template": "https://x/<rev>"}):
        pinned(tree, "niv", {"nixpkgs": {"url": web.url, "sha256": web.base32, "rev": "1a2b3c", **more}})
        assert await pins.fetch(tree, "niv", "nixpkgs", timeout=60) == path
    assert web.asked == ["/nixpkgs.tar.gz", "/gone.tar.gz"], "what is in the store is not fetched"


FINE: dict[str, Any] = {"type": "Channel", "url": "http://192.0.2.1/x.tar.xz", "hash": "0" * 52}


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"hash": None}, "it has no sha256 hash, and without one nobody knows what comes"),
    ({"hash": "sha1-x"}, "it has no sha256 hash"),
    ({"hash": "sha256-AAAA"}, "it has no sha256 hash"),
    ({"hash": "z" * 52}, "it has no sha256 hash"),
    ({"url": None, "type": "Git"}, "it is a git repository; pin the archive"),
    ({"url": "file:///etc/shadow"}, "its address should be like https://"),
    ({"url": "http://x/\n--option"}, "its address should be like https://"),
    ({"type": "Git", "submodules": True}, "it is no archive but 'Git' with submodules"),
    ({"type": "Container"}, "it is no archive but 'Container'"),
    ({"type": ["Git"]}, "it is no archive but a list"),
]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "toto.toml: nix.nixpkgs: there is no npins/sources.json"),
        ("{", "npins/sources.json: is not as npins writes it\nnext: run npins again"),
        ([], "is not as npins writes it"),
        ({"version": 4, "pins": []}, "is not as npins writes it"),
        ({"version": 2, "pins": {}}, "is of version 2\nnext: run `npins upgrade`"),
        ({"version": 5, "pins": {}}, "has no pin 'nixpkgs'; it has none\nnext: pin it with npins, or name a"),
        ({"version": 5, "pins": {"nixos": FINE}}, "has no pin 'nixpkgs'; it has 'nixos'\nnext: "),
        ({"version": 5, "pins": {str(n): FINE for n in range(101)}}, "has more than 100 pins"),
        *(
            ({"version": 7, "pins": {"nixpkgs": FINE | change}}, f"toto does not fetch the pin 'nixpkgs': {says}")
            for change, says in WRONG
        ),
    ],
)
async def test_what_is_not_fetched_is_told(tree: Path, content: object, says: str) -> None:
    if content is not None:
        pinned(tree, "npins", content)
    with pytest.raises(InputError) as caught:
        await pins.fetch(tree, "npins", "nixpkgs", timeout=60)
    assert says in str(caught.value)


async def test_an_archive_that_is_not_there_or_has_a_different_hash_is_told(tree: Path, web: Web) -> None:
    other = web.base32[:-1] + ("0" if web.base32[-1] != "0" else "1")
    for url, says in ((web.url, "hash mismatch"), (web.url.replace("nix", "no"), "404")):
        pinned(tree, "niv", {"nixpkgs": {"url": url, "sha256": other}})
        with pytest.raises(pins.PinsFailed, match=rf"(?s)^nix/sources\.json: the pin 'nixpkgs' could not.*{says}"):
            await pins.fetch(tree, "niv", "nixpkgs", timeout=60)


async def test_a_link_in_its_place_is_not_followed(tree: Path) -> None:
    (tree / "npins").mkdir()
    (tree / "npins/sources.json").symlink_to("/etc/passwd")
    with pytest.raises(InputError, match=r"there is no npins/sources\.json"):
        await pins.fetch(tree, "npins", "nixpkgs", timeout=60)


@pytest.mark.parametrize("text", ["npins", "niv", "npins#nixos-24.11"])
def test_a_setting_names_a_tool_and_a_pin(text: str) -> None:
    assert pins.names(text) == (text.partition("#")[0], text.partition("#")[2] or "nixpkgs")
    assert pins.names("<nixpkgs>") is None and pins.names("npins/nixpkgs.nix") is None
