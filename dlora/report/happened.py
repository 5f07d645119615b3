"""What happened to a run beside its figures: events with their time, and samples side by side."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from typing import Any

from dlora.metrics.events import FINISHED, SAMPLE, SKIPPED, START
from dlora.report.run_files import RunFiles
from dlora.report.tables import as_words
from dlora.report.views import is_number, is_step, skipped_steps

MOST_EVENTS, MOST_SAMPLES = 500, 50  # of a page
NO_EVENTS = ("adapter", "batch_hash")  # texts of every line
_BEFORE, _AFTER = "before", "after"


def events_of(runs: Sequence[RunFiles]) -> list[dict[str, Any]]:
    """The events of some runs: run, step, time, kind, words; those of a common run once."""
    found: list[dict[str, Any]] = []
    seen: list[Any] = []
    for run in runs:
        if run.common and run.common not in seen:
            seen.append(run.common)
            found += _rows(run.group.absolute().name if run.group else run.name, run.common)
        found += _rows(run.name, run.events)
        told = {e["step"] for e in run.events if e["event"] == SKIPPED and is_step(e.get("step"))}
        found += [
            _row(run.name, step, None, SKIPPED, "loss or gradient not finite; nothing was changed")
            for step in skipped_steps(run)
            if step not in told
        ]
        found += list(_changed_texts(run))
    return found


def _rows(name: str, events: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for event in events:
        kind, step = event["event"], event.get("step")
        if kind != SAMPLE:
            own = _words(event)
            kind = "restart" if kind == START and step else kind
            yield _row(name, step if is_step(step) else None, event.get("time"), kind, own)


def _row(name: str, step: int | None, time: Any, kind: str, words: str) -> dict[str, Any]:
    shown = f"{step:,}" if step is not None else ""
    return {"run": name, "step": shown, "time": _time(time), "kind": kind, "words": words}


def _time(seconds: Any) -> str:
    """In UTC, so that the page says the same wherever it is made."""
    if not is_number(seconds):
        return ""
    try:
        moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    except (ValueError, OverflowError, OSError):
        return ""
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC"


def _words(event: dict[str, Any]) -> str:
    """What an event says beside its kind, step and time."""
    own = {k: v for k, v in event.items() if k not in ("event", "time", "step")}
    if event["event"] in (START, FINISHED):  # whose bytes are in the table of the plan
        own = {k: v for k, v in own.items() if k not in ("planned", "measured")}
    if len(own) == 1 and own.keys() <= {"found", "why", "cause"}:
        return as_words(*own.values())
    return ", ".join(f"{as_words(str(k))}: {as_words(v)}" for k, v in own.items())


def _changed_texts(run: RunFiles) -> Iterator[dict[str, Any]]:
    """What lines of the log say that is no number, where it changes."""
    for name, values in run.texts.items():
        last = None
        for step, text in values if name not in NO_EVENTS else ():
            if text != last:
                yield _row(run.name, step, None, as_words(name), as_words(text))
            last = text


def samples_of(runs: Sequence[RunFiles]) -> list[dict[str, str]]:
    """Prompts with the answers before and after training; of several answers the last one."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for run in runs:
        for event in run.events:
            if event["event"] != SAMPLE or not isinstance(event.get("prompt"), str):
                continue
            key = run.name, event["prompt"]
            row = found.setdefault(
                key, {"run": run.name, "prompt": as_words(event["prompt"]), _BEFORE: "", _AFTER: ""}
            )
            row["wanted"] = as_words(event.get("wanted", ""))
            when = _BEFORE if str(event.get("when", "")).startswith(_BEFORE) else _AFTER
            row[when] = as_words(event.get("answer", ""))
    return list(found.values())
