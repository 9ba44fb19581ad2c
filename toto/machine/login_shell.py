"""How words reach a program on a machine through whatever login shell its user has."""

import os
import re
from collections.abc import Sequence
from typing import Final

# What a login shell is given: in single quotes, every shell leaves all characters but these as they are. `sh` on the
# machine makes the words out of it.
_SPECIAL: Final = re.compile(rb"[^A-Za-z0-9 _.,:;=@%^+/()<>{}~*?#&|$\"-]")
_RUN: Final = '"$@"'
_UNPACK: Final = (
    'n=$#; while [ "$n" -gt 0 ]; do w=$(printf "%b." "$1"); shift; set -- "$@" "${w%.}"; n=$((n-1)); done; '
)


def line(words: Sequence[str]) -> str:
    """The line for a login shell, whichever it is, that runs `words` as they are; a single word is a line for sh."""
    command = [os.fsencode(word) for word in (["/bin/sh", "-c", *words] if len(words) == 1 else words)]
    packed = [_SPECIAL.sub(lambda found: b"\\0%03o" % found[0][0], word) for word in command]
    run = _RUN if packed == command else _UNPACK + _RUN
    return f"/bin/sh -c '{run}' sh " + " ".join(f"'{word.decode()}'" for word in packed)
