"""Garbage of a machine, with a real nix and a store of its own: what is needed stays, whatever the policy."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import flying_monkey
from flying_monkey.memory import Memory

pytestmark = pytest.mark.skipif(sys.base_prefix.startswith("/nix/"), reason="Python is in the store that is replaced")
_PACKAGE = Path(flying_monkey.__file__).parents[1]


class Store:
    """A machine's /nix, /run and /var/lib/flying-monkey, in a mount namespace."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for folder in ("nix/store", "nix/var/nix/gcroots", "nix/var/nix/profiles", "run", "memory", "etc"):
            (root / folder).mkdir(parents=True)
        (root / "nix/var/nix/gcroots/profiles").symlink_to("/nix/var/nix/profiles")
        (root / "etc/config.json").write_text(json.dumps({"repo": "infra", "name": "web1", "signers": "/none"}))
        self.paths: dict[str, str] = {}
        for name in ("one", "two", "three", "four", "five", "trash"):
            file = root / f"nixos-system-{name}"
            file.write_text(name * 10_000)
            self.paths[name] = self.nix("nix-store", "--add", f"/media/{file.name}").stdout.strip()

    def nix(self, *argv: str) -> "subprocess.CompletedProcess[str]":
        binds = {"nix": "/nix", "run": "/run", "memory": "/var/lib/flying-monkey", "etc": "/etc/flying-monkey"}
        words = ["bwrap", "--dev-bind", "/", "/", "--bind", str(self.root), "/media"]
        words += [word for name, place in binds.items() for word in ("--bind", str(self.root / name), place)]
        env = {"PATH": os.environ["PATH"], "NIX_REMOTE": "", "HOME": "/media", "NIX_CONF_DIR": "/media/etc"}
        return subprocess.run([*words, "--", *argv], env=env, capture_output=True, text=True, check=False)

    def collect(self, generations: int, free: int, age: float = 7_200) -> str:
        """What it prints; the store was written to `age` seconds ago."""
        os.utime(self.root / "nix/store", (time.time() - age,) * 2)
        code = f"import sys; sys.path.insert(0, {str(_PACKAGE)!r}); from flying_monkey.garbage import main; main()"
        python = str(Path(sys.base_prefix) / "bin/python3")
        done = self.nix(python, "-IS", "-c", code, str(generations), str(free))
        return done.stdout + done.stderr

    def remember(self, **what: Any) -> None:
        replace(Memory(), **what).save(self.root / "memory/memory.json")

    def there(self) -> set[str]:
        return {name for name, path in self.paths.items() if (self.root / path[1:]).exists()}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path)
    for name in ("one", "two", "three", "four", "five"):
        done = made.nix("nix-env", "--profile", "/nix/var/nix/profiles/system", "--set", made.paths[name])
        assert done.returncode == 0, done.stderr
    return made


NEVER_ENOUGH = 10**18


def test_old_generations_and_garbage_go_and_what_is_needed_stays(store: Store) -> None:
    (store.root / "run/booted-system").symlink_to(store.paths["two"])
    (store.root / "run/current-system").symlink_to(store.paths["four"])
    store.remember(kept=store.paths["one"])
    for name in ("booted", "current"):  # as NixOS has them
        (store.root / f"nix/var/nix/gcroots/{name}-system").symlink_to(f"/run/{name}-system")
    said = store.collect(1, NEVER_ENOUGH)
    assert "1 generations removed" in said and "nothing else is garbage" in said
    assert store.there() == {"one", "two", "four", "five"}, "kept last, booted, running, and the next boot's"
    store.remember(kept=store.paths["four"])
    assert "1 generations removed" in store.collect(1, NEVER_ENOUGH)
    assert store.there() == {"two", "four", "five"}


def test_nothing_is_collected_while_there_is_room_or_an_update_is_under_way(store: Store) -> None:
    store.remember(kept=store.paths["five"], step="tried", state="done 0")
    assert store.collect(1, NEVER_ENOUGH) == "an update is under way: nothing is removed\n"
    store.remember(kept=store.paths["five"])
    assert "0 generations removed" in store.collect(10, 0) and len(store.there()) == 6
    assert "4 generations removed" in store.collect(1, 0) and len(store.there()) == 6, "there is room: it can go back"
    for age in (0, 3_000, -100_000):
        assert "just written to" in store.collect(1, NEVER_ENOUGH, age) or age < -4_000
    store.collect(1, NEVER_ENOUGH)
    assert store.there() == {"five"}


def test_a_memory_that_cannot_be_read_removes_nothing(store: Store) -> None:
    (store.root / "memory/memory.json").write_text("{half")
    assert store.collect(1, NEVER_ENOUGH).startswith("flying-monkey:") and len(store.there()) == 6


@pytest.mark.parametrize("words", [(), ("1",), ("1", "2", "3"), ("-1", "0"), ("1", "x"), ("1", "")])
def test_it_takes_two_numbers(words: tuple[str, ...]) -> None:
    done = subprocess.run([sys.executable, "-m", "flying_monkey.garbage", *words], capture_output=True, check=False)
    assert done.returncode == 1 and b"it takes the generations" in done.stderr
