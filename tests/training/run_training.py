"""One training run through dlora's own pieces, inside the worker processes of `ranks.py`."""

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ranks
import torch
from torch import Tensor

from dlora.checkpoint.host_copy import capture
from dlora.config.load import parse
from dlora.hooks import NO_HOOKS, Hooks
from dlora.metrics.log import read_metrics
from dlora.runtime.agreement import agree
from dlora.runtime.memory import MemoryMeter
from dlora.runtime.ranks import Ranks
from dlora.runtime.run_lock import RunLock
from dlora.train import Run
from dlora.training.checks import check_output
from dlora.training.startup import import_late_ones, prepared

BASE_SETTINGS = {
    "model.dtype": "float32",
    "adapter.r": 4,
    "adapter.lora_alpha": 8,
    "optimizer.lr": 2e-3,
    "train.max_steps": 20,
    "train.global_batch_size": 7,  # divides by no number of ranks
    "train.micro_batch_size": 2,
    "output.tensorboard": False,
    "output.save_every": 0,
}

# Figures that hold clocks or memory; all others of two equal runs are equal bit for bit.
MEASURED = {
    "step_seconds",
    "tokens_per_second",
    "all_tokens_per_second",
    "peak_memory_bytes",
}


def command_line(**settings: Any) -> list[str]:
    """Words for `dlora.train`: BASE_SETTINGS and `settings`; `__` is a dot, None is left out."""
    given = BASE_SETTINGS | {key.replace("__", "."): value for key, value in settings.items()}
    words = []
    for key, value in given.items():
        if value is not None:
            words += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    return words


@functools.cache
def meter() -> MemoryMeter:
    """One for each worker."""
    return MemoryMeter()


def prepared_run(argv: list[str], hooks: Hooks = NO_HOOKS) -> Run:
    """This rank's `Run`, as `dlora.train.main` sets it up."""
    config = parse(argv, prog="dlora.train").config
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    these = Ranks(rank, world, torch.device("cpu"), ranks.current_store)

    def check() -> tuple[None, str]:
        if rank == 0:
            check_output(config)
        return None, ""

    agree(these, "lock", check)
    lock = RunLock(config.output.directory, "not taken: the next run may be another pool's")
    import_late_ones(config)
    since_before = meter()
    return Run(config, these, prepared(config, these), since_before, lock, hooks)


def train(argv: list[str], meddle: Callable[[Run], None] | None = None) -> dict[str, Any]:
    """Run to the end; status, trained tensors and optimizer state that this rank can save.

    Args:
        meddle: called with the run before it starts.
    """
    run = prepared_run(argv)
    if meddle is not None:
        meddle(run)
    status = run.train()
    held = capture(run.replica, run.replica.states(run.optimizer), {})
    tensors = {name: parameter.detach().clone() for name, parameter in run.replica.named.items()}
    return {"status": status, "tensors": tensors, "optimizer": held and held.states["optimizer"]}


def figures(directory: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics without what was measured."""
    records = read_metrics(Path(directory) / "metrics.jsonl")
    return [{k: v for k, v in record.items() if k not in MEASURED} for record in records]


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """‖got − wanted‖ / ‖wanted‖."""
    return float((got - wanted).norm() / wanted.norm())


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two states hold equal tensors under equal names."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
