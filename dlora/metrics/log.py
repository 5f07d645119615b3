"""`metrics.jsonl` and TensorBoard: the same figures, one line per logged optimizer step."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dlora.io.files import write_atomically

SHRUNK = "_shrunk"  # of a figure with the scale that the adapter has at last


class MetricsLog:
    """Appends to `<directory>/metrics.jsonl`; after a resume it has every step once.

    Args:
        after: the step that the run starts from; lines of later steps are dropped first, and all of
            them where it is None (a fresh run).
        tensorboard: also write the figures as scalars under `<directory>/tensorboard`.
        warn: gets a line if a write fails; the next one writes the lost lines as well.
    """

    def __init__(
        self,
        directory: Path,
        *,
        after: int | None,
        tensorboard: bool,
        warn: Callable[[str], None] = print,
    ) -> None:
        self._path = directory / "metrics.jsonl"
        last = -1 if after is None else after
        found = read_metrics(self._path)
        before = [r for r in found if r["step"] <= last]
        # The last step that was reported before, which may be past `after`; -1: none.
        self.reported = max((r["step"] for r in found), default=-1)
        write_atomically(self._path, "".join(_line(record) for record in before).encode())
        self._warn, self._unwritten, self._refused = warn, "", False
        self._board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(
                str(directory / "tensorboard"), purge_step=None if after is None else after + 1
            )

    def write(self, record: dict[str, Any]) -> None:
        """Append one line, and flush it."""
        self._unwritten += _line(record)
        self._flush()
        if self._board is not None:
            for name, value in record.items():
                if isinstance(value, (int, float)) and name != "step":
                    self._board.add_scalar(name, value, record["step"])

    def figure(self, name: str, figure: Any, step: int) -> None:
        """Show a matplotlib figure on TensorBoard."""
        if self._board is not None:
            self._board.add_figure(name, figure, step, close=False)

    def text(self, name: str, text: str) -> None:
        """Show a text on TensorBoard, as Markdown."""
        if self._board is not None:
            self._board.add_text(name, text)

    def close(self) -> None:
        """Write what is buffered, and close TensorBoard's writer."""
        self._flush()
        if self._board is not None:
            self._board.close()

    def _flush(self) -> None:
        """Append what is buffered; a failed write leaves nothing in the file."""
        size = self._path.stat().st_size if self._path.exists() else 0
        try:
            with open(self._path, "ab") as file:
                file.write(self._unwritten.encode())
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(self._path, size)
            if not self._refused:
                self._warn(f"{self._path} cannot be written: {error}; the run continues")
            self._refused = True
            return
        self._unwritten, self._refused = "", False


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a `metrics.jsonl`; the torn line of a crash is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


def complete(path: Path, record: dict[str, Any]) -> None:
    """Append a step's line, unless the file has that step already."""
    if all(found["step"] != record["step"] for found in read_metrics(path)):
        torn = path.exists() and not path.read_bytes().endswith(b"\n")
        with open(path, "a", encoding="utf-8") as file:
            file.write("\n" * torn + _line(record))


def result_lines(directory: Path, until: int | None = None) -> list[dict[str, Any]]:
    """The lines of the metrics up to what the run has left.

    The last one has the figures of the adapter that was written, where its scale was lowered at the
    end: those that are called `…_shrunk`.

    Args:
        until: the step of that adapter, where the run went on and was rolled back.
    """
    found = read_metrics(directory / "metrics.jsonl")
    lines = [line for line in found if until is None or line["step"] <= until]
    if lines:
        shrunk = {n.removesuffix(SHRUNK): v for n, v in lines[-1].items() if n.endswith(SHRUNK)}
        lines[-1] = lines[-1] | shrunk
    return lines


def held_out_line(directory: Path, until: int | None = None) -> str | None:
    """A line on the held-out loss before and after training, across resumes; None if unknown.

    Args:
        until: as of `result_lines`.
    """
    found = [r for r in result_lines(directory, until) if r.get("eval_loss") is not None]
    if len(found) < 2:
        return None
    first, last = found[0]["eval_loss"], found[-1]["eval_loss"]
    when = "before" if found[0]["step"] == 0 else f"at step {found[0]['step']}"
    change = f" ({last / first - 1:+.1%})" if first > 0 else ""
    return f"held-out loss: {first:.4f} {when}, {last:.4f} after{change}"


def _line(record: dict[str, Any]) -> str:
    """JSON has no NaN and no infinity: they become null."""
    lost = {k: None for k, v in record.items() if isinstance(v, float) and not math.isfinite(v)}
    return json.dumps(record | lost) + "\n"
