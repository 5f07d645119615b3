"""What the trials of a sweep report when a run trains several of them, and which are to end.

    rank 0 of each run ──figures of each trial──> the board, an actor ──> those that are behind
    the run ──asks, in every step──> whether a trial is dropped

ASHA's rungs are on the board, over the trials of all runs. They are Ray Tune's own scheduler.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dlora.hooks import Committed, Hooks

Figures = Mapping[str, Any]


@dataclass
class Heard:
    """What the board knows of a trial.

    Attributes:
        directory: of its run.
        figure: the newest of the metric; None: there was none.
        step: of the newest report.
        seconds: from the start of its run until then.
        standing: how it has left (see `dlora.hooks.Hooks.left`); empty while it is trained.
        why: it has failed, or did not end well.
    """

    directory: str
    figure: float | None = None
    step: int = 0
    seconds: float = 0.0
    standing: str = ""
    why: str = ""


class Board:
    """An actor with the figures of all trials.

    Args:
        metric: to be minimised.
        asha: steps of a trial, for ASHA with Ray Tune's defaults; None: no trial is dropped.
    """

    def __init__(self, metric: str, asha: int | None) -> None:
        from ray.tune.schedulers import ASHAScheduler

        self._metric, self._asha, self._last = metric, None, asha
        if asha is not None:
            self._asha = ASHAScheduler(time_attr="step", max_t=asha, metric=metric, mode="min")
        self._heard: dict[str, Heard] = {}
        self._began: dict[str, float] = {}
        self._judged: dict[str, Any] = {}  # trials that ASHA compares, as it knows them
        self._behind: set[str] = set()

    def begin(self, names: Collection[str], directory: str) -> None:
        """Note that a run of these trials begins."""
        for name in names:
            self._heard[name], self._began[name] = Heard(directory), time.monotonic()
            if self._asha is not None:
                self._judged[name] = SimpleNamespace(trial_id=name)
                self._asha.on_trial_add(None, self._judged[name])

    def behind(self, names: Collection[str]) -> set[str]:
        """Those that are to be dropped; a run that starts again asks for them."""
        return self._behind & set(names)

    def report(self, lines: Mapping[str, Figures]) -> set[str]:
        """Take a step's figures of some trials; returns those of them that are to be dropped.

        A step that a run makes again was reported before, and is not judged again.
        """
        for name, line in lines.items():
            heard = self._heard[name]
            if line["step"] <= heard.step:
                continue
            heard.step, heard.seconds = line["step"], time.monotonic() - self._began[name]
            heard.figure = line.get(self._metric, heard.figure)
            if name in self._judged and self._is_behind(name, line):
                self._behind.add(name)
        return self.behind(lines)

    def left(self, name: str, standing: str, why: str, line: Figures | None) -> None:
        """Note how a trial has ended, with its last figures if they are to be reported."""
        heard = self._heard[name]
        if line is not None:
            self.report({name: line})
            self._end(name, line)
        heard.standing, heard.why = standing, why

    def heard(self) -> dict[str, Heard]:
        """All that is known."""
        return self._heard

    def _is_behind(self, name: str, line: Figures) -> bool:
        """ASHA's answer, which is final: its own trial ends with it, as under Ray Tune.

        It ends trials after their last step as well, and those are not behind.
        """
        assert self._asha is not None
        if self._asha.on_trial_result(None, self._judged[name], dict(line)) != self._asha.STOP:
            return False
        self._end(name, line)
        return line["step"] != self._last

    def _end(self, name: str, line: Figures) -> None:
        if self._asha is not None and name in self._judged:
            self._asha.on_trial_complete(None, self._judged.pop(name), dict(line))


class Teller:
    """Rank 0 of a run of several trials, as the hooks call it.

    Args:
        board: its handle.
        every: steps between two reports of each trial.
    """

    def __init__(self, board: Any, every: Mapping[str, int]) -> None:
        self._board, self._every = board, every
        self._asked = [board.behind.remote(list(every))]
        self._behind: set[str] = set()
        self._lines: Mapping[str, Figures] = {}  # of the newest step that was saved

    def beside(self, hooks: Hooks) -> Hooks:
        """The hooks of a run with these beside what they do."""

        def saved(record: Figures, committed: Committed) -> None:
            self.saved(record)
            hooks.saved(record, committed)

        return replace(hooks, should_drop=self.should_drop, saved=saved, left=self.left)

    def saved(self, record: Figures) -> None:
        """Report the trials that are due in a step that is saved."""
        self._lines = record["adapters"]
        due = {n: plain(x) for n, x in self._lines.items() if x["step"] % self._every[n] == 0}
        if due:
            self._asked.append(self._board.report.remote(due))

    def should_drop(self, name: str) -> bool:
        """Whether a trial is behind; waits for the answer to what was reported, a step ago."""
        while self._asked:
            self._behind |= ray.get(self._asked.pop(0))
        return name in self._behind

    def left(self, name: str, standing: str, why: str) -> None:
        """Tell how a trial has ended."""
        line = self._lines.get(name) if standing == "finished" else None
        ray.get(self._board.left.remote(name, standing, why, line and plain(line)))


def plain(line: Figures) -> dict[str, Any]:
    """A line's numbers and texts."""
    return {name: value for name, value in line.items() if isinstance(value, (int, float, str))}


def start_board(metric: str, asha: int | None) -> Any:
    """A board on this node, which lives as long as the program.

    Once it is gone so is what was reported: it does not start again, and asking it is an error.
    """
    if not ray.is_initialized():
        ray.init()
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(Board).options(num_cpus=0, scheduling_strategy=here)
    return actor.remote(metric, asha)
