"""`python -m launchers.ray_sweep --config FILE --space SPACE`: many runs of one configuration.

    python -m launchers.ray_sweep --config configs/lora.yaml --samples 8 --scheduler asha \\
        --space '{"adapter.r": [8, 16], "optimizer.lr": {"loguniform": [1.0e-5, 1.0e-3]}}'

SPACE is YAML or JSON, or a file of it: keys of the configuration, each with a list (all of its
values, a grid) or a distribution to draw from: `uniform`, `loguniform` or `randint` with [low,
high], `choice` with a list. The grid is run once for each sample. A trial reports its figures with
its saves: at every evaluation, or every `output.save_every` steps where there is none. `asha` ends
trials that are behind then. Each trial is a run of launchers.ray_train's in `output.dir/TRIAL`; the
table at the end is in `output.dir/sweep.json` as well, its plot in `sweep.png`.

Exit status: 0 all trials ended well, 2 a wrong configuration or space, 1 a trial failed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from dlora.config.load import SCHEMA, Config, UsageError, option, parse
from dlora.train import exit_with

from . import NAME
from .argv import names_of, word, words_of
from .ray_train import Workers, check_options, number, placed, trainer
from .sweep_report import Trial, draw, table

RANGES = ("uniform", "loguniform", "randint")
Space = dict[str, Any]


@dataclass(frozen=True)
class Sweep(Workers):
    """What is tried; the others are launchers.ray_train's, for each trial."""

    space: str = option("{}", "values or a distribution of each key: YAML, JSON, or a file of it")
    samples: int = option(1, "how often the grid is run, each time with new draws", ge=1)
    scheduler: Literal["none", "asha"] = option("none", "asha: stop trials early that are behind")
    metric: Literal["eval_loss", "loss"] = option("eval_loss", "the metric to minimise")
    max_concurrent: int = option(0, "trials at the same time; 0: as many as fit the cluster", ge=0)
    sweep_seed: int = option(0, "seed of the draws")


def main(argv: list[str]) -> int:
    """Run the sweep; returns the exit status."""
    options = parse(argv, prog=f"{NAME}.ray_sweep", extra=Sweep)
    if options.check:
        raise UsageError("--check is an option of dlora.train, which reads the same configuration")
    config, sweep = options.config, options.extra
    space = read_space(sweep.space)
    own = names_of(Sweep)
    words = {name: value for name, value in words_of(argv, Sweep) if name not in own}
    check(config, sweep, words, space)
    root = Path(config.output.dir).expanduser().absolute()
    trials = run(words, sweep, space, root, config.train.max_steps)
    root.mkdir(parents=True, exist_ok=True)
    (root / "sweep.json").write_text(json.dumps([vars(t) for t in trials], indent=2) + "\n")
    draw(trials, sweep.metric, root / "sweep.png")
    table(trials, sweep.metric)
    print(f"{root / 'sweep.json'}\n{root / 'sweep.png'}", flush=True)
    return 1 if any(trial.error for trial in trials) else 0


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


def check(config: Config, sweep: Sweep, words: Mapping[str, str | None], space: Space) -> None:
    """Check, before any run is started, that a run accepts every value of the space.

    Raises:
        UsageError: it does not; a key is set twice; or no run would compute the metric.
    """
    check_options(config, sweep)
    if sweep.name or config.output.remote:
        raise UsageError(
            f"{'--name' if sweep.name else 'output.remote'}: remove it, since trials would share "
            "it; each gets its own in output.dir, or in --storage"
        )
    if sweep.scheduler == "asha" and (
        config.train.epochs or {"train.epochs", "train.max_steps"} & space.keys()
    ):
        raise UsageError("--scheduler: asha compares trials by step; fix train.max_steps")
    if sweep.scheduler == "asha" and told_every(config) >= config.train.max_steps:
        raise UsageError(
            "--scheduler: asha compares trials while they run; set data.eval with "
            "output.eval_every, or else output.save_every, below train.max_steps"
        )
    if twice := sorted(words.keys() & space.keys()):
        raise UsageError(f"--space: {twice[0]} is on the command line too; set it in one place")
    if sweep.metric == "eval_loss" and not evaluates(config):
        raise UsageError("--metric: eval_loss needs data.eval and output.eval_every above 0")
    if evaluates(config) and "output.save_every" in words.keys() | space.keys():
        raise UsageError(
            "output.save_every: a trial saves when it evaluates; output.eval_every says when"
        )
    for key, values in space.items():
        [listed] = values.values() if isinstance(values, dict) else [values]
        for value in listed:
            configuration(words, {key: value}, Path("runs"))


def configuration(
    words: Mapping[str, str | None], values: Mapping[str, Any], directory: Path
) -> Config:
    """The configuration of a trial, which reports to Ray at each save; see `told_every`."""
    given = [word(name, value) for name, value in words.items() if name != "output.dir"]
    tried = [word(key, v if isinstance(v, str) else json.dumps(v)) for key, v in values.items()]
    options = parse([*given, *tried, f"--output.dir={directory}"], f"{NAME}.ray_sweep", Workers)
    config = options.config
    return replace(config, output=replace(config.output, save_every=told_every(config)))


def told_every(config: Config) -> int:
    """Steps between two saves: those of evaluation or, without one, of saves; else all steps."""
    output = config.output
    every = output.eval_every if evaluates(config) else output.save_every
    return every or config.train.max_steps


def evaluates(config: Config) -> bool:
    """Whether a run evaluates."""
    return bool(config.data.eval) and config.output.eval_every > 0


def run(
    words: dict[str, str | None], sweep: Sweep, space: Space, root: Path, max_steps: int
) -> list[Trial]:
    """Let Ray Tune run all trials; returns them, the best first."""
    # A save before a node's announced removal has no evaluation.
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"
    from ray import tune
    from ray.tune.search import BasicVariantGenerator

    directory = Path.cwd()

    def trial(values: dict[str, Any]) -> None:
        os.chdir(directory)
        from ray.tune.integration.ray_train import TuneReportCallback

        name = tune.get_context().get_trial_name()
        config = configuration(words, values, root / name)
        config, place = placed(config, sweep)
        verdict = (
            trainer(config, sweep, place, directory, callbacks=[TuneReportCallback()])
            .fit()
            .return_value
        )
        if verdict.status:
            raise UsageError(verdict.error)

    scheduler = None
    if sweep.scheduler == "asha":
        scheduler = tune.schedulers.ASHAScheduler(time_attr="step", max_t=max_steps)
    tuner = tune.Tuner(
        tune.with_resources(trial, {"memory": 1 << 20}),  # the CPUs are for its workers
        param_space={key: _drawn(tune, values) for key, values in space.items()},
        tune_config=tune.TuneConfig(
            metric=sweep.metric,
            mode="min",
            num_samples=sweep.samples,
            scheduler=scheduler,
            search_alg=BasicVariantGenerator(
                max_concurrent=sweep.max_concurrent or room(sweep), random_state=sweep.sweep_seed
            ),
        ),
        run_config=tune.RunConfig(name="tune", storage_path=str(root)),
    )
    found = [
        Trial.of(result.config or {}, result.metrics or {}, result.error, sweep.metric)
        for result in tuner.fit()
    ]
    return sorted(found, key=lambda trial: trial.order)


def room(sweep: Sweep) -> int:
    """The number of trials that the cluster has room for at the same time."""
    import ray

    if not ray.is_initialized():
        ray.init()
    workers = number(sweep.num_workers)
    least = workers[0] if isinstance(workers, tuple) else workers
    per_worker = {"GPU": 1.0} if sweep.use_gpu else {"CPU": 1.0}
    per_worker |= sweep.resources
    there = ray.cluster_resources()
    return max(1, min(int(there.get(n, 0) / (least * a)) for n, a in per_worker.items()))


def _drawn(tune: Any, values: Any) -> Any:
    """A list or distribution as Ray Tune's object."""
    if isinstance(values, list):
        return tune.grid_search(values)
    [(kind, given)] = values.items()
    return tune.choice(given) if kind == "choice" else getattr(tune, kind)(*given)


if __name__ == "__main__":
    exit_with(main)
