"""What a machine knows of itself: who it is, what it runs, and which closures are in its store."""

import json
import os
import stat
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from flying_monkey.desired import System
from flying_monkey.nix_hash import sha256

CONFIGURATION: Final = Path("/etc/flying-monkey/config.json")
PROFILE: Final = Path("/nix/var/nix/profiles/system")
STORE: Final = Path("/nix/store")
RUNNING: Final = Path("/run/current-system")
_MOST: Final = 65_536  # bytes of the configuration
_ROOM: Final = 64 * 2**20  # bytes that an activation needs on each disk that it writes to
_AT_ONCE: Final = 500  # store paths of a command
_LONGEST: Final = 1_800.0  # seconds to look at a whole closure, on a slow disk
PATH: Final = (
    "/run/wrappers/bin:/run/current-system/sw/bin:/nix/var/nix/profiles/default/bin:/usr/sbin:/usr/bin:/sbin:/bin"
)


class Misconfigured(Exception):
    """The configuration of this machine's agent cannot be used."""


class NotReady(Exception):
    """A system cannot be activated on this machine; the message says why."""


@dataclass(frozen=True)
class Configuration:
    """What root configured. `name` is the machine's in the manifest of `repo`; `signers` and `revoked` are files.

    `helper` is what sudo lets toto's user run as root.
    `built` is when the agent was built, in seconds since 1970: no honest clock is behind it. With `writable_store` toto
    may write to the store over ssh; then nothing may be built here (`max-jobs = 0`), for who writes can build.
    """

    repo: str
    name: str
    signers: str
    revoked: str | None = None
    memory: str = "/var/lib/flying-monkey/memory.json"
    host_keys: str = "/etc/ssh"
    helper: str = "/run/current-system/sw/bin/flying-monkey-helper"
    sudo: str = "sudo"
    """what runs the helper as root for toto's user, where not everybody may run `sudo` itself"""
    built: float = 0
    writable_store: bool = False
    url: str = ""
    """where the agent asks toto; "" for a machine that is pushed to"""
    ca: str | None = None
    """a file with the authorities by which toto's certificate is trusted, instead of the machine's own"""
    user: str = "nobody"
    """who reads what comes from the network"""
    metrics: str | None = None
    """a file for Prometheus' textfile collector"""
    metrics_port: int = 0
    """a port of loopback where the same is served; 0 for none"""
    tests: bool = True
    """whether toto's user may run commands as a user of no rights, for the infra repo's tests"""

    @classmethod
    def load(cls, file: Path = CONFIGURATION) -> Self:
        """What `file` says, which must be root's alone to write. Raises `Misconfigured`."""
        try:
            with file.open("rb") as source:
                seen = os.fstat(source.fileno())
                found = json.loads(source.read(_MOST))
            if seen.st_uid != 0 or seen.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise Misconfigured(f"{file}: not root's, or others may write to it")
            return cls(**found)
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise Misconfigured(f"{file}: {error}") from None

    def public_keys(self) -> list[str]:
        """This machine's ssh host keys: type and base64."""
        found = []
        for file in sorted(Path(self.host_keys).glob("ssh_host_*_key.pub")):
            found.append(" ".join(file.read_text(errors="replace").split()[:2]))
        return found


def environment() -> dict[str, str]:
    """What a program of this machine's gets, whoever asked for it. Nix uses the store directly: this is root."""
    return {"PATH": PATH, "LANG": "C.UTF-8", "NIX_REMOTE": "", "HOME": "/root"}


def running() -> str:
    """The store path of the system that runs, or ""."""
    return str(RUNNING.resolve()) if RUNNING.exists() else ""


def boots() -> str:
    """The store path of the system that the next boot begins, or ""."""
    return str(PROFILE.resolve()) if PROFILE.exists() else ""


def _closure(*paths: str) -> set[str]:
    there = [each for each in paths if Path(each).exists()]
    return {*run("nix-store", "--query", "--requisites", *there).split()} if there else set()


def known() -> set[str]:
    """The systems that this machine runs, boots or has a generation of: root took those, whoever signed them."""
    generations = PROFILE.parent.glob(f"{PROFILE.name}-*-link") if PROFILE.exists() else ()
    return {running(), boots(), *(str(each.resolve()) for each in generations)} - {""}


def nar_hash(path: str) -> str:
    """The hash of a store path's contents, or "" when it is not in this machine's store."""
    try:
        return run("nix-store", "--query", "--hash", path) if path else ""
    except NotReady:
        return ""


def free() -> int:
    """The bytes that are free on the disk of the store."""
    room = os.statvfs(STORE)
    return room.f_bavail * room.f_frsize


def keep(path: str, root: Path) -> None:
    """Have the garbage collector keep `path`, or nothing, by `root`, in the place of what that kept. Raises OSError."""
    fresh = root.with_name(f".{root.name}")
    fresh.unlink(missing_ok=True)
    if not path:
        root.unlink(missing_ok=True)
        return
    fresh.symlink_to(path)
    fresh.replace(root)


def boot() -> str:
    """The kernel's name for this boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def check(system: System) -> None:
    """Check that a system is in the store as its document says, signed throughout.

    A signature is asked of each path whose name does not itself follow from its contents, and which is in none of the
    systems that this machine has run: what root has run it may run again. Raises `NotReady`.
    """
    found = run("nix-store", "--query", "--hash", system.path)
    digest = sha256(found)
    if digest is None or digest != sha256(system.nar_hash):
        raise NotReady(f"{system.path} has the hash {found}, and the document says {system.nar_hash}")
    verify = ("nix", "--extra-experimental-features", "nix-command", "store", "verify", "--no-contents")
    fresh = sorted(_closure(system.path) - _closure(*known()))
    for some in (fresh[start : start + _AT_ONCE] for start in range(0, len(fresh), _AT_ONCE)):
        try:
            run(*verify, "--sigs-needed", "1", *some)
        except NotReady as error:
            raise NotReady(
                f"not all of {system.path} is signed by a key of this machine's trusted-public-keys:\n{error}"
            ) from None
    if not os.access(f"{system.path}/bin/switch-to-configuration", os.X_OK):
        raise NotReady(f"{system.path} is no NixOS system: it has no bin/switch-to-configuration")


def check_room() -> None:
    """Check that there is room on each disk that an activation writes to. Raises `NotReady`."""
    for place in ("/nix/var", "/var/lib", "/etc"):
        room = os.statvfs(place)
        if room.f_bavail * room.f_frsize < _ROOM:
            raise NotReady(f"less than {_ROOM // 2**20} MiB are free at {place}")


def run(*argv: str, longest: float = _LONGEST) -> str:
    """What a program prints. Raises `NotReady` when it fails, or does not end within `longest` seconds."""
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=longest,
            env=environment(),
        )
    except subprocess.TimeoutExpired:
        raise NotReady(f"{argv[0]} did not end within {longest:.0f} s") from None
    except OSError as error:
        raise NotReady(f"{argv[0]}: {error.strerror}") from None
    if done.returncode != 0:
        raise NotReady(done.stderr.strip()[-1_000:] or f"{argv[0]} exited with status {done.returncode}")
    return done.stdout.strip()
