"""A fourth kind of target, for the tests: a file of the repo that is copied to a folder. This is what it is."""

import hashlib
from pathlib import Path
from typing import Any

from toto.base.errors import InputError
from toto.ledger.ledger import Before, Deployed
from toto.ledger.target import Target
from toto.plan.changes import Change, Desired
from toto.plan.kind import Found, Kind, Source
from toto.plan.order import Order


class DeployedFile(Deployed):
    """`size` is what was copied, in bytes."""

    size: int


class FileBefore(Before):
    """What the file held before; None where there was none."""

    text: str | None = None


class FileOrder(Order):
    """One file's part of a plan."""

    path: str


class FileKind(Kind[Path]):
    """Files under files/, copied to the folder that files/TO names; z comes after a, and what x fails is a warning."""

    name, one, many = "file", "file", "files"

    async def discover(self, source: Source) -> list[Found[Path]]:
        return [
            Found(Target("file", path.name), path, ("toy",), ("a",) if path.name == "z" else (), stops=path.name != "x")
            for path in sorted(source.tree.glob("files/*"))
            if path.name != "TO"
        ]

    async def identify(self, source: Source, found: Found[Path]) -> Desired:
        if found.subject.read_text() == "broken":
            raise InputError("it does not evaluate", target=found.target.label)
        digest = hashlib.sha256(found.subject.read_bytes()).hexdigest()
        return Desired(target=found.target, file=f"files/{found.target.name}", identity=digest)

    async def order(self, source: Source, found: Found[Path], change: Change) -> FileOrder:
        return source.order(FileOrder, change, path=f"files/{found.target.name}")

    def deployed(self, desired: Desired, **facts: Any) -> DeployedFile:
        return DeployedFile(identity=desired.identity, **{"size": 0, **facts})
