"""Whether a target is held just now: by a freeze, or by the window of its machine."""

from datetime import datetime

from toto.infra_repo.manifest import Manifest
from toto.infra_repo.settings import RollOut
from toto.ledger.target import Target


def held_now(target: Target, fleet: Manifest, settings: RollOut) -> str | None:
    """Why a target must not be rolled out now: it or the fleet is frozen, or a maintenance window is closed."""
    machine = fleet.machines.get(target.name) if target.kind == "host" else None
    now = datetime.now().astimezone()
    for whose, rules in (("the fleet", settings), (target.label, machine)):
        if rules is None:
            continue
        if rules.freeze:
            return rules.freeze if isinstance(rules.freeze, str) else f"{whose} is frozen"
        if rules.window is not None and not rules.window.contains(now):
            return f"outside the window of {whose}, {rules.window}"
    return None
