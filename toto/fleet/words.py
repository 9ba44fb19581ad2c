"""Times, sizes and strangers' text, as people read them."""

import re
from datetime import UTC, datetime
from typing import Final

_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def clean(text: str) -> str:
    """Text without control characters."""
    return _CONTROL.sub("�", text)


def ago(at: str | float | datetime, now: datetime) -> str:
    """How long ago a moment (UTC) was, in words."""
    if not at:
        return ""
    try:
        then = at if isinstance(at, datetime) else _moment(at)
    except (ValueError, OSError, OverflowError):
        return str(at)
    seconds = max(0, (now - then).total_seconds())
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length or (seconds >= length and unit == "min"):
            return f"{seconds / length:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def _moment(at: str | float) -> datetime:
    if isinstance(at, float):
        return datetime.fromtimestamp(at, UTC)
    then = datetime.fromisoformat(at)
    return then if then.tzinfo else then.replace(tzinfo=UTC)


def size(count: int) -> str:
    """A number of bytes, for people."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def lasted(seconds: float | None) -> str:
    """How long something took, for people."""
    if seconds is None:
        return ""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
