"""What a machine is reverted to; `toto.machine.activation` does it."""

from typing import Literal

from toto.machine.activation import MachineState


def where_to(before: MachineState, good: str | None, activation: Literal["switch", "boot", "test"]) -> MachineState:
    """What a machine has to run and boot after its roll-out is reverted.

    `before` is what it ran and booted before toto touched it. `good` is the store path of its last good, None if it has
    none. `activation` is what its roll-outs end with.
    """
    if good is None:
        return before
    match activation:
        case "switch":
            return MachineState(system=good, profile=good)
        case "boot":  # the roll-out did not touch what it runs
            return MachineState(system=before.system, profile=good)
        case "test":  # the roll-out did not touch what it boots
            return MachineState(system=good, profile=before.profile)
