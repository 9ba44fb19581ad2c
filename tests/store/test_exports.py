"""What root exports of the grants, whatever toto has made of its folders."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from toto.store import exports

ONE, TWO, PROGRAM = ("1" * 32 + "-one", "2" * 32 + "-two", "3" * 32 + "-program")
OPTIONS = "(ro,sync,subtree_check,all_squash,sec=sys)"


class Store:
    """toto's grants, a store, and root's configuration."""

    def __init__(self, root: Path) -> None:
        self.root, self.granted, self.nix = root, root / "granted", root / "nix"
        self.granted.mkdir()
        (self.nix / "store" / ONE / "bin").mkdir(parents=True)
        (self.nix / "store" / ONE / "bin" / "link").symlink_to(f"/nix/store/{PROGRAM}")
        (self.nix / "store" / ONE / "text").write_text("one")
        (self.nix / "store" / TWO).write_text("two")
        (self.nix / "store" / PROGRAM).symlink_to(TWO)
        self.machines: dict[str, Any] = {
            "web1": {"repo": "infra-1", "address": "10.0.0.1"},
            "web2": {"repo": "infra-1", "address": "fd00::2", "diskless": True},
        }

    def grant(self, machine: str, *paths: str) -> Path:
        folder = self.granted / "infra-1" / machine
        folder.mkdir(parents=True, exist_ok=True)
        for file in folder.glob("*.narinfo"):
            file.unlink()
        for path in paths:
            self.narinfo(folder, path)
        return folder

    def narinfo(self, folder: Path, path: str, references: str = TWO) -> None:
        lines = [
            f"StorePath: /nix/store/{path}",
            f"NarHash: sha256:{'0' * 52}",
            "NarSize: 7",
            f"References: {references}",
        ]
        (folder / f"{path[:32]}.narinfo").write_text("\n".join(lines))

    def run(self) -> "subprocess.CompletedProcess[str]":
        about = {"granted": str(self.granted), "nix": str(self.nix), "machines": self.machines}
        (self.root / "config.json").write_text(json.dumps(about))
        words = [sys.executable, "-IS", exports.__file__, str(self.root / "config.json")]
        return subprocess.run(words, capture_output=True, text=True, check=False)

    def lines(self) -> list[str]:
        done = self.run()
        assert done.returncode == 0, done.stderr
        return done.stdout.split("\n")[:-1]

    def tree(self) -> Path:
        return self.nix / "toto-store" / "web2"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def test_machines_that_root_names_get_what_toto_grants(store: Store) -> None:
    assert store.lines() == [""]
    store.grant("web1", ONE)
    store.grant("stranger", ONE)
    assert store.lines() == [f"{store.granted}/infra-1/web1 10.0.0.1{OPTIONS}"]
    store.grant("web2", ONE, TWO, PROGRAM)
    assert store.lines()[1:] == [
        f"{store.granted}/infra-1/web2 fd00::2{OPTIONS}",
        f"/nix/toto-store/web2 fd00::2{OPTIONS}",
    ]
    os.rename(store.granted / "infra-1/web2", store.root / "retired")  # noqa: PTH104
    assert len(store.lines()) == 1 and not store.tree().exists(), "taken back"


def test_a_tree_has_the_store_paths_that_are_granted_and_what_nix_knows_of_them(store: Store) -> None:
    store.grant("web2", ONE, TWO, PROGRAM)
    store.lines()
    tree = store.tree()
    assert (tree / ONE / "text").samefile(store.nix / "store" / ONE / "text")
    assert (tree / ONE / "bin/link").readlink() == Path(f"/nix/store/{PROGRAM}") and (tree / PROGRAM).is_symlink()
    assert (tree / exports.REGISTRATION).read_text() == "".join(
        f"/nix/store/{each}\nsha256:{'0' * 52}\n7\n\n1\n/nix/store/{TWO}\n" for each in (ONE, TWO, PROGRAM)
    )
    before = (tree / TWO).stat().st_ino
    store.grant("web2", TWO)
    store.lines()
    assert {each.name for each in tree.iterdir()} == {TWO, exports.REGISTRATION}
    assert (tree / TWO).stat().st_ino == before
    del store.machines["web2"]["diskless"]
    assert len(store.lines()) == 1 and not tree.exists()


def test_one_that_was_killed_goes_on_and_what_is_gone_is_left_out(store: Store) -> None:
    store.grant("web2", ONE, TWO, "4" * 32 + "-garbage")
    (store.tree() / ".new" / "half").mkdir(parents=True)
    store.lines()
    assert {each.name for each in store.tree().iterdir()} == {ONE, TWO, exports.REGISTRATION}


def test_what_toto_has_made_of_its_folders_leads_nowhere(store: Store, tmp_path: Path) -> None:
    (store.granted / "infra-1").mkdir()
    (store.granted / "infra-1/web1").symlink_to("/etc")
    assert store.lines() == [""]
    (store.granted / "infra-1/web1").unlink()
    (store.granted / "infra-1").rmdir()
    (store.granted / "infra-1").symlink_to(tmp_path)
    (tmp_path / "web1").mkdir()
    assert store.lines() == [""]


@pytest.mark.parametrize("path", ["../../etc/passwd", "1" * 32 + "-a/../../etc", "", "e" * 32 + "-x"])
def test_what_is_no_store_path_is_in_no_tree(store: Store, path: str) -> None:
    folder = store.grant("web2", ONE)
    store.narinfo(folder, ONE, path or "x")
    (folder / f"{'4' * 32}.narinfo").write_text(f"StorePath: {path}\nNarHash: sha256:{'0' * 52}\nNarSize: 1\n")
    done = store.run()
    assert done.returncode == 1 and "the exports stay as they are" in done.stderr
    assert not store.tree().exists()


@pytest.mark.parametrize(
    "machine",
    [
        {"repo": "infra-1", "address": "*"},
        {"repo": "infra-1", "address": "10.0.0.1(rw) 10.0.0.2"},
        {"repo": "../x", "address": "10.0.0.1"},
        {"repo": "infra-1"},
        {"repo": "infra-1", "address": "10.0.0.1", "more": 1},
    ],
)
def test_a_configuration_that_is_none_exports_nothing(store: Store, machine: dict[str, Any]) -> None:
    store.machines = {"web1": machine}
    store.grant("web1", ONE)
    done = store.run()
    assert done.returncode == 1 and done.stdout == ""
