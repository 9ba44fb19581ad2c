"""How the command tells that it could not do what was asked."""

import sys
from collections.abc import Sequence
from typing import Final

FAILED: Final = 2


def tell(
    words: Sequence[str], message: str, *, by: str = "toto", target: str | None = None, hint: str | None = None
) -> int:
    """Tell it on standard error, or with `--json` among the words as a document on standard output.

    Returns the exit status: 2, and with `--exit-code` 1, since 2 then says that something would change.
    """
    before = list(words[: words.index("--")]) if "--" in words else list(words)
    status = 1 if "--exit-code" in before else FAILED
    if "--json" in before:
        from toto.cli.output import document  # noqa: PLC0415  (`toto --help` does without)

        print(document("error", [{"message": message, "target": target, "hint": hint, "status": status}]))
    else:
        text = message if target is None else f"{target}: {message}"
        print(f"{by}: {text}" + (f"\nnext: {hint}" if hint else ""), file=sys.stderr)
    return status
