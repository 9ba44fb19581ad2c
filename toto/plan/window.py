"""Decides whether a target is held back now: by a freeze or a closed window."""

from datetime import datetime
from typing import Protocol

from toto.infra_repo.settings import RollOut
from toto.infra_repo.window import Window


class Rules(Protocol):
    """When something may be rolled out, as the manifest or the settings say."""

    @property
    def freeze(self) -> bool | str: ...
    @property
    def window(self) -> Window | None: ...


def held_now(label: str, rules: Rules | None, settings: RollOut) -> str:
    """Why a target must not be rolled out now: it or the fleet is frozen, or a window is closed; "" when it may be.

    `rules` are the target's own, `settings` those of the fleet. Windows are in toto's local time.
    """
    now = datetime.now()  # (without a zone: then it is known when this machine's clock is set back)
    for whose, each in (("the fleet", settings), (label, rules)):
        if each is None:
            continue
        if each.freeze:
            return each.freeze if isinstance(each.freeze, str) else f"{whose} is frozen"
        if each.window is not None and not each.window.contains(now):
            return f"outside the window of {whose}, {each.window}"
    return ""
