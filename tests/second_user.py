"""A second user of this machine, for tests: root becomes `nobody`, who sees the programs and the checkout."""

import os
import pwd
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from toto.server.deployments import ROOT

USER: Final = "nobody"
AS_USER: Final = (
    "setpriv",
    f"--reuid={pwd.getpwnam(USER).pw_uid}",
    f"--regid={pwd.getpwnam(USER).pw_gid}",
    "--clear-groups",
    "--",
)

# In a mount namespace of its own: where they lie below root's home, the programs and the checkout, at their own paths,
# in a home that can be entered. Arguments: folders that are empty in it, --, a folder, paths, --, a command.
_MOUNTS: Final = """
set -eu
while [ "$1" != -- ]; do mount -t tmpfs -o mode=755 empty "$1"; shift; done
stage=$2; shift 2
mount -t tmpfs -o mode=755 stage "$stage"
number=0
for path; do
    [ "$path" != -- ] || break
    number=$((number + 1)); mkdir "$stage/$number"; mount --bind "$path" "$stage/$number"
done
mount -t tmpfs -o mode=755 home "$HOME"
number=0
while [ "$1" != -- ]; do
    number=$((number + 1)); mkdir -p "$1"; mount --bind "$stage/$number" "$1"; shift
done
shift
exec "$@"
"""


def run(
    command: Sequence[str | Path],
    stage: Path,
    *,
    empty: Sequence[str] = (),
    environment: Mapping[str, str],
    timeout: float,
) -> subprocess.CompletedProcess[str]:
    """Run a command as root where `nobody` sees what it needs; `empty` folders are empty there. stderr is in stdout.

    Nothing that it mounts outlives it. `stage` is a folder for it; `environment` is all that the command gets besides
    PATH and PYTHONPATH.
    """
    seen = {Path(sys.prefix), Path(sys.base_prefix), ROOT, Path(os.environ["TOTO_HELM4"]).parents[1]}
    known = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "LANG": "C.UTF-8", "DO_NOT_TRACK": "1"}
    variables = [f"{name}={value}" for name, value in {**known, **environment}.items()]
    mounts: list[str | Path] = ["sh", "-c", _MOUNTS, "sh", *empty, "--", stage, *sorted(seen), "--"]
    return subprocess.run(
        ["unshare", "--mount", "--propagation", "private", *mounts, "env", "-i", *variables, *command],
        cwd="/",
        env=os.environ | {"HOME": str(Path.home())},
        timeout=timeout,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
