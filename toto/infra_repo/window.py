"""Windows of time in which machines may be changed: `Mon-Fri 22:00-06:00`."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from typing import Final, Self

from toto.base.model import shown

_DAYS: Final = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")


@dataclass(frozen=True)
class Window:
    """A weekly maintenance window, such as `Sat-Sun 22:00-06:00`, `Mon,Thu 01:00-03:30` or `22:00-06:00` (daily).

    A window whose end is not after its start ends on the next day. Its days are the days on which it starts.
    """

    text: str
    days: frozenset[int]  # 0 is Monday
    start: time
    end: time  # 24:00 is stored as 00:00 of the next day

    @classmethod
    def parse(cls, text: str) -> Self:
        """The window that `text` describes. Raises ValueError with the expected form."""
        wanted = f"should be like 'Sat-Sun 22:00-06:00' or '22:00-06:00', not {shown(text)}"
        form = re.fullmatch(r"(?:([A-Za-z,-]+) +)?(\d\d:\d\d) ?- ?(\d\d:\d\d)", text.strip(), re.ASCII)
        if form is None:
            raise ValueError(wanted)
        try:
            days = frozenset(range(7)) if form[1] is None else frozenset(_days(form[1]))
            start = time.fromisoformat(form[2])
            end = time(0) if form[3] == "24:00" else time.fromisoformat(form[3])
        except ValueError:
            raise ValueError(wanted) from None
        return cls(text.strip(), days, start, end)

    def contains(self, moment: datetime) -> bool:
        """Whether the window is open at `moment`; see `until`."""
        return self.until(moment) is not None

    def until(self, moment: datetime) -> datetime | None:
        """When the window that is open at `moment` ends, in UTC; None when it is not open.

        It goes by the clock of the moment's time zone; by the machine's when it has none.

        A window opens once: from the first moment at which the clock shows its start, or a later time, until the first
        at which it shows its end. So the hour that is repeated when clocks are set back does not open it again, and a
        window that lies in the hour that is left out when they are set forward does not open on that day.
        """
        for day in (moment.date(), moment.date() - timedelta(days=1)):
            last = day if self.start < self.end else day + timedelta(days=1)
            if day.weekday() not in self.days or moment.timestamp() < _first(day, self.start, moment):
                continue
            if moment.timestamp() < (end := _first(last, self.end, moment)):
                return datetime.fromtimestamp(end, UTC)
        return None

    def __str__(self) -> str:
        return self.text


def _first(day: date, clock: time, like: datetime) -> float:
    """The first moment (seconds since 1970) at which the clock shows this time or a later one, in `like`'s zone."""
    wanted = datetime.combine(day, clock)
    early, late = sorted(wanted.replace(tzinfo=like.tzinfo, fold=fold).timestamp() for fold in (0, 1))
    # The two differ when the clock shows it twice, at both, or never: then it jumps over it between the two.
    shown = (
        datetime.fromtimestamp(second, like.tzinfo).replace(tzinfo=None) for second in range(int(early), int(late))
    )
    return next((early + number for number, each in enumerate(shown) if each >= wanted), late)


def _days(text: str) -> Iterator[int]:
    for part in text.split(","):
        first, _, last = part.partition("-")
        begin = _DAYS.index(first.capitalize())
        end = _DAYS.index(last.capitalize()) if last else begin
        yield from ((begin + step) % 7 for step in range((end - begin) % 7 + 1))
