"""Where the figures of a run go: its files, trackers, an endpoint, and the program that calls it.

What can be refused is started before weights are read; nothing is reported before the first line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import yaml

from dlora.config.load import Config, OutputConfig
from dlora.data import batch_hash
from dlora.metrics.endpoint import MetricsEndpoint
from dlora.metrics.log import MetricsLog
from dlora.metrics.trackers import STARTERS, Trackers
from dlora.objectives.objective import Objective, figures_of
from dlora.runtime.agreement import agree
from dlora.runtime.console import console
from dlora.runtime.ranks import Ranks
from dlora.sharding.replica.step_scalars import Reduced
from dlora.training.context import CHECKPOINTS, RunContext
from dlora.training.prepare import Preparation
from dlora.training.rates import Rates
from dlora.training.record import record_start
from dlora.training.resolved import resolved_yaml
from dlora.training.resume import open_directory


class Sink(Protocol):
    """Takes the lines of the metrics."""

    def write(self, record: dict[str, Any]) -> None:
        """Take a line."""

    def close(self) -> None:
        """Take no more."""


class RunLog:
    """The log of one rank; of ranks other than 0 only `logged` hears of a line.

    Args:
        files: `metrics.jsonl` and TensorBoard.
        logged: the hook of that name.
    """

    def __init__(
        self,
        files: MetricsLog | None,
        others: Sequence[Sink],
        logged: Callable[[int, Mapping[str, Any]], None],
    ) -> None:
        self._files, self._logged = files, logged
        self._sinks: list[Sink] = [*([files] if files else []), *others]

    def write(self, record: dict[str, Any]) -> None:
        """Report one line everywhere."""
        for sink in self._sinks:
            sink.write(record)
        self._logged(record["step"], dict(record))

    def figure(self, name: str, figure: Any, step: int) -> None:
        """Show a matplotlib figure on TensorBoard."""
        if self._files is not None:
            self._files.figure(name, figure, step)

    def close(self) -> None:
        """End all reports."""
        for sink in self._sinks:
            sink.close()


def due(step: int, every: int, last: bool = False) -> bool:
    """Whether something that happens every so many steps and last (0: never) happens at `step`."""
    return every > 0 and (step % every == 0 or last)


def has_reader(output: OutputConfig, step: int, scalars: Mapping[str, float], steps: int) -> bool:
    """Whether a step's line is logged or goes with a checkpoint; `output.log_every` rules what a
    commit of a snapshot writes as well. In other steps a figure is not worth waiting for a device.

    Args:
        scalars: of the step's reduction: above 0 where a save or a stop is asked for.
        steps: of the whole run.
    """
    asked = any(scalars[name] > 0 for name in ("save", "terminated", "interrupted"))
    every = (output.log_every, output.eval_every, output.save_every)
    return asked or any(due(step, n, last=step == steps) for n in every)


def step_figures(
    context: RunContext,
    objective: Objective,
    rates: Rates,
    ids: Any,
    reduced: Reduced,
    seconds: float,
) -> dict[str, Any]:
    """The figures of a step of the sequences `ids`, beside its loss; tokens exclude padding."""
    lengths, pairs, weight = context.prepared.train.lengths, figures_of(objective), reduced.tokens
    all_tokens = int(sum(lengths[i] for i in ids))
    targets = round(reduced.scalars["targets"]) if pairs else weight
    named = ("aux_loss", *pairs)
    return {
        **{n: s / max(weight, 1) for n, s in reduced.scalars.items() if n in named},
        "tokens": targets,
        "all_tokens": all_tokens,
        "padding": 1 - all_tokens / max(reduced.scalars["places"], all_tokens),
        **rates.of(targets, all_tokens, seconds),
        "peak_memory_bytes": max(reduced.each),
        "wire_bytes": context.replica.wire.take(),
        "batch_hash": batch_hash(ids),
    }


def start_sinks(config: Config, ranks: Ranks, prepared: Preparation) -> list[Sink]:
    """The endpoint and the trackers that the configuration names, on rank 0; elsewhere none.

    Raises:
        UsageError: on every rank, if one of them cannot start.
    """
    output, resumed = config.output, prepared.resumed
    names = [name for name in output.report_to if name in STARTERS]
    # A finished run only writes its adapter again.
    done = resumed is not None and resumed.step >= prepared.sampler.total_steps
    if done or not (names or output.metrics_port):
        return []

    def start() -> tuple[list[Sink], str]:
        sinks: list[Sink] = []
        if ranks.main and output.metrics_port:
            about = {"dir": str(output.directory.absolute()), "model": config.model.path}
            sinks.append(MetricsEndpoint(output.metrics_port, about))
        if ranks.main and names:
            shown = _shown(config, prepared)
            here = resumed is not None and resumed.lies_in(output.directory / CHECKPOINTS)
            warn = console.warning
            sinks.append(Trackers(names, output.directory, shown, resumes=here, warn=warn))
        return sinks, ""

    return agree(ranks, "trackers", start, patience_seconds=ranks.timeout_seconds)


def open_log(context: RunContext, start: int, sinks: Sequence[Sink]) -> RunLog:
    """The log of this rank, for a run that has done `start` steps."""
    if not context.ranks.main:
        return RunLog(None, (), context.hooks.logged)
    files = open_directory(context, start)
    if context.saved_in is None:  # else the run of several adapters records its start
        record_start(context, start, context.prepared.sampler.total_steps)
    if "tensorboard" in context.config.output.report_to and not start:
        files.text(
            "config",
            f"```yaml\n{context.settings()}```",
        )
    for sink in sinks:
        if isinstance(sink, Trackers):
            sink.begin(files.reported)
    return RunLog(files, sinks, context.hooks.logged)


def _shown(config: Config, prepared: Preparation) -> dict[str, Any]:
    """The resolved configuration by dotted keys."""
    sections = yaml.safe_load(resolved_yaml(config, prepared, prepared.compiles))
    return {
        f"{section}.{name}": value
        for section, options in sections.items()
        for name, value in options.items()
    }
