"""Whose signatures count in a repository, and which commits lack one. git verifies them.

The pre-receive hook asks for the commits of a push (`toto.git_host.receive`), and a run asks again for the commit that
it deploys (`toto.git_host.admission`).
"""

import os
import tempfile
from collections.abc import Awaitable, Mapping
from pathlib import Path
from typing import Final, Protocol

from toto.base.process import Completed
from toto.git_host import access
from toto.git_host.access import Right

_SAID: Final[Mapping[str, str]] = {  # git's %G?
    "N": "is not signed",
    "B": "has a bad signature: it was changed after it was signed",
    "U": "is signed with a key that is not trusted here",
    "E": "is signed with a key that is not known here",
    "X": "has a signature that has expired",
    "Y": "is signed with a key that has expired",
    "R": "is signed with a key that was revoked",
}


class Git(Protocol):
    """Runs git in the repository: the hook's git sees the pushed objects, which no other does."""

    def __call__(self, *arguments: str, extra: Mapping[str, str], timeout: float) -> Awaitable[Completed]: ...


async def untrusted(
    git: Git, repo: Path, right: Right, *revisions: str, allowed_signers: str | None, gpg_home: str | None
) -> list[str]:
    """Those of the commits whose signature is missing or not trusted, one line for each.

    `revisions` are as for `git log`. ssh signatures are trusted by the file `allowed_signers`, or without it if they
    are by a user who has `right` to `repo`; gpg signatures by the keyring in `gpg_home`. Raises `AccessError`.
    """
    with tempfile.TemporaryDirectory(prefix="toto-signatures-") as folder:
        signers = allowed_signers
        if signers is None:
            signers = f"{folder}/allowed_signers"
            rules = access.remembered(repo.parent) or await access.in_force(repo.parent)
            name = repo.name.removesuffix(".git")
            Path(signers).write_text(rules.allowed_signers(right, name, access.creator(repo)))
        elif not os.access(signers, os.R_OK):
            return [f"the signatures cannot be verified: {signers} cannot be read on toto"]
        done = await git(
            "-c",
            f"gpg.ssh.allowedSignersFile={signers}",
            "log",
            "--no-show-signature",
            "--format=%H %G? %GK",
            *revisions,
            extra={"GNUPGHOME": gpg_home or f"{folder}/no-gnupg"},
            timeout=600,
        )
    verdicts = [line.split(" ", 2) for line in done.lines]
    return [
        f"{commit[:8]} {_SAID.get(verdict, 'has a signature that cannot be verified')}" + (f": {key}" if key else "")
        for commit, verdict, key in verdicts
        if verdict != "G"
    ]
