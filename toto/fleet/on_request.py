"""Builds that people ask for: `toto build HOST[@COMMIT]` has toto build a host, and `toto fetch` hands out the result.

People get it as a binary cache, signed by the key of the repository's machines, that `nix copy` takes. What they have
they need not be sent; and no path is handed out but those of hosts of a repository for which they may have toto build.
"""

import asyncio
import contextlib
import re
import shlex
import tarfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, Self

from toto.base import owned
from toto.base.errors import InputError, TotoError
from toto.base.prefect_api import Api
from toto.fleet import builds
from toto.git_host import access, runs, shell
from toto.git_host import host as git_host
from toto.git_host.shared import name_of
from toto.infra_repo import git
from toto.machine import keys
from toto.store import grants

DEPLOYMENT: Final = "build/build"
_TIMEOUT: Final = 3_600.0  # seconds to sign and compress a closure
_KNOWN: Final = 100_000_000  # bytes of a list of store paths
_STORE_PATH: Final = re.compile(rb"^StorePath: (/nix/store/\S+)$", re.MULTILINE)
_URL: Final = re.compile(rb"^URL: (\S+)$", re.MULTILINE)


@dataclass(frozen=True)
class Wanted:
    """A host of a repository, and the commit of which it is to be."""

    repo: Path
    host: str
    commit: str

    @classmethod
    async def of(cls, repos: Path, words: str, user: str | None, named: str | None = None) -> Self:
        """What `HOST[@COMMIT]` means to a user of the git host (None: somebody on toto itself).

        `named` is the repository; without it, it is the only one for which they may rehearse.
        Raises `InputError`, `NoSuchCommit`.
        """
        if (form := shell.BUILT.fullmatch(words)) is None or ".." in words:
            raise InputError(f"{words[:80]!a} is not HOST or HOST@COMMIT", hint="such as web1, or web1@3f1c9b2a")
        found = [
            repo
            for repo in git_host.infra_repos(repos)
            if named in (None, name_of(repo)) and await access.may(repos, user, "rehearse", name_of(repo))
        ]
        if len(found) != 1:
            raise InputError(
                f"you may have hosts built of {', '.join(map(name_of, found))}"
                if found
                else f"there is no repository {named} of which you may have hosts built"
                if named
                else "there is no repository of which you may have hosts built",
                hint="say which: --repo NAME" if found else "it takes the right `rehearse`: see docs/git-host.md",
            )
        return cls(found[0], form[1], git.resolve(found[0], form[2] or "HEAD"))

    def __str__(self) -> str:
        return f"{self.host}@{self.commit[:8]}"


async def start(wanted: Wanted, user: str | None) -> str:
    """Start a run that builds; its id. Raises `ServerError`."""
    return await runs.start(wanted.repo, DEPLOYMENT, {"commit": wanted.commit, "only": [wanted.host]}, user)


async def row(api: Api, wanted: Wanted, run: str) -> dict[str, Any]:
    """How the run built the host: a row of `toto.fleet.builds`. Raises `TotoError` when there is none of that name."""
    asked = {"artifacts": {"flow_run_id": {"any_": [run]}, "type": {"any_": ["table"]}}, "limit": 10}
    for built in builds.Built.of(await api.call("POST", "/artifacts/filter", asked)):
        if wanted.host in built.rows:
            return dict(built.rows[wanted.host])
    raise TotoError("the run has built no host of this name", target=wanted.host, hint="is it in hosts/, or a flake's?")


def built(wanted: Wanted) -> str:
    """The store path of the host, which was built and is kept. Raises `InputError` when it is not."""
    with contextlib.suppress(OSError):
        return str((builds.folder(wanted.repo) / wanted.commit / wanted.host).readlink())
    raise InputError(
        "was not built, or is not kept any more",
        target=str(wanted),
        hint=f"ssh toto build {wanted} --repo {name_of(wanted.repo)}",
    )


async def how_to_fetch(wanted: Wanted, path: str) -> str:
    """What to type on one's own machine to get it, in lines."""
    key = await keys.public_half(await keys.for_closures(wanted.repo, None))
    folder = f"{wanted.host}-{wanted.commit[:8]}"
    trusted = shlex.quote(f"extra-trusted-public-keys = {key}")
    return (
        f"    mkdir {folder}\n"
        "    nix --extra-experimental-features nix-command path-info --all | \\\n"
        f"        ssh toto fetch {wanted} --repo {name_of(wanted.repo)} | tar -x -C {folder}\n"
        f"    sudo NIX_CONFIG={trusted} nix --extra-experimental-features nix-command \\\n"
        f'        copy --from "file://$PWD/{folder}" {path}'
    )


def known(source: IO[bytes]) -> set[bytes]:
    """The store paths, a line each, that somebody says they have. Raises `InputError` when there is no end to them."""
    said = source.read(_KNOWN + 1)
    if len(said) > _KNOWN:
        raise InputError(f"the list of paths is larger than {_KNOWN // 1_000_000} MB")
    return set(said.split())


async def fetch(wanted: Wanted, have: Collection[bytes], sink: IO[bytes]) -> None:
    """Write a tar of a binary cache with the host's closure to `sink`, without the contents of paths in `have`.

    Raises `InputError` when it was not built, `CopyFailed`, OSError when nobody reads.
    """
    path = built(wanted)
    key = await keys.for_closures(wanted.repo, None)
    place = grants.prepare().parent
    owned.sweep(place)
    with owned.folder("fetch", place) as folder:
        await grants.lend(wanted.repo, folder / "cache", path, key, timeout=_TIMEOUT, target=str(wanted))
        await asyncio.to_thread(_pack, folder / "cache", have, sink)


def _pack(cache: Path, have: Collection[bytes], sink: IO[bytes]) -> None:
    with tarfile.open(fileobj=sink, mode="w|", format=tarfile.USTAR_FORMAT) as tar:
        tar.add(cache / "nix-cache-info", "nix-cache-info")
        for narinfo in sorted(cache.glob("*.narinfo")):
            text = narinfo.read_bytes()
            path, url = _STORE_PATH.search(text), _URL.search(text)
            if path and url and path[1] not in have:
                tar.add(cache / url[1].decode(), url[1].decode())
            tar.add(narinfo, narinfo.name)
