"""The space of a sweep: what `--space` says, and the values that are drawn from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import yaml

from dlora.config.load import SCHEMA, UsageError

RANGES = ("uniform", "loguniform", "randint")
Space = dict[str, Any]


def read_space(given: str) -> Space:
    """Read the space of `--space`, or of the file that it names.

    Raises:
        UsageError: it is not a mapping of configuration keys to lists or distributions.
    """
    try:
        text = Path(given).read_text() if Path(given).suffix in (".yaml", ".json") else given
        space = yaml.safe_load(text)
    except (OSError, yaml.YAMLError) as error:
        raise UsageError(f"--space: {str(error).partition(chr(10))[0]}") from None
    if not isinstance(space, dict) or not space:
        raise UsageError(
            '--space: expected {"section.key": [values] or {"loguniform": [low, high]}}'
        )
    for key, values in space.items():
        if key not in SCHEMA:
            raise UsageError(f"--space: {key} is not a key of the configuration")
        values = space[key] = numbers(values) if SCHEMA[key].type is float else values
        if isinstance(values, dict) and len(values) == 1:
            [(kind, values)] = values.items()
            if kind not in (*RANGES, "choice"):
                raise UsageError(
                    f"--space: {key}: {kind} is not one of {', '.join(RANGES)}, choice"
                )
            if kind in RANGES and not is_range(values, above_zero=kind == "loguniform"):
                raise UsageError(f"--space: {key}: {kind} needs [low, high], low below high")
            if kind != "choice" and SCHEMA[key].type is int and kind != "randint":
                raise UsageError(f"--space: {key}: {kind} draws fractions; randint draws integers")
            if kind == "randint" and not all(type(value) is int for value in values):
                raise UsageError(f"--space: {key}: randint needs integers")
        if not isinstance(values, list) or not values:
            raise UsageError(f"--space: {key}: expected a list or one distribution")
    return space


def numbers(given: Any) -> Any:
    """`given` with strings such as 1e-5 as floats: YAML, unlike JSON, reads them as strings."""
    if isinstance(given, dict):
        return {kind: numbers(values) for kind, values in given.items()}
    if isinstance(given, list):
        return [numbers(value) for value in given]
    try:
        return float(given) if isinstance(given, str) else given
    except ValueError:
        return given


def is_range(values: Any, *, above_zero: bool) -> bool:
    """Whether these are two numbers in order."""
    if not isinstance(values, list) or [type(v) in (int, float) for v in values] != [True] * 2:
        return False
    return values[0] < values[1] and (values[0] > 0 or not above_zero)


def searched(space: Space) -> dict[str, Any]:
    """The space as Ray Tune searches it."""
    return {key: _drawn(values) for key, values in space.items()}


def drawn_values(space: Space, samples: int, seed: int) -> list[dict[str, Any]]:
    """The values of each trial: those that Ray Tune's own search draws from this seed."""
    from ray.tune.search.variant_generator import generate_variants

    draws, spec = numpy.random.default_rng(seed), {"config": searched(space)}
    return [
        dict(trial["config"])
        for _ in range(samples)
        for _, trial in generate_variants(spec, random_state=draws)
    ]


def _drawn(values: Any) -> Any:
    """A list or distribution as Ray Tune's object."""
    from ray import tune

    if isinstance(values, list):
        return tune.grid_search(values)
    [(kind, given)] = values.items()
    return tune.choice(given) if kind == "choice" else getattr(tune, kind)(*given)
