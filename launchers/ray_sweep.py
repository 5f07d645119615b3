"""`python -m launchers.ray_sweep --config FILE --space SPACE`: many runs of one configuration.

    python -m launchers.ray_sweep --config configs/lora.yaml --samples 8 --scheduler asha \\
        --space '{"adapter.r": [8, 16], "optimizer.lr": {"loguniform": [1.0e-5, 1.0e-3]}}'

SPACE is YAML or JSON, or a file of it: keys of the configuration, each with a list (all of its
values, a grid) or a distribution to draw from: `uniform`, `loguniform` or `randint` with [low,
high], `choice` with a list. The grid is run once for each sample. A trial reports its figures with
its saves: at every evaluation, or every `output.save_every` steps where there is none. `asha` ends
trials that are behind then. Each trial is a run of launchers.ray_train's in `output.dir/TRIAL`; the
table at the end is in `output.dir/sweep.json` as well, its plot in `sweep.png`.

`--together K` trains K trials in each run, on one gather of W0 for all: their values are those of
adapter, optimizer, train and data, and a trial's directory is `output.dir/RUN/adapters/TRIAL`. Then
`asha` drops trials inside a run, which goes on with the others.

Exit status: 0 all trials ended well, 2 a wrong configuration or space, 1 a trial failed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dlora.config.load import Config, UsageError, option, parse
from dlora.train import exit_with

from . import NAME
from .argv import names_of, words_of
from .ray_train import Workers, check_options, number, placed, trainer
from .sweep_report import Trial, draw, found_together, name_best, table
from .sweep_runs import (
    Words,
    check_together,
    configuration,
    evaluates,
    names,
    packs,
    together,
    told_by,
    told_every,
)
from .sweep_space import Space, drawn_values, read_space, searched


@dataclass(frozen=True)
class Sweep(Workers):
    """What is tried; the others are launchers.ray_train's, for each trial."""

    space: str = option("{}", "values or a distribution of each key: YAML, JSON, or a file of it")
    samples: int = option(1, "how often the grid is run, each time with new draws", ge=1)
    scheduler: Literal["none", "asha"] = option("none", "asha: stop trials early that are behind")
    metric: Literal["eval_loss", "loss"] = option("eval_loss", "the metric to minimise")
    together: int = option(1, "trials that each run trains together, on one gather of W0", ge=1)
    max_concurrent: int = option(0, "runs at the same time; 0: as many as fit the cluster", ge=0)
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
    how = run_together if sweep.together > 1 else run
    trials = sorted(
        how(words, sweep, space, root, config.train.max_steps), key=lambda trial: trial.order
    )
    root.mkdir(parents=True, exist_ok=True)
    (root / "sweep.json").write_text(json.dumps([vars(t) for t in trials], indent=2) + "\n")
    draw(trials, sweep.metric, root / "sweep.png")
    table(trials, sweep.metric)
    name_best(trials)
    print(f"{root / 'sweep.json'}\n{root / 'sweep.png'}", flush=True)
    return 1 if any(trial.error for trial in trials) else 0


def check(config: Config, sweep: Sweep, words: Mapping[str, str | None], space: Space) -> None:
    """Check, before any run is started, that a run accepts every value of the space.

    Raises:
        UsageError: it does not; a key is set twice; or no run would compute the metric.
    """
    check_options(config, sweep)
    if config.adapters:
        raise UsageError(
            "adapters: remove it; a sweep names its trials itself, and trains several in one run "
            "with --together"
        )
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
    if sweep.together > 1:
        check_options(check_together(words, space), sweep)
    for key, values in space.items():
        [listed] = values.values() if isinstance(values, dict) else [values]
        for value in listed:
            configuration(words, {key: value}, Path("runs"))
            if sweep.together > 1:
                together(words, {"trial": {key: value}}, Path("runs"))


def run(words: Words, sweep: Sweep, space: Space, root: Path, max_steps: int) -> list[Trial]:
    """Let Ray Tune run all trials, each as a run."""
    from ray import tune
    from ray.tune.integration.ray_train import TuneReportCallback

    directory = Path.cwd()

    def trial(values: dict[str, Any]) -> None:
        os.chdir(directory)
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
    drawn = searched(space)
    found = tuned(trial, drawn, sweep, root, metric=sweep.metric, mode="min", scheduler=scheduler)
    return [
        Trial.of(result.config or {}, result.metrics or {}, result.error, sweep.metric)
        for result in found
    ]


def run_together(
    words: Words, sweep: Sweep, space: Space, root: Path, max_steps: int
) -> list[Trial]:
    """Let Ray Tune run all trials, several in each run; a board has what they report.

    Raises:
        UsageError: trials that were drawn cannot be trained; none has begun.
    """
    import ray
    from ray import tune
    from ray.tune.integration.ray_train import TuneReportCallback

    from . import ray_board

    values = drawn_values(space, sweep.samples, sweep.sweep_seed)
    drawn = {f"trial_{place:05d}": of_trial for place, of_trial in enumerate(values)}
    runs = list(packs(drawn, sweep.together))
    for trials in runs:
        together(words, trials, root)
    board = ray_board.start_board(sweep.metric, max_steps if sweep.scheduler == "asha" else None)
    directory = Path.cwd()

    def pack(values: dict[str, Any]) -> None:
        os.chdir(directory)
        trials, name = dict(runs[values["pack"]]), tune.get_context().get_trial_name()
        ray.get(board.begin.remote(list(trials), str(root / name)))
        while trials:
            config, place = placed(together(words, trials, root / name), sweep)
            told, said = {"board": board, "every": told_by(config)}, [TuneReportCallback()]
            made = trainer(config, sweep, place, directory, trials=told, callbacks=said)
            verdict = made.fit().return_value
            wrong = [trial for trial in trials if names(verdict.error, trial)]
            if not wrong:
                break
            for trial in wrong:  # before weights were read; the others begin without it
                del trials[trial]
                ray.get(board.left.remote(trial, "failed", verdict.error, None))
        if verdict.status:
            raise UsageError(verdict.error or f"the run ended with status {verdict.status}")

    numbers = {"pack": tune.grid_search(list(range(len(runs))))}
    errors = {
        name: result.error
        for result in tuned(pack, numbers, sweep, root)
        for name in runs[(result.config or {})["pack"]]
    }
    return found_together(drawn, ray.get(board.heard.remote()), errors)


def tuned(
    work: Callable[[dict[str, Any]], None], space: Space, sweep: Sweep, root: Path, **how: Any
) -> Any:
    """What Ray Tune found in a space, with `how` for its `TuneConfig`."""
    # A save before a node's announced removal has no evaluation.
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"
    from ray import tune
    from ray.tune.search import BasicVariantGenerator

    return tune.Tuner(
        tune.with_resources(work, {"memory": 1 << 20}),  # the CPUs are for its workers
        param_space=space,
        tune_config=tune.TuneConfig(
            num_samples=1 if sweep.together > 1 else sweep.samples,
            search_alg=BasicVariantGenerator(
                max_concurrent=sweep.max_concurrent or room(sweep), random_state=sweep.sweep_seed
            ),
            **how,
        ),
        run_config=tune.RunConfig(name="tune", storage_path=str(root)),
    ).fit()


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


if __name__ == "__main__":
    exit_with(main)
