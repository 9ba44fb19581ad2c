"""A target: one thing that is deployed, by kind and name."""

from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from pydantic import TypeAdapter

Kind: TypeAlias = Literal["host", "terraform", "helm"]
KINDS: Final[tuple[Kind, ...]] = ("host", "terraform", "helm")  # in the order in which they are rolled out
KIND: Final[TypeAdapter[Kind]] = TypeAdapter(Kind)


@dataclass(frozen=True, order=True)
class Target:
    """One thing that is deployed; it prints as `host/web1`."""

    kind: Kind
    name: str

    def __str__(self) -> str:
        return f"{self.kind}/{self.name}"

    @property
    def label(self) -> str:
        """What people call it: a host by its bare name, the others as they print."""
        return self.name if self.kind == "host" else str(self)
