"""Long series in few columns, without losing an extreme: lowest, highest and mean of each column.

Steps that no page is wide enough for share a column. Of a column a chart draws the band from its
lowest to its highest value and a line through the means, so that a single outlier among 10,000
steps is seen, and its value read.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from dlora.report.run_files import Figure


@dataclass(frozen=True)
class Cell:
    """A series' values in a column; `count` of them are numbers, `lost` are none."""

    low: float = math.nan
    high: float = math.nan
    mean: float = math.nan
    count: int = 0
    lost: int = 0


@dataclass(frozen=True)
class Columns:
    """The columns of a chart.

    Attributes:
        ends: (first step, last step) of each that has a value, in order.
        exact: whether each is one step.
    """

    ends: list[tuple[int, int]]
    exact: bool

    def place(self, step: int) -> int:
        """The column of a step, or the last one before it; -1: it is before all."""
        return bisect_right(self.ends, (step, math.inf)) - 1

    def cells(self, figure: Figure) -> list[Cell | None]:
        """A series in these columns; None where it has no line of the log."""
        found: list[Cell | None] = [None] * len(self.ends)
        sums: dict[int, tuple[float, float, list[float], int]] = {}
        for step, value in zip(figure.steps, figure.values, strict=True):
            place = self.place(step)
            low, high, values, lost = sums.get(place, (math.inf, -math.inf, [], 0))
            if math.isfinite(value):
                values.append(value)
                sums[place] = min(low, value), max(high, value), values, lost
            else:
                sums[place] = low, high, values, lost + 1
        for place, (low, high, values, lost) in sums.items():
            if not values:
                found[place] = Cell(lost=lost)
                continue
            # Each by itself, since the sum of large values may be infinite.
            mean = min(max(math.fsum(v / len(values) for v in values), low), high)
            found[place] = Cell(low, high, mean, len(values), lost)
        return found


def columns_of(figures: Sequence[Figure], most: int) -> Columns:
    """At most `most` columns for the steps of all of them: each step's own where that is enough."""
    steps = sorted({step for figure in figures for step in figure.steps})
    if len(steps) <= most:
        return Columns([(step, step) for step in steps], exact=True)
    first, span = steps[0], steps[-1] - steps[0] + 1
    ends: dict[int, tuple[int, int]] = {}
    for step in steps:
        place = (step - first) * most // span
        ends[place] = (ends[place][0] if place in ends else step, step)
    return Columns(list(ends.values()), exact=False)
