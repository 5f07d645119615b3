"""The charts of a report: every figure of every run in one of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from dlora.metrics.events import FINISHED, SAMPLE, SKIPPED, START
from dlora.report.chart import Chart, Line
from dlora.report.grouping import Group, grouped
from dlora.report.numbers import unit_of
from dlora.report.run_files import Figure, RunFiles

MOST_CHARTS = 300
MOST_REFERENCES = 4
MOST_MARKS = 40  # in a chart, where more would hide its lines
CELLS = 36_000  # columns of all lines of a page, which decide its size
MOST_COLUMNS, FEWEST_COLUMNS = 400, 60
PLANNED = {"peak_memory_bytes": "peak", "wire_bytes": "wire"}  # figure → key of what was planned


@dataclass
class Charts:
    """The charts by section, and the figures that have none, since there were too many."""

    sections: dict[str, list[Chart]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    @property
    def all(self) -> list[Chart]:
        """In the order of the page."""
        return [chart for charts in self.sections.values() for chart in charts]


def charts_of(runs: Sequence[RunFiles]) -> Charts:
    """The charts of some runs."""
    groups = grouped(name for run in runs for name in run.figures)
    shown, found = groups[:MOST_CHARTS], Charts()
    found.left_out = [name for group in groups[MOST_CHARTS:] for name in group.names]
    lines = sum(name in run.figures for g in shown for run in runs for name in g.names)
    most = min(MOST_COLUMNS, max(FEWEST_COLUMNS, CELLS // max(lines, 1)))
    marks = [mark for run in runs for mark in marks_of(run, several=len(runs) > 1)]
    marks = marks if len(marks) <= MOST_MARKS else []
    for group in shown:
        found.sections.setdefault(group.section, []).append(_chart(group, runs, marks, most))
    return found


def _chart(
    group: Group, runs: Sequence[RunFiles], marks: list[tuple[int, str]], most: int
) -> Chart:
    several = len(runs) > 1
    lines = []
    for number, run in enumerate(runs):
        for place, name in enumerate(group.names):
            if (figure := run.figures.get(name)) is None:
                continue
            label = name
            if several:
                label = run.name if len(group.names) == 1 else f"{run.name}: {name}"
            lines.append(
                Line(label, figure, number if several else place, dash=several and place > 0)
            )
    return Chart(
        title=group.title,
        note=group.note,
        unit=unit_of(group.names[0]),
        lines=lines,
        from_zero=group.from_zero,
        references=list(_planned(group.names[0], runs)),
        marks=marks,
        most_columns=most,
    )


def _planned(name: str, runs: Sequence[RunFiles]) -> Iterator[tuple[str, float]]:
    """What the runs had planned of a figure, a line for each that differs."""
    found: dict[float, str] = {}
    for run in runs:
        planned = run.started.get("planned")
        value = planned.get(PLANNED.get(name, "")) if isinstance(planned, dict) else None
        if is_number(value):
            found.setdefault(float(value), run.name)
    for value, of in list(found.items())[:MOST_REFERENCES]:
        yield ("planned" if len(found) == 1 else f"planned, {of}"), value


def skipped_steps(run: RunFiles) -> list[int]:
    """The steps whose loss or gradient was not finite, which changed nothing."""
    found = {e["step"] for e in run.events if e["event"] == SKIPPED and is_step(e.get("step"))}
    for name in ("loss", "grad_norm"):
        figure = run.figures.get(name, Figure())
        found |= {
            step
            for step, value in zip(figure.steps, figure.values, strict=True)
            if not math.isfinite(value)
        }
    return sorted(found)


def marks_of(run: RunFiles, *, several: bool) -> Iterator[tuple[int, str]]:
    """(step, what happened) of the events that a chart shows: all but the ordinary."""
    who = f"{run.name}: " if several else ""
    for event in (*run.common, *run.events):
        kind, step = event["event"], event.get("step")
        if kind in (SAMPLE, FINISHED, SKIPPED) or not is_step(step):
            continue
        if kind != START:
            yield step, f"{who}{kind}"[:80]
        elif step:
            yield step, f"{who}restarted"
    yield from ((step, f"{who}skipped") for step in skipped_steps(run))


def is_step(value: object) -> TypeGuard[int]:
    """Whether an event's step is one."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is a finite number of a file."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
