"""A time for people and for JSON."""

from datetime import UTC, datetime
from typing import Final

_LAST: Final = 253_402_300_799.0  # of the year 9999


def moment(at: float) -> str:
    """A time, in seconds since 1970, as ISO 8601 (UTC)."""
    if at > _LAST:
        return "the end of time"
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")
