"""Builds a host of a commit, and keeps what was built; nothing is rehearsed, and no machine is asked."""

import contextlib
import shutil
import time
from pathlib import Path
from typing import Final

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks import sink
from toto.base.errors import TotoError
from toto.fleet import builds
from toto.nix import commands as nix
from toto.nix.builders import Heard
from toto.plan.changes import Desired, Failure

_AT_WORK: Final = 3_600.0  # seconds for which a different run may still build into a commit's folder


@task(name="build", task_run_name="build", cache_policy=NO_CACHE)
async def build_host(repo: Path, commit: str, host: Desired, timeout: float) -> dict[str, str]:
    """Build a host's system; the row for it, which says why when it does not build."""
    name, heard = host.target.name, Heard(sink())
    try:
        root = builds.root(repo, commit, name)
        path = await nix.build(host.identity, root, timeout=timeout, target=name, heard=heard)
        size = await nix.closure_size(path)
    except TotoError as error:
        return builds.row(name, builds.FAILED, why=str(error).partition("\n")[0].removesuffix(":"))
    return builds.row(name, builds.BUILT, why=heard.who, path=path, size=size)


def failed(failure: Failure) -> dict[str, str]:
    """The row for a host that does not evaluate."""
    return builds.row(failure.target.name, builds.NOT_EVALUATED, why=failure.where)


def forget_all_but(repo: Path, keep: int) -> None:
    """Let garbage collection have what was built of all commits but the newest `keep` ones."""
    ages = {}
    for each in builds.folder(repo).glob("*"):
        with contextlib.suppress(FileNotFoundError):  # a different run has removed it
            ages[each] = time.time() - each.stat().st_mtime
    for old in sorted(ages, key=lambda each: ages[each])[max(1, keep) :]:
        if ages[old] > _AT_WORK:
            shutil.rmtree(old, ignore_errors=True)
