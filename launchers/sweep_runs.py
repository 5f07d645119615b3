"""The configurations of a sweep's runs: of one trial each, or of several trials together.

    trials   t0 t1 t2 t3 t4   ──--together 2──>   runs   [t0 t1] [t2 t3] [t4]

A run of several trials is one of `adapters`: an entry is what its trial's values make different.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from dlora.config.adapters import COMMON, OWN, configs_of
from dlora.config.load import Config, UsageError, parse, value_of

from . import NAME
from .argv import word
from .ray_train import Workers

Words = Mapping[str, str | None]
Trials = Mapping[str, Mapping[str, Any]]  # name → its values


def configuration(words: Words, values: Mapping[str, Any], directory: Path) -> Config:
    """The configuration of a trial, which reports to Ray at each save; see `told_every`."""
    tried = [word(key, v if isinstance(v, str) else json.dumps(v)) for key, v in values.items()]
    config = _parsed(words, tried, directory)
    return replace(config, output=replace(config.output, save_every=told_every(config)))


def together(words: Words, trials: Trials, directory: Path) -> Config:
    """The configuration of a run of several trials, which saves when any of them reports.

    Raises:
        UsageError: one of them is wrong, or cannot be trained beside others.
    """
    entries = []
    for name, values in trials.items():
        alone, sections = configuration(words, values, directory), dict[str, Any]()
        for key in values:
            section, _, option = key.partition(".")
            sections.setdefault(section, {})[option] = value_of(alone, key)
        entries.append({"name": name} | sections)
    text = yaml.safe_dump(entries, default_flow_style=True, width=math.inf)
    try:
        config = _parsed(words, [word("adapters", text)], directory)
    except UsageError as error:  # each alone is right
        raise UsageError(f"--together: {error}") from None
    saves = [saved_every(own) for own in configs_of(config).values()]
    return replace(config, output=replace(config.output, save_every=math.gcd(*saves)))


def told_by(config: Config) -> dict[str, int]:
    """Steps between two reports of each trial of a run of several."""
    return {name: told_every(own) for name, own in configs_of(config).items()}


def told_every(config: Config) -> int:
    """Steps between two saves: those of evaluation or, without one, of saves; else all steps."""
    return saved_every(config) or config.train.max_steps


def saved_every(config: Config) -> int:
    """The same, and 0 where it is all steps."""
    output = config.output
    return output.eval_every if evaluates(config) else output.save_every


def evaluates(config: Config) -> bool:
    """Whether a run evaluates."""
    return bool(config.data.eval) and config.output.eval_every > 0


def check_together(words: Words, space: Iterable[str]) -> Config:
    """Check that the trials of a space may be trained beside each other, whatever the values.

    Returns the configuration of a run of one of them.

    Raises:
        UsageError: a key cannot differ between the adapters of a run, or the configuration has
            something that needs a run for each.
    """
    for key in space:
        if key.partition(".")[0] not in OWN:
            raise UsageError(
                f"--space: {key}: trials of a run differ in {', '.join(OWN)}; try it without "
                "--together"
            )
        if key in COMMON:
            raise UsageError(
                f"--space: {key} is the same for all trials of a run; try it without --together"
            )
    return together(words, {"trial": {}}, Path("runs"))


def packs(trials: Trials, size: int) -> Iterator[Trials]:
    """The trials of each run, in their order."""
    names = list(trials)
    for first in range(0, len(names), size):
        yield {name: trials[name] for name in names[first : first + size]}


def names(error: str, trial: str) -> bool:
    """Whether a run's error is about this one of its trials."""
    return f"adapters[{trial}]: " in error


def _parsed(words: Words, more: Sequence[str], directory: Path) -> Config:
    given = [word(name, value) for name, value in words.items() if name != "output.dir"]
    argv = [*given, *more, f"--output.dir={directory}"]
    return parse(argv, f"{NAME}.ray_sweep", Workers).config
