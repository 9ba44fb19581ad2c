"""Builds hosts of the lab, for tests. Not toto's own door to nix (that is `toto.nix.commands`)."""

import asyncio
import json
from pathlib import Path
from typing import Final

from tests.lab.setup import environment

BOOTSTRAP: Final = Path(__file__).with_name("bootstrap.nix")


class NixFailed(Exception):
    """nix exited with an error; the message is what it said."""


async def nix(*argv: str, cwd: Path | None = None) -> str:
    """Runs a nix command with the lab's configuration; returns its output, stripped."""
    process = await asyncio.create_subprocess_exec(
        *argv,
        cwd=cwd,
        env=environment(),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        out, err = await process.communicate()
    except BaseException:
        if process.returncode is None:
            process.kill()
            await process.wait()
        raise
    if process.returncode:
        raise NixFailed(err.decode())
    return out.decode().strip()


def bootstrap(name: str, keys: list[str]) -> str:
    """The nix expression of a freshly installed machine."""
    return f"import {BOOTSTRAP} {{ name = {nix_string(name)}; keys = [ {' '.join(map(nix_string, keys))} ]; }}"


def nix_string(text: str) -> str:
    return json.dumps(text).replace("${", "\\${")


async def build(configuration: str, attribute: str, *, link: Path | None = None) -> Path:
    """Builds `system` or `vm` of a configuration (a nix expression); `link` becomes a GC root of it."""
    kept = ["--out-link", str(link)] if link else ["--no-out-link"]
    return Path(
        await nix("nix-build", "<nixpkgs/nixos>", "-A", attribute, "--arg", "configuration", configuration, *kept)
    )


async def drv(configuration: str, attribute: str) -> str:
    """The derivation's store path; evaluates only."""
    return await nix("nix-instantiate", "<nixpkgs/nixos>", "-A", attribute, "--arg", "configuration", configuration)
