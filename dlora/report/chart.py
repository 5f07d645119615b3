"""A chart of the page: its lines as SVG, its axes, what hovering shows, and its values as a table.

Everything is drawn here, so the page is whole without its script, which only finds the column
under a pointer and shows what is written for it. The drawing is stretched to the page's width;
words lie above it, so they keep their size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from dlora.report.columns import Cell, Columns, columns_of
from dlora.report.numbers import log_ticks, shown, tick_words, ticks
from dlora.report.run_files import Figure

WIDTH, HEIGHT = 1000, 300  # of the drawing, before it is stretched
COLOURS = 8  # of the page; more lines repeat them, dashed
FEW = 40  # values of a line that have a dot each
MOST_DOTS = 200  # of a chart
LOG_ABOVE = 50.0  # highest over median, from which a logarithm shows more
ROWS = 16  # of a table of values


@dataclass(frozen=True)
class Line:
    """One series.

    Attributes:
        label: for the legend.
        colour: number of it.
        dash: whether the line is dashed.
    """

    label: str
    figure: Figure
    colour: int
    dash: bool = False

    @property
    def is_dashed(self) -> bool:
        """Also where its colour has another line already."""
        return self.dash or self.colour >= COLOURS


@dataclass(frozen=True)
class Axis:
    """Values to heights: 0 at the top, HEIGHT at the bottom."""

    low: float
    high: float
    is_log: bool

    def height(self, value: float) -> float:
        """Where a value lies."""
        low, high = self.low, self.high
        if self.is_log:
            low, high, value = math.log(low), math.log(high), math.log(max(value, self.low))
        # Halves, since the difference of large values may be infinite.
        span = high / 2 - low / 2
        share = (value / 2 - low / 2) / span if span else 0.5
        return round(HEIGHT * (1 - min(max(share, 0.0), 1.0)), 1)


@dataclass
class Chart:
    """What the page's template shows of one chart."""

    title: str
    note: str
    unit: str
    lines: list[Line]
    from_zero: bool = False
    references: list[tuple[str, float]] = field(default_factory=list)  # such as what was planned
    marks: list[tuple[int, str]] = field(default_factory=list)  # (step, what happened)
    most_columns: int = 400

    def __post_init__(self) -> None:
        figures = [line.figure for line in self.lines]
        self.columns: Columns = columns_of(figures, self.most_columns)
        self.cells = [self.columns.cells(figure) for figure in figures]
        self.axis = self._axis()
        ends = self.columns.ends
        self.first, self.last = (ends[0][0], ends[-1][1]) if ends else (0, 0)

    # -- the drawing ----------------------------------------------------------------------------

    def drawn(self) -> list[dict[str, Any]]:
        """Each line's paths: its band, its means, and a dot for each of few values."""
        found = []
        counts = [sum(c is not None and c.count > 0 for c in cells) for cells in self.cells]
        few = FEW if sum(n for n in counts if n <= FEW) <= MOST_DOTS else 1
        for line, cells, count in zip(self.lines, self.cells, counts, strict=True):
            points = list(zip(self._places(), cells, strict=True))
            found.append(
                {
                    "colour": line.colour % COLOURS,
                    "dash": line.is_dashed,
                    "band": "" if self.columns.exact else self._band(points),
                    "path": self._path(points),
                    "dots": self._dots(points) if count <= few else "",
                }
            )
        return found

    def _path(self, points: list[tuple[float, Cell | None]]) -> str:
        """A line through the means, broken where values were no numbers."""
        words, pen = [], "M"
        for x, cell in points:
            if cell is None:
                continue
            if not cell.count:
                pen = "M"
                continue
            dot = "h0" if pen == "M" else ""  # of a value between two gaps
            words.append(f"{pen}{x:g} {self.axis.height(cell.mean):g}{dot}")
            pen = "L"
        return "".join(words)

    def _band(self, points: list[tuple[float, Cell | None]]) -> str:
        """The area between lowest and highest, a polygon for each stretch without a gap."""
        words, stretch = [], list[tuple[float, Cell]]()
        for x, cell in [*points, (0.0, Cell())]:
            if cell is None:
                continue
            if cell.count:
                stretch.append((x, cell))
                continue
            if stretch:
                there = [f"{x:g} {self.axis.height(c.high):g}" for x, c in stretch]
                back = [f"{x:g} {self.axis.height(c.low):g}" for x, c in reversed(stretch)]
                words.append("M" + "L".join(there + back) + "Z")
            stretch = []
        return "".join(words)

    def _dots(self, points: list[tuple[float, Cell | None]]) -> str:
        """Lines of no length with round ends: dots that stretching leaves round."""
        there = ((x, cell) for x, cell in points if cell is not None and cell.count)
        return "".join(f"M{x:g} {self.axis.height(cell.mean):g}h0" for x, cell in there)

    def _axis(self) -> Axis:
        there = [c for cells in self.cells for c in cells if c is not None and c.count]
        lows, highs = [c.low for c in there], [c.high for c in there]
        lows += (more := [value for _, value in self.references])
        highs += more
        if not lows:
            return Axis(0.0, 1.0, is_log=False)
        low, high = min(lows), max(highs)
        middle = sorted(c.mean for c in there)[len(there) // 2] if there else high
        if low > 0 and high / LOG_ABOVE > middle:
            return Axis(low, high, is_log=True)
        if self.from_zero and low >= 0:
            return Axis(0.0, high * 1.05 if high < 1e300 else high, is_log=False) if high else _unit
        pad = 0.04 * (high - low) if high - low < 1e300 else 0.0
        if pad == 0 and low == high:
            pad = abs(low) / 2 or 1.0
        bottom = 0.0 if 0 <= low < pad else low - pad
        return Axis(bottom, high + pad, is_log=False)

    def _places(self) -> list[float]:
        """Where each column lies, from 0 to WIDTH."""
        return [self.place((a + b) / 2) for a, b in self.columns.ends]

    def place(self, step: float) -> float:
        """Where a step lies."""
        span = self.last - self.first
        return round(WIDTH * (step - self.first) / span, 1) if span else WIDTH / 2

    # -- its axes -------------------------------------------------------------------------------

    def heights(self) -> list[tuple[float, str]]:
        """(per cent from the top, words) of the ticks at the side."""
        low, high = self.axis.low, self.axis.high
        values = log_ticks(low, high) if self.axis.is_log else ticks(low, high, 5)
        words = tick_words(values, self.unit)
        if self.axis.is_log:
            words = [shown(value, self.unit) for value in values]
        heights = [100 * self.axis.height(value) / HEIGHT for value in values]
        return list(zip(heights, words, strict=True))

    def steps(self) -> list[tuple[float, str]]:
        """(per cent from the left, words) of the ticks below."""
        values = [v for v in ticks(self.first, self.last, 5) if v == int(v)]
        return [(self.place(v) * 100 / WIDTH, f"{int(v):,}") for v in values]

    def lines_across(self) -> list[dict[str, Any]]:
        """References, by their height."""
        return [
            {"height": self.axis.height(value), "label": f"{label}: {shown(value, self.unit)}"}
            for label, value in self.references
        ]

    def lines_up(self) -> list[tuple[float, str]]:
        """Marks, by their place."""
        return [
            (self.place(step), f"step {step:,}: {text}")
            for step, text in self.marks
            if self.first <= step <= self.last
        ]

    # -- its values -----------------------------------------------------------------------------

    def hover(self) -> dict[str, Any]:
        """What the script shows: of each column its place and steps, of each line in it the height
        (-1: none) and the value."""
        notes: dict[str, str] = {}
        for step, text in self.marks:
            if (place := self.columns.place(step)) >= 0 and self.first <= step <= self.last:
                notes[str(place)] = "; ".join(filter(None, (notes.get(str(place)), text)))
        return {
            "x": self._places(),
            "steps": [_span(a, b) for a, b in self.columns.ends],
            "lines": [
                {
                    "label": line.label,
                    "colour": line.colour % COLOURS,
                    "dash": line.is_dashed,
                    "y": [self.axis.height(c.mean) if c and c.count else -1 for c in cells],
                    "text": [self._text(cell) for cell in cells],
                }
                for line, cells in zip(self.lines, self.cells, strict=True)
            ],
            "notes": notes,
        }

    def _text(self, cell: Cell | None) -> str:
        if cell is None:
            return ""
        lost = f"{cell.lost} not finite" if cell.lost > 1 else "not finite" if cell.lost else ""
        if not cell.count:
            return lost
        text = shown(cell.mean, self.unit)
        if cell.count > 1:
            text = f"{text} ({shown(cell.low, self.unit)} to {shown(cell.high, self.unit)})"
        return f"{text}, {lost}" if lost else text

    def table(self) -> list[tuple[str, list[str]]]:
        """(steps, the lines' values) of some columns, evenly spread, the first and last included,
        and each column that has a line's lowest or highest value."""
        count = len(self.columns.ends)
        wanted = {round(i * (count - 1) / (ROWS - 1)) for i in range(ROWS)} if count else set()
        for cells in self.cells:
            there = [i for i, cell in enumerate(cells) if cell is not None and cell.count]
            if there and len(self.lines) <= COLOURS:
                wanted.add(min(there, key=lambda i: _of(cells[i]).low))
                wanted.add(max(there, key=lambda i: _of(cells[i]).high))
                wanted |= {there[0], there[-1]}
        return [
            (_span(*self.columns.ends[i]), [self._text(cells[i]) or "–" for cells in self.cells])
            for i in sorted(wanted)
        ]

    def summary(self) -> str:
        """What the chart says, for those who do not see it."""
        parts = []
        for line in self.lines[:COLOURS]:
            if not (there := line.figure.finite):
                parts.append(f"{line.label}: no finite value")
                continue
            values = [value for _, value in there]
            (a, first), (b, last) = there[0], there[-1]
            ends = f"from {shown(first, self.unit)} at step {a:,} to {shown(last, self.unit)}"
            low, high = shown(min(values), self.unit), shown(max(values), self.unit)
            parts.append(f"{line.label}: {ends} at step {b:,}, lowest {low}, highest {high}")
        more = len(self.lines) - COLOURS
        return ". ".join([f"{self.title} over steps", *parts, *[f"{more} more lines"] * (more > 0)])


_unit = Axis(0.0, 1.0, is_log=False)


def _of(cell: Cell | None) -> Cell:
    assert cell is not None
    return cell


def _span(first: int, last: int) -> str:
    return f"{first:,}" if first == last else f"{first:,} to {last:,}"
