"""What a run left in its directory, read with patience: nothing in it is trusted.

metrics.jsonl   every number of every line is a figure; `{"a": {"b": 1}}` is the figure `a/b`
config.yaml     by dotted keys
events.jsonl    starts, samples, skipped steps and the like; runs of before have none
ranks.json      {step: {module: rank kept}} of AdaLoRA
adapters/NAME/  of a run of several adapters, each with files of its own
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dlora.config.strict_yaml import parse_yaml
from dlora.errors import UsageError
from dlora.io.files import path_of
from dlora.metrics.events import START, read_events
from dlora.metrics.log import read_metrics

METRICS, CONFIG, RANKS, ADAPTERS = "metrics.jsonl", "config.yaml", "ranks.json", "adapters"
MOST_STEP = 2**53  # beyond which a number of a step is none
MOST_ITEMS = 256  # of a list or a mapping in a line, that are figures of their own
MOST_CONFIG_BYTES = 2**20  # of a config.yaml, whose aliases could make more of it than memory has


@dataclass
class Figure:
    """The values of one name over the steps: NaN where a line says null, or what is not finite."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    @property
    def finite(self) -> list[tuple[int, float]]:
        """(step, value) of the values that are numbers."""
        return [p for p in zip(self.steps, self.values, strict=True) if math.isfinite(p[1])]


@dataclass
class RunFiles:
    """One run, or one adapter of a run of several.

    Attributes:
        name: unique in a report.
        config: by dotted keys.
        figures: by name, in the order of the log.
        texts: by name, what lines say that is no number: (step, text).
        group: the directory of the run that trained it beside others; None: it is its own.
        events: of its own, and `common` those of that run.
        notes: what could not be read.
    """

    name: str
    directory: Path
    group: Path | None = None
    config: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, Figure] = field(default_factory=dict)
    texts: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    common: list[dict[str, Any]] = field(default_factory=list)
    ranks: dict[int, dict[str, int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def last_step(self) -> int:
        """The last step of the log; 0 where it has none."""
        return max((f.steps[-1] for f in self.figures.values() if f.steps), default=0)

    @property
    def started(self) -> dict[str, Any]:
        """What its last start recorded."""
        starts = [e for e in (*self.common, *self.events) if e["event"] == START]
        return starts[-1] if starts else {}


def find_runs(words: list[str]) -> list[RunFiles]:
    """The runs that a user names, those of several adapters one by one, with unique names.

    Raises:
        UsageError: one is not the directory of a run, or is named twice.
    """
    found: list[RunFiles] = []
    for word in words:
        directory = path_of(word, "RUN")
        if not directory.is_dir():
            raise UsageError(f"RUN: {word}: there is no such directory")
        found += read_run(directory)
    places = [run.directory.resolve() for run in found]
    for place in places:
        if places.count(place) > 1:
            raise UsageError(f"RUN: {place} is given twice")
    for run, name in zip(found, _names(places), strict=True):
        run.name = name
    return found


def read_run(directory: Path) -> list[RunFiles]:
    """The run in a directory, or its adapters.

    Raises:
        UsageError: no run wrote there.
    """
    folder = directory / ADAPTERS
    try:
        found = [p for p in folder.iterdir() if (p / METRICS).is_file()]
        members = sorted(found, key=_by_number)
    except OSError:
        members = []
    if not members and not (directory / METRICS).is_file():
        raise UsageError(f"RUN: {directory} has no {METRICS}: no run has logged a step there")
    common = read_events(directory)
    if not members:
        return [_read(RunFiles("", directory))]
    own = [_read(RunFiles("", directory))] if (directory / METRICS).is_file() else []
    return own + [_read(RunFiles("", place, directory, common=common)) for place in members]


def _read(run: RunFiles) -> RunFiles:
    directory = run.directory
    run.name = directory.absolute().name
    run.events = read_events(directory)
    run.config = dict(_config(directory / CONFIG, run.notes))
    run.ranks = _ranks(directory / RANKS, run.notes)
    try:
        lines = read_metrics(directory / METRICS)
    except OSError as error:
        raise UsageError(f"RUN: {directory / METRICS} cannot be read: {error.strerror}") from None
    for line in lines:
        step = line["step"]
        if isinstance(step, bool) or not 0 <= step < MOST_STEP:
            continue
        for name, value in flat(line):
            if name == "step":
                continue
            if isinstance(value, str):
                run.texts.setdefault(name, []).append((step, value))
            else:
                figure = run.figures.setdefault(name, Figure())
                figure.steps.append(step)
                figure.values.append(value)
    return run


def flat(record: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, float | str]]:
    """The numbers and texts of a line by name, `a/b` of what lies in `a`; null is NaN."""
    for key, value in list(record.items())[:MOST_ITEMS]:
        name = f"{above}{key}"
        if isinstance(value, dict):
            yield from flat(value, f"{name}/")
        elif isinstance(value, list):
            yield from flat({str(i): v for i, v in enumerate(value[:MOST_ITEMS])}, f"{name}/")
        else:
            yield name, value if isinstance(value, str) else as_number(value)


def as_number(value: Any) -> float:
    """A number of JSON; NaN for null and for what is too large."""
    try:
        number = math.nan if value is None else float(value)
    except (OverflowError, TypeError, ValueError):
        return math.nan
    return number if math.isfinite(number) else math.nan


def _config(path: Path, notes: list[str]) -> Iterator[tuple[str, Any]]:
    """The keys of a configuration; a note where it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
        if len(text) > MOST_CONFIG_BYTES:
            raise UsageError(f"{path}: longer than a configuration is")
        value, _ = parse_yaml(text, str(path))
    except OSError as error:
        notes.append(f"{path}: cannot be read: {error.strerror}")
        return
    except UsageError as error:
        notes.append(str(error))
        return
    for section, options in (value if isinstance(value, dict) else {}).items():
        if isinstance(options, dict):
            yield from ((f"{section}.{name}", option) for name, option in options.items())
        else:
            yield str(section), options


def _ranks(path: Path, notes: list[str]) -> dict[int, dict[str, int]]:
    """AdaLoRA's masks by step."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {
            int(step): {str(name): int(rank) for name, rank in ranks.items()}
            for step, ranks in sorted(found.items(), key=lambda item: int(item[0]))
            if ranks
        }
    except (OSError, ValueError, AttributeError, TypeError, RecursionError, OverflowError) as error:
        notes.append(f"{path}: cannot be read: {error}")
        return {}


def _by_number(path: Path) -> list[tuple[int, str]]:
    """Orders `a_2` before `a_10`."""
    parts = re.split(r"([0-9]+)", path.name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def _names(places: list[Path]) -> list[str]:
    """The last parts of each path, as few as tell them apart; without `adapters` between."""
    for count in range(1, max((len(p.parts) for p in places), default=1) + 1):
        names = ["/".join(n for n in p.parts[-count:] if n != ADAPTERS) for p in places]
        if len(set(names)) == len(names):
            return names
    return [str(place) for place in places]
