"""Reading a checked-out commit: its settings and its manifest."""

from pathlib import Path

from toto.infra_repo import manifest
from toto.infra_repo import settings as settings_of
from toto.infra_repo.manifest import Manifest
from toto.infra_repo.settings import Settings


def read_tree(tree: Path, *, deployed: bool = False) -> tuple[Settings, Manifest]:
    """The settings and the manifest of an exported commit. Raises `SettingsError`, `ManifestError`.

    `deployed` is as in `settings.load`.
    """
    settings = settings_of.load(tree, deployed=deployed)
    return settings, manifest.load(tree / manifest.FILE)
