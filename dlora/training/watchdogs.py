"""What a run watches for in itself: steps without a finite gradient, tensors without any, silence.

loss or gradient not finite  ──> the step is left out; three in a row end the run
no gradient on any rank      ──> in ten steps, for a trained tensor: the run ends and lists them
no progress for a long time  ──> the stack of every thread, while the collective still waits
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import math
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

from torch import Tensor, nn

from dlora.errors import and_more
from dlora.io.files import write_atomically
from dlora.metrics.events import SKIPPED, add_event
from dlora.runtime.console import console

BAD_STEPS_IN_A_ROW = 3
STEPS_TO_BE_USED_IN = 10
SHARE_OF_TIMEOUT = 0.9  # of a collective's timeout, after which the stacks are shown
SECONDS_FOR_THE_LOCK = 10.0  # after which nobody gives back the interpreter's lock


class FiniteWatch:
    """Steps whose loss or gradient is not finite: they are skipped, counted, and end the run.

    Args:
        file: gets the sequences of the steps that end the run; each skipped step is an event of the
            run in its directory.
    """

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        self.say: Callable[[str], None] = console.info
        self._steps: list[int] = []
        self._row: dict[int, list[int]] = {}  # step: its sequences, without a good one between

    def see(self, record: Mapping[str, Any], ids: Sequence[int] = ()) -> str | None:
        """Look at a step's record; returns why the run has to end, or None."""
        step, loss, norm = record["step"], record["loss"], record["grad_norm"]
        if is_finite(loss, norm):
            self._row.clear()
            return None
        self._steps.append(step)
        if self._file is not None:
            values = {"loss": str(loss), "grad_norm": str(norm)}
            add_event(self._file.parent, SKIPPED, step, values, console.warning)
        self._row[step] = [int(i) for i in ids]
        if len(self._steps) == 1:
            self.say(
                f"warning: step {step} has loss {loss} and gradient norm {norm} and is skipped; a "
                "smaller optimizer.lr may help"
            )
        if len(self._row) < BAD_STEPS_IN_A_ROW:
            return None
        where = ""
        if self._file is not None:
            where = f"; their sequences are listed in {self._file}"
            try:
                write_atomically(self._file, (json.dumps(self._row) + "\n").encode())
            except OSError as error:
                where = f"; {self._file} cannot be written: {error}"
        return f"{len(self._row)} steps in a row had no finite loss or gradient{where}"

    def close(self) -> None:
        """Report the skipped steps at the end of the run."""
        if self._steps:
            self.say(
                f"warning: loss or gradient was not finite in {len(self._steps)} steps, the first "
                f"of them step {self._steps[0]}; they were skipped"
            )


def is_finite(*values: float) -> bool:
    """Whether none of the values is NaN or infinite."""
    return all(math.isfinite(value) for value in values)


class UnusedWatch:
    """Trained tensors that no pass has reached: nothing would ever train them.

    Zero is a gradient; a tensor without any is not part of what is computed. An expert that no
    token has been sent to is, if another expert of its list has had a gradient.

    Args:
        allowed: do not watch.
        expected: modules that are known not to be reached, which the run has said.
    """

    def __init__(self, allowed: bool, expected: Collection[str] = ()) -> None:
        self._left = 0 if allowed else STEPS_TO_BE_USED_IN
        self._expected = tuple(f"{path}." for path in expected)
        self._unused: set[str] | None = None
        self._used_in_lists: set[str] = set()

    def see(self, named: Mapping[str, Tensor], present: Mapping[str, bool]) -> str | None:
        """See which tensors had a gradient on some rank; returns why the run has to end, or None.

        A tensor without elements, pruned to rank 0, does not count.
        """
        if self._left == 0:
            return None
        absent = {
            name
            for name, tensor in named.items()
            if tensor.numel() and not present[name] and not name.startswith(self._expected)
        }
        self._used_in_lists |= {_of_any_expert(name) for name in named if present[name]}
        self._unused = absent if self._unused is None else self._unused & absent
        self._left -= 1
        if not self._unused:
            self._left = 0
        if self._left:
            return None
        experts = self._used_in_lists
        names = sorted(n for n in self._unused if _of_any_expert(n) not in experts)
        if not names:
            return None
        return (
            f"no gradient in {STEPS_TO_BE_USED_IN} steps on any rank for {and_more(names, 5)}; "
            "leave them out (adapter.target_modules, adapter.modules_to_save) or set "
            "train.allow_unused: true"
        )


def _of_any_expert(name: str) -> str:
    """A name without its index in a list inside a block: `layers.3.mlp.experts.*.w1`."""
    parts = name.split(".")
    indices = [place for place, part in enumerate(parts) if part.isdigit()]
    if len(indices) < 2:
        return name
    return ".".join("*" if place == indices[-1] else part for place, part in enumerate(parts))


class Watch(Protocol):
    """What wants to know that there is progress."""

    def beat(self) -> None:
        """There is."""


def beat_in_passes(model: nn.Module, watches: Sequence[Watch]) -> None:
    """Every forward pass is progress; the model keeps the watches, and not their run."""
    for watch in watches:
        model.register_forward_pre_hook(lambda *_, watch=watch: watch.beat())


class HangWatch:
    """Shows the stack of every thread when there is no progress, before the collective gives up.

    A thread reads the stacks while it holds the interpreter's lock: faulthandler's own timer reads
    them beside running threads, which has ended a process by SIGSEGV. It is left for the case that
    something else never gives the lock back; then no thread runs Python.
    """

    def __init__(self, timeout_seconds: float) -> None:
        self._seconds = SHARE_OF_TIMEOUT * timeout_seconds
        self._last_beat = time.monotonic()
        self._over = threading.Event()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, no `beat` for nine tenths of the run's timeout shows the stacks, once."""
        self._over = threading.Event()
        self.beat()
        watch = threading.Thread(target=self._watch, args=(self._over,), daemon=True)
        watch.start()
        try:
            yield
        finally:
            self._over.set()
            watch.join()
            faulthandler.cancel_dump_traceback_later()

    def beat(self) -> None:
        """Record progress."""
        self._last_beat = time.monotonic()
        faulthandler.dump_traceback_later(self._seconds + SECONDS_FOR_THE_LOCK, file=_stderr())

    def _watch(self, over: threading.Event) -> None:
        shown_for = -math.inf
        while not over.wait(max(0.05, self._last_beat + self._seconds - time.monotonic())):
            beat = self._last_beat
            if beat == shown_for or time.monotonic() < beat + self._seconds:
                continue
            faulthandler.cancel_dump_traceback_later()
            print(_stacks(self._seconds), file=_stderr(), flush=True)
            shown_for = beat


def _stderr() -> TextIO:
    return sys.__stderr__ or sys.stderr


def _stacks(seconds: float) -> str:
    """The stack of every thread but the caller's, the innermost call last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = [f"no progress for {seconds:g} s; the stack of every thread:"]
    for ident, frame in sys._current_frames().items():
        if ident != threading.get_ident():
            stack = "".join(traceback.format_stack(frame)).rstrip()
            parts.append(f"thread {names.get(ident, ident)}:\n{stack}")
    return "\n".join(parts)
