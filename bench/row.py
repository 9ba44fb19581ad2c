"""The rows of the table: a measure and the baseline that it is compared with."""

import statistics
from dataclasses import dataclass

HEAD = f"{'measure (medians)':<46}{'toto':>11}   {'beside':<42}{'':>11}   {'ratio':>6}"


@dataclass(frozen=True)
class Row:
    """A measure (one value for each round) and the baseline that it is compared with, in the same unit."""

    what: str
    values: list[float]
    against: str
    others: list[float]
    unit: str = "s"

    def __str__(self) -> str:
        ours, theirs = statistics.median(self.values), statistics.median(self.others)
        return (
            f"{self.what:<46}{self._shown(ours):>11}   {self.against:<42}{self._shown(theirs):>11}   "
            f"{ours / theirs:6.2f}"
        )

    def _shown(self, value: float) -> str:
        return f"{value:.3f} s" if self.unit == "s" else f"{value:.1f} {self.unit}"


@dataclass(frozen=True)
class Spread:
    """The median and the 95th percentile of a measure (seconds), and the target for the latter."""

    what: str
    values: list[float]
    promised: float

    def __str__(self) -> str:
        middle, high = statistics.median(self.values), statistics.quantiles(self.values, n=20, method="inclusive")[-1]
        return (
            f"    {self.what}: p50 {middle:.3f} s, p95 {high:.3f} s of {len(self.values)}; target p95 < "
            f"{self.promised:g} s: {'held' if high < self.promised else 'NOT HELD'}"
        )


@dataclass(frozen=True)
class Target:
    """Whether a row meets its target: at most `times` × the baseline + `plus`, in the row's unit."""

    what: str
    row: Row
    times: float
    plus: float

    def __str__(self) -> str:
        ours, theirs = statistics.median(self.row.values), statistics.median(self.row.others)
        limit = self.times * theirs + self.plus
        return (
            f"    target: {self.what} ≤ {self.times:g} × {theirs:.3f} s + {self.plus:g} s = {limit:.3f} s: "
            f"{'held' if ours <= limit else 'NOT HELD'} ({ours:.3f} s)"
        )
