"""The figures of an evaluation by name, and the options that follow one of them."""

from collections.abc import Iterator
from typing import Any

from dlora.config.options import show
from dlora.config.sections import Config
from dlora.registry import room

MODES = ("min", "max")
KEYS = {"keep_best": ("metric", "mode"), "early_stopping": ("metric", "patience")}  # of `output`
_SCORES = {"bleu": "sacrebleu", "chrf": "sacrebleu"}
_SCORES |= dict.fromkeys(("rouge1", "rouge2", "rougeL"), "rouge_score")


def figures_of(config: Config) -> dict[str, str]:
    """{figure of an evaluation: whether it should be `min` or `max`}.

    The task and the objective say which they add, in `evaluated`: {name: mode}.
    """
    parts = (("tasks", config.train.task), ("objectives", config.train.objective))
    own: dict[str, str] = {"loss": "min"}
    for name, chosen in parts:
        own |= room(name)[chosen].says.get("evaluated", {})
    own |= dict.fromkeys(config.output.eval_metrics, "max")
    return {f"eval_{name}": mode for name, mode in own.items()}


def mode_of(config: Config, followed: dict[str, Any]) -> str:
    """Whether the figure that an option follows should be `min` or `max`."""
    mode = followed.get("mode") or figures_of(config)[str(followed["metric"])]
    return str(mode)


def problems(config: Config) -> Iterator[str]:
    """What is wrong with the options about evaluations."""
    metrics = config.output.eval_metrics
    for name in sorted({name for name in metrics if metrics.count(name) > 1}):
        yield f"output.eval_metrics: {name} is there twice"
    if metrics and room("tasks")[config.train.task].says.get("draws_head"):
        yield f"output.eval_metrics: train.task: {config.train.task} writes no answers to compare"
    for option, keys in KEYS.items():
        followed, key = getattr(config.output, option), f"output.{option}"
        if followed is None:
            continue
        if unknown := [name for name in followed if name not in keys]:
            yield f"{key}: {show(unknown[0])} is not a part of it; expected {' and '.join(keys)}"
        known = figures_of(config)
        if (metric := followed.get("metric")) not in known:
            given = "metric is missing" if metric is None else f"metric: {show(metric)}"
            yield f"{key}: {given}; the figures of an evaluation are {', '.join(known)}"
        if "mode" in followed and "mode" in keys and followed["mode"] not in MODES:
            yield f"{key}: mode: expected min or max, got {show(followed['mode'])}"
        patience = followed.get("patience")
        if "patience" in keys and (not isinstance(patience, int) or patience < 1):
            given = "is missing" if patience is None else f"got {show(patience)}"
            yield f"{key}: patience: expected a whole number of at least 1, {given}"
    if config.output.keep_best is not None and config.output.remote is not None:
        yield (
            "output.keep_best: the adapter in output.dir/best is not copied to output.remote; set "
            "one of the two"
        )


def packages(config: Config) -> Iterator[tuple[str, str]]:
    """(score, package that it needs) of `output.eval_metrics`."""
    for name in config.output.eval_metrics:
        if name in _SCORES:
            yield name, _SCORES[name]
