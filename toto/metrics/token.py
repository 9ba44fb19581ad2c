"""The token by which a Prometheus reads toto's figures, and nothing else."""

import contextlib
import os
import secrets
from pathlib import Path

from toto.base import files, paths


def file() -> Path:
    """The file of the token, which is made when missing. Without the file there is a new token, at once."""
    found = paths.private_folder(paths.state_home() / "keys") / "metrics"
    if not found.exists():
        fresh = files.write(found.with_name(f".metrics.{os.getpid()}"), secrets.token_urlsafe(32))
        with contextlib.suppress(FileExistsError):
            found.hardlink_to(fresh)
        fresh.unlink()
    return found
