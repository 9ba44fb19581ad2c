"""Files that are made when first needed, such as keys: of several processes that need one at once, all use the same."""

import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

from toto.base import process


async def made(file: Path, make: Callable[[Path], Awaitable[object]]) -> Path:
    """Return `file`, which `make(PATH)` makes when it is missing; a `.pub` that it leaves beside it comes along."""
    if file.exists():
        return file
    file.parent.mkdir(mode=0o700, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as directory:
        fresh = Path(directory, file.name)
        await make(fresh)
        # The process that links it first has made it; the others use that one.
        try:
            file.hardlink_to(fresh)
        except FileExistsError:
            return file
        if (public := Path(f"{fresh}.pub")).exists():
            public.replace(f"{file}.pub")
    return file


async def ssh_key(file: Path, comment: str) -> Path:
    """The private ssh key `file`, which is made when missing."""

    async def make(fresh: Path) -> None:
        await process.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", fresh], timeout=60)

    return await made(file, make)
