"""Training runs through dlora's own pieces, inside the worker processes of `ranks.py`."""

import contextlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ranks
import remembered  # noqa: F401 - traces
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
from dlora.train import Run as TrainingRun
from dlora.training.checks import check_output
from dlora.training.prepare import prepare
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
MEASURED = {"step_seconds", "tokens_per_second", "all_tokens_per_second", "peak_memory_bytes"}
MEASURED |= {"all_tokens_per_second_per_device"}
Run = tuple[list[dict[str, Any]], list[dict[str, Any]]]  # results by rank, lines of the metrics


def command_line(**settings: Any) -> list[str]:
    """Words for `dlora.train`: BASE_SETTINGS and `settings`; `__` is a dot, None is left out."""
    given = BASE_SETTINGS | {key.replace("__", "."): value for key, value in settings.items()}
    words = []
    for key, value in given.items():
        if value is not None:
            words += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    return words


def prepared_run(
    argv: list[str], hooks: Hooks = NO_HOOKS, kind: Any = TrainingRun, how: Any = prepare
) -> Any:
    """This rank's `Run`, as `dlora.train.main` sets it up.

    Args:
        kind, how: the class of the run, and what prepares it.
    """
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
    since_before = MemoryMeter()
    return kind(config, these, prepared(config, these, how), since_before, lock, hooks)


def train(argv: list[str], meddle: Callable[[TrainingRun], None] | None = None) -> dict[str, Any]:
    """Run to the end; status, trained tensors and optimizer state that this rank can save.

    Args:
        meddle: called with the run before it starts.
    """
    run = prepared_run(argv)
    if meddle is not None:
        meddle(run)
    status = run.train()
    run.checkpoints.close()
    held = capture(run.replica, run.replica.states(run.optimizer), {})
    tensors = {name: parameter.detach().clone() for name, parameter in run.replica.named.items()}
    own = held and {name: state.clone() for name, state in held.states["optimizer"].items()}
    return {"status": status, "tensors": tensors, "optimizer": own}


def told(argv: list[str]) -> tuple[dict[str, Any], str]:
    """A run, and what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        return train(argv), printed.getvalue()


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


class Runs:
    """`run("name", 2, **settings)`: a run on 2 ranks in `root`/name; its `Run`.

    Args:
        command: (directory, *words, **settings) → the words of the command line.
    """

    def __init__(self, pools: ranks.Pools, command: Callable[..., list[str]], root: Path) -> None:
        self.pools, self.command, self.root = pools, command, root

    def __call__(
        self,
        name: str,
        world: int,
        *words: Any,
        work: Callable[..., Any] = train,
        arguments: tuple[Any, ...] = (),
        per_node: int | None = None,
        **settings: Any,
    ) -> Run:
        directory = self.root / name
        argv = self.command(directory, *words, **settings)
        results = self.pools(world).run(work, argv, *arguments, ranks_per_node=per_node)
        return results, figures(directory)


def check_near(
    run: Run,
    one: Run,
    *,
    rel: float = 1e-5,
    bound: float = 1e-4,
    exact: tuple[str, ...] = ("step", "lr", "tokens", "batch_hash"),
) -> None:
    """Within invariant 3's bounds of another run, and the same bits on every rank."""
    (results, lines), ((wanted, *_), wanted_lines) = run, one
    for got, expected in zip(lines, wanted_lines, strict=True):
        for name in ("loss", "grad_norm"):
            assert got[name] == pytest.approx(expected[name], rel=rel), name
        assert [got[name] for name in exact] == [expected[name] for name in exact]
    for result in results:
        assert result["status"] == 0
        assert same_bits(result["tensors"], results[0]["tensors"])
    for name, tensor in wanted["tensors"].items():
        assert relative_error(results[0]["tensors"][name], tensor) < bound, name
