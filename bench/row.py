"""A row of the table: a measure beside the thing that it is compared with."""

import statistics
from dataclasses import dataclass

HEAD = f"{'measure (medians)':<46}{'toto':>11}   {'beside':<42}{'':>11}   {'ratio':>6}"


@dataclass(frozen=True)
class Row:
    """A measure (one value a round) and what it is held against, in the same unit."""

    what: str
    values: list[float]
    against: str
    others: list[float]
    unit: str = "s"

    def __str__(self) -> str:
        mine, theirs = statistics.median(self.values), statistics.median(self.others)
        return (f"{self.what:<46}{self._shown(mine):>11}   {self.against:<42}{self._shown(theirs):>11}   "
                f"{mine / theirs:6.2f}")

    def _shown(self, value: float) -> str:
        return f"{value:.3f} s" if self.unit == "s" else f"{value:.1f} {self.unit}"


@dataclass(frozen=True)
class Spread:
    """The median and the 95th percentile of a measure (seconds), beside what was promised of the latter."""

    what: str
    values: list[float]
    promised: float

    def __str__(self) -> str:
        middle, high = statistics.median(self.values), statistics.quantiles(self.values, n=20, method="inclusive")[-1]
        return (f"    {self.what}: p50 {middle:.3f} s, p95 {high:.3f} s of {len(self.values)}; target p95 < "
                f"{self.promised:g} s: {'held' if high < self.promised else 'NOT HELD'}")


@dataclass(frozen=True)
class Target:
    """Whether a row keeps within what was promised: at most `times` × the other + `plus`."""

    what: str
    row: Row
    times: float
    plus: float

    def __str__(self) -> str:
        mine, theirs = statistics.median(self.row.values), statistics.median(self.row.others)
        limit = self.times * theirs + self.plus
        return (f"    target: {self.what} ≤ {self.times:g} × {theirs:.3f} s + {self.plus:g} s = {limit:.3f} s: "
                f"{'held' if mine <= limit else 'NOT HELD'} ({mine:.3f} s)")
