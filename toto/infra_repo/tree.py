"""Reading a checked-out commit: its settings and its manifest."""

from pathlib import Path

from toto.infra_repo import manifest
from toto.infra_repo import settings as settings_of
from toto.infra_repo.manifest import Manifest
from toto.infra_repo.settings import Settings


def read_tree(tree: Path) -> tuple[Settings, Manifest]:
    """The settings and the manifest of an exported commit. Raises `SettingsError`, `ManifestError`."""
    settings = settings_of.load(tree)
    return settings, manifest.load(tree / manifest.FILE)
