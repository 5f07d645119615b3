"""What a sweep found: a table, and a plot of the figure over each key."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    Attributes:
        values: of the keys that were swept.
        figure: the last value of the metric; None where there is none.
        step: the last step that was reported.
        error: the last line of what ended it; empty where it ended well or early.
    """

    values: dict[str, Any]
    figure: float | None
    step: int
    seconds: float
    error: str

    @classmethod
    def of(
        cls, values: Mapping[str, Any], metrics: Mapping[str, Any], error: Any, metric: str
    ) -> Trial:
        """The trial by what Ray Tune recorded of it."""
        lines = str(error).strip().splitlines() if error else [""]
        figure = metrics.get(metric)
        return cls(
            values=dict(values),
            figure=None if figure is None else float(figure),
            step=int(metrics.get("step", 0)),
            seconds=float(metrics.get("time_total_s", 0.0)),
            error=lines[-1],
        )

    @property
    def order(self) -> tuple[bool, float]:
        """The best first; those without a figure last."""
        if self.figure is None or math.isnan(self.figure):
            return True, 0.0
        return False, self.figure


@dataclass(frozen=True)
class TrialTogether(Trial):
    """One of several trials of a run.

    Attributes:
        directory: with its metrics and, where it was trained to its end, `adapter`.
        dropped: it ended early, as it was behind.
    """

    directory: str
    dropped: bool


def found_together(
    drawn: Mapping[str, Mapping[str, Any]], heard: Mapping[str, Any], errors: Mapping[str, Any]
) -> list[Trial]:
    """The trials by what the board has heard, and by what ended their runs.

    Args:
        drawn: values by name.
        heard: `ray_board.Heard` of those whose runs have begun.
        errors: of each one's run, which are the trial's where it had not ended before; None: none.
    """
    found: list[Trial] = []
    for name, values in drawn.items():
        known, error = heard.get(name), errors.get(name)
        if known is None or not known.standing:
            why = str(error).strip().splitlines()[-1] if error else "its run did not train it"
        else:
            why = known.why if known.standing != "dropped" else ""
        found.append(
            TrialTogether(
                values=dict(values),
                figure=known and known.figure,
                step=known.step if known else 0,
                seconds=known.seconds if known else 0.0,
                error=why,
                directory=f"{known.directory}/adapters/{name}" if known else "",
                dropped=known is not None and known.standing == "dropped",
            )
        )
    return found


def name_best(trials: Sequence[Trial]) -> None:
    """Print where the adapter of the best trial lies, of those that were trained together."""
    for trial in trials:
        if isinstance(trial, TrialTogether) and not trial.error and not trial.dropped:
            values = ", ".join(f"{key} {plain(value)}" for key, value in trial.values.items())
            print(f"best: {values}: {trial.directory}/adapter", flush=True)
            return


def table(trials: Sequence[Trial], metric: str) -> None:
    """Print the trials, the best first."""
    keys = keys_of(trials)
    shown = Table(*keys, metric, "step", "seconds", "")
    for trial in trials:
        figure = "-" if trial.figure is None else f"{trial.figure:.4f}"
        values = [plain(trial.values.get(key)) for key in keys]
        shown.add_row(*values, figure, str(trial.step), f"{trial.seconds:.0f}", trial.error)
    Console().print(shown)


def draw(trials: Sequence[Trial], metric: str, file: Path) -> None:
    """A panel for each key: the figure of each trial over its value."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    keys = keys_of(trials)
    figure, axes = pyplot.subplots(
        1, len(keys), figsize=(4 * len(keys), 3.4), sharey=True, squeeze=False
    )
    for axis, key in zip(axes[0], keys, strict=True):
        known = [trial for trial in trials if trial.figure is not None]
        values: list[Any] = [trial.values.get(key) for trial in known]
        numbers = all(type(value) in (int, float) for value in values)
        places = values if numbers else [plain(value) for value in values]
        axis.scatter(places, [trial.figure for trial in known])
        if numbers and values and min(values) > 0 and max(values) / min(values) >= 20:
            axis.set_xscale("log")
        axis.set_xlabel(key)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel(metric)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def keys_of(trials: Sequence[Trial]) -> list[str]:
    """The keys that were swept."""
    return list(dict.fromkeys(key for trial in trials for key in trial.values))


def plain(value: Any) -> str:
    """A value as the table and the plot show it."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
