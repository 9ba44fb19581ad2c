"""What a machine is reverted to. How it gets there is `toto.machine.activation`'s."""

from typing import Literal

from toto.machine.activation import MachineState


def where_to(before: MachineState, good: str | None, activation: Literal["switch", "boot", "test"]) -> MachineState:
    """What a machine has to run and to boot once its roll-out is reverted.

    `before` is what it ran and booted before it was touched, `good` the path of its last good (None where there is
    none), and `activation` what a roll-out of it ends with.
    """
    if good is None:
        return before
    match activation:
        case "switch":
            return MachineState(system=good, profile=good)
        case "boot":  # what runs was never touched
            return MachineState(system=before.system, profile=good)
        case "test":  # what boots was never touched
            return MachineState(system=good, profile=before.profile)
