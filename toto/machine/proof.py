"""Checks what a machine has signed by its ssh host key, which is the manifest's: see `toto.machine.owners`."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from flying_monkey import signature


def check(text: bytes, signed: bytes, machine: str, host_keys: Sequence[str], namespace: str) -> None:
    """Check that one of `host_keys` (type and base64) signed `text`. Raises `flying_monkey.signature.NotGenuine`."""
    with tempfile.NamedTemporaryFile("w", prefix="toto-signers-") as signers:
        signers.writelines(f'{machine} namespaces="{namespace}" {key}\n' for key in host_keys)
        signers.flush()
        signature.check(text, signed, machine, Path(signers.name), namespace)
