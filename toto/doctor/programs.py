"""The programs that toto starts, and what needs them."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from toto.doctor.findings import Finding, Toto


@dataclass(frozen=True)
class Program:
    """A program, the package of Debian's that has it ("" for none), and what toto does with it.

    `needed` is False where only some do that; `roots` is True for what only root's nix daemon runs.
    """

    name: str
    package: str
    what: str
    needed: bool = True
    roots: bool = False


ALL: Final = (
    *(Program(each, "nix-bin", "evaluates and builds") for each in ("nix", "nix-store", "nix-instantiate", "nix-hash")),
    Program("nix-daemon", "nix-bin", "has the store and builds", roots=True),
    Program("busybox", "busybox-static", "the shell of builds", roots=True),
    Program("git", "git", "the repositories and the ledger"),
    Program("curl", "curl", "by which a push starts its run"),
    Program("ssh", "openssh-client", "reaches sandboxes and machines"),
    Program("ssh-keygen", "openssh-client", "makes keys, signs and verifies"),
    Program("bwrap", "bubblewrap", "makes cells"),
    *(Program(each, "util-linux", "makes cells") for each in ("setpriv", "nsenter", "prlimit", "unshare")),
    Program("slirp4netns", "slirp4netns", "gives cells and sandboxes the internet"),
    Program("nft", "nftables", "keeps cells off this machine and its neighbours"),
    Program("ip", "iproute2", "makes the networks of cells"),
    Program("qemu-system-x86_64", "qemu-system-x86", "tells whether KVM works", needed=False),
    Program("terraform", "", "terraform roots", needed=False),
    Program("helm", "", "helm releases", needed=False),
    Program("gpg", "gnupg", "commits that are signed by gpg", needed=False),
)
_SYSTEM: Final = "/usr/sbin:/sbin"  # where toto looks besides PATH
_NIXOS: Final = Path("/etc/NIXOS")


async def programs(toto: Toto) -> Sequence[Finding]:
    """Those that are not there, or that all are."""
    found = [lacking(each) for each in ALL if (os.geteuid() == 0 or not each.roots) and not _there(each.name)]
    return found or [Finding("programs", "ok", "all that toto starts are on PATH")]


def lacking(program: Program) -> Finding:
    """What to say of a program that is not there."""
    if _NIXOS.exists():
        mend = "nix/toto.nix brings it: run `toto` as that installs it (services.toto.programs for more)"
    elif program.package:
        mend = f"apt install {program.package}"
    else:
        mend = f"put {program.name} on the PATH of `toto serve`, where a repository has {program.what}"
    return Finding(program.name, "missing" if program.needed else "warning", f"is not on PATH: {program.what}", mend)


def _there(name: str) -> bool:
    return shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:{_SYSTEM}") is not None
