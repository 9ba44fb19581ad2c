"""Where a machine goes back to. How it gets there is `toto.machine.activation`'s."""

from typing import Literal

from toto.machine.activation import Facts


def where_to(before: Facts, good: str | None, activation: Literal["switch", "boot", "test"]) -> Facts:
    """What a machine has to run and to boot after a roll-out that is taken back.

    `before` is what it ran and booted before it was touched, `good` the path of its last good (None where there is
    none), and `activation` what a roll-out of it ends with.
    """
    if good is None:
        return before
    match activation:
        case "switch":
            return Facts(system=good, profile=good)
        case "boot":  # what runs was never touched
            return Facts(system=before.system, profile=good)
        case "test":  # what boots was never touched
            return Facts(system=good, profile=before.profile)
