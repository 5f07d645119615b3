"""The live line of a run: a progress bar on a terminal, one plain line per step elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any


class StepDisplay:
    """Shows step, loss, tokens per second and memory. Silent on ranks other than 0."""

    def __init__(self, total: int, done: int, enabled: bool) -> None:
        self._total, self._enabled = total, enabled
        self._bar: Any = None
        if enabled and sys.stdout.isatty():
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(),
            )
            self._task = self._bar.add_task("training", total=total, completed=done, figures="")

    def __enter__(self) -> StepDisplay:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, record: dict[str, Any], of_method: str = "") -> None:
        """Show the figures of a metrics line, and a method's own."""
        figures = (
            f"loss {record['loss']:.4f}  {record['tokens_per_second']:,.0f} tokens/s  "
            f"{record['peak_memory_bytes'] / 1e6:,.0f} MB"
        )
        if of_method:
            figures += f"  {of_method}"
        if "eval_loss" in record:
            figures += f"  held-out {record['eval_loss']:.4f}"
        if self._bar is not None:
            self._bar.update(self._task, completed=record["step"], figures=figures)
        elif self._enabled:
            print(f"step {record['step']}/{self._total}  {figures}", flush=True)


class CopyDisplay:
    """Progress of writing files: a bar of bytes on a terminal, a plain line per file elsewhere."""

    def __init__(self, total: int, say: Callable[[str], None] = print) -> None:
        self._total, self._say, self._done = total, say, 0
        self._bar: Any = None
        if sys.stdout.isatty():
            from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

            self._bar = Progress(BarColumn(), DownloadColumn(), TimeRemainingColumn())
            self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> CopyDisplay:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, nbytes: int) -> None:
        """Count bytes that have been written."""
        self._done += nbytes
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)

    def finish(self, name: str) -> None:
        """A file is complete."""
        if self._bar is None:
            self._say(f"{name}  {self._done / 1e6:,.0f} of {self._total / 1e6:,.0f} MB")
