"""The rows of the table: a measure and the baseline that it is compared with."""

import math
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
            f"{self.what:<46}{self.shown(ours):>11}   {self.against:<42}{self.shown(theirs):>11}   {ours / theirs:6.2f}"
        )

    def shown(self, value: float) -> str:
        """A value with its unit."""
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
class Exponent:
    """How a measure grows: with which power of the size, when the size is `times` as large (1: in proportion)."""

    what: str
    times: float
    values: list[float]
    others: list[float]

    def __str__(self) -> str:
        ours, theirs = statistics.median(self.values), statistics.median(self.others)
        return f"    it grows {self.what} with the power {math.log(ours / theirs, self.times):.2f}"


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
        share = f"{self.times:g} × {self.row.shown(theirs)} + {self.row.shown(self.plus)} = " if self.times else ""
        return (
            f"    target: {self.what} ≤ {share}{self.row.shown(limit)}: "
            f"{'held' if ours <= limit else 'NOT HELD'} ({self.row.shown(ours)})"
        )
