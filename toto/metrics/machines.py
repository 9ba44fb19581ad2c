"""The machines of a fleet, as Prometheus discovers them (`http_sd`, `file_sd`), by the manifest that is deployed.

A machine is one target without a port. Which exporters it has is a matter of its role and its tags, which relabelling
looks at: see monitoring/prometheus.yml.
"""

import ipaddress
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from toto.git_host.shared import name_of
from toto.infra_repo.deployed import manifest_of


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


def _bracketed(address: str) -> str:
    try:
        return f"[{address}]" if ipaddress.ip_address(address).version == 6 else address
    except ValueError:
        return address
