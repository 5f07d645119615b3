"""The live line of a run: a bar on a terminal or in a notebook, else a plain line at times."""

from __future__ import annotations

import importlib.util
import math
import sys
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

LINE_SECONDS = 5.0  # between two plain lines


class _Bar:
    """A bar of rich's on a terminal or in a notebook; nothing elsewhere or if not wanted."""

    def __init__(self, total: int, done: int = 0, wanted: bool = True, words: str = "") -> None:
        self._bar: Any = None
        if wanted and (sys.stdout.isatty() or in_notebook()):
            figures = [TextColumn(words), BarColumn(), TextColumn("{task.fields[figures]}")]
            columns = figures if words else [BarColumn(), DownloadColumn()]
            self._bar = Progress(*columns, TimeRemainingColumn())
            self._task = self._bar.add_task("", total=total, completed=done, figures="")

    def __enter__(self) -> Any:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.refresh()  # which it leaves out in a notebook, where the last step would miss
            self._bar.stop()

    def _show(self, done: int, figures: str = "") -> bool:
        """Whether there is a bar, which now shows this."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, figures=figures)
        return self._bar is not None


class StepDisplay(_Bar):
    """Shows loss, rates and memory of a run's steps. Silent on ranks other than 0.

    Off a terminal a line is printed for the first step, the last one and evaluated ones; for others
    where `LINE_SECONDS` have passed since the last line.
    """

    def __init__(self, total: int, done: int, enabled: bool) -> None:
        super().__init__(total, done, enabled, "step {task.completed}/{task.total}")
        self._total, self._start, self._enabled = total, done, enabled
        self._began, self._printed = time.monotonic(), -math.inf

    def update(self, record: dict[str, Any], of_method: str = "") -> None:
        """Show the figures of a metrics line, and a method's own."""
        step, now = record["step"], time.monotonic()
        figures = (
            f"loss {record['loss']:.4f}  {record['tokens_per_second']:,.0f} target tokens/s  "
            f"{record['all_tokens_per_second']:,.0f} tokens/s in all  "
            f"{record['peak_memory_bytes'] / 1e6:,.0f} MB"
        )
        if of_method:
            figures += f"  {of_method}"
        if "eval_loss" in record:
            figures += f"  held-out {record['eval_loss']:.4f}"
        if "forget_kl" in record:
            figures += f"  KL from the base {record['forget_kl']:.4g}"
        if self._show(step, figures) or not self._enabled:
            return
        is_due = now - self._printed >= LINE_SECONDS or step == self._total
        if is_due or "eval_loss" in record or "forget_kl" in record:
            per_step = (now - self._began) / (step - self._start)
            left = clock(per_step * (self._total - step))
            print(f"step {step}/{self._total}  {figures}  {left} left", flush=True)
            self._printed = now


class CopyDisplay(_Bar):
    """Progress of writing files: a bar of bytes on a terminal, a plain line per file elsewhere."""

    def __init__(self, total: int, announce: Callable[[str], None] = print) -> None:
        super().__init__(total)
        self._total, self._announce, self._done = total, announce, 0

    def advance(self, nbytes: int) -> None:
        """Count bytes that have been written."""
        self._done += nbytes
        self._show(self._done)

    def finish(self, name: str) -> None:
        """Report that the file `name` is complete."""
        if self._bar is None:
            self._announce(f"{name}  {self._done / 1e6:,.0f} of {self._total / 1e6:,.0f} MB")


def in_notebook() -> bool:
    """Whether this is a notebook that can show a bar; without ipywidgets it gets plain lines."""
    return Console().is_jupyter and importlib.util.find_spec("ipywidgets") is not None


def clock(seconds: float) -> str:
    """Seconds as `1:02:03`, or `2:03` below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
