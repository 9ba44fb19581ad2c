"""A target: one thing that is deployed, by kind and name. `toto.plan.kinds` lists the kinds."""

from dataclasses import dataclass
from typing import Final, Self

HOST: Final = "host"  # the kind whose targets have labels without the kind


@dataclass(frozen=True, order=True)
class Target:
    """One thing that is deployed; it prints as `host/web1`."""

    kind: str
    name: str

    @classmethod
    def of(cls, text: str) -> Self:
        """The target that a person means by `web1`, `host/web1` or `terraform/dns`."""
        kind, slash, name = text.partition("/")
        return cls(kind, name) if slash else cls(HOST, text)

    def __str__(self) -> str:
        return f"{self.kind}/{self.name}"

    @property
    def label(self) -> str:
        """Its name in messages: `web1` for a host, `terraform/dns` for the other kinds."""
        return self.name if self.kind == HOST else str(self)
