"""Reads nix's ways to write a SHA-256 hash."""

import base64
import binascii
import re
from typing import Final

_BASE32: Final = "0123456789abcdfghijklmnpqrsvwxyz"  # nix's own


def sha256(text: str) -> bytes | None:
    """The 32 bytes of a hash: base 64 as in `sha256-…`, hexadecimal, or nix's base 32, with `sha256:` or without.

    None for any other text.
    """
    if text.startswith("sha256-"):
        try:
            data = base64.b64decode(text.removeprefix("sha256-"), validate=True)
        except binascii.Error:
            return None
        return data if len(data) == 32 else None
    text = text.removeprefix("sha256:")
    if re.fullmatch(r"[0-9a-f]{64}", text):
        return bytes.fromhex(text)
    if len(text) == 52 and not set(text) - set(_BASE32):
        value = 0
        for letter in text:
            value = value << 5 | _BASE32.index(letter)
        return value.to_bytes(33, "little")[:32] if value < 1 << 256 else None
    return None
