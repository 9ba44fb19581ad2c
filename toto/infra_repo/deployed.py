"""The manifest that is deployed."""

from functools import lru_cache
from pathlib import Path
from typing import Final

from gitdb.exc import BadName

from toto.infra_repo import git, manifest

_LARGEST: Final = 10_000_000  # bytes of a manifest


def manifest_of(repo: Path) -> manifest.Manifest:
    """The manifest at the tip of the deployed branch; no machines when there is none yet.

    Raises `ManifestError` for mistakes in it.
    """
    with git.open_repo(repo) as opened:
        try:
            blob = opened.commit("HEAD").tree / manifest.FILE
        except (BadName, ValueError, KeyError):
            return manifest.Manifest()
        return _parsed(blob.data_stream.read(_LARGEST).decode(errors="replace"))


@lru_cache(maxsize=32)
def _parsed(text: str) -> manifest.Manifest:
    """Whoever asks every few seconds has the same text parsed once: a thousand machines are 0.3 s of work."""
    return manifest.parse(text)
