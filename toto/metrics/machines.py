"""The machines of a fleet, as Prometheus discovers them (`http_sd`, `file_sd`), by the manifest that is deployed.

A machine is one target without a port. Which exporters it has is a matter of its role and its tags, which relabelling
looks at: see monitoring/prometheus.yml.
"""

import ipaddress
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from gitdb.exc import BadName

from toto.git_host.shared import name_of
from toto.infra_repo import git, manifest

_LARGEST: Final = 10_000_000  # bytes of a manifest


def targets(repos: Iterable[Path]) -> list[dict[str, Any]]:
    """The machines of these infra repos, in the form of Prometheus. Raises `TotoError` when a manifest has mistakes."""
    found = []
    for repo in repos:
        for machine in manifest_of(repo).machines.values():
            labels = {
                "repo": name_of(repo),
                "machine": machine.name,
                "role": machine.role,
                "tags": f",{','.join(machine.tags)},",
            }
            found.append(
                {
                    "targets": [_bracketed(machine.address)],
                    "labels": {f"__meta_toto_{name}": value for name, value in labels.items()},
                }
            )
    return found


def manifest_of(repo: Path) -> manifest.Manifest:
    """The manifest at the tip of the deployed branch; no machines when there is none yet.

    Raises `ManifestError` for mistakes in it.
    """
    with git.open_repo(repo) as opened:
        try:
            blob = opened.commit("HEAD").tree / manifest.FILE
        except (BadName, ValueError, KeyError):
            return manifest.Manifest()
        return manifest.parse(blob.data_stream.read(_LARGEST).decode(errors="replace"))


def _bracketed(address: str) -> str:
    try:
        return f"[{address}]" if ipaddress.ip_address(address).version == 6 else address
    except ValueError:
        return address
