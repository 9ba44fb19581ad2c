"""A target: one thing that is deployed, by kind and name. What a kind is, `toto.plan.kinds` knows."""

from dataclasses import dataclass
from typing import Final

HOST: Final = "host"  # the kind whose targets people call by their bare names


@dataclass(frozen=True, order=True)
class Target:
    """One thing that is deployed; it prints as `host/web1`."""

    kind: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind}/{self.name}"

    @property
    def label(self) -> str:
        """What people call it: a host by its bare name, the others as they print."""
        return self.name if self.kind == HOST else str(self)
