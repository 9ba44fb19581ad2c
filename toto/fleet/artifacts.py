"""The keys by which runs keep what they show, and by which the page of the fleet finds it: Prefect's artifacts."""

import hashlib
import json
import re
from typing import Final

from toto.ledger.target import Target

_PLAIN: Final = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


def of_repo(what: str, repo: str) -> str:
    """The key of something of a repo, such as `report-infra`."""
    return _key(what, repo)


def of_target(what: str, repo: str, target: Target) -> str:
    """The key of something of a target, such as `console-infra--host--web1`."""
    return _key(what, repo, target.kind, target.name)


def _key(what: str, *names: str) -> str:
    """No two have the same. Prefect takes lower-case letters, digits and dashes: other names get a hash as well."""
    words = list(names)
    if not all(_PLAIN.fullmatch(each) for each in names):
        words = [re.sub(r"[^a-z0-9]+", "-", each.lower()).strip("-") for each in names]
        words.append(hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16])
    return f"{what}-{'--'.join(words)}"
