"""Where a machine goes back to."""

from typing import Literal

import pytest

from toto.machine.activation import Facts
from toto.machine.back import where_to

BEFORE = Facts(system="ran", profile="boots")


@pytest.mark.parametrize(("good", "activation", "to"), [
    (None, "switch", BEFORE),
    (None, "boot", BEFORE),
    (None, "test", BEFORE),
    ("good", "switch", Facts("good", "good")),
    ("good", "boot", Facts("ran", "good")),
    ("good", "test", Facts("good", "boots")),
])
def test_back_to_the_last_good_where_toto_had_touched_it(good: str | None, to: Facts,
                                                         activation: Literal["switch", "boot", "test"]) -> None:
    assert where_to(BEFORE, good, activation) == to
