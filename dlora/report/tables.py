"""The tables of a report: the runs side by side, their settings, memory against plan, figures."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from dlora.config.load import SCHEMA
from dlora.metrics.events import ENDS, FINISHED, START
from dlora.metrics.progress import clock
from dlora.report.numbers import BYTES, shown, unit_of
from dlora.report.run_files import Figure, RunFiles
from dlora.report.views import is_number

MOST_CHARACTERS = 2_000  # of a value or a text
ABSENT = "–"
PLANNED = (  # key of the record, words
    ("peak", "peak memory"),
    ("base", "W0 held"),
    ("replica", "A, B, gradients, state"),
    ("wire", "wire per step"),
)
_MISSING = object()


# -- the runs, side by side ---------------------------------------------------------------------


def overview(runs: Sequence[RunFiles]) -> list[tuple[str, list[str]]]:
    """(words, of each run) of what to know first; rows that say nothing of any run are left out."""
    rows = [(words, [of(run) for run in runs]) for words, of in _ROWS]
    return [row for row in rows if any(cell != ABSENT for cell in row[1])]


def _first_last(name: str, run: RunFiles) -> str:
    there = run.figures.get(name, Figure()).finite
    if len(there) < 2:
        return shown(there[0][1]) if there else ABSENT
    (_, first), (_, last) = there[0], there[-1]
    change = f" ({last / first - 1:+.1%})" if first > 0 else ""
    return f"{shown(first)} → {shown(last)}{change}"


def _best(run: RunFiles) -> str:
    there = run.figures.get("eval_loss", Figure()).finite
    if not there:
        return ABSENT
    step, value = min(there, key=lambda point: point[1])
    return f"{shown(value)} at step {step:,}"


def _median(name: str, run: RunFiles) -> str:
    there = [value for _, value in run.figures.get(name, Figure()).finite]
    return shown(statistics.median(there), unit_of(name)) if there else ABSENT


def _highest(name: str, run: RunFiles) -> str:
    there = [value for _, value in run.figures.get(name, Figure()).finite]
    return shown(max(there), unit_of(name)) if there else ABSENT


def _time(run: RunFiles) -> str:
    """Seconds of the steps; a logged step stands for those before it that were not logged."""
    seconds, before = 0.0, 0
    for step, value in run.figures.get("step_seconds", Figure()).finite:
        seconds, before = seconds + value * max(step - before, 1), step
    return clock(seconds) if 0 < seconds < 1e9 else ABSENT


def _steps(run: RunFiles) -> str:
    total = run.started.get("steps", run.config.get("train.max_steps"))
    return f"{run.last_step:,}" + (f" of {total:,}" if isinstance(total, int) else "")


def _ended(run: RunFiles) -> str:
    ends = [e for e in (*run.common, *run.events) if e["event"] in (START, *ENDS)]
    if not ends:
        return ABSENT
    return "no end recorded: running or killed" if ends[-1]["event"] == START else _end(ends[-1])


def _end(event: dict[str, Any]) -> str:
    why = event.get("cause", event.get("why"))
    return event["event"] + (f": {as_words(why)}" if why else "")


def _machine(run: RunFiles) -> str:
    started = run.started
    if not isinstance(started.get("ranks"), int):
        return ABSENT
    ranks, nodes = started["ranks"], started.get("nodes", 1)
    several = f" on {nodes} nodes" if nodes != 1 else ""
    return f"{ranks} rank{'s' * (ranks != 1)}{several}, {as_words(started.get('device', '?'))}"


def _set(key: str) -> Any:
    return lambda run: as_words(run.config[key]) if run.config.get(key) is not None else ABSENT


_ROWS: tuple[tuple[str, Any], ...] = (
    ("base", _set("model.path")),
    ("method", _set("adapter.method")),
    ("objective", _set("train.objective")),
    ("steps", _steps),
    ("ended", _ended),
    ("ranks", _machine),
    ("loss", lambda run: _first_last("loss", run)),
    ("held-out loss", lambda run: _first_last("eval_loss", run)),
    ("lowest held-out loss", _best),
    ("time in steps", _time),
    ("target tokens per second, median", lambda run: _median("tokens_per_second", run)),
    ("padding, median", lambda run: _median("padding", run)),
    ("peak memory", lambda run: _highest("peak_memory_bytes", run)),
    ("wire per step, median", lambda run: _median("wire_bytes", run)),
)


# -- settings -----------------------------------------------------------------------------------


def settings(runs: Sequence[RunFiles]) -> list[dict[str, Any]]:
    """Every key of the configurations: its values, whether they differ between runs, whether one is
    no default, and its meaning."""
    rows = []
    for key in dict.fromkeys(key for run in runs for key in run.config):
        values = [run.config.get(key, _MISSING) for run in runs]
        words = [ABSENT if value is _MISSING else as_words(value) for value in values]
        option = SCHEMA.get(key)
        default = as_words(option.default) if option else None
        rows.append(
            {
                "key": key,
                "cells": words,
                "differs": len(set(words)) > 1,
                "is_set": any(word != default for word in words),
                "meaning": option.doc if option else "",
            }
        )
    return rows


def as_words(value: Any) -> str:
    """A value of a file, as JSON unless it is text, and cut where it is long."""
    if isinstance(value, str):
        return cut(value)
    words: list[str] = []
    length = 0
    try:
        # Piece by piece: a short YAML file may hold a value that no memory could write out.
        for piece in json.JSONEncoder(ensure_ascii=False, default=str).iterencode(value):
            words.append(piece)
            length += len(piece)
            if length > MOST_CHARACTERS:
                break
    except (ValueError, TypeError, RecursionError):
        return "?"
    return cut("".join(words))


def cut(text: str, most: int = MOST_CHARACTERS) -> str:
    """A text, or its beginning."""
    return text if len(text) <= most else f"{text[:most]} … (cut)"


# -- memory and wire against plan ---------------------------------------------------------------


def against_plan(runs: Sequence[RunFiles]) -> list[dict[str, Any]]:
    """Planned and measured bytes per rank, a row for each figure of each run."""
    rows = []
    for run in runs:
        planned, measured = run.started.get("planned"), _measured(run)
        if not isinstance(planned, dict):
            continue
        for key, words in PLANNED:
            expected, found = planned.get(key), measured.get(key)
            if not is_number(expected):
                continue
            row: dict[str, Any] = {"run": run.name, "what": words}
            row["planned"] = shown(expected, BYTES)
            row |= {"measured": "not recorded", "share": None}
            if is_number(found):
                share = found / expected if expected else None
                row |= {"measured": shown(found, BYTES), "share": share}
            rows.append(row)
    return rows


def _measured(run: RunFiles) -> dict[str, Any]:
    """What the last end recorded; of a run that has not ended, what its log shows."""
    for event in reversed((*run.common, *run.events)):
        if event["event"] == FINISHED and isinstance(event.get("measured"), dict):
            return dict(event["measured"])
    found = {}
    peaks = [v for _, v in run.figures.get("peak_memory_bytes", Figure()).finite]
    sent = [v for _, v in run.figures.get("wire_bytes", Figure()).finite]
    if peaks:
        found["peak"] = max(peaks)
    if sent:
        found["wire"] = statistics.median(sent[2:] or sent)
    return found


# -- all figures --------------------------------------------------------------------------------


def figures(runs: Sequence[RunFiles]) -> Iterator[dict[str, Any]]:
    """Every figure of every run, in numbers."""
    for run in runs:
        for name, figure in run.figures.items():
            unit, there = unit_of(name), figure.finite
            row = {"run": run.name, "name": name, "count": len(figure.values), "ends": None}
            if there:
                low = min(there, key=lambda point: point[1])
                high = max(there, key=lambda point: point[1])
                row["ends"] = [
                    (f"{shown(value, unit)}", f"{step:,}")
                    for step, value in (there[0], there[-1], low, high)
                ]
            row["lost"] = len(figure.values) - len(there)
            yield row
