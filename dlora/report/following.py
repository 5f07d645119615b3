"""Follows a run from outside, by its files alone: new lines of its metrics, and whether it lives.

A run renews the time of its `.lock` every few seconds and empties it when it ends. A lock of the
kernel's would tell at once, but whoever tries to take it is in the way of a run that starts.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dlora.errors import UsageError
from dlora.io.files import path_of
from dlora.metrics.events import ENDS, START, read_events
from dlora.report.run_files import ADAPTERS, CONFIG, METRICS
from dlora.runtime.run_lock import NAME as LOCK
from dlora.runtime.run_lock import STALE_SECONDS

RUNNING, SILENT, GONE = "running", "silent", "gone"


class Tail:
    """The lines of a `metrics.jsonl` that have come since the last look."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode, self._offset = -1, 0

    def new(self) -> list[dict[str, Any]]:
        """Whole lines only; from the beginning where a resumed run has written the file anew."""
        try:
            with open(self._path, "rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self._inode or status.st_size < self._offset:
                    self._inode, self._offset = status.st_ino, 0
                file.seek(self._offset)
                text = file.read()
        except OSError:
            return []
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        return list(_records(whole))


def _records(text: bytes) -> Iterator[dict[str, Any]]:
    for line in text.splitlines():
        try:
            record = json.loads(line.decode("utf-8", "replace"))
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            yield record


class Pulse:
    """Whether the run in a directory lives, by its `.lock`.

    Args:
        now: seconds, of a clock that never jumps.
    """

    def __init__(self, directory: Path, now: Callable[[], float] = time.monotonic) -> None:
        self._path, self._now = directory / LOCK, now
        self._beat, self._seen = -1, now()

    def state(self) -> str:
        """GONE: no run has the directory. RUNNING: one has, as far as is known. SILENT: its process
        is dead, or it has had no heartbeat for as long as makes it count as dead."""
        try:
            with open(self._path, "rb") as file:
                beat, text = os.fstat(file.fileno()).st_mtime_ns, file.read()
            owner = json.loads(text) if text.strip() else None
        except (OSError, ValueError):
            return GONE
        if not isinstance(owner, dict):
            return GONE
        now = self._now()
        if beat != self._beat:
            self._beat, self._seen = beat, now
        if now - self._seen >= STALE_SECONDS or _is_dead(owner):
            return SILENT
        return RUNNING


def _is_dead(owner: dict[str, Any]) -> bool:
    """Whether its process was on this kernel, and is not there any more."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        if owner.get("kernel") != boot or owner.get("host") != os.uname().nodename:
            return False
        os.kill(int(owner["pid"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, KeyError, ValueError, TypeError, OverflowError):
        return False
    return False


class FollowedRun:
    """A run that is looked at again and again.

    Raises:
        UsageError: there is no run in that directory.
    """

    def __init__(self, word: str) -> None:
        self.directory = path_of(word, "RUN")
        if not self.directory.is_dir():
            raise UsageError(f"RUN: {word}: there is no such directory")
        if not any((self.directory / name).exists() for name in (METRICS, CONFIG, LOCK, ADAPTERS)):
            raise UsageError(f"RUN: {word}: no run has written there")
        self.pulse = Pulse(self.directory)
        self._tails: dict[str, Tail] = {}

    def look(self) -> dict[str, list[dict[str, Any]]]:
        """New lines by adapter; of a run of one, by the name ''."""
        for name, path in self._logs():
            self._tails.setdefault(name, Tail(path))
        return {name: tail.new() for name, tail in self._tails.items()}

    def _logs(self) -> Iterator[tuple[str, Path]]:
        if (path := self.directory / METRICS).exists():
            yield "", path
        try:
            members = sorted((self.directory / ADAPTERS).iterdir())
        except OSError:
            return
        yield from ((p.name, p / METRICS) for p in members if (p / METRICS).exists())

    def started(self) -> dict[str, Any]:
        """What the run recorded at its last start."""
        starts = [e for e in read_events(self.directory) if e["event"] == START]
        return starts[-1] if starts else {}

    def end(self) -> dict[str, Any] | None:
        """How the last start of it ended, by its own record; None: it has not, or wrote none."""
        marks = [e for e in read_events(self.directory) if e["event"] in (START, *ENDS)]
        return marks[-1] if marks and marks[-1]["event"] != START else None
