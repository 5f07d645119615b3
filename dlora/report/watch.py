"""`dlora watch RUN`: a run's figures as they come, from another shell, until the run ends.

On a terminal a table that is drawn anew; elsewhere a line now and then, as the run itself prints.
It ends with 0 where the run has finished, with 1 where it was stopped, failed or was killed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dlora.metrics.events import FINISHED
from dlora.metrics.progress import LINE_SECONDS, clock
from dlora.report.following import GONE, RUNNING, FollowedRun
from dlora.report.run_files import as_number
from dlora.runtime.arguments import OneLineParser
from dlora.runtime.exit_status import exit_with

LOOK_SECONDS = 0.5
RESTART_SECONDS = 30.0  # that a killed run is given to be started again
RECENT = 20  # steps whose time says how long a step takes
INTERRUPTED = 130


def main(argv: list[str]) -> int:
    """The command; returns the exit status."""
    parser = OneLineParser("dlora watch", "follow a run's metrics until it ends")
    parser.add_argument("run", metavar="RUN", help="output.dir of a run")
    args: argparse.Namespace = parser.parse_args(argv)
    run = FollowedRun(args.run)
    view = Screen() if sys.stdout.isatty() else Lines()
    try:
        with view:
            return Watch(run, view).run()
    except KeyboardInterrupt:
        return INTERRUPTED


@dataclass
class Latest:
    """The latest figures of one adapter."""

    total: int = 0
    step: int = 0
    line: dict[str, Any] = field(default_factory=dict)
    held_out: float | None = None
    evaluated: bool = False  # by the latest line
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))

    def take(self, line: dict[str, Any]) -> None:
        """Take a line of the metrics."""
        self.step, self.evaluated = line["step"], line.get("eval_loss") is not None
        if self.evaluated:
            self.held_out = as_number(line["eval_loss"])
        if "loss" in line:  # the line of step 0 has none
            self.line = line
        if (took := as_number(line.get("step_seconds"))) > 0:
            self.seconds.append(took)

    @property
    def left(self) -> str:
        """Time left, from the median of recent steps."""
        if not self.seconds or not self.total:
            return ""
        return clock(statistics.median(self.seconds) * max(self.total - self.step, 0))

    @property
    def done(self) -> str:
        """Steps."""
        return f"step {self.step}/{self.total}" if self.total else f"step {self.step}"

    def figures(self) -> list[tuple[str, str]]:
        """(name, value) of what is shown."""
        found = [
            ("loss", _number(self.line.get("loss"), ".4f") if self.line else ""),
            ("held-out", "" if self.held_out is None else _number(self.held_out, ".4f")),
            ("lr", _number(self.line.get("lr"), ".3g")),
            ("tokens/s", _number(self.line.get("tokens_per_second"), ",.0f")),
            ("left", self.left),
        ]
        return [(name, value) for name, value in found if value]


def _number(value: Any, how: str) -> str:
    if value is None:
        return ""
    number = as_number(value)
    return "not finite" if number != number else f"{number:{how}}"


class Watch:
    """Looks at a run until it ends, and shows what is new."""

    def __init__(self, run: FollowedRun, view: Any) -> None:
        self._run, self._view = run, view
        self._latest: dict[str, Latest] = {}
        self._lost_since: float | None = None

    def run(self) -> int:
        """Returns the exit status."""
        while True:
            state = self._run.pulse.state()  # before the look, which then has the last lines
            self._look()
            if state == RUNNING:
                self._lost_since = None
            elif (status := self._ended(state)) is not None:
                return status
            time.sleep(LOOK_SECONDS)

    def _look(self) -> None:
        totals = self._totals()
        for name, lines in self._run.look().items():
            latest = self._latest.setdefault(name, Latest())
            latest.total = totals.get(name, totals.get("", latest.total))
            for line in lines:
                latest.take(line)
                self._view.line(name, latest)
        self._view.show(str(self._run.directory), self._latest)

    def _totals(self) -> dict[str, int]:
        """Steps of each adapter, and of the whole run."""
        started = self._run.started()
        of_members = started.get("adapters")
        named = dict(of_members) if isinstance(of_members, dict) else {}
        named[""] = started.get("steps")
        return {k: v for k, v in named.items() if isinstance(v, int)}

    def _ended(self, state: str) -> int | None:
        """The exit status, or None where the run may yet be started again."""
        end = self._run.end()
        if end is not None:
            why = end.get("cause") or end.get("why")
            said = f"{end['event']} after step {end.get('step')}" + (f": {why}" if why else "")
            self._view.end(" ".join(said.split()), self._latest)
            return 0 if end["event"] == FINISHED else 1
        now = time.monotonic()
        if self._lost_since is None:
            self._lost_since = now
            # A run of before that wrote no events, or one that was killed long ago.
            if state == GONE and not self._run.started():
                return self._without_a_record()
        if now - self._lost_since < RESTART_SECONDS:
            return None
        words = "no run is alive here: it was killed, or its machine was lost"
        self._view.end(words, self._latest)
        return 1

    def _without_a_record(self) -> int:
        steps = max((latest.step for latest in self._latest.values()), default=0)
        self._view.end(f"no run is alive here; its log ends at step {steps}", self._latest)
        return 1


class Lines:
    """Off a terminal: a line for the first step, for the last, for each that was evaluated, and
    where some seconds have passed since the last line."""

    def __init__(self) -> None:
        self._printed: dict[str, float] = {}  # when
        self._shown: dict[str, int] = {}  # which step

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def line(self, name: str, latest: Latest) -> None:
        """A line of the log has come."""
        now = time.monotonic()
        is_due = now - self._printed.get(name, -LINE_SECONDS) >= LINE_SECONDS
        if is_due or latest.evaluated or latest.step == latest.total:
            self._print(name, latest)
            self._printed[name] = now

    def _print(self, name: str, latest: Latest) -> None:
        words = [f"{name}: {latest.done}" if name else latest.done]
        for figure, value in latest.figures():
            words.append(f"{value} left" if figure == "left" else f"{figure} {value}")
        print("  ".join(words), flush=True)
        self._shown[name] = latest.step

    def show(self, title: str, latest: dict[str, Latest]) -> None:
        """Nothing between lines."""

    def end(self, words: str, latest: dict[str, Latest]) -> None:
        """The run is over: its last lines, and a line about it."""
        for name, figures in latest.items():
            if self._shown.get(name) != figures.step:
                self._print(name, figures)
        print(words, flush=True)


class Screen:
    """On a terminal: a table, a row for each adapter."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._live = Live(console=self._console, auto_refresh=False)

    def __enter__(self) -> Screen:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def line(self, name: str, latest: Latest) -> None:
        """Shown with the next table."""

    def show(self, title: str, latest: dict[str, Latest]) -> None:
        """Draw the table."""
        self._live.update(table(title, latest), refresh=True)

    def end(self, words: str, latest: dict[str, Latest]) -> None:
        """The run is over: a line about it, at its table."""
        self._console.print(Text(words))


def table(title: str, latest: dict[str, Latest]) -> Table:
    """What a terminal shows. Names and titles come as text: rich would read marks in a string."""
    names = ("loss", "held-out", "lr", "tokens/s", "left")
    drawn = Table(title=Text(title), title_justify="left", box=None, padding=(0, 2, 0, 0))
    if any(latest):
        drawn.add_column("adapter")
    drawn.add_column("step", justify="right")
    drawn.add_column("", min_width=16)
    for name in names:
        drawn.add_column(name, justify="right")
    for adapter, figures in sorted(latest.items()):
        bar = ProgressBar(total=figures.total or 1, completed=min(figures.step, figures.total))
        shown = dict(figures.figures())
        cells: list[Any] = [
            figures.done.removeprefix("step "),
            bar,
            *(shown.get(n, "") for n in names),
        ]
        drawn.add_row(*([Text(adapter)] if any(latest) else []), *cells)
    if not latest:
        drawn.add_row("waiting for the first step")
    return drawn


if __name__ == "__main__":
    exit_with(main)
