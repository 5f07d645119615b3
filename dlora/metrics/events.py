"""`events.jsonl`: what happens to a run beside its figures, one line each, across its restarts.

    {"event": "start", "time": 1764524400.1, "step": 0, "steps": 200, "ranks": 2, ...}
    {"event": "sample", "time": ..., "step": 0, "when": "before training", "prompt": ..., ...}
    {"event": "skipped", "time": ..., "step": 17, ...}
    {"event": "finished", "time": ..., "step": 200, "measured": {...}}

`time` is in seconds since 1970, `step` the steps that are done. A line is written at once, since
the next moment may be the run's last.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

EVENTS = "events.jsonl"
START, SAMPLE, SKIPPED, HEALED = "start", "sample", "skipped", "healed"
STOPPED, FAILED, FINISHED = "stopped", "failed", "finished"
ENDS = (STOPPED, FAILED, FINISHED)  # of one start of a run; another start may follow


def add_event(
    directory: Path,
    event: str,
    step: int,
    values: dict[str, Any],
    warn: Callable[[str], None] = print,
) -> None:
    """Append a line; a line that cannot be written costs the run nothing but itself.

    Args:
        step: optimizer steps that are done.
        values: JSON; of numbers that are not finite, their names.
        warn: gets a line if the file cannot be written.
    """
    record = {"event": event, "time": round(time.time(), 3), "step": step, **values}
    path = directory / EVENTS
    try:
        with open(path, "ab+") as file:
            # After the torn line of a crash, a new line.
            if file.tell() and (file.seek(-1, 2), file.read(1))[1] != b"\n":
                file.write(b"\n")
            file.write((json.dumps(record) + "\n").encode())
    except OSError as error:
        warn(f"{path} cannot be written: {error}; the run continues")


def read_events(directory: Path) -> list[dict[str, Any]]:
    """All whole lines, in their order; of a run that wrote none, none."""
    try:
        text = (directory / EVENTS).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    found = []
    for line in text.split("\n"):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(record.get("event"), str):
            found.append(record)
    return found
