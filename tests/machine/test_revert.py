"""What a machine is reverted to."""

from typing import Literal

import pytest

from toto.machine.activation import MachineState
from toto.machine.revert import where_to

BEFORE = MachineState(system="ran", profile="boots")


@pytest.mark.parametrize(
    ("good", "activation", "to"),
    [
        (None, "switch", BEFORE),
        (None, "boot", BEFORE),
        (None, "test", BEFORE),
        ("good", "switch", MachineState(system="good", profile="good")),
        ("good", "boot", MachineState(system="ran", profile="good")),
        ("good", "test", MachineState(system="good", profile="boots")),
    ],
)
def test_a_machine_is_reverted_to_its_last_good_where_it_was_touched(
    good: str | None, to: MachineState, activation: Literal["switch", "boot", "test"]
) -> None:
    assert where_to(BEFORE, good, activation) == to
